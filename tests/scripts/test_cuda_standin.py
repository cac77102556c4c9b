"""The rules for the CUDA backend see what is wrong; what stands in for CUDA covers what is called.

The stand-in itself runs in `scripts/check_cuda_placement.py`, for which CI has no onnxruntime-gpu. Texts and events
here are from its runs, shortened.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from cuda_standin.build import HERE, requirements, stub
from cuda_standin.records import (
    DECODE,
    FAULTS,
    RECORDED,
    Copies,
    Nodes,
    Observation,
    Report,
    Step,
    observation_from_dict,
    parse_profile,
    parse_report,
    short_name,
)
from cuda_standin.verdict import EXPECTED, faults
from helpers.places import ROOT

FLASH = (
    "void onnxruntime::flash::flash_fwd_splitkv_kernel<onnxruntime::flash::Flash_fwd_kernel_traits<32, 64, 256, 4, "
    "false, false, cutlass::half_t>, true>(onnxruntime::flash::Flash_fwd_params)"
)
REPORT = f"""launch\t22\t0x0x0\tcublasGemmEx
launch\t1\t1x1x1\tvoid onnxruntime::cuda::_Clip<long>(long const*, long*, long const*, long const*, long, long)
launch\t2\t1x1x1\tvoid onnxruntime::cuda::_Clip<int>(int const*, int*, int const*, int const*, int, int)
replay\t3\t1x4x4\t{FLASH}
copy\t13\t2308\t256\tdevice to device
copy\t1\t516\t516\tdevice to host
"""
SLOT_BYTES = 131_072
RIGHT = Report(
    {"cublasGemmEx": 22, "flash_fwd_splitkv_kernel 1x4x4": 3},
    {},
    {
        "device to device": Copies(13, 2308, 256),
        "device to host": Copies(1, 516, 516),
        "host to device": Copies(2, 2048, 1024),
    },
)
REPLAYED = replace(RIGHT, launched={}, replayed=RIGHT.launched)
NODES = {
    "vision": Nodes({"CUDA": {"Conv": 1, "MatMul": 30}, "CPU": {"Squeeze": 2, "Concat": 2}}, 32),
    "embed": Nodes({"CUDA": {"Gather": 2, "Where": 1}}),
    "decoder": Nodes({"CUDA": {"MatMul": 22, "Attention": 3}}),
}
SOUND = Observation(
    "float16",
    layers=3,
    cache_slot_bytes=SLOT_BYTES,
    attention={"using Flash Attention (batch=1, q_seq=1, total_seq=1024, past=no)": 3},
    nodes=NODES,
    steps=[Step(DECODE, 1, RIGHT, 2048, 516), Step(RECORDED, 1, REPLAYED, 2048, 516)],
)


def with_step(**changes: Any) -> Observation:
    """The sound observation with another report of its plain step."""
    return replace(SOUND, steps=[replace(SOUND.steps[0], report=replace(RIGHT, **changes))])


def with_copies(direction: str, copies: Copies) -> Observation:
    return with_step(copies={**RIGHT.copies, direction: copies})


def with_decoder(nodes: Nodes) -> Observation:
    return replace(SOUND, nodes={**NODES, "decoder": nodes})


def test_a_report_is_read() -> None:
    report = parse_report(REPORT)
    assert report.launched == {"cublasGemmEx": 22, "_Clip 1x1x1": 3}
    assert report.replayed == {"flash_fwd_splitkv_kernel 1x4x4": 3}
    assert report.copies == {"device to device": Copies(13, 2308, 256), "device to host": Copies(1, 516, 516)}


def test_a_kernel_is_called_by_its_own_name() -> None:
    assert short_name(FLASH) == "flash_fwd_splitkv_kernel"
    assert short_name("cudnn_kernel") == "cudnn_kernel"
    assert short_name("void a::(anonymous namespace)::k<(b::Kind)1>(int)") == "k"


def test_a_profile_is_read() -> None:
    def event(kind: str, provider: str, output_bytes: int, name: str = "n_kernel_time") -> dict[str, Any]:
        seen = {"op_name": kind, "provider": f"{provider}ExecutionProvider", "output_size": str(output_bytes)}
        return {"cat": "Node", "name": name, "args": seen}

    events = [
        {"cat": "Session", "name": "model_run", "args": {}},
        event("MatMul", "CUDA", 4096),
        event("MatMul", "CUDA", 512),
        event("Squeeze", "CPU", 8),
        event("Concat", "CPU", 24),
        {"cat": "Node", "name": "n_fence_before", "args": {"op_name": "MatMul"}},
    ]
    assert parse_profile(events) == Nodes({"CUDA": {"MatMul": 2}, "CPU": {"Squeeze": 1, "Concat": 1}}, 24)


def test_an_observation_survives_its_way_from_one_process_to_the_other() -> None:
    assert observation_from_dict(json.loads(json.dumps(asdict(SOUND)))) == SOUND


def test_nothing_is_wrong_with_what_is_right() -> None:
    assert faults(SOUND) == []


@pytest.mark.parametrize(
    "observation, words",
    [
        (with_decoder(Nodes({"CUDA": {"MatMul": 22}, "CPU": {"Asinh": 1}}, 8)), "decoder: Asinh on the CPU"),
        (with_decoder(Nodes({"CUDA": {"MatMul": 22, "MemcpyToHost": 1}})), "decoder: 1 MemcpyToHost"),
        (with_decoder(Nodes({})), "decoder: nothing on CUDA"),
        (replace(SOUND, nodes={"vision": Nodes({"CUDA": {"Conv": 1}, "CPU": {"Mul": 1}}, 4096)}), "vision: 4096 bytes"),
        (with_copies("device to host", Copies(2, 3588, 3072)), "2 copies, 3588 bytes, to the host, not 1 of 516"),
        (with_copies("device to host", Copies()), "0 copies, 0 bytes, to the host"),
        (with_copies("host to device", Copies(3, 2052, 1024)), "3 copies, 2052 bytes, to the device, not 2 of 2048"),
        (with_copies("device to device", Copies(8, SLOT_BYTES, 16_384)), "131072 bytes copied within the device"),
        (with_step(launched={"attention_kernel_batched_impl 1x2x1": 3}), "3 attention_kernel_batched_impl 1x2x1, not"),
        (with_step(launched={"flash_fwd_kernel 1x1x4": 2}), "2 flash_fwd_kernel 1x1x4, not 3"),
        (with_step(launched={"cublasGemmEx": 22}), "no kernel that is known"),
        (replace(SOUND, dtype="float32"), "not 3 of UnfusedSoftmaxKernel"),
        (with_step(launched={}, replayed=RIGHT.launched), "0 launches, and 25 by a CUDA graph"),
        (replace(SOUND, steps=[Step(RECORDED, 1, RIGHT, 2048, 516)]), "25 launches, and 0 by a CUDA graph"),
        (
            replace(SOUND, steps=[SOUND.steps[0], replace(SOUND.steps[1], report=replace(
                REPLAYED, replayed={"flash_fwd_splitkv_kernel 1x4x4": 3}))]),
            "{1: 25} without a CUDA graph, {1: 3} with one",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(observation: Observation, words: str) -> None:
    assert any(words in fault for fault in faults(observation)), faults(observation)


def test_each_planted_fault_is_to_be_found() -> None:
    assert set(EXPECTED) == set(FAULTS)


def test_functions_that_do_nothing_are_written() -> None:
    assert stub("cublasLtDestroy") == "int cublasLtDestroy() { return 0; }"
    assert "*made = new char" in stub("cudaStreamCreateWithFlags")
    assert 'standin_launch("cublasGemmEx")' in stub("cublasGemmEx")
    assert 'standin_launch("cublasLtMatmul")' in stub("cublasLtMatmul")
    assert "standin_launch" not in stub("cublasLtMatmulDescSetAttribute")
    assert "*value = 13000;" in stub("cudaDriverGetVersion")
    assert stub("cublasGetStatusString").startswith("const char*")


def test_the_environment_has_no_other_cuda() -> None:
    assert any(requirement.startswith("onnxruntime-gpu") for requirement in requirements())
    assert not any("[" in requirement or "cuda-bindings" in requirement for requirement in requirements())


def test_whatever_the_device_calls_of_cuda_bindings_is_there() -> None:
    def tree(path: Path) -> ast.AST:
        return ast.parse(path.read_text(encoding="utf-8"))

    device = tree(ROOT / "runtime/pixtral_runtime/backends/cuda.py")
    used = [getattr(node, "attr", getattr(node, "value", None)) for node in ast.walk(device)]
    called = {name for name in used if isinstance(name, str) and re.fullmatch(r"cuda[A-Z]\w+", name)}
    bindings = tree(HERE / "python/cuda/bindings/runtime.py")
    there = {node.name for node in ast.walk(bindings) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    there |= {node.id for node in ast.walk(bindings) if isinstance(node, ast.Name)}
    assert len(called) > 20
    assert called <= there
