"""What `fuzz_commands.py` runs: lines that work, options with values of their type, and calls of the Python API."""

from __future__ import annotations

import random as random_module
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from fuzz_files import QUESTION, odd_paths

LINES = {
    "export": ["checkpoint -o new --dry-run", "hf -o new --dry-run --precision int4 --calibration samples.jsonl"],
    "build": ["bundle --target rtx:sm89 --dry-run", "built --target trt,rtx:sm120 --dry-run"],
    "run": [
        "bundle photos --max-new-tokens 2",
        "bundle photos --max-new-tokens 2 -o results.jsonl --resume",
        "bundle photos --max-new-tokens 2 -o new.jsonl --report new.html --format parquet",
        "bundle photos --max-new-tokens 2 -o new.jsonl --format webdataset",
        "bundle shard.tar album.zip tables --max-new-tokens 2 -o new.jsonl --format webdataset",
        "bundle scan.pdf photos list.csv -p {name} --pages 1- --per document --max-new-tokens 2",
        "bundle --requests requests.jsonl --max-new-tokens 2 -o new.jsonl --format parquet --embed",
        "bundle --requests requests.jsonl --max-new-tokens 2",
        "bundle photos/a.png --json-schema schema.json --max-new-tokens 4",
        "built - -p @prompts.txt --max-new-tokens 2",
    ],
    "ask": ["bundle photos/a.png --max-new-tokens 2", "built -p @prompts.txt --max-new-tokens 2"],
    "bench": [
        "bundle --image-side 16 --runs 1 --warmup 0 --decode-tokens 2",
        "bundle --images photos --runs 1 --warmup 0 --decode-tokens 2 --compare bench.json --save new.json",
    ],
    "eval": [
        "bundle --task custom --data questions --max-new-tokens 2",
        "bundle --task custom --data questions --max-new-tokens 2 --against eval.json --html new.html",
        "bundle --task custom --data questions --max-new-tokens 2 --image-tokens 4,full --html new.html",
        "bundle --task custom --data questions --max-new-tokens 2 --image-tokens 4,8 --against built --save new.json",
        "bundle --task vqav2 --data tables --max-new-tokens 2 --save new.json",
        "bundle --task perplexity --data texts --window 16 --against built --save new.json",
        "bundle --task gsm8k --data problems --shots 1 --max-new-tokens 2 --html new.html",
        "bundle --task mmlu --data choices --shots 0",
    ],
    "tune": [
        "bundle --images photos --questions prompts.txt --image-tokens 4,full --max-new-tokens 2",
        "bundle --images questions --questions questions/rows.jsonl --image-tokens 4,8 --html new.html",
        "bundle built --images photos --questions prompts.txt --image-tokens 4 --metric divergence --budget 9",
        "checkpoint bundle --images photos --questions prompts.txt --image-tokens 4 --max-new-tokens 2 -o new",
    ],
    "serve": ["bundle --host 256.1.1.1"],  # it would answer for ever at an address that is one
    "merge": ["results.jsonl -o merged.jsonl", "results.jsonl other.jsonl -o merged.parquet"],
    "compare": [
        "bundle built --images photos --max-new-tokens 2",
        "bundle bundle --prompts prompts.txt --html c.html",
        "bundle built --texts texts --limit 2",
    ],
    "plan": ["checkpoint", "hf --precision int8", "bundle --device orin-nx-16"],
    "check": ["bundle --against checkpoint", "built --engine rtx:sm89"],
    "verify": ["bundle", "built --backend ort-cpu --batch 2", "bundle --certify"],
    "sign": ["bundle --key key.pem"],
    "inspect": ["bundle --verify", "built"],
    "doctor": [""],
    "api": ["bundle"],
}
"""What works, file by file as `fuzz_files` lays them out. `api` is Python's face, see `call_api`."""
WEIGHTS = {"run": 6, "bench": 2, "eval": 3, "api": 4, "inspect": 2, "plan": 2, "export": 3, "doctor": 0.1}
"""How often beside the others."""
NEVER = {"ray": "every value looks for a cluster, for ten seconds", "watch": "it has no end"}
NUMBERS = (
    *("0", "-1", "1", "2", "3", "16", "100", "1000", "2147483648", "9223372036854775808", "1" + "0" * 30),
    *("0.5", "-0.0", "1e-320", "1e308", "inf", "-inf", "nan", "", "x", "٣", " 2", "1_0", "0x10"),
)
TEXTS = (
    *("", " ", "x", "ä€😀", "\udcff", "a" * 5000, "\n", "@", "@absent", "-", "--", "a=b", "*=int4", "layers.*=float16"),
    *(
        ",",
        "1,,2",
        "4,8,full",
        "*",
        "**",
        "[",
        "1/2",
        "0/0",
        "a:b=1..2..3",
        "vision:H=16..64..256",
        "8GB",
        "1e400GB",
        "http://[",
    ),
)


