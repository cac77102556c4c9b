"""A results file as tests compare it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

UNSTABLE = ("times_ms", "reused_tokens", "seal")  # what two runs of one job need not agree in


def by_id(path: Path) -> dict[str, dict[str, Any]]:
    """The file's records without what may differ from run to run. Fails on torn lines and on an id that is twice."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {record["id"]: {k: v for k, v in record.items() if k not in UNSTABLE} for record in records}
    assert len(found) == len(records)
    return found
