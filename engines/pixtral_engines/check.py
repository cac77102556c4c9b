"""Does TensorRT understand a bundle's graphs as ONNX Runtime computes them?

ONNX Runtime runs the portable graph as it stands, nothing fused; the interpreter runs the network that TensorRT parsed.
Both get the same inputs, call by call, over the cases of `pixtral_runtime.compare.parity`, so that one wrong step
cannot hide in the next. Where they part, the first layer that differs is named. Every layer's largest activation is
kept: float16 ends at 65504, and Pixtral was trained in bfloat16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from pixtral_engines.interpreter import Interpreter, Observe
from pixtral_engines.lowered_graph import lower
from pixtral_engines.network import parse_graph
from pixtral_engines.parts import specs_of
from pixtral_runtime.backends.ort_session import ort_errors, refuse_missing_kernels
from pixtral_runtime.backends.session import Array
from pixtral_runtime.bundle.integrity import unchanged
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.compare.parity import DECODE_STEPS, TensorCheck, prompt_cases, relative_error, vision_cases
from pixtral_runtime.inputs.prompt import Prompt, PromptBuilder

CHUNK_TOKENS = 64  # tokens of a prefill step, so that short prompts take several
FLOAT16_LARGEST = 65504.0

NETWORK_TOLERANCE = {"float32": 1e-4, "float16": 1e-2}  # seen 1e-6 and 3e-3 on the demo checkpoint
"""Largest error allowed, as a share of the tensor's largest magnitude, by the dtype of activations."""
ROUNDED_TOLERANCE = 0.3  # seen 0.1 in float16
"""Where activations are rounded to 8 bits: what float16 rounds the other way moves a whole step."""


@dataclass
class LargestActivations:
    """Largest magnitude each layer of a graph made, over all calls."""

    largest: dict[str, float] = field(default_factory=dict)

    def observe(self, layer: str, tensor: str, value: Array) -> None:
        if value.dtype.kind == "f" or value.dtype.name == "bfloat16":
            wide = value.astype(np.float32, copy=False)
            peak = float(np.abs(wide).max(initial=0.0)) if np.isfinite(wide).all() else float("inf")
            self.largest[layer] = max(self.largest.get(layer, 0.0), peak)

    @property
    def worst(self) -> tuple[str, float]:
        return max(self.largest.items(), key=lambda item: item[1], default=("", 0.0))


