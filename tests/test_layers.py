"""Imports point down, from package to package and from room to room, and nothing goes in a circle.

What is imported within a function, or for types only, counts as well: who reads a file has to know it.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from helpers.places import ROOT

FOLDERS = {
    "pixtral_cli": ROOT / "pixtral_cli",
    "pixtral_export": ROOT / "export" / "pixtral_export",
    "pixtral_engines": ROOT / "engines" / "pixtral_engines",
    "pixtral_runtime": ROOT / "runtime" / "pixtral_runtime",
}
BELOW = {
    "pixtral_cli": {"pixtral_export", "pixtral_engines", "pixtral_runtime"},
    "pixtral_export": {"pixtral_runtime"},
    "pixtral_engines": {"pixtral_runtime"},
    "pixtral_runtime": set[str](),
}
NEVER = {
    "pixtral_cli": {"torch", "click"},
    "pixtral_export": {"tensorrt", "tensorrt_rtx"},
    "pixtral_engines": {"torch", "transformers"},
    "pixtral_runtime": {"torch", "transformers", "onnx", "onnxscript", "onnx_ir", "typer", "rich"},
}
ALLOWED = {
    # Only where a CUDA device is used, of which the extra `gpu` brings onnx along, or where engines are built.
    "runtime/pixtral_runtime/backends/candidates.py": {"onnx"},
    "runtime/pixtral_runtime/backends/onnx_nodes.py": {"onnx"},
    "runtime/pixtral_runtime/backends/ort_cuda_attention.py": {"onnx"},
    "runtime/pixtral_runtime/backends/ort_cuda_lowering.py": {"onnx"},
}
ORDER = {
    "pixtral_cli": (
        ("__main__",),
        ("main",),
        ("commands",),
        ("eval_curve", "tune_exports", "tune_files"),
        ("engine_report", "eval_files", "golden_report", "verify_report"),
        (
            "bench_cases",
            "bench_tables",
            "chat",
            "device_rows",
            "eval_tables",
            "export_run",
            "job_progress",
            "job_watch",
            "recipe_costs",
            "tune_grid",
            "tune_tables",
        ),
        ("job_files", "job_options", "typed_lines"),
        ("dropped_paths", "options"),
        ("output",),
    ),
    "pixtral_export": (
        ("certify",),
        ("check", "export", "origin"),
        ("plan",),
        ("weights",),
        ("checkpoint", "graphs", "quantization"),
        ("model", "target_folder", "weight_names"),
    ),
    "pixtral_engines": (
        ("certify",),
        ("build", "check", "plan_judgement"),
        ("build_plan",),
        ("compiled_plan", "interpreter", "network", "profiles", "targets"),
        ("layer_semantics", "lowered_graph"),
        ("attention_semantics",),
        ("tensors",),
        ("arrays", "lowering", "lowering_trt10_3", "parts"),
    ),
    "pixtral_runtime": (
        ("evaluation", "server"),
        ("batch", "bench", "compare"),
        ("generation", "sources"),
        ("backends", "inputs"),
        ("bundle", "device"),
        ("files", "html_page", "json_data", "server_address", "stats", "workers"),
        ("errors", "version"),
    ),
}
"""Rooms of each package, files and folders alike, from the top down. A room imports from lines below its own only."""
HEAVY = {
    "cv2", "huggingface_hub", "llguidance", "matplotlib", "mistral_common", "numpy", "onnx", "onnx_ir", "onnxruntime",
    "onnxscript", "openai", "PIL", "polygraphy", "pyarrow", "ray", "rich", "safetensors", "tensorrt", "tensorrt_rtx",
    "torch", "transformers",
}  # fmt: skip


ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *(f.parent for f in FOLDERS.values()))))}


def imports(node: ast.AST, *, at_start: bool = False) -> Iterator[str]:
    """Top-level names that a piece of code imports; `at_start`: only those that importing its module imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield (node.module or "").partition(".")[0]
    if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return
    if at_start and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for child in ast.iter_child_nodes(node):
        yield from imports(child, at_start=at_start)


def complaints(package: str, code: str, allowed: Set[str] = frozenset()) -> set[str]:
    """What a file of the package imports and should not."""
    tree = ast.parse(code)
    wrong = set(imports(tree)) & ((set(FOLDERS) - BELOW[package] - {package}) | NEVER[package]) - allowed
    if package == "pixtral_cli":
        wrong |= set(imports(tree, at_start=True)) & HEAVY
    return wrong


