#!/usr/bin/env bash
# Builds sdist -> wheel and uses the wheel as a stranger would: in a clean environment outside the tree, without torch.
# Usage: scripts/check_wheel.sh BUNDLE
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

.venv/bin/python -m build --no-isolation --outdir "$work" .
.venv/bin/python -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet "$(ls "$work"/*.whl)[cpu,serve]"
cp -r "$1" "$work/bundle"
cp -r tests/data/images "$work/images"

cd /
PATH="$work/venv/bin:$PATH"
unset PYTHONPATH
pixtral --help
python - <<'PYTHON'
import importlib.util

assert importlib.util.find_spec("torch") is None, "the base install brings torch"
import pixtral_cli.main
import pixtral_runtime.generation.model
from pixtral_runtime.server.page import page_routes

assert page_routes(), "the server's page is missing"
print("imported without torch from", pixtral_runtime.generation.model.__file__)
PYTHON
pixtral doctor
pixtral run "$work/bundle" "$work/images" -o "$work/results.jsonl"
echo "wheel: PASSED"
