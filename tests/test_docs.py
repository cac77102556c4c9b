"""What the documents say about interfaces is what the code does."""

from __future__ import annotations

import re

import pytest

from helpers.places import ROOT
from make_synthetic_checkpoint import pixtral_12b
from pixtral_runtime.bundle.spec import GRAPHS, graph_spec

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


def test_the_table_of_graph_tensors_is_the_spec() -> None:
    page = (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")
    expected = []
    for name in GRAPHS:
        spec = graph_spec(name, pixtral_12b(), "Act")
        for kind, tensors in (("in", spec.inputs), ("out", spec.outputs)):
            caches = [t.name for t in tensors if t.name.startswith(("past_", "present_"))]
            for tensor in tensors:
                if tensor.name in caches[1:]:
                    continue
                shown = f"`{caches[0]}` … `{caches[-1]}`" if caches[:1] == [tensor.name] else f"`{tensor.name}`"
                expected.append(f"| {name} {kind} | {shown} | {' × '.join(map(str, tensor.shape))} | {tensor.dtype} |")
    assert re.findall(r"^\| (?:vision|embed|decoder) (?:in|out) .*$", page, re.MULTILINE) == expected


@pytest.mark.parametrize("page", PAGES)
def test_links_between_documents_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target.split("#")[0] for target in re.findall(r"\]\((?!https?://)([^)]+)\)", text)]
    assert not [target for target in targets if target and not (ROOT / page).parent.joinpath(target).exists()]