@cache
def built(app: Any) -> Any:
    """The application as typer makes it of its functions: a fifth of a second, so once for all invocations."""
    import typer

    return typer.main.get_command(app)


def parameters(command: str) -> list[Any]:
    from pixtral_cli.main import app

    return [one for one in built(app).commands[command].params if one.name not in NEVER]


def value_for(annotation: object, words: str, random: random_module.Random) -> str:
    """A value for an option or an argument, mostly of its type; `words` are its help and its default."""
    kind = str(annotation)
    if "Path" in kind and random.random() < 0.9:
        return random.choice(odd_paths())
    if ("int" in kind or "float" in kind) and random.random() < 0.95:
        return random.choice(NUMBERS)
    named = re.findall(r"[\w:.-]+", words)
    return str(random.choice(random.choice((named or TEXTS, TEXTS, TEXTS, NUMBERS, odd_paths()))))


def arguments(command: str, random: random_module.Random) -> list[str]:
    """A line that works, changed."""
    line = random.choice(LINES[command]).split()
    options = [one for one in parameters(command) if one.opts[0].startswith("-")]
    if line and random.random() < 0.15:
        place = random.randrange(len(line))
        line[place] = random.choice(random.choice((odd_paths(), TEXTS, NUMBERS)))
    if "--dry-run" in line and random.random() < 0.04:
        line.remove("--dry-run")
    for option in random.sample(options, min(len(options), random.choice((0, 1, 1, 2, 3)))):
        line.append(random.choice((*option.opts, *option.secondary_opts)))
        if not option.is_flag:
            line.append(value_for(option.type_descriptor.annotation, f"{option.help} {option.default}", random))
    return line


def call_api(random: random_module.Random) -> Callable[[], object]:
    """A call of the Python API, with values of the right types where files are read, of any type elsewhere."""
    from pixtral_runtime import Conversation, Message, Sampling, load
    from pixtral_runtime.batch.request_file import read_request_file
    from pixtral_runtime.batch.shards import merge_results
    from pixtral_runtime.bench.report import read_report
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.evaluation.result import read_evaluation
    from pixtral_runtime.inputs.image_files import collect_images, open_images

    def path() -> Path:
        return Path(random.choice((*odd_paths(), "a\0b")))

    def anything() -> Any:
        message = Message("user", ("Which?", random.choice((Path("photos/a.png"), path(), "x", 5))))  # type: ignore[arg-type]
        odd: tuple[Any, ...] = (
            None,
            True,
            0,
            -1,
            2**70,
            0.5,
            float("nan"),
            "",
            "\0",
            "\udcff",
            b"",
            b"x",
            [],
            {},
            object(),
            [message],
        )
        return random.choice((*odd, path(), str(path()), [path()], QUESTION, 3))

    def settings(**usual: object) -> dict[str, Any]:
        return {name: anything() if random.random() < 0.1 else value for name, value in usual.items()}

    def generate() -> object:
        model = load(**settings(path="bundle", threads=1, backend="auto"))
        sampling = Sampling(**settings(temperature=0.5, top_p=0.8, seed=1)) if random.random() < 0.5 else Sampling()
        asked = settings(prompt=QUESTION, images=["photos/a.png"], system=None, max_new_tokens=2, sampling=sampling)
        return list(model.stream(**asked)) if random.random() < 0.3 else model.generate(**asked)

    def converse() -> object:
        settled = settings(system=None, max_new_tokens=2, sampling=Sampling())
        conversation = Conversation(load("bundle"), **settled)
        for _ in range(3):
            conversation.ask(**settings(text=QUESTION, images=["photos/a.png"]))
            random.choice((conversation.undo, conversation.forget_oldest, conversation.reset, conversation.stop))()
        return conversation.messages

    return random.choice(
        (
            generate,
            generate,
            generate,
            converse,
            lambda: load("bundle").generate(QUESTION, anything(), max_new_tokens=1),
            lambda: read_request_file(path(), max_new_tokens=random.choice((-1, 0, 2))),
            lambda: merge_results([Path("results.jsonl"), path()], path(), random.random() < 0.5, "jsonl"),
            lambda: [read_report(path()), read_report(Path("bench.json"))],
            lambda: [read_evaluation(path()), read_evaluation(Path("eval.json"))],
            lambda: open_bundle(path()),
            lambda: open_images(collect_images([str(path())], recursive=True)),
        )
    )
