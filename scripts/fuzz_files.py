"""The files of `fuzz_commands.py`: one of each kind that commands read, paths of odd kinds, damage to any of them."""

from __future__ import annotations

import json
import os
import random as random_module
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

QUESTION = "Which colour?"
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 3, 2**31, 2**63, 10**30, 1e308, -0.5, float("nan"), float("inf"), "", "x", "\0", "\udcff"),
    *("a" * 300, "../../x", "odd/loop", "/proc/self/mem", "\U0001f600", [], {}, [[]], {"a": {}}, [None], "@deep@"),
)
DEEP = "[" * 100_000 + "]" * 100_000  # in the place of "@deep@"
NAME_OF_ANY_BYTES = os.fsdecode(b"caf\xe9.png")
HEADER_BYTES = 8  # of a safetensors file: the length of its JSON


def _write_sources(world: Path) -> None:
    """An archive, a shard, a list and a document; tables are there already."""
    with tarfile.open(world / "shard.tar", "w") as shard, zipfile.ZipFile(world / "album.zip", "w") as album:
        for name in ("a.png", "b.jpg"):
            shard.add(world / "photos" / name, name)
            album.write(world / "photos" / name, name)
    (world / "list.csv").write_text("image,text\nphotos/a.png,red\nphotos/b.jpg,blue\n")
    pages = [Image.new("RGB", (40, 56), colour) for colour in ("white", "red")]
    pages[0].save(world / "scan.pdf", save_all=True, append_images=pages[1:])


