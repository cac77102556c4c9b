"""Where tests find the project, its data and the real pictures beside it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
IMAGES = DATA / "images"
DEMO = DATA / "tiny-pixtral"
SHARED = ROOT.parent / "shared"
MADE = "PIXTRAL_TEST_BUNDLES"  # the variable that names the folder of a run's demo bundles and traces
