"""What llama.cpp itself costs the same weights on the same text, by its own quantizer and its own kernels.

    pip install --no-deps --target artifacts/llama gguf cyllama==0.2.18     # llama.cpp b9190 in a wheel
    PYTHONPATH=artifacts/llama python scripts/measure_llama_cpp.py GGUF CHECKPOINT FOLDER --windows 4
    PYTHONPATH=artifacts/llama python scripts/measure_llama_cpp.py GGUF CHECKPOINT FOLDER --beside "int4 in 32"

CHECKPOINT is what `convert_gguf.py` made of GGUF. The file's weights are written in float32 and quantized by
`llama_model_quantize` with its defaults. llama.cpp then reads the windows of `measure_text.py` and gives the logits of
every position, which are compared with those of the exported float32 bundle in FOLDER. float32 in llama.cpp is the
control: it must be nowhere apart. `--beside` adds recipes of ours, so that all rows are of one run. Prints a table; the
last line is JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from convert_gguf import old_ids, tokens_in_order
from measure_text import COMPARED, SAMPLES, WINDOW, Candidate, LogitsOf, candidates, markdown, measure
from pixtral_export.checkpoint.reader import open_checkpoint

FILE_TYPES = {"Q4_0": 2, "Q8_0": 7}  # llama.h, llama_ftype
SAME = 1e-3  # nats; llama.cpp keeps keys and values in float16


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(f"the package {error.name} is missing; this script's -h begins with how to get it") from None


def write_plain(gguf: Any, source: Path, target: Path) -> None:
    """The same file with all weights in float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, items = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), kind, sub_type=items)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(llama: Any, plain: Path, target: Path, kind: str) -> None:
    settings = llama.LlamaModelQuantizeParams()
    settings.ftype = FILE_TYPES[kind]
    llama.model_quantize(str(plain), str(target), settings)


def by_llama_cpp(llama: Any, path: Path, ids_there: np.ndarray, threads: int) -> LogitsOf:
    # get_logits_ith of this binding asks the model for the size of its vocabulary, which only the vocabulary knows.
    size = {"n_vocab": property(lambda model: model.get_vocab().n_vocab)}
    model = type("Model", (llama.LlamaModel,), size)(str(path))
    settings = llama.LlamaContextParams()
    settings.n_ctx = WINDOW
    settings.n_threads = settings.n_threads_batch = threads

    def logits(ids: np.ndarray) -> np.ndarray:
        context = llama.LlamaContext(model, settings)
        batch = llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for position, token in enumerate(ids_there[ids].tolist()):
            batch.add(token, position, [0], True)
        context.decode(batch)
        return np.stack([np.array(context.get_logits_ith(n), np.float32)[ids_there] for n in range(len(ids))])

    return logits


def llama_candidates(gguf: Any, llama: Any, source: Path, threads: int) -> Iterator[Candidate]:
    fields = gguf.GGUFReader(source).fields
    order = tokens_in_order(*(fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type")))
    ids_there = np.array(old_ids(order))
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "F32.gguf")
        write_plain(gguf, source, plain)
        yield "llama.cpp: F32", "", by_llama_cpp(llama, plain, ids_there, threads)
        for kind in FILE_TYPES:
            target = Path(folder, f"{kind}.gguf")
            quantize(llama, plain, target, kind)
            yield f"llama.cpp: {kind}", "", by_llama_cpp(llama, target, ids_there, threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--windows", type=int, default=12, help=f"documents to read, {WINDOW} tokens of each")
    parser.add_argument("--beside", action="append", default=[], choices=COMPARED, metavar="NAME", help="repeatable")
    parser.add_argument("--samples", action="append", choices=SAMPLES, help="calibrate with these; both unless named")
    parser.add_argument("--threads", type=int, default=1, help="for llama.cpp")
    args = parser.parse_args()
    gguf, llama = package("gguf"), package("cyllama.llama.llama_cpp")
    llama.disable_logging()
    theirs = llama_candidates(gguf, llama, args.gguf, args.threads)
    checkpoint = open_checkpoint(args.checkpoint)
    ours = candidates(checkpoint, args.folder, args.beside, args.samples or SAMPLES) if args.beside else ()
    rows = measure(args.checkpoint, args.folder, args.windows, chain(theirs, ours))
    print(markdown(rows))
    print(json.dumps(rows))
    if (apart := rows[1]["kl_nats"]) > SAME:
        raise SystemExit(
            f"llama.cpp's float32 is {apart} nats from ours, above {SAME}: other weights than CHECKPOINT's?"
        )


if __name__ == "__main__":
    main()
