"""Imports point down, and what is heavy or belongs to one layer stays where it belongs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
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
HEAVY = {
    "cv2", "huggingface_hub", "llguidance", "matplotlib", "mistral_common", "numpy", "onnx", "onnx_ir", "onnxruntime",
    "onnxscript", "openai", "PIL", "polygraphy", "pyarrow", "ray", "rich", "safetensors", "tensorrt", "tensorrt_rtx",
    "torch", "transformers",
}  # fmt: skip


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


def complaints(package: str, code: str) -> set[str]:
    """What a file of the package imports and should not."""
    tree = ast.parse(code)
    wrong = set(imports(tree)) & ((set(FOLDERS) - BELOW[package] - {package}) | NEVER[package])
    if package == "pixtral_cli":
        wrong |= set(imports(tree, at_start=True)) & HEAVY
    return wrong


def source_files() -> list[tuple[str, Path]]:
    return [(package, path) for package, folder in FOLDERS.items() for path in sorted(folder.rglob("*.py"))]


@pytest.mark.parametrize(
    ("package", "path"), source_files(), ids=[f"{package}/{path.name}" for package, path in source_files()]
)
def test_a_file_imports_only_what_its_layer_may(package: str, path: Path) -> None:
    assert complaints(package, path.read_text(encoding="utf-8")) == set()


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
