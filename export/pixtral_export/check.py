"""Does a bundle compute what its checkpoint means? Torch against ONNX Runtime, stage by stage.

The reference is the eager model in float32 with the checkpoint's weights, run without a cache, over the inputs of
`pixtral_runtime.compare.parity`; a prompt is prefilled in chunks and then decoded token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from pixtral_export.checkpoint.reader import Checkpoint
from pixtral_export.model.parameters import parameters
from pixtral_export.model.pixtral import Pixtral
from pixtral_export.model.rope import decoder_rope_tables
from pixtral_export.weight_names import DECODER_ROPE, QUERY_ROPE
from pixtral_export.weights.values import check_values
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.compare.parity import DECODE_STEPS, TensorCheck, prompt_cases, relative_error, vision_cases
from pixtral_runtime.errors import BundleError, MemoryShortageError, Option
from pixtral_runtime.generation.model import Model
from pixtral_runtime.generation.model_runner import ModelRunner
from pixtral_runtime.inputs.prompt import Prompt

EXPORT_TOLERANCE = {
    "float32": 1e-4,  # seen 2e-6 on the demo checkpoint
    "float16": 2e-2,  # seen 4e-3
}
"""Largest error allowed, as a share of the reference tensor's largest magnitude, by the bundle's dtype."""
QUANTIZED_TOLERANCE = 0.3  # seen 0.08 (int4) to 0.14 (fp8) on the demo checkpoint
"""For a quantized bundle against the unquantized reference: finds broken graphs, says nothing of answers."""


def load_reference(checkpoint: Checkpoint, positions: int, available_bytes: int | None = None) -> Pixtral:
    """The eager float32 model with a checkpoint's weights. Raises MachineError where memory is short."""
    needed = 4 * sum(torch.Size(p.shape).numel() for p in parameters(checkpoint.config))
    if available_bytes is not None and needed > available_bytes:
        raise MemoryShortageError(
            f"the torch reference needs {needed / 1e9:.0f} GB of memory, {available_bytes / 1e9:.0f} GB are available",
            "check a checkpoint of fewer layers, or use a machine with more memory",
        )
    state = {}
    for parameter in parameters(checkpoint.config):
        check_values(checkpoint, parameter, None, "float32")
        tensor = checkpoint.read(parameter).float()
        state[parameter.name] = tensor.T.contiguous() if parameter.is_linear else tensor
    model = Pixtral(checkpoint.config, positions)
    model.load_state_dict(state, assign=True)
    return model.eval()


