"""Stage of the device check: whether transformers runs there as its measurement needs it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from device_results import emit, median_ms, reported

LAYERS = 4  # of 40; the head is read once in either


def mistral(layers: int) -> Any:
    """A decoder of Pixtral-12B's widths with random bfloat16 weights, made on the device."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    small = bool(os.environ.get("DEVICE_CHECK_SMALL"))
    config = MistralConfig(
        hidden_size=256 if small else 5120, intermediate_size=512 if small else 14336, num_hidden_layers=layers,
        num_attention_heads=4 if small else 32, num_key_value_heads=2 if small else 8, head_dim=128,
        vocab_size=1024 if small else 131_072, max_position_embeddings=131_072, sliding_window=None,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1e9},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    place = "cuda" if torch.cuda.is_available() else "cpu"
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(place):
            model = MistralForCausalLM(config)
    finally:
        torch.set_default_dtype(kept)
    return model.eval()


def smoke() -> None:
    """A few layers: an eager step on a growing cache, and a step on a static cache in a CUDA graph."""
    try:
        import torch
        import transformers
    except ImportError as error:
        emit("transformers", f"not here: {error}")
        return
    on_gpu = torch.cuda.is_available()
    emit(
        "transformers",
        f"{transformers.__version__}, torch {torch.__version__}, cuda {torch.version.cuda}, GPU {on_gpu}",
    )
    started = time.perf_counter()
    model = mistral(LAYERS)
    emit(
        "transformers: model made",
        round(time.perf_counter() - started, 1),
        "s",
        kind=str(next(model.parameters()).dtype),
    )
    place = next(model.parameters()).device
    wait: Callable[[], Any] = torch.cuda.synchronize if on_gpu else (lambda: None)
    rows, small = 256, model.config.hidden_size < 5120
    tokens = torch.randint(0, model.config.vocab_size, (1, rows), device=place)
    with torch.inference_mode(), reported("transformers eager"):
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        started = time.perf_counter()
        model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        wait()
        emit("transformers: first prefill of 256", round(1e3 * (time.perf_counter() - started), 1), "ms")

        def step() -> None:
            model(tokens[:, :1], past_key_values=cache, use_cache=True)
            wait()

        emit(f"transformers eager, {LAYERS} layers", median_ms(step, 30, 5), "ms", expected="2.5 to 3.5")
    with torch.no_grad(), reported("transformers static"):  # inference tensors may not be changed in a graph's replay
        from transformers import StaticCache

        static = StaticCache(config=model.config, max_cache_len=512)
        model(tokens, past_key_values=static, use_cache=True, logits_to_keep=1,
              cache_position=torch.arange(rows, device=place))  # fmt: skip
        token, position = tokens[:, :1].clone(), torch.tensor([rows], device=place)

        def static_step() -> Any:
            return model(token, past_key_values=static, use_cache=True, cache_position=position,
                         position_ids=position[None]).logits  # fmt: skip

        for _ in range(3):
            expected = static_step().float().clone()
        emit("transformers: static step, finite", bool(expected.isfinite().all()), expected="True")
        if not on_gpu:
            emit("transformers in a CUDA graph", "torch.cuda is not available here", small=small)
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                static_step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = static_step()

        def replay() -> None:
            graph.replay()
            wait()

        emit(f"transformers in a CUDA graph, {LAYERS} layers", median_ms(replay, 50, 5), "ms", expected="1.3")
        emit("transformers: replay finite", bool(output.float().isfinite().all()), expected="True")
