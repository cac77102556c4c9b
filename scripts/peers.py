"""Runtimes of Pixtral's decoder: how each gets a model of the same shapes, and how a round of it is measured.

Runs as a child process of `bench_peers.py`, in the interpreter that has the runtime: above its functions stands nothing
but NumPy and the standard library. A child loads its model, says so, and measures a round whenever it is told to; it
stays loaded while others have their turn, so that turns are seconds apart.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from child_process import counters
from random_gguf import CONTEXT, Shapes, write_gguf

GROUP = 128  # weights to a scale, as in our bundles

Logits = npt.NDArray[np.float32]
"""Of the last token, (V,)."""


@dataclass(frozen=True)
class Work:
    """What a round measures."""

    model: str  # path of what the runtime loads
    vocab_size: int
    prompt_tokens: int
    steps: int
    threads: int

    @property
    def prompt(self) -> npt.NDArray[np.int64]:
        """Random text tokens, (T,), the same in all processes."""
        return np.random.default_rng(0).integers(self.vocab_size // 2, self.vocab_size, self.prompt_tokens)


@dataclass(frozen=True)
class Loaded:
    """A model in memory. `prefill` begins anew with the work's prompt, `decode` adds a token at a position."""

    prefill: Callable[[], Logits]
    decode: Callable[[int, int], Logits]
    versions: dict[str, str]
    threads: int
    in_process: bool = True  # else a server has the model, and memory is not ours to tell


def measure(work: Work, model: Loaded) -> dict[str, Any]:
    """A round: a prefill, and greedy decode steps, whose speed is that of the median step."""
    started = time.perf_counter()
    logits = model.prefill()
    prefill_s = time.perf_counter() - started
    steps_s = []
    for position in range(work.prompt_tokens, work.prompt_tokens + work.steps):
        token = int(logits.argmax())
        started = time.perf_counter()
        logits = model.decode(token, position)
        steps_s.append(time.perf_counter() - started)
    if not np.isfinite(logits).all():
        raise SystemExit("logits are not finite: what was measured is not what a real model does")
    # Not getrusage: its peak starts with that of the parent process.
    memory = counters(Path("/proc/self/status"))
    return {
        "prefill_tokens_per_s": work.prompt_tokens / prefill_s,
        "decode_tokens_per_s": 1 / statistics.median(steps_s),
        "peak_rss_bytes": 1024 * memory["VmHWM"] if model.in_process else None,
        "anonymous_bytes": 1024 * memory["RssAnon"] if model.in_process else None,
    }


def write_text_checkpoint(checkpoint: str, target: str) -> None:
    """The decoder of a Pixtral checkpoint as a text model in Hugging Face's format, bfloat16, streamed.

    The tokenizer knows one word: converters insist on one, and prompts are token ids.
    """
    import torch
    from safetensors.torch import save_file

    from make_synthetic_checkpoint import hf_config
    from pixtral_export.checkpoint.reader import open_checkpoint
    from pixtral_export.checkpoint.tensor_names import hf_name
    from pixtral_export.model.parameters import parameters

    opened, folder = open_checkpoint(Path(checkpoint)), Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    total = 0
    for parameter in parameters(opened.config):
        if parameter.name.startswith("vision_"):
            continue
        name = hf_name(parameter.name).removeprefix("language_model.")
        places[name] = file = f"model-{len(places) + 1:05}.safetensors"
        tensor = opened.read(parameter).to(torch.bfloat16).contiguous()
        total += tensor.nbytes
        save_file({name: tensor}, folder / file, {"format": "pt"})
    both = hf_config(opened.config)["text_config"] | hf_config(opened.config, "hf-new")["text_config"]
    config = both | {"architectures": ["MistralForCausalLM"], "hidden_act": "silu", "dtype": "bfloat16"}
    words = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
    for name, content in {
        "config.json": config | {"bos_token_id": 1, "eos_token_id": 2},
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": places},
        "tokenizer.json": words,
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    }.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def load_ours(work: Work) -> Loaded:
    """A bundle in ONNX Runtime."""
    import onnxruntime

    from pixtral_runtime import load
    from pixtral_runtime.inputs.prompt import Prompt
    from pixtral_runtime.version import __version__

    runner = load(work.model, threads=work.threads).runner
    prompt = Prompt(work.prompt, np.full(work.prompt_tokens, -1), (), 0)
    features = runner.encode_images(prompt)
    cache = runner.sessions.decoder.new_cache(1, work.prompt_tokens + work.steps + 1)
    return Loaded(
        lambda: np.asarray(runner.prefill(prompt, features, cache)[-1], np.float32),
        lambda token, position: runner.decode_token(token, position, cache),
        {"pixtral": __version__, "onnxruntime": onnxruntime.__version__},
        work.threads,
    )