def modules(package: str) -> dict[str, Path]:
    """The files of a package by dotted name."""
    named = {}
    for path in sorted(FOLDERS[package].rglob("*.py")):
        parts = path.relative_to(FOLDERS[package]).with_suffix("").parts
        named[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return named


def imported_modules(code: str, known: Mapping[str, object]) -> set[str]:
    """Which of the known modules a piece of code imports, or imports something from."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & set(known)) or {node.module or ""}
    return found & set(known)


def room(module: str) -> str:
    """The file or folder of its package that a module lies in; empty for the package itself."""
    return [*module.split("."), ""][1]


def steps_up(module: str, imported: set[str]) -> set[str]:
    """What a module imports of its own package from a room that is not below its own."""
    package = module.partition(".")[0]
    level = {name: row for row, names in enumerate(ORDER[package]) for name in names}
    own = room(module)
    others = {other for other in imported if other.startswith(f"{package}.") and room(other) != own}
    return {other for other in others if level[room(other)] <= level[own]}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def source_files() -> list[tuple[str, Path]]:
    return [(package, path) for package, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize(
    ("package", "path"), source_files(), ids=[path.relative_to(ROOT).as_posix() for _, path in source_files()]
)
def test_a_file_imports_only_what_its_layer_may(package: str, path: Path) -> None:
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), set())
    assert complaints(package, path.read_text(encoding="utf-8"), allowed) == set()


@pytest.mark.parametrize("package", FOLDERS)
def test_every_room_has_its_line_in_the_order(package: str) -> None:
    listed = [name for names in ORDER[package] for name in names]
    assert sorted(listed) == sorted({room(module) for module in modules(package)} - {""})


@pytest.mark.parametrize("package", FOLDERS)
def test_rooms_import_from_rooms_below_only(package: str) -> None:
    named = modules(package)
    wrong = {
        module: up
        for module, path in named.items()
        if room(module) and (up := steps_up(module, imported_modules(path.read_text(encoding="utf-8"), named)))
    }
    assert wrong == {}


def test_no_files_import_each_other_in_a_circle() -> None:
    named = {module: path for package in FOLDERS for module, path in modules(package).items()}
    scripts = {path.stem: path for path in sorted((ROOT / "scripts").glob("*.py"))}
    known = named | scripts
    graph = {
        module: imported_modules(path.read_text(encoding="utf-8"), known) - {module} for module, path in known.items()
    }
    assert circle(graph) == []


@pytest.mark.parametrize("package", FOLDERS)
def test_folders_hold_a_docstring_and_no_imports(package: str) -> None:
    for path in FOLDERS[package].rglob("*/__init__.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        assert len(tree.body) == 1, path


@pytest.mark.parametrize("package", FOLDERS)
def test_every_layer_has_files_and_says_that_it_is_typed(package: str) -> None:
    assert (FOLDERS[package] / "__init__.py").is_file()
    assert (FOLDERS[package] / "py.typed").is_file()


@pytest.mark.parametrize(
    ("package", "code", "wrong"),
    [
        ("pixtral_runtime", "def f():\n    import torch.nn", {"torch"}),
        ("pixtral_runtime", "from pixtral_export.checkpoint.tensor_names import x", {"pixtral_export"}),
        ("pixtral_engines", "import pixtral_export", {"pixtral_export"}),
        ("pixtral_export", "if True:\n    from pixtral_cli import main", {"pixtral_cli"}),
        ("pixtral_cli", "class C:\n    import numpy as np", {"numpy"}),
        ("pixtral_cli", "try:\n    import cv2\nexcept ImportError:\n    pass", {"cv2"}),
        ("pixtral_cli", "def f():\n    import numpy", set()),
        ("pixtral_cli", "if TYPE_CHECKING:\n    import numpy", set()),
    ],
)
def test_the_check_itself_sees_a_wrong_import(package: str, code: str, wrong: set[str]) -> None:
    assert complaints(package, code) == wrong


@pytest.mark.parametrize(
    ("module", "code", "wrong"),
    [
        ("bundle.spec", "from pixtral_runtime.generation.model import load", {"generation.model"}),  # up
        ("bench.measure", "def f():\n    from pixtral_runtime.batch import job", {"batch.job"}),  # sideways
        ("inputs.prompt", "if TYPE_CHECKING:\n    import pixtral_runtime.backends.session", {"backends.session"}),
        ("generation.model", "from pixtral_runtime import files\nfrom pixtral_runtime.inputs.prompt import x", set()),
        ("bench.measure", "from pixtral_runtime.bench.cases import Case", set()),
    ],
)
def test_the_order_sees_a_step_up_and_a_step_aside(module: str, code: str, wrong: set[str]) -> None:
    found = steps_up(f"pixtral_runtime.{module}", imported_modules(code, modules("pixtral_runtime")))
    assert found == {f"pixtral_runtime.{name}" for name in wrong}


def test_the_check_for_circles_sees_one() -> None:
    codes = {"a": "def f():\n    import b", "b": "if TYPE_CHECKING:\n    from c import x", "c": "import a"}
    graph = {name: imported_modules(code, codes) for name, code in codes.items()}
    assert set(circle(graph)) == {"a", "b", "c"}
    assert circle(graph | {"c": set()}) == []


def test_importing_the_runtime_imports_no_backend_and_nothing_heavy() -> None:
    code = f"import sys, pixtral_runtime; print(*sorted(set(sys.modules) & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout.split() == []
    code = code.replace("; print", "; pixtral_runtime.load; print")  # the check sees what is imported
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert {"numpy", "PIL"} <= set(done.stdout.split())