def make_world(target: Path) -> None:
    """Write one of each file that commands read. Imports torch."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from typer.testing import CliRunner

    from helpers.bundles import export_tiny
    from helpers.tiny import tiny_config, write_checkpoint
    from pixtral_cli.main import app
    from pixtral_runtime.bundle.engine_list import Engine, EngineSet, source_of, with_engines
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.bundle.spec import GRAPHS
    from pixtral_runtime.compare.certify import certify
    from pixtral_runtime.files import sha256_of_file

    world = target.with_name(f"{target.name}.partial")
    shutil.rmtree(world, ignore_errors=True)
    world.mkdir()
    write_checkpoint(world / "checkpoint", tiny_config())
    write_checkpoint(world / "hf", tiny_config(), format="hf", shards=2)
    export_tiny(world / "checkpoint", world / "bundle")
    shutil.copytree(world / "bundle", world / "built")
    built = open_bundle(world / "built")
    engines = {}
    for graph in GRAPHS:
        (world / "built" / f"{graph}.engine").write_bytes(b"no engine")
        engines[graph] = Engine(
            f"{graph}.engine",
            9,
            sha256_of_file(world / "built" / f"{graph}.engine"),
            source_of(built, graph),
            [{"B": [1, 1, 1]}],
        )
    with_engines(built, EngineSet("rtx:sm89", "tensorrt_rtx 1.7.1.116", "float16", 768, 1, 256, engines)).write()
    (world / "photos").mkdir()
    for number, name in enumerate(("a.png", "b.jpg", "c.webp", "d.tiff", "e.gif", "f.bmp")):
        Image.new("RGB", (40, 24), (40 * number, 99, 5)).save(world / "photos" / name)
    row = {"question": QUESTION, "answer": "red", "image": "../photos/a.png"}
    for name in ("questions", "texts", "problems", "choices"):
        (world / name).mkdir()
    (world / "tables").mkdir()
    picture = {"bytes": (world / "photos/a.png").read_bytes(), "path": "a.png"}
    answers = [{"answer": "red", "answer_confidence": "yes", "answer_id": n} for n in range(10)]
    vqa = {"question": QUESTION, "question_id": 1, "answers": answers, "image": picture, "answer_type": "other"}
    pq.write_table(pa.Table.from_pylist([vqa] * 2), world / "tables/validation-00000-of-00001.parquet")
    request = {"id": "1", "prompt": QUESTION, "images": ["photos/a.png"], "max_new_tokens": 2}
    part = {"type": "image_url", "image_url": {"url": "photos/b.jpg"}}
    talk = {"id": "2", "messages": [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]}
    schema = {"type": "object", "properties": {"colour": {"type": "string", "maxLength": 3}}, "required": ["colour"]}
    texts: dict[str, list[Any]] = {
        "questions/rows.jsonl": [row, row | {"id": "second"}],
        "texts/lines.jsonl": [{"text": QUESTION}, {"text": "A longer text. " * 9}],
        "problems/test.jsonl": [{"question": "1 + 1?", "answer": "#### 2"}],
        "problems/train.jsonl": [{"question": "1 + 2?", "answer": "#### 3"}],
        "choices/test.jsonl": [{"question": QUESTION, "subject": "art", "choices": list("abcd"), "answer": 1}],
        "requests.jsonl": [request, talk],
        "samples.jsonl": [{"prompt": QUESTION, "image": "photos/a.png"}],
        "schema.json": [schema],
    }
    for name, entries in texts.items():
        (world / name).write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    (world / "texts/notes.md").write_text("# Notes\n\nA short text.\n")
    certify(open_bundle(world / "bundle"))
    (world / "key.pem").write_text("-----BEGIN EC PRIVATE KEY-----\n-----END EC PRIVATE KEY-----\n")
    (world / "prompts.txt").write_text(f"# a comment\n{QUESTION}\n")
    _write_sources(world)
    before = Path.cwd()
    os.chdir(world)
    for line in (
        "run bundle photos --max-new-tokens 2 -o results.jsonl",
        "run bundle photos -p Who? --max-new-tokens 2 -o other.jsonl",
        "bench bundle --images photos --runs 1 --warmup 0 --decode-tokens 2 --save bench.json",
        "eval bundle --task custom --data questions --max-new-tokens 2 --save eval.json",
    ):
        done = CliRunner().invoke(app, line.split())
        assert done.exit_code == 0, done.stderr
    os.chdir(before)
    world.rename(target)


def lay_out(world: Path, folder: Path) -> Path:
    """A copy of the world with paths of odd kinds beside it."""
    copy = folder / "here"
    shutil.copytree(world, copy)
    odd = copy / "odd"
    (odd / "folder").mkdir(parents=True)
    (odd / "empty").touch()
    (odd / "plain").write_text("plain")
    (odd / NAME_OF_ANY_BYTES).write_bytes((copy / "photos/a.png").read_bytes())
    links = {"dangling": "absent", "loop": "loop", "null": "/dev/null", "unreadable": "/proc/self/mem", "up": ".."}
    for name, target in links.items():
        (odd / name).symlink_to(target)
    return copy


def odd_paths() -> tuple[str, ...]:
    """Good ones and odd ones, relative to a copy of the world."""
    good: tuple[str, ...] = (
        "checkpoint",
        "hf",
        "bundle",
        "built",
        "photos",
        "photos/a.png",
        "tables",
        "questions",
        "texts",
        "texts/notes.md",
        "requests.jsonl",
    )
    good += (
        "shard.tar",
        "album.zip",
        "list.csv",
        "scan.pdf",
        "samples.jsonl",
        "schema.json",
        "prompts.txt",
        "results.jsonl",
        "bench.json",
        "eval.json",
        "key.pem",
        "new/file.x",
    )
    odd: tuple[str, ...] = (
        "folder",
        "empty",
        "plain",
        "plain/x",
        "dangling",
        "loop",
        "loop/x",
        "null",
        "unreadable",
        "up",
        "absent/x",
    )
    odd += (NAME_OF_ANY_BYTES, "n" * 300, "n" * 300 + "/x", "d/" * 3000 + "x", "folder/", "*", "\n", "ä.json")
    return (*good, *(f"odd/{name}" for name in odd), "", "-", "/", "/dev/full/x", "/proc/x", "/sys/kernel/x")


def damage(named: Sequence[Path], random: random_module.Random) -> str:
    """Damage one of the files named, or in a folder named. Returns what was done."""
    found = [path for path in named if len(str(path)) < 100 and path.parts and not path.is_absolute() and path.exists()]
    files = sorted(
        {file for path in found for file in (path.rglob("*") if path.is_dir() else (path,)) if file.is_file()}
    )
    files = [file for file in files if not file.is_symlink() and file.parts[0] != "odd"]
    if not files:
        return ""
    path = random.choice(files)
    if random.random() < 0.1:
        how = random.choice(("absent", "loop", "/dev/null", "/proc/self/mem", "folder", "empty"))
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "empty":
            path.touch()
        else:
            path.symlink_to(how if how.startswith("/") else path.name if how == "loop" else how)
        return f"[{path} is now {how}]"
    data = path.read_bytes()
    changed = _damaged_json(path, data, random) if random.random() < 0.85 else None
    path.write_bytes(_damaged_bytes(data, random) if changed is None else changed)
    if (manifest := path.with_name("bundle.json")).is_file() and path != manifest and random.random() < 0.8:
        listed = json.loads(manifest.read_bytes())
        if path.name in listed["files"]:
            listed["files"][path.name]["bytes"] = path.stat().st_size
            manifest.write_text(json.dumps(listed))
    return f"[{path} damaged]"


def _damaged_bytes(data: bytes, random: random_module.Random) -> bytes:
    """Some bytes changed, most of them near the beginning, or cut off, or doubled."""
    changed = bytearray(data)
    place = int(len(data) * random.random() ** 2)
    how = random.random()
    if how < 0.2:
        return data[:place]
    if how < 0.3:
        return data[:place] + data[place // 2 :]
    for _ in range(random.choice((1, 2, 8))):
        if changed:
            changed[int(len(changed) * random.random() ** 3)] = random.choice(
                (0, 1, 127, 128, 255, random.randrange(256))
            )
    return bytes(changed)


def _damaged_json(path: Path, data: bytes, random: random_module.Random) -> bytes | None:
    """JSON, JSON lines and the header of safetensors with something else in them; None for another file."""
    if path.suffix == ".safetensors":
        size = int.from_bytes(data[:HEADER_BYTES], "little")
        header = _odd_json(data[HEADER_BYTES : HEADER_BYTES + size], random)
        return len(header).to_bytes(HEADER_BYTES, "little") + header + data[HEADER_BYTES + size :]
    if path.suffix == ".json":
        return _odd_json(data, random)
    if path.suffix != ".jsonl":
        return None
    lines = data.splitlines()
    place = random.randrange(len(lines))
    lines[place] = random.choice((b"", b"5", lines[0], *[_odd_json(lines[place], random)] * 7))
    return b"\n".join(lines) + b"\n"


def _odd_json(data: bytes, random: random_module.Random) -> bytes:
    """A value changed, a key gone or renamed, somewhere in a JSON document."""
    root = [json.loads(data)]
    place: Any = root
    key: Any = 0
    while isinstance(place[key], dict | list) and place[key] and random.random() < 0.85:
        place = place[key]
        key = random.choice(list(place)) if isinstance(place, dict) else random.randrange(len(place))
    how = random.random()
    if how < 0.15 and place is not root:
        del place[key]
    elif how < 0.25 and isinstance(place, dict):
        place[f"{key}x"] = place.pop(key)
    else:
        place[key] = random.choice((*ODD_VALUES, [place[key]], str(place[key])))
    text = json.dumps(root[0]) if root else ""
    return text.replace('"@deep@"', DEEP).encode()