def load_transformers(work: Work) -> Loaded:
    """transformers in bfloat16 on torch's own kernels, with the cache it takes by itself."""
    import torch
    import transformers

    torch.set_num_threads(work.threads)
    model = transformers.MistralForCausalLM.from_pretrained(work.model, dtype=torch.bfloat16).eval()
    cache: Any = None

    def advance(tokens: npt.NDArray[np.int64]) -> Logits:
        nonlocal cache
        with torch.inference_mode():
            out = model(torch.from_numpy(tokens)[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        logits: Logits = out.logits[0, -1].float().numpy()
        return logits

    def prefill() -> Logits:
        nonlocal cache
        cache = None
        return advance(work.prompt)

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return Loaded(prefill, lambda token, _position: advance(np.array([token])), versions, torch.get_num_threads())


def write_random_gguf(source: str, target: str) -> None:
    """A Q4_0 model of the checkpoint's shapes; its weights are others, because rounding them would show nothing new."""
    config = json.loads(Path(source, "config.json").read_text(encoding="utf-8"))
    shapes = Shapes(
        dim=config["hidden_size"], n_layers=config["num_hidden_layers"], head_dim=config["head_dim"],
        hidden_dim=config["intermediate_size"], n_heads=config["num_attention_heads"],
        n_kv_heads=config["num_key_value_heads"], vocab_size=config["vocab_size"], rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
    )  # fmt: skip
    write_gguf(Path(target), shapes)


def load_llama_cpp(work: Work) -> Loaded:
    """llama.cpp, through the C interface that llama-cpp-python exposes, with its own defaults for a batch."""
    lib = importlib.import_module("llama_cpp")
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(work.model.encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {work.model}")
    params = lib.llama_context_default_params()
    params.n_ctx = CONTEXT
    params.n_batch = max(params.n_batch, work.prompt_tokens)
    params.n_threads = params.n_threads_batch = work.threads
    context = lib.llama_init_from_model(model, params)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def advance(tokens: npt.NDArray[np.int64]) -> Logits:
        array = (ctypes.c_int32 * len(tokens))(*tokens.tolist())
        status = lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens)))  # logits of the last token
        if status:
            raise SystemExit(f"llama_decode returned {status}")
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (vocabulary,)).copy()

    def prefill() -> Logits:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        return advance(work.prompt)

    versions = {"llama_cpp_python": lib.__version__, "llama_cpp_system": lib.llama_print_system_info().decode().strip()}
    return Loaded(prefill, lambda token, _position: advance(np.array([token])), versions, lib.llama_n_threads(context))


def convert_genai(source: str, target: str) -> None:
    """int4 by the builder that onnxruntime-genai ships, with the head in int8 and logits for the last token only."""
    import runpy

    importlib.import_module("onnxruntime_genai")  # says plainly that it is missing
    options = ["hf_token=false", f"block_size={GROUP}", "accuracy_level=4", "prune_lm_head=true"]
    options += ["algo_config=rtn", "matmul_mixed_precision=last_matmul:int8"]
    sys.argv[1:] = ["-i", source, "-o", target, "-c", target, "-p", "int4", "-e", "cpu", "--extra_options", *options]
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


def load_genai(work: Work) -> Loaded:
    """onnxruntime-genai. It picks tokens itself, so that picking is inside its times."""
    og, onnxruntime = importlib.import_module("onnxruntime_genai"), importlib.import_module("onnxruntime")
    config = og.Config(work.model)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": work.threads}}}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=work.prompt_tokens + work.steps + 2, do_sample=False)
    generator: Any = None

    def advance() -> Logits:
        if generator.is_done():
            raise SystemExit("the model ended its answer early")
        generator.generate_next_token()  # runs the model, but for the first token after the prompt
        return np.asarray(generator.get_logits(), np.float32).reshape(-1)

    def prefill() -> Logits:
        nonlocal generator
        generator = og.Generator(model, params)
        generator.append_tokens(work.prompt.astype(np.int32))
        return advance()

    versions = {"onnxruntime_genai": og.__version__, "onnxruntime": onnxruntime.__version__}
    return Loaded(prefill, lambda _token, _position: advance(), versions, work.threads)


