"""One bit of a file flipped, and the command run that reads it: found at load, or harmless, never a silent change.

    python scripts/prove_flips.py --flips 200          # of each kind of file; 40 minutes on two cores

Kinds are each file of a bundle, the results of a run, an evaluation's answers, ratings and result, and the caches of
features and of images. A flip is found where the command ends with exit 3 or 5, and harmless where what comes out is
what came out before. The last line is JSON; a silent change, a bug's exit 1 and a crash end it with exit 6.
"""

from __future__ import annotations

import argparse
import json
import os
import random as random_module
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from fuzz_commands import in_child, run_command
from prove_exclusion import make_world

RUN = "run bundle photos --max-new-tokens 4 -q -o"
EVALUATE = "eval bundle --task vqav2 --data tables --max-new-tokens 4 -q --cache cache --save"
FIRST = (f"{RUN} r.jsonl --embedding-cache features", f"{EVALUATE} e.json")


@dataclass(frozen=True)
class Kind:
    """Files of which one is damaged, the command that reads it, and what it gives."""

    files: str
    line: str
    outcome: Callable[[Path], Any]


def answers(path: Path) -> dict[str, Any]:
    """By id; files that cannot be read have none."""
    from pixtral_runtime.batch.record_lines import read_results

    return {id: (record.answer, record.error) for id, record in read_results(path).records.items()}


def scores(path: Path) -> Any:
    saved = json.loads(path.read_bytes())
    return [saved["scores"], [(example["id"], example["answer"]) for example in saved["examples"]]]


def images(folder: Path) -> list[tuple[str, bytes]]:
    return sorted((path.name, path.read_bytes()) for path in (folder / "cache").iterdir())


KINDS = (
    *(
        Kind(f"bundle/{name}", f"{RUN} new.jsonl", lambda at: answers(at / "new.jsonl"))
        for name in ("bundle.json", "vision.onnx", "embed.onnx", "decoder.onnx", "tekken.json", "weights.bin")
    ),
    Kind("r.jsonl", f"{RUN} r.jsonl --resume", lambda at: answers(at / "r.jsonl")),
    Kind("features/*", f"{RUN} new.jsonl --embedding-cache features", lambda at: answers(at / "new.jsonl")),
    Kind("cache/*", f"{EVALUATE} new.json", lambda at: (scores(at / "new.json"), images(at))),
    Kind("e.answers.jsonl", f"{EVALUATE} e.json --resume", lambda at: scores(at / "e.json")),
    Kind("e.json", f"{EVALUATE} new.json --against e.json", lambda at: scores(at / "new.json")),
)


def ended(line: str, folder: Path, outcome: Callable[[Path], Any]) -> tuple[int, str, str]:
    """Exit code of a command in a child, what it said, and what came out, as text; a crash is its signal, negative."""
    said = folder.with_name("said")

    def work() -> None:
        os.chdir(folder)
        code, text, _ = run_command(line.split(), b"")
        said.write_text(json.dumps([code, text, repr(outcome(folder)) if code == 0 else ""]))

    said.unlink(missing_ok=True)
    status = in_child(work)
    code, text, result = json.loads(said.read_text()) if said.exists() else (status, "", "")
    return (status if status < 0 else code), text, result


def prove(kind: Kind, world: Path, flips: int, random: random_module.Random) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    bad: list[str] = []
    with tempfile.TemporaryDirectory(prefix="flips-") as name:
        at = Path(name, "here")
        shutil.copytree(world, at)
        _, _, expected = ended(kind.line, at, kind.outcome)
        for _ in range(flips):
            shutil.rmtree(at)
            shutil.copytree(world, at)
            path = random.choice(sorted(at.glob(kind.files)))
            data = bytearray(path.read_bytes())
            place, bit = random.randrange(len(data)), random.randrange(8)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            code, said, result = ended(kind.line, at, kind.outcome)
            verdict = "found" if code in (3, 5) else "harmless" if code == 0 and result == expected else "bad"
            counts[verdict] += 1
            if verdict == "bad":
                bad.append(f"{path.name} {place}.{bit}: exit {code}: {said[-200:] or 'another outcome'}")
    return {"files": kind.files, "line": kind.line, **counts, "bad": bad}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    random, found = random_module.Random(chosen.seed), []
    with tempfile.TemporaryDirectory(prefix="flips-world-") as name:
        os.environ["XDG_CACHE_HOME"] = f"{name}/cache"
        world = Path(name, "world")
        world.mkdir()
        if in_child(lambda: make_world(world)):
            sys.exit("the files to begin with cannot be made")
        import onnxruntime  # noqa: F401 - before the children begin, so that each has all at once
        from mistral_common.tokens.tokenizers import image, mistral  # noqa: F401

        import pixtral_runtime.evaluation.run  # noqa: F401

        for line in FIRST:
            code, said, _ = ended(line, world, lambda _: None)
            if code:
                sys.exit(f"{line}: {said}")
        for kind in KINDS:
            found.append(prove(kind, world, chosen.flips, random))
            print(json.dumps(found[-1]), flush=True)
    totals = {name: sum(one.get(name, 0) for one in found) for name in ("found", "harmless")}
    bad = sum(len(one["bad"]) for one in found)
    print(json.dumps({"flips": sum(totals.values()) + bad, **totals, "bad": bad}))
    sys.exit(6 if bad else 0)


if __name__ == "__main__":
    main()
