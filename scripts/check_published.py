"""Does `plan` and `export --dry-run` take every published checkpoint, and name what is wrong with a broken one?

    python scripts/check_published.py                       # some 5 minutes, 100 MB of disk
    python scripts/check_published.py --only ministral-3-3b

Writes each member of the family in the formats in which it is published: true names, shapes, types and index files,
with holes in the place of weights. Then plants a mistake of each kind in the smallest of each format. Prints a line a
checkpoint; the last line is JSON. Exits 1 where a checkpoint is refused or a mistake is not named.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from make_synthetic_checkpoint import SIZES, write_checkpoint
from pixtral_cli.main import app
from publish_codes import publish

PUBLISHED = (
    ("pixtral-12b", "mistral", ""),
    ("pixtral-12b", "hf", ""),
    ("pixtral-12b", "hf", "w4a16"),
    ("pixtral-12b", "hf", "w8a8"),
    ("pixtral-12b", "hf", "fp8-dynamic"),
    ("pixtral-large", "mistral", ""),
    ("pixtral-large", "hf", ""),
    ("mistral-small-3.1", "mistral", ""),
    ("mistral-small-3.1", "hf", ""),
    ("mistral-small-3.1", "hf", "w4a16"),
    ("devstral-small-2", "mistral", "fp8"),
    ("devstral-small-2", "hf", "fp8"),
    ("ministral-3-3b", "mistral", ""),
    ("ministral-3-3b", "hf", ""),
    ("ministral-3-3b", "mistral", "fp8"),
    ("ministral-3-3b", "hf", "fp8"),
    ("ministral-3-3b", "hf-new", "fp8"),
    ("ministral-3-8b", "mistral", "fp8"),
    ("ministral-3-8b", "hf", "fp8"),
    ("ministral-3-14b", "mistral", "fp8"),
    ("ministral-3-14b", "hf", "fp8"),
)
"""Model, format of names, scheme of codes."""
OWN_PRECISION = {"fp8": "fp8", "w4a16": "int4", "w8a8": "int8"}
Header = dict[str, Any]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def write(folder: Path, size: str, format: str, scheme: str) -> tuple[Path, int]:
    plain, coded = folder / "plain", folder / "coded"
    total = write_checkpoint(plain, SIZES[size](), format=format, seed=None)
    return (coded, publish(plain, coded, scheme, sparse=True)) if scheme else (plain, total)


def accepted(checkpoint: Path, scheme: str, folder: Path) -> dict[str, Any]:
    """What a plan and two rehearsed exports say."""
    precision = OWN_PRECISION.get(scheme, "int4")
    code, text = run("plan", str(checkpoint), "--precision", precision, "--json")
    row: dict[str, Any] = {"plan": code}
    if code == 0:
        row["bundle_gb"] = round(json.loads(text)["bundle_bytes"] / 1e9, 2)
    for wish in {precision, "int4"}:
        dry, said = run("export", str(checkpoint), "-o", str(folder / "bundle"), "--precision", wish, "--dry-run")
        row[f"export {wish}"] = dry if dry == 0 else said.strip()
    return row


def edit_header(file: Path, change: Callable[[Header], Any]) -> None:
    """Change what a weight file says of its tensors; their bytes stay holes."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: Header = json.loads(stream.read(length))
    size = file.stat().st_size - 8 - length
    change(header)
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        stream.truncate(8 + len(encoded) + size)


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def mistakes(format: str, scheme: str) -> dict[str, tuple[Callable[[Path], Any], str]]:
    """What to do to a checkpoint, and what the refusal must name, by kind."""
    is_mistral = format == "mistral"
    prefix = "" if is_mistral else "language_model.model."
    layer = f"{prefix}layers.3." + ("attention.wk" if is_mistral else "self_attn.k_proj")
    merger = "patch_merger" if is_mistral else "multi_modal_projector.patch_merger"
    merging = f"{merger}.merging_layer.weight"
    config = "params.json" if is_mistral else "config.json"

    def in_header(change: Callable[[Header], Any], name: str) -> Callable[[Path], Any]:
        def edit(folder: Path) -> None:
            for file in folder.glob("*.safetensors"):
                edit_header(file, lambda header: change(header) if name in header else None)

        return edit

    def reshaped(header: Header) -> None:
        header[merging]["shape"].reverse()

    def retyped(header: Header) -> None:
        header[f"{layer}.weight"]["dtype"] = "F8_E5M2" if scheme else "I16"

    def cut(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[-1]
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size - 4096)

    def stretched(content: dict[str, Any]) -> None:
        if is_mistral:
            content["yarn"]["mystery"] = 1
        else:
            content["text_config"]["rope_parameters"]["mystery"] = 1

    found = {
        "a tensor is missing": (
            in_header(lambda h: h.pop(f"{prefix}norm.weight"), f"{prefix}norm.weight"),
            "norm.weight",
        ),
        "a matrix lies the other way": (in_header(reshaped, merging), merging),
        "a weight of another type": (in_header(retyped, f"{layer}.weight"), layer),
        "a file is cut off": (cut, "cut off"),
        "an unknown setting of YaRN": (lambda folder: edit_json(folder / config, stretched), "mystery = 1"),
    }
    if scheme:
        scale = f"{layer}.{'qscale_weight' if is_mistral else 'weight_scale_inv'}"
        found["a scale is missing"] = (in_header(lambda header: header.pop(scale), scale), layer)
        block = (
            (lambda c: c["quantization"].update(qformat_weight="nvfp4"))
            if is_mistral
            else (lambda c: c["quantization_config"].update(weight_block_size=[128, 128]))
        )
        found["another scheme"] = (lambda folder: edit_json(folder / config, block), "already quantized")
    if not is_mistral:
        found["a shard is missing"] = (lambda folder: sorted(folder.glob("*.safetensors"))[0].unlink(), ".safetensors")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SIZES, action="append", help="these models alone; repeatable")
    args = parser.parse_args()
    rows, planted = [], []
    for size, format, scheme in PUBLISHED:
        if args.only and size not in args.only:
            continue
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            checkpoint, total = write(folder, size, format, scheme)
            row = {"model": size, "format": format, "scheme": scheme or "bfloat16", "gb": round(total / 1e9, 2)}
            rows.append(row | accepted(checkpoint, scheme, folder))
            print(rows[-1], flush=True)
            if size != "ministral-3-3b" or format == "hf-new":
                continue
            for kind, (plant, named) in mistakes(format, scheme).items():
                broken = folder / "broken"
                shutil.copytree(checkpoint, broken, copy_function=copy_sparse)
                plant(broken)
                code, said = run("plan", str(broken))
                is_named = code == 3 and named in said.replace("\n", "")
                planted.append({"mistake": kind, "format": format, "scheme": scheme, "exit": code, "named": is_named})
                print(planted[-1] if is_named else (planted[-1], said), flush=True)
                shutil.rmtree(broken)
    print(json.dumps({"checkpoints": rows, "mistakes": planted}))
    is_right = all(value == 0 for row in rows for key, value in row.items() if key.startswith(("plan", "export")))
    sys.exit(0 if is_right and all(one["named"] for one in planted) else 1)


def copy_sparse(source: str, target: str) -> None:
    """Copy a file whose end is a hole."""
    if not source.endswith(".safetensors"):
        shutil.copyfile(source, target)
        return
    with open(source, "rb") as whole, open(target, "wb") as copy:
        start = whole.read(8)
        copy.write(start + whole.read(struct.unpack("<Q", start)[0]))
        copy.truncate(Path(source).stat().st_size)


if __name__ == "__main__":
    main()
