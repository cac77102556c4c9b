"""How far logits go where attention adds up in float16: TensorRT's fused kernels may, and no GPU is here to show it.

    python scripts/measure_attention_sums.py BUNDLE … --rows 256,4096,16384 --steps 4

ONNX Runtime reads a prompt of so many tokens, then each decode step is evaluated twice from the same cache as TensorRT
parses it: with sums in float32, and rounded to float16 after every 16 products. `noise` is what the first differs by
from ONNX Runtime, which adds up in float32 as well: what float16 and codes of 8 bits do to each other anyway. Prompts
are pictures and questions one after the other, or random token ids where the bundle's tokenizer cannot be read. A line
of JSON for each number of rows; errors are shares of the largest logit.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort

from pixtral_engines.interpreter import Interpreter
from pixtral_engines.network import parse_graph
from pixtral_runtime import load
from pixtral_runtime.backends.session import Array
from pixtral_runtime.backends.trt_package import import_tensorrt
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.compare.parity import relative_error
from pixtral_runtime.errors import PixtralError
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.image_files import open_image

CHUNK = 512
IMAGES = Path(__file__).parents[1] / "tests" / "data" / "images"
QUESTIONS = ("Describe this image in one short sentence.", "what is it?", "Is it red?")


def hidden_states(bundle: Bundle, count: int) -> Array:
    """(1, count, D) of a prompt."""
    vision, embed = (ort.InferenceSession(bundle.graph_path(graph)) for graph in ("vision", "embed"))
    dim = bundle.model.decoder.dim
    found: list[Array] = []
    try:
        prompts = load(bundle.path).prompts
        prompts.tokenizer  # noqa: B018 - read when first used
    except PixtralError:
        prompts = None
    pictures = sorted(IMAGES.glob("*.png"))
    while sum(one.shape[1] for one in found) < count:
        turn = len(found)
        if prompts is None:
            tokens = np.random.default_rng(0).integers(bundle.model.decoder.vocab_size, size=(1, count))
            features, index = np.zeros((1, dim), bundle.dtype), np.full((1, count), -1)
        else:
            picture = open_image(pictures[turn % len(pictures)])
            prompt = prompts.build(user_message(QUESTIONS[turn % len(QUESTIONS)], [picture], None))
            (pixels,) = prompt.images
            features = vision.run(None, {"pixels": pixels[None].astype(bundle.dtype)})[0][0]
            tokens, index = prompt.token_ids[None], prompt.feature_index[None]
        feeds = {"token_ids": tokens, "image_features": features, "feature_index": index}
        found.append(embed.run(None, feeds)[0])
    return np.concatenate(found, 1)[:, :count]


def measure(bundle: Bundle, rows: int, steps: int) -> dict[str, object]:
    """Decode steps at the end of a cache of `rows` rows."""
    trt = import_tensorrt("rtx")
    parsed = parse_graph(bundle, "decoder", trt, rows)
    exact, rounded = (
        Interpreter(parsed.network, trt, keep=parsed, float16_attention=is_rounded) for is_rounded in (False, True)
    )
    decoder = ort.InferenceSession(bundle.graph_path("decoder"))
    names, config = [output.name for output in decoder.get_outputs()], bundle.model.decoder
    pairs = bundle.graph_spec("decoder").caches
    shape = (1, config.n_kv_heads, rows, config.head_dim)
    cache = {past.name: np.zeros(shape, bundle.cache_dtype) for past, _ in pairs}
    hidden, start = hidden_states(bundle, rows), 0
    errors, noise, same = [], [], 0
    while start < rows:
        count = min(CHUNK, rows - steps - start) if start < rows - steps else 1
        feeds = {
            "hidden": hidden[:, start : start + count],
            "position_ids": np.arange(start, start + count)[None],
            "write_index": np.array([start]),
            "logits_index": np.array([count - 1]),
            **cache,
        }
        found = dict(zip(names, decoder.run(None, feeds), strict=True))
        if start >= rows - steps:
            given = feeds | {"inverse_temperature": np.ones(1, np.float32)}
            expected, seen = (one.run(given)["logits"] for one in (exact, rounded))
            errors.append(float(relative_error(seen, expected)))
            noise.append(float(relative_error(expected, found["logits"])))
            same += int(seen.argmax() == expected.argmax())
        cache = {past.name: found[present.name] for past, present in pairs}
        start += count
    shares = {"largest_error": np.max(errors), "median_error": np.median(errors), "noise": np.max(noise)}
    return {"rows": rows, "steps": steps, "same_token": same, **{name: float(share) for name, share in shares.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--rows", default="256,4096,16384")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    for path in args.bundles:
        bundle = open_bundle(path)
        for rows in map(int, args.rows.split(",")):
            found = measure(bundle, rows, args.steps)
            print(json.dumps({"bundle": path.name, "precision": bundle.precision, **found}), flush=True)


if __name__ == "__main__":
    main()
