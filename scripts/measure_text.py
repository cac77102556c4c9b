"""What each recipe costs a model that is far from sure: perplexity and divergence on real text, beside imitations.

    python scripts/convert_gguf.py …                                                   # or any checkpoint with a tongue
    python scripts/measure_text.py artifacts/smollm2/checkpoint artifacts/smollm2/bundles
    python scripts/measure_text.py CHECKPOINT FOLDER --only "int4 in 32" --only "imitation: Q4_0"

Text is what a Debian machine with Python holds: the reference's topics, README, NEWS and FAQ files, library sources.
Half of the documents lend samples to calibrate with ("own"), the others a window each to be read; a hash of the text
decides. Reads windows through the exported bundles in ONNX Runtime, and through torch for the imitations: the same
weights rounded as others do it, embedding and head in int8 blocks as ours. Divergence is the mean KL from float32 in
nats over all positions. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import pydoc_data.topics
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from torch import Tensor

from demo_bundles import make_bundle
from pixtral_export.check import load_reference, reference_logits
from pixtral_export.checkpoint.reader import Checkpoint, open_checkpoint
from pixtral_export.model.pixtral import Pixtral
from pixtral_export.model.transformer import Linear
from pixtral_export.plan import ExportSettings
from pixtral_export.quantization.formats import FORMATS, INT8
from pixtral_runtime import load
from pixtral_runtime.inputs.prompt import Prompt

SAMPLES = ("own", "packaged")
WINDOW = 512  # tokens, the first of them <s>
OWN_SAMPLES = 16
SAMPLE_LETTERS = 1500  # of an own sample, some 350 tokens
LEAST_LETTERS = 4000
FULL = ExportSettings(dtype="float32", max_context=2048)
RECIPES = {
    "float32": FULL,
    "int8 KV cache": replace(FULL, kv_cache="int8"),
    "fp8": replace(FULL, precision="fp8"),
    "int8": replace(FULL, precision="int8"),
    "int4": replace(FULL, precision="int4"),
    "int4 in 64": replace(FULL, precision="int4", group_size=64),
    "int4 in 64 by AWQ": replace(FULL, precision="int4", group_size=64, method="awq"),
    "int4 in 64 by rounding": replace(FULL, precision="int4", group_size=64, method="rtn"),
    "int4 in 32": replace(FULL, precision="int4", group_size=32),
    "int4 in 32 by rounding": replace(FULL, precision="int4", group_size=32, method="rtn"),
}
IMITATIONS = {f"imitation: {kind}": kind for kind in ("fp8", "int8", "Q8_0", "Q4_0")}
COMPARED = (*IMITATIONS, *RECIPES)

LogitsOf = Callable[[np.ndarray], np.ndarray]
"""Token ids (T,) to logits (T, V) in float32."""
Candidate = tuple[str, str, LogitsOf]
"""Name, kind of samples and logits of what is compared with float32."""


def documents() -> Iterator[str]:
    """Excerpts of everything that is long enough, from a quarter on: licences and contents stand at the beginning."""
    library, debian = Path(sysconfig.get_path("stdlib")), Path("/usr/share/doc")
    kinds = ("README*", "NEWS*", "FAQ*")
    files = [*library.glob("*.py"), *(path for kind in kinds for path in debian.glob(f"*/{kind}"))]
    texts = list(pydoc_data.topics.topics.values())
    for path in files:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        texts.append(data.decode(errors="ignore"))
    yield from (text[len(text) // 4 :][: 4 * LEAST_LETTERS] for text in texts if len(text) >= LEAST_LETTERS)


def split() -> tuple[list[str], list[str]]:
    """Documents to calibrate with and to read, kinds mixed, in an order that only their text decides; none twice."""
    place = {text: hashlib.sha256(text.encode()).digest() for text in documents()}
    mixed = sorted(place, key=place.__getitem__)
    return [text for text in mixed if place[text][-1] % 2], [text for text in mixed if not place[text][-1] % 2]


def own_samples(folder: Path) -> Path:
    target = folder / "own.jsonl"
    rows = [{"prompt": text[:SAMPLE_LETTERS]} for text in split()[0][:OWN_SAMPLES]]
    target.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return target


def windows(tokenizer: Path, count: int) -> list[np.ndarray]:
    tekken = Tekkenizer.from_file(str(tokenizer))
    ids = [np.array(tekken.encode(text, bos=True, eos=False)[:WINDOW]) for text in split()[1]]
    return [window for window in ids if len(window) == WINDOW][:count]


@dataclass
class Score:
    """Sums over positions."""

    loss: float = 0.0
    kl: float = 0.0
    same: int = 0
    positions: int = 0

    def add(self, ids: np.ndarray, reference: np.ndarray, logits: np.ndarray) -> None:
        ours, theirs = (torch.from_numpy(x[:-1]).log_softmax(-1) for x in (reference, logits))
        self.loss -= float(theirs[torch.arange(len(theirs)), torch.from_numpy(ids[1:])].double().sum())
        self.kl += float((ours.exp() * (ours - theirs)).sum(-1).double().sum())
        self.same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        self.positions += len(theirs)

    def row(self) -> dict[str, float]:
        return {
            "perplexity": round(float(np.exp(self.loss / self.positions)), 3),
            "kl_nats": round(self.kl / self.positions, 5),
            "top1": round(self.same / self.positions, 4),
        }


def by_bundle(path: Path) -> LogitsOf:
    runner = load(path).runner

    def logits(ids: np.ndarray) -> np.ndarray:
        prompt = Prompt(ids, np.full(len(ids), -1), (), 0)
        cache = runner.sessions.decoder.new_cache(1, len(ids))
        return np.asarray(runner.prefill(prompt, runner.no_features, cache, all_logits=True), np.float32)

    return logits


def by_torch(model: Pixtral) -> LogitsOf:
    def logits(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            tokens = torch.from_numpy(ids)
            no_features = torch.zeros(1, model.config.decoder.dim)
            return reference_logits(model, tokens, torch.full_like(tokens, -1), no_features).numpy()

    return logits


def blocks(weight: Tensor, group: int, bits: int) -> Tensor:
    """A weight (K, N) rounded in groups along K as llama.cpp's Q4_0 and Q8_0 are: scales in float16, signed for 4 bits,
    where the largest magnitude becomes -8.
    """
    x: Tensor = weight.unflatten(0, (-1, group))
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    scale = (largest.abs() / 127 if bits == 8 else largest / -8).half().float()
    codes = torch.where(scale == 0, 0.0, x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (codes * scale).flatten(0, 1)


def eight_bits(x: Tensor, dim: int, format: str) -> Tensor:
    """One scale a row or column, found in the values themselves."""
    kind = FORMATS[format]
    scale = (x.abs().amax(dim, keepdim=True) / kind.largest).clamp(min=1e-12)
    return kind.round(x / scale) * scale


def imitate(model: Pixtral, kind: str) -> None:
    """Round a model as another toolkit would. 8 bits: a scale an output, and one for each token where it is read."""
    table = model.tok_embeddings.weight
    table.copy_(blocks(table.T.contiguous(), 64, 8).T)
    model.output.weight.copy_(blocks(model.output.weight, 64, 8))
    for name, layer in model.named_modules():
        if not isinstance(layer, Linear) or not name.startswith("layers."):
            continue
        if kind in ("Q4_0", "Q8_0"):
            layer.weight.copy_(blocks(layer.weight, 32, int(kind[1])))
            continue
        format = {"fp8": "float8e4m3fn", "int8": INT8.name}[kind]
        layer.weight.copy_(eight_bits(layer.weight, 0, format))
        layer.register_forward_pre_hook(lambda _, inputs, format=format: (eight_bits(inputs[0], -1, format),))


def candidates(checkpoint: Checkpoint, folder: Path, only: Sequence[str], kinds: Sequence[str]) -> Iterator[Candidate]:
    sources = {"own": own_samples(folder), "packaged": None}
    for name, kind in IMITATIONS.items():
        if not only or name in only:
            model = load_reference(checkpoint, FULL.max_context or 0)
            with torch.no_grad():
                imitate(model, kind)
            yield name, "", by_torch(model)
    for name, settings in RECIPES.items():
        if name == "float32" or (only and name not in only):
            continue
        if settings.method == "rtn":
            yield name, "", by_bundle(make_bundle(name, settings, None, folder, checkpoint.path).path)
            continue
        for kind in kinds:
            yield name, kind, by_bundle(make_bundle(name, settings, sources[kind], folder, checkpoint.path).path)


def measure(checkpoint: Path, folder: Path, count: int, compared: Iterable[Candidate]) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    read = windows(checkpoint / "tekken.json", count)
    plain = by_bundle(make_bundle("float32", FULL, None, folder, checkpoint).path)
    reference = [plain(ids) for ids in read]
    exact = Score()
    for ids, logits in zip(read, reference, strict=True):
        exact.add(ids, logits, logits)
    rows: list[dict[str, Any]] = [{"recipe": "float32", "samples": "", "positions": exact.positions} | exact.row()]
    for name, samples, logits_of in compared:
        started, score = time.monotonic(), Score()
        for ids, expected in zip(read, reference, strict=True):
            score.add(ids, expected, logits_of(ids))
        rows.append({"recipe": name, "samples": samples} | score.row())
        rows[-1]["perplexity_percent"] = round(100 * (rows[-1]["perplexity"] / rows[0]["perplexity"] - 1), 1)
        print(rows[-1], f"{time.monotonic() - started:.0f} s", flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| recipe | samples | perplexity | | KL, nats | same choice |", "| --- " * 6 + "|"]
    for row in rows:
        more = f"{row['perplexity_percent']:+} %" if "perplexity_percent" in row else ""
        cells = [row["recipe"], row["samples"], f"{row['perplexity']:.2f}", more, f"{row['kl_nats']:.4f}"]
        lines.append("| " + " | ".join([*cells, f"{100 * row['top1']:.1f} %"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--windows", type=int, default=12, help=f"documents to read, {WINDOW} tokens of each")
    parser.add_argument("--only", action="append", default=[], choices=COMPARED, metavar="NAME", help="repeatable")
    parser.add_argument("--samples", action="append", choices=SAMPLES, help="calibrate with these; both unless named")
    args = parser.parse_args()
    compared = candidates(open_checkpoint(args.checkpoint), args.folder, args.only, args.samples or SAMPLES)
    rows = measure(args.checkpoint, args.folder, args.windows, compared)
    print(markdown(rows))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
