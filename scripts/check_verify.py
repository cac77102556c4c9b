"""Does `pixtral verify` find what it must, and nothing else? Prints JSON; exit 6 where a fault is missed or invented.

    python scripts/check_verify.py [BUNDLE …] [--onnxruntime FOLDER …]

Bundles of the demo checkpoint with certificates; without any, some in float16, int4 and int8 are made. Each gets every
fault of `verify_faults` in a copy. Then each is replayed undisturbed, over threads and batch sizes, with the release of
ONNX Runtime that is installed and with those in further folders (`pip install --target FOLDER --no-deps
onnxruntime==1.31.1`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pixtral_runtime.bundle.certificate import read_certificate
from pixtral_runtime.bundle.manifest import open_bundle
from pixtral_runtime.compare.verify import StageCheck, verify
from pixtral_runtime.errors import CheckFailed, InputError
from verify_faults import Fault, faults, rebind

THREADS, BATCHES = (1, 2, 3, 4, 6, 8), (1, 2, 4)
RECIPES = (None, "int4", "int8")
REFUSED = "refused"


@dataclass(frozen=True)
class Finding:
    """What became of a fault: the stage that was named, what was said, and whether that was right."""

    bundle: str
    fault: str
    expected: str
    stage: str
    said: str
    caught: bool
    seconds: float


def replayed(folder: Path, threads: int = 0, batch: int = 1) -> StageCheck:
    """The last stage of a replay on the CPU."""
    try:
        bundle = open_bundle(folder)
        return list(verify(bundle, read_certificate(bundle), "ort-cpu", threads=threads, batch=batch))[-1]
    except InputError as error:
        return StageCheck(REFUSED, 1, fault=str(error))


def find(bundle: Path, fault: Fault) -> Finding:
    """Plant a fault in a copy of a bundle, and see whether it is found."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "bundle")
        shutil.copytree(bundle, copy)
        fault.plant(copy)
        if fault.is_hidden:
            rebind(copy)
        started = time.perf_counter()
        seen = replayed(copy)
        seconds = round(time.perf_counter() - started, 2)
    stage = seen.stage if seen.fault else ""
    is_right = stage == fault.stage if fault.stage else bool(stage)
    return Finding(bundle.name, fault.name, fault.stage, stage, seen.fault, is_right, seconds)


def undisturbed(bundles: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Every bundle over threads and batch sizes, with the release of ONNX Runtime that is imported here."""
    import onnxruntime

    for bundle in bundles:
        for threads in THREADS:
            for batch in BATCHES:
                started = time.perf_counter()
                seen = replayed(bundle, threads, batch)
                setting = {"onnxruntime": onnxruntime.__version__, "threads": threads, "batch": batch}
                seconds = round(time.perf_counter() - started, 2)
                yield {"bundle": bundle.name, **setting, "alarm": seen.fault, "seconds": seconds}


def in_release(folder: Path, bundles: Sequence[Path]) -> list[dict[str, Any]]:
    """`undisturbed` in a process that finds another ONNX Runtime first."""
    paths = [str(folder), *filter(None, sys.path)]
    command = [sys.executable, __file__, "--only-replays", *map(str, bundles)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def make_bundles(folder: Path) -> list[Path]:
    """The demo checkpoint in each recipe, with a certificate."""
    from demo_bundles import DEMO
    from pixtral_export.certify import certify_export
    from pixtral_export.checkpoint.reader import open_checkpoint
    from pixtral_export.export import export
    from pixtral_export.plan import ExportSettings, plan_export

    made, checkpoint = [], open_checkpoint(DEMO)
    for precision in RECIPES:
        target = folder / (precision or "float16")
        plan = plan_export(checkpoint, ExportSettings(precision=precision))
        export(
            checkpoint, plan, target, force=False, progress=lambda *_: None,
            certify=lambda bundle: certify_export(bundle, checkpoint, print),
        )  # fmt: skip
        made.append(target)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--onnxruntime", nargs="*", type=Path, default=[], help="folders with other releases of it")
    parser.add_argument("--only-replays", action="store_true", help="the undisturbed bundles alone")
    asked = parser.parse_args()
    if asked.only_replays:
        print(json.dumps(list(undisturbed(asked.bundles))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        bundles = asked.bundles or make_bundles(Path(scratch))
        findings = [
            find(bundle, fault)
            for bundle, other in zip(bundles, [*bundles[1:], bundles[0]], strict=True)
            for fault in faults(open_bundle(bundle), other)
        ]
        replays = list(undisturbed(bundles))
        for folder in asked.onnxruntime:
            replays += in_release(folder, bundles)
    missed = [asdict(finding) for finding in findings if not finding.caught]
    alarms = [replay for replay in replays if replay["alarm"]]
    summary = {
        "faults": len(findings),
        "missed": missed,
        "replays": len(replays),
        "releases": sorted({replay["onnxruntime"] for replay in replays}),
        "false_alarms": alarms,
        "longest_replay_s": max(replay["seconds"] for replay in replays),
        "findings": [asdict(finding) for finding in findings],
    }
    print(json.dumps(summary, indent=2))
    if missed or alarms:
        raise SystemExit(CheckFailed.exit_code)


if __name__ == "__main__":
    main()
