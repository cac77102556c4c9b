"""Two commands that write one place at once, again and again: never a mixed artefact, and who comes second says so.

    python scripts/prove_exclusion.py --rounds 20          # 20 minutes on two cores

The second command of a pair starts at a random moment of the first one's time. Afterwards one has done its work or both
have, one after the other; the one that had to give way ended with exit 3; and what is there is whole. The last line is
JSON; what is wrong ends it with exit 6.
"""

from __future__ import annotations

import argparse
import json
import os
import random as random_module
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from fuzz_commands import in_child, run_command

PICTURES = 24
EXPORT = "export checkpoint -o {} --max-context 512 -q"
RUN = "run bundle photos --max-new-tokens 8 -q -o r.jsonl"
EVALUATE = "eval bundle --task vqav2 --data tables --max-new-tokens 4 -q"


@dataclass(frozen=True)
class Pair:
    """Two commands, what is there before them, and what is wrong with what they leave; nothing where all is well.

    `may_both`: they write different places and share a cache, so neither gives way.
    """

    first: str
    second: str
    faults: Callable[[Path], str]
    before: tuple[str, ...] = ()
    may_both: bool = False


def bundle_faults(path: Path) -> str:
    from pixtral_runtime.bundle.engine_list import listed_engines, verify_engines
    from pixtral_runtime.bundle.integrity import verify_bundle
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.errors import PixtralError

    try:
        bundle = open_bundle(path)
        list(verify_bundle(bundle))
        for target in bundle.engines:
            verify_engines(bundle, listed_engines(bundle, target))
    except PixtralError as error:
        return str(error)
    left = {file for file in path.rglob("*") if file.is_file()} - set(bundle.own_files)
    return f"{len(left)} files more: {min(left)}" if left else ""


def results_faults(path: Path) -> str:
    from pixtral_runtime.batch.record_lines import read_results
    from pixtral_runtime.errors import PixtralError

    try:
        contents = read_results(path)
    except PixtralError as error:
        return str(error)
    answered = sum(record.answer is not None for record in contents.records.values())
    return "" if contents.is_clean and answered == PICTURES else f"{path.name}: {answered} of {PICTURES}"


def saved_faults(folder: Path) -> str:
    """Results of two evaluations that shared a cache: the same score, and each image is the content of its name."""
    from hashlib import sha256

    scores = {json.dumps(json.loads((folder / name).read_bytes())["scores"]) for name in ("e.json", "f.json")}
    torn = [path for path in (folder / "cache").iterdir() if sha256(path.read_bytes()).hexdigest() != path.stem]
    return f"{len(scores)} scores, {len(torn)} torn images" if len(scores) != 1 or torn else ""


PAIRS = (
    Pair(EXPORT.format("b"), EXPORT.format("b") + " --dtype float32", lambda at: bundle_faults(at / "b")),
    Pair(EXPORT.format("b") + " --force", EXPORT.format("b") + " --dtype float32 --force",
         lambda at: bundle_faults(at / "b"), (EXPORT.format("b"),)),
    Pair(EXPORT.format("bundle") + " --force", "build bundle --target rtx:sm89 --context 64 --chunk 32 -q",
         lambda at: bundle_faults(at / "bundle")),
    Pair("build bundle --target rtx:sm89 --context 64 --chunk 32 -q",
         "build bundle --target rtx:sm86 --context 64 --chunk 32 -q", lambda at: bundle_faults(at / "bundle")),
    Pair(RUN, RUN, lambda at: results_faults(at / "r.jsonl")),
    Pair(f"{RUN} --resume", f"{RUN} --force", lambda at: results_faults(at / "r.jsonl")),
    Pair(f"{EVALUATE} --save e.json --cache cache", f"{EVALUATE} --save f.json --cache cache", saved_faults,
         may_both=True),
    Pair(f"{RUN} --embedding-cache cache", "run bundle photos --max-new-tokens 8 -q -o s.jsonl --embedding-cache cache",
         lambda at: results_faults(at / "r.jsonl") or results_faults(at / "s.jsonl"), may_both=True),
)  # fmt: skip


def make_world(world: Path) -> None:
    """A checkpoint, its bundle, pictures, and a table of questions with pictures in it. Imports torch."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    from helpers.bundles import export_tiny
    from helpers.tiny import tiny_config, write_checkpoint

    export_tiny(write_checkpoint(world / "checkpoint", tiny_config()), world / "bundle")
    for name in ("photos", "tables"):
        (world / name).mkdir()
    answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": n} for n in range(10)]
    rows = []
    for number in range(PICTURES):
        path = world / f"photos/{number:02}.png"
        Image.new("RGB", (40, 24), (10 * number, 99, 5)).save(path)
        picture = {"bytes": path.read_bytes(), "path": path.name}
        common = {"question": "Which colour?", "answers": answers, "answer_type": "other"}
        rows.append(common | {"question_id": number, "image": picture})
    pq.write_table(pa.Table.from_pylist(rows), world / "tables/validation-00000-of-00001.parquet")


def begin(line: str) -> int:
    """Start a command in a child that has all packages in memory already. Returns its process."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            code, said, _ = run_command(line.split(), b"")
            if code not in (0, 3):
                print(f"{line}: exit {code}: {said[-300:]}", flush=True)
        finally:
            os._exit(code)
    return child


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prove(pair: Pair, world: Path, rounds: int, random: random_module.Random) -> dict[str, Any]:
    codes: Counter[str] = Counter()
    faults: list[str] = []
    seconds = 0.0
    for number in range(-1, rounds):  # the first one says how long the first command takes
        with tempfile.TemporaryDirectory(prefix="exclusion-") as name:
            at = Path(shutil.copytree(world, Path(name, "here")))
            os.chdir(at)
            for line in pair.before:
                end(begin(line))
            started, first = time.monotonic(), begin(pair.first)
            if number < 0:
                end(first)
                seconds = time.monotonic() - started
                continue
            time.sleep(random.uniform(0.0, seconds))
            second = begin(pair.second)
            ended = end(first), end(second)
            os.chdir(world)
            codes[f"{ended[0]}, {ended[1]}"] += 1
            is_right = ended == (0, 0) if pair.may_both else 0 in ended and set(ended) <= {0, 3}
            if fault := pair.faults(at) or ("" if is_right else f"exits {ended}"):
                faults.append(f"round {number}: {fault}")
    return {"first": pair.first, "second": pair.second, "exits": dict(codes), "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    random, found = random_module.Random(chosen.seed), []
    with tempfile.TemporaryDirectory(prefix="exclusion-world-") as name:
        world = Path(name, "world")
        world.mkdir()
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        if in_child(lambda: make_world(world)):
            sys.exit("the files to begin with cannot be made")
        import onnxruntime  # noqa: F401 - before the children begin, so that each has it at once
        import torch  # noqa: F401

        import pixtral_export.export  # noqa: F401

        for pair in PAIRS:
            found.append(prove(pair, world, chosen.rounds, random))
            print(json.dumps(found[-1]), flush=True)
    faults = sum(len(one["faults"]) for one in found)
    print(json.dumps({"pairs": len(found), "rounds": chosen.rounds, "faults": faults}))
    sys.exit(6 if faults else 0)


if __name__ == "__main__":
    main()
