"""Stage of the device check: transformers in bfloat16 beside the project, the same shapes with random weights."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from device_results import NEW_TOKENS, TEXT_TOKENS, emit, median_ms, reported

SMALL = bool(os.environ.get("DEVICE_CHECK_SMALL"))  # a rehearsal without a GPU


def transformers() -> None:
    """Decode eagerly and in a CUDA graph, prefill, vision, and a whole request."""
    try:
        import torch
        import transformers as peer
    except ImportError as error:
        emit("transformers", f"not here: {error}")
        return
    gpu = torch.cuda.is_available()
    emit("transformers", f"{peer.__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}, GPU {gpu}")
    started = time.perf_counter()
    model = pixtral()
    attention = model.config.text_config._attn_implementation
    emit("transformers: model made", round(time.perf_counter() - started, 1), "s", attention=attention)
    wait: Callable[[], Any] = torch.cuda.synchronize if gpu else (lambda: None)
    with torch.no_grad(), flash_attention():
        with reported("transformers eager"):
            eager(model, wait, "25 to 35")
        with reported("transformers prefill"):
            tokens = random_tokens(model, 1, 64 if SMALL else 4160)
            read = waiting(lambda: model(tokens, logits_to_keep=1, use_cache=True), wait)
            emit(f"transformers prefill {tokens.shape[1]:,}", median_ms(read, 3, 1, 2.0), "ms", expected="170 to 250")
        with reported("transformers vision"):
            side = 64 if SMALL else 1024
            pixels = torch.randn(1, 3, side, side, device=model.device, dtype=model.dtype)
            sizes = torch.tensor([[side, side]], device=model.device)
            see = waiting(lambda: model.model.get_image_features(pixel_values=pixels, image_sizes=sizes), wait)
            emit(f"transformers vision 1 × {side}²", median_ms(see, 5, 2, 2.0), "ms", expected="40 to 80")
        with reported("transformers request"):
            request(model, wait)
    with torch.no_grad(), reported("transformers eager as it comes"):
        # cuDNN's attention, which PyTorch prefers on this GPU, plans anew for every length that a cache grows to.
        eager(model, wait, steps=6, name="transformers eager, attention as PyTorch picks it,")
    for slots, expected in ((1, "6.5 to 7.5"), (16, "")):
        with torch.no_grad(), reported(f"transformers graph {slots}"):  # inference mode forbids what a replay changes
            in_a_graph(model, wait, slots, expected)


def pixtral() -> Any:
    """Pixtral-12B's shapes, made on the GPU."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig, PixtralVisionConfig

    text = MistralConfig(
        hidden_size=256 if SMALL else 5120, intermediate_size=512 if SMALL else 14336,
        num_hidden_layers=2 if SMALL else 40, num_attention_heads=4 if SMALL else 32,
        num_key_value_heads=2 if SMALL else 8, head_dim=128, vocab_size=4096 if SMALL else 131_072,
        max_position_embeddings=131_072, sliding_window=None, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9},
    )  # fmt: skip
    vision = PixtralVisionConfig(num_hidden_layers=2 if SMALL else 24)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=10, projector_hidden_act="gelu",
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=False,
    )  # fmt: skip
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            return LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(kept)


@contextmanager
def flash_attention() -> Iterator[None]:
    """Without cuDNN's attention."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def waiting(work: Callable[[], Any], wait: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        work()
        wait()

    return run


def random_tokens(model: Any, slots: int, count: int) -> Any:
    import torch

    return torch.randint(20, model.config.text_config.vocab_size, (slots, count), device=model.device)


def eager(
    model: Any, wait: Callable[[], Any], expected: str = "", *, steps: int = 40, name: str = "transformers eager"
) -> None:
    """A step of one slot over a cache that grows."""
    from transformers import DynamicCache

    cache, rows = DynamicCache(config=model.config.text_config), 64 if SMALL else 2048
    tokens = random_tokens(model, 1, rows)
    model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    step = waiting(lambda: model(tokens[:, :1], past_key_values=cache, use_cache=True).logits.argmax(-1), wait)
    emit(f"{name} 1 × {rows:,}", median_ms(step, steps, min(5, steps), 3.0), "ms", expected=expected)


def in_a_graph(model: Any, wait: Callable[[], Any], slots: int, expected: str) -> None:
    """A step over a static cache, recorded once and replayed."""
    import torch
    from transformers import StaticCache

    rows = 64 if SMALL else 2048
    figure = f"transformers in a CUDA graph {slots} × {rows:,}"
    cache = StaticCache(config=model.config.text_config, max_cache_len=rows)
    token, position = random_tokens(model, slots, 1), torch.tensor([rows - 1], device=model.device)

    def step() -> Any:
        return model(token, past_key_values=cache, use_cache=True, cache_position=position,
                     position_ids=position[None].expand(slots, 1)).logits.argmax(-1)  # fmt: skip

    step()
    if not torch.cuda.is_available():
        emit(figure, "torch.cuda is not available here")
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    milliseconds = median_ms(waiting(graph.replay, wait), 50, 5, 1.0)
    emit(figure, milliseconds, "ms", expected=expected, tokens_per_s=round(1e3 * slots / milliseconds, 1))


def request(model: Any, wait: Callable[[], Any]) -> None:
    """A picture of 480 × 360 pixels on the GPU already, and as many new tokens as the project's requests have."""
    import torch

    height, width, patch = 368, 480, 16
    image = ([10] * (width // patch) + [12]) * (height // patch)
    tokens = torch.tensor([[1, *image[:-1], 13, *range(1000, 1000 + TEXT_TOKENS)]], device=model.device)
    pixels = torch.randn(1, 3, height, width, device=model.device, dtype=model.dtype)
    sizes = torch.tensor([[height, width]], device=model.device)

    def answer(count: int) -> float:
        started = time.perf_counter()
        model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=pixels, image_sizes=sizes,
                       do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)  # fmt: skip
        wait()
        return time.perf_counter() - started

    answer(4)
    seconds = answer(4 if SMALL else NEW_TOKENS)
    emit("transformers requests, one at a time", round(1 / seconds, 3), "per s", expected="0.2 to 0.3",
         seconds=round(seconds, 2), prompt_tokens=tokens.shape[1])  # fmt: skip
