"""What a power loss leaves of each command that writes: a file system is copied in mid-run, and the copy is mounted.

    sudo python scripts/prove_power_loss.py --filesystems ext4,xfs --copies 5       # minutes; needs mkfs.xfs for xfs

Each command works on a file system in an image file. Now and then, and right after it has ended, all is halted and the
image is copied: that is what a disk would hold if the power failed then. Mounted again, the copy must hold the old or
the new, whole; and the same command must go on from there. The last line is JSON; what is wrong ends it with exit 6.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random as random_module
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixtral_runtime.batch.record_lines import read_results
from pixtral_runtime.bundle.engine_list import listed_engines, verify_engines
from pixtral_runtime.bundle.integrity import verify_bundle
from pixtral_runtime.bundle.manifest import open_bundle
from pixtral_runtime.errors import PixtralError

ROOT = Path(__file__).parents[1]
CHECKPOINT = ROOT / "tests/data/tiny-pixtral"
IMAGE_BYTES = 400 << 20
PICTURES = 40
LIMIT_S = 600.0
STARTED: list[subprocess.Popen[str]] = []


@dataclass(frozen=True)
class Case:
    """A command, what goes before it, and what is wrong with what it left; nothing where all is well."""

    name: str
    line: str
    before: tuple[str, ...]
    faults: Callable[[Path, bool], str]  # in a folder; whether the command had ended
    again: str = ""  # how it goes on, where that is another line


def bundle_faults(folder: Path, must_be: bool) -> str:
    """A bundle is whole, or there is none yet."""
    try:
        bundle = open_bundle(folder / "b")
        list(verify_bundle(bundle))
        for target in bundle.engines:
            verify_engines(bundle, listed_engines(bundle, target))
    except PixtralError as error:
        return "" if "is no bundle" in str(error) and not must_be else str(error)
    return ""


def records_faults(path: Path, must_be: bool) -> str:
    """Every line but the last is an answer."""
    try:
        contents = read_results(path) if path.exists() else None
    except PixtralError as error:
        return str(error)
    if contents and contents.torn > 1:
        return f"{contents.torn} torn lines"
    answers = len(contents.records) if contents else 0
    return f"{answers} of {PICTURES} answers" if must_be and answers != PICTURES else ""


def run_faults(folder: Path, must_be: bool) -> str:
    """Records as above; table and page are whole or not there."""
    table, page = folder / "r.csv", folder / "r.html"
    lines = len(table.read_bytes().splitlines()) if table.exists() else 0
    if lines != PICTURES + 1 and (lines or must_be):
        return f"{table.name} has {lines} lines"
    text = page.read_bytes() if page.exists() else b""
    if not text.rstrip().endswith(b"</html>") and (page.exists() or must_be):
        return f"{page.name} ends with {text[-20:]!r}"
    return records_faults(folder / "r.jsonl", must_be)


def eval_faults(folder: Path, must_be: bool) -> str:
    saved = folder / "e.json"
    try:
        json.loads(saved.read_bytes() if saved.exists() or must_be else b"{}")
    except (OSError, ValueError) as error:
        return f"{saved.name}: {error}"
    return records_faults(folder / "e.answers.jsonl", must_be)


EXPORT = f"export {CHECKPOINT} -o b --max-context 512 -q"
ASK = "run b photos --max-new-tokens 12 --batch 2 -q -o r.jsonl --format csv --report r.html"
EVALUATE = "eval b --task custom --data data --max-new-tokens 12 --batch 2 -q --save e.json"
INT4 = f"{EXPORT} --precision int4 --calibration-samples 8"
BUILD = "build b --target rtx:sm89 --context 128 --chunk 64 -q"
CASES = (
    Case("export", EXPORT, (), bundle_faults, f"{EXPORT} --force"),
    Case("export --force", f"{EXPORT} --dtype float32 --force", (EXPORT,), lambda at, _: bundle_faults(at, True)),
    Case("export int4", INT4, (), bundle_faults, f"{INT4} --force"),
    Case(
        "build",
        "build b --target rtx:sm89 --context 128 --chunk 64 -q",
        (EXPORT,),
        lambda at, _: bundle_faults(at, True),
    ),
    Case("run", ASK, (EXPORT,), run_faults, f"{ASK} --resume"),
    Case("eval", EVALUATE, (EXPORT,), eval_faults, f"{EVALUATE} --resume"),
)


def start(line: str, folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "pixtral_cli", *line.split()],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    STARTED.append(process)
    return process


def run(line: str, folder: Path) -> str:
    """Nothing where the command ends well, else what it says."""
    process = start(line, folder)
    said = process.communicate(timeout=LIMIT_S)[1]
    return "" if process.returncode == 0 else f"exit {process.returncode}: {said[-300:]}"


@contextmanager
def mounted(image: Path, at: Path) -> Iterator[None]:
    at.mkdir(exist_ok=True)
    options = ["-o", "loop,nouuid"] if is_xfs(image) else ["-o", "loop"]
    subprocess.run(["mount", *options, image, at], check=True)
    try:
        yield
    except KeyboardInterrupt:
        for process in STARTED:
            process.kill()
            process.wait()
        raise
    finally:
        subprocess.run(["umount", at], check=True)


def is_xfs(image: Path) -> bool:
    with image.open("rb") as file:
        return file.read(4) == b"XFSB"


def copy_image(image: Path, copy: Path, processes: int | None) -> None:
    """The image at one moment: the processes are halted, and it is copied until the kernel wrote nothing meanwhile."""
    if processes is not None:
        os.killpg(processes, signal.SIGSTOP)
    try:
        while True:
            subprocess.run(["cp", "--sparse=always", image, copy], check=True)
            if filecmp.cmp(image, copy, shallow=False):
                return
    finally:
        if processes is not None:
            os.killpg(processes, signal.SIGCONT)


def lay_out(folder: Path) -> None:
    """Pictures, and questions about them."""
    from PIL import Image

    for name in ("photos", "data"):
        (folder / name).mkdir()
    rows = []
    for number in range(PICTURES):
        Image.new("RGB", (40, 24), (6 * number, 99, 5)).save(folder / f"photos/{number:02}.png")
        rows.append({"question": "Which colour?", "answer": "red", "image": f"../photos/{number:02}.png"})
    (folder / "data/rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def prove(case: Case, kind: str, copies: int, random: random_module.Random) -> dict[str, Any]:
    """What copies of a file system hold, taken while the command runs, after a run that says how long it takes."""
    faults: list[str] = []
    with tempfile.TemporaryDirectory(prefix="power-loss-") as name:
        work = Path(name)
        image, at = work / "image", work / "mounted"
        with image.open("xb") as file:
            file.truncate(IMAGE_BYTES)
        subprocess.run([f"mkfs.{kind}", "-q", image], check=True)
        taken: list[Path] = []
        with mounted(image, at):
            lay_out(at)
            for line in case.before:
                faults += filter(None, [run(line, at)])
            os.sync()
            scratch = work / "scratch"
            shutil.copytree(at, scratch, ignore=shutil.ignore_patterns("lost+found"))
            started = time.monotonic()
            faults += filter(None, [run(case.line, scratch)])
            seconds = time.monotonic() - started
            moments = sorted(random.uniform(0.4, 1.0) * seconds for _ in range(copies))
            started, process = time.monotonic(), start(case.line, at)
            for moment in moments:
                try:
                    process.wait(max(0.0, started + moment - time.monotonic()))
                except subprocess.TimeoutExpired:
                    taken.append(work / f"copy-{len(taken)}")
                    copy_image(image, taken[-1], process.pid)
            said = process.communicate(timeout=LIMIT_S)[1]
            taken.append(work / f"copy-{len(taken)}")
            copy_image(image, taken[-1], None)
            faults += [f"exit {process.returncode}: {said[-300:]}"] if process.returncode else []
        went_on = 0
        for number, copy in enumerate(taken):
            with mounted(copy, at):
                has_ended, where = number == len(taken) - 1, f"copy {number} of {len(taken)}"
                if fault := case.faults(at, has_ended):
                    faults.append(f"{where}: {fault}")
                if number == 0 or has_ended:
                    again = run(case.again or case.line, at) or case.faults(at, True)
                    went_on += not again
                    faults += [f"{where}, going on: {again}"] if again else []
    return {"case": case.name, "filesystem": kind, "copies": len(taken), "went_on": went_on, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filesystems", default="ext4,xfs")
    parser.add_argument("--copies", type=int, default=5, help="of each run, beside the one at its end")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is mounted is unmounted again
    roots = (ROOT, ROOT / "export", ROOT / "engines", ROOT / "runtime")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, roots))
    random, found = random_module.Random(chosen.seed), []
    for kind in chosen.filesystems.split(","):
        for case in CASES:
            if case.name in chosen.cases.split(","):
                found.append(prove(case, kind, chosen.copies, random))
                print(json.dumps(found[-1]), flush=True)
    faults = sum(len(one["faults"]) for one in found)
    print(json.dumps({"cases": len(found), "copies": sum(one["copies"] for one in found), "faults": faults}))
    sys.exit(6 if faults else 0)


if __name__ == "__main__":
    main()