def check_lora(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Raise BundleError unless the checkpoint was opened with the adapter that the bundle was made with."""
    seen, made_with = checkpoint.lora.id if checkpoint.lora else None, bundle.lora
    if made_with is None and seen is not None:
        raise BundleError(f"{bundle.path} was made without an adapter, seen {seen}", "leave lora away")
    if made_with is not None and (seen is None or seen.sha256 != made_with.sha256):
        raise BundleError(
            f"{bundle.path} was made with the adapter {made_with}, seen {seen or 'none'}", Option("lora", "FOLDER")
        )


def tolerance_of(bundle: Bundle) -> float:
    """The largest error allowed of a bundle's tensors."""
    is_quantized = bundle.precision != bundle.dtype or bundle.kv_cache is not None
    return QUANTIZED_TOLERANCE if is_quantized else EXPORT_TOLERANCE[bundle.dtype]


def check_bundle(model: Model, reference: Pixtral) -> Iterator[TensorCheck]:
    """Compare every stage of a loaded bundle with the reference, case by case."""
    if model.bundle.model != reference.config:
        raise BundleError(
            "the bundle was made from a checkpoint of another configuration", "name the checkpoint it came from"
        )
    tolerance = tolerance_of(model.bundle)
    runner = model.runner

    def compare(stage: str, case: str, tensor: str, seen: npt.ArrayLike, expected: torch.Tensor) -> TensorCheck:
        a, b = np.asarray(seen), expected.numpy()
        if a.shape != b.shape:
            raise BundleError(
                f"{stage} {case}: {tensor} has shape {a.shape}, expected {b.shape}", "re-export the bundle"
            )
        return TensorCheck(stage, case, tensor, relative_error(a, b), tolerance)

    yield from _check_tables(model.bundle)
    with torch.inference_mode():
        yield from _check_vision(model, reference, compare)
        for case, prompt in prompt_cases(model.prompts):
            yield from _check_decoder(runner, reference, prompt, case, compare)


Compare = Callable[[str, str, str, npt.ArrayLike, torch.Tensor], TensorCheck]


def _check_tables(bundle: Bundle) -> Iterator[TensorCheck]:
    """The decoder's rotary tables at every position of the context, most of which no prompt here is long enough for."""
    import onnx

    graph = onnx.load(bundle.graph_path("decoder"), load_external_data=False).graph
    stored, decoder = {one.name: one for one in graph.initializer}, bundle.model.decoder
    names = (*DECODER_ROPE, *(QUERY_ROPE if decoder.query_scale else ()))
    for name, table in zip(names, decoder_rope_tables(decoder, bundle.limits.max_context), strict=True):
        if name not in stored:
            raise BundleError(f"{bundle.path}'s decoder has no {name}", "re-export the bundle")
        onnx.external_data_helper.load_external_data_for_tensor(stored[name], str(bundle.path))
        error = relative_error(onnx.numpy_helper.to_array(stored[name]), table.numpy())
        yield TensorCheck("tables", "all positions", name, error, EXPORT_TOLERANCE[bundle.dtype])


def _check_vision(model: Model, reference: Pixtral, compare: Compare) -> Iterator[TensorCheck]:
    for case, pixels in vision_cases(model.bundle):
        run = model.runner.sessions.vision.run({"pixels": pixels.astype(model.bundle.dtype)})
        expected = reference.image_features(torch.from_numpy(pixels))
        yield compare("vision", case, "image_features", run["image_features"].numpy(), expected)


def _check_decoder(
    runner: ModelRunner, reference: Pixtral, prompt: Prompt, case: str, compare: Compare
) -> Iterator[TensorCheck]:
    """Prefill in chunks and decode the reference's own greedy tokens; every logit must agree."""
    features = [reference.image_features(torch.from_numpy(image)[None])[0] for image in prompt.images]
    table = torch.cat(features) if features else torch.zeros(1, reference.config.decoder.dim)
    encoded = runner.encode_images(prompt)
    if features:
        yield compare("vision", case, "image_features", encoded, table)
    ids, index = torch.from_numpy(prompt.token_ids), torch.from_numpy(prompt.feature_index)
    tokens, places = prompt.token_ids[None], prompt.feature_index[None]
    embedded = runner.sessions.embed.run({"token_ids": tokens, "image_features": encoded, "feature_index": places})
    hidden = reference.tok_embeddings(ids[None], table, index[None])
    yield compare("embed", case, "hidden", embedded["hidden"].numpy(), hidden)
    cache = runner.sessions.decoder.new_cache(1, len(prompt.token_ids))
    expected = reference_logits(reference, ids, index, table)
    yield compare("prefill", case, "logits", runner.prefill(prompt, encoded, cache, all_logits=True), expected)
    steps = []
    for _ in range(DECODE_STEPS):
        token = int(expected[-1].argmax())
        steps.append(runner.decode_token(token, len(ids), cache))
        ids, index = torch.cat([ids, torch.tensor([token])]), torch.cat([index, torch.tensor([-1])])
        expected = reference_logits(reference, ids, index, table)
    yield compare("decode", case, "logits", np.stack(steps), expected[-DECODE_STEPS:])


def reference_logits(
    reference: Pixtral, token_ids: torch.Tensor, feature_index: torch.Tensor, features: torch.Tensor
) -> torch.Tensor:
    """Logits (T, V) of a full forward pass without a cache. token_ids and feature_index (T,); features (F, D)."""
    length = len(token_ids)
    x = reference.tok_embeddings(token_ids[None], features, feature_index[None])
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    hidden = reference.hidden(x, torch.arange(length)[None], mask)
    logits: torch.Tensor = reference(hidden, torch.arange(length))
    return logits