def convert_openvino(source: str, target: str) -> None:
    """int4 by optimum-intel without data, the head as it likes, and logits for the last token only."""
    optimum, ops = importlib.import_module("optimum.intel"), importlib.import_module("openvino.opset13")
    scheme = optimum.OVWeightQuantizationConfig(bits=4, sym=True, group_size=GROUP, ratio=1.0)
    model = optimum.OVModelForCausalLM.from_pretrained(source, export=True, compile=False, quantization_config=scheme)
    head = model.model.output("logits").get_node().input_value(0).get_node()
    while head.get_type_name() != "MatMul":
        head = head.input_value(0).get_node()
    hidden = head.input_value(0)  # (B, T, D)
    one = [np.array([number], np.int64) for number in (-1, np.iinfo(np.int64).max, 1, 1)]
    head.input(0).replace_source_output(ops.slice(hidden, *one).output(0))  # (B, 1, D)
    model.model.validate_nodes_and_infer_types()
    model.save_pretrained(target)


def load_openvino(work: Work) -> Loaded:
    """OpenVINO's CPU plugin with its own defaults for latency."""
    ov = importlib.import_module("openvino")
    settings = {"INFERENCE_NUM_THREADS": work.threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = ov.Core().compile_model(str(Path(work.model, "openvino_model.xml")), "CPU", settings)
    wanted = {name for port in compiled.inputs for name in port.names}
    request = compiled.create_infer_request()

    def advance(tokens: npt.NDArray[np.int64], start: int) -> Logits:
        end = start + len(tokens)
        feeds: dict[str, npt.NDArray[Any]] = {
            "input_ids": tokens[None], "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end)[None], "beam_idx": np.zeros(1, np.int32),
        }  # fmt: skip
        out = request.infer({name: value for name, value in feeds.items() if name in wanted})
        return np.array(out["logits"], np.float32).reshape(-1)

    def prefill() -> Logits:
        request.reset_state()
        return advance(work.prompt, 0)

    versions = {"openvino": ov.__version__}
    return Loaded(prefill, lambda token, position: advance(np.array([token]), position), versions, work.threads)


def load_vllm(work: Work) -> Loaded:
    """vLLM behind its own server, at the address that `model` is: a streamed completion, timed by its first token."""
    address = work.model.rstrip("/")
    with urllib.request.urlopen(f"{address}/models") as answer:
        name = json.load(answer)["data"][0]["id"]
    with urllib.request.urlopen(f"{address.removesuffix('/v1')}/version") as answer:
        version = json.load(answer)["version"]
    asked = {"model": name, "prompt": work.prompt.tolist(), "max_tokens": work.steps + 1, "temperature": 0.0}
    body = json.dumps(asked | {"ignore_eos": True, "stream": True}).encode()
    stream: Any = None

    def token() -> Logits:
        for line in stream:
            if line.startswith(b"data: {") and json.loads(line[6:])["choices"]:
                return np.zeros(1, np.float32)  # the server picks tokens itself
        raise SystemExit("the server ended its answer early")

    def prefill() -> Logits:
        nonlocal stream
        if stream is not None:
            stream.close()
        headers = {"Content-Type": "application/json"}
        stream = urllib.request.urlopen(urllib.request.Request(f"{address}/completions", body, headers))
        return token()

    return Loaded(prefill, lambda _token, _position: token(), {"vllm": version}, 0, in_process=False)


PREPARE: dict[str, Callable[[str, str], None]] = {
    "text": write_text_checkpoint,
    "llama.cpp": write_random_gguf,
    "onnxruntime-genai": convert_genai,
    "openvino": convert_openvino,
}
LOAD: dict[str, Callable[[Work], Loaded]] = {
    "pixtral": load_ours,
    "llama.cpp": load_llama_cpp,
    "transformers": load_transformers,
    "onnxruntime-genai": load_genai,
    "openvino": load_openvino,
    "vllm": load_vllm,
}


def child_main(task: str, settings: dict[str, Any]) -> None:
    """Convert a model, or load one and measure a round for each line of standard input; answers are lines of JSON."""
    if task == "prepare":
        PREPARE[settings["name"]](settings["source"], settings["target"])
        return
    work = Work(**settings)
    model = LOAD[task](work)
    measure(work, model)  # untimed: pages weights in
    print(json.dumps({"versions": model.versions, "threads": model.threads}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(measure(work, model)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--child"]:
        sys.exit("run bench_peers.py, which runs this")
    child_main(sys.argv[2], json.loads(sys.argv[3]))