class NetworkCheck:
    """Both sides of every graph of a bundle. Raises MachineError where ONNX Runtime cannot run the bundle.

    `compat`: the network's side in the form for TensorRT 10.3. `cuts`: its decoder in parts, one after the other.
    Other cases than `parity`'s: `pictures` are pixels (B, 3, H, W) by name, `asked` prompts by name.
    """

    def __init__(
        self,
        bundle: Bundle,
        prompts: PromptBuilder,
        package: ModuleType,
        *,
        compat: bool = False,
        cuts: Sequence[int] = (),
        pictures: Iterable[tuple[str, Array]] | None = None,
        asked: Iterable[tuple[str, Prompt]] | None = None,
    ) -> None:
        refuse_missing_kernels(bundle)
        self.bundle = bundle
        self._pictures = vision_cases(bundle) if pictures is None else pictures
        self._prompts = list(prompt_cases(prompts) if asked is None else asked)
        self.rows = max(len(prompt.token_ids) for _, prompt in self._prompts) + DECODE_STEPS
        self.activations = {graph: LargestActivations() for graph in GRAPHS}
        is_rounded = bundle.precision in ("int8", "fp8") or bundle.kv_cache is not None
        self.tolerance = ROUNDED_TOLERANCE if is_rounded else NETWORK_TOLERANCE[bundle.dtype]
        self._reference: dict[str, Any] = {}
        self._network: dict[str, list[Interpreter]] = {}
        with unchanged(bundle):
            for graph in GRAPHS:
                self._reference[graph] = _session(bundle.graph_path(graph))
                self._network[graph] = []
                for part in specs_of(bundle, graph, cuts, compat=compat).values():
                    parsed = parse_graph(bundle, graph, package, self.rows, compat=compat, part=part, cuts=cuts)
                    interpreter = Interpreter(parsed.network, package, keep=parsed, cache_constants=True)
                    self._network[graph].append(interpreter)

    def run(self) -> Iterator[TensorCheck]:
        """Compare every output of every call of the sweep."""
        for case, pixels in self._pictures:
            yield from self._call("vision", case, {"pixels": pixels.astype(self.bundle.dtype)}, {})
        for case, prompt in self._prompts:
            yield from self._answer(case, prompt)

    def _answer(self, case: str, prompt: Prompt) -> Iterator[TensorCheck]:
        """Encode a prompt's images, prefill in chunks and decode greedily, each call fed by the reference."""
        found: dict[str, Array] = {}
        features: list[Array] = []
        for image in prompt.images:
            yield from self._call("vision", case, {"pixels": image[None].astype(self.bundle.dtype)}, found)
            features.append(found["image_features"][0])
        decoder = self.bundle.model.decoder
        table = np.concatenate(features) if features else np.zeros((1, decoder.dim), self.bundle.dtype)
        shape = (1, decoder.n_kv_heads, self.rows, decoder.head_dim)
        pairs = self.bundle.graph_spec("decoder").caches
        cache = {past.name: np.zeros(shape, self.bundle.cache_dtype) for past, _ in pairs}
        tokens, index, start = prompt.token_ids, prompt.feature_index, 0
        for step in range(-(-len(tokens) // CHUNK_TOKENS) + DECODE_STEPS):
            count = min(CHUNK_TOKENS, len(tokens) - start)
            if count == 0:  # the prompt is read: append the reference's choice
                tokens, index, count = np.append(tokens, found["logits"][-1].argmax()), np.append(index, -1), 1
            here, now = slice(start, start + count), f"{case}, step {step}"
            embed = {"token_ids": tokens[None, here], "image_features": table, "feature_index": index[None, here]}
            yield from self._call("embed", now, embed, found)
            feeds = {
                "hidden": found["hidden"],
                "position_ids": np.arange(start, start + count)[None],
                "write_index": np.array([start]),
                "logits_index": np.array([count - 1]),
            }
            yield from self._call("decoder", now, feeds | cache, found)
            cache = {past.name: found[present.name] for past, present in pairs}
            start += count

    def _call(self, graph: str, case: str, feeds: dict[str, Array], found: dict[str, Array]) -> Iterator[TensorCheck]:
        """Run both sides; the reference's outputs go into `found`."""
        session = self._reference[graph]
        with ort_errors(self.bundle.graph_path(graph), "cannot be computed"):
            expected = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
        seen = self._run(graph, feeds, self.activations[graph].observe)
        errors = {name: relative_error(seen[name], value) for name, value in expected.items()}
        layer = ""
        for name, error in errors.items():
            if not error <= self.tolerance:
                layer = layer or self._first_difference(graph, feeds)
            yield TensorCheck(graph, case, name, error, self.tolerance, layer if not error <= self.tolerance else "")
        found.update(expected)

    def _run(self, graph: str, feeds: Mapping[str, Array], observe: Observe) -> dict[str, Array]:
        """The network's side. What its decoder picks of logits is not compared: the reference has no such output."""
        values = _with_temperature(feeds)
        for network in self._network[graph]:
            taken = {tensor.name for tensor in network.inputs}
            values |= network.run({name: value for name, value in values.items() if name in taken}, observe)
        return values

    def _first_difference(self, graph: str, feeds: Mapping[str, Array]) -> str:
        """The first layer, in the network's order, whose output is not the tensor of the same name in the graph."""
        wanted = _all_tensors(self.bundle, graph, self.rows, feeds)
        first: list[str] = []

        def observe(layer: str, tensor: str, value: Array) -> None:
            known = wanted.get(tensor)
            if first or known is None or (known.shape, known.dtype) != (value.shape, value.dtype):
                return
            if not relative_error(value, known) <= self.tolerance:
                first.append(layer)

        self._run(graph, feeds, observe)
        return first[0] if first else "no single layer"


def _session(path: Path) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    with ort_errors(path, "is damaged"):
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _all_tensors(bundle: Bundle, graph: str, rows: int, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Every tensor of a graph, as ONNX Runtime computes it."""
    import onnx

    lowered = lower(bundle.graph_path(graph), rows)
    model = lowered.model
    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    made = {name for node in model.graph.node for name in node.output} - {value.name for value in model.graph.output}
    model.graph.output.extend(value for value in inferred if value.name in made)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{graph}.onnx")
        lowered.save(path, link=True)
        session = _session(path)
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, _with_temperature(feeds)), strict=True))


def _with_temperature(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """With what a decoder that picks candidates takes as well."""
    wanted = feeds.get("logits_index", ())
    return {**feeds, "inverse_temperature": np.ones(len(wanted), np.float32)} if len(wanted) else dict(feeds)
