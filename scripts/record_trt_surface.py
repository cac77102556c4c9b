"""Record what a TensorRT's Python bindings have: classes, what each of them has, members of enumerations, functions.

    python scripts/record_trt_surface.py tensorrt_rtx tensorrt_cu12_bindings-10.3.0-cp311-none-manylinux_2_17_x86_64.whl

An argument is an installed package, or a wheel of bindings for this Python:
`pip download --no-deps tensorrt-cu12-bindings==10.3.0`. Bindings of a wheel are imported over empty libraries in
TensorRT's place, which export the functions that the bindings want: what there is to call depends on nothing else.
Needs gcc, nm and readelf. One JSON file each goes to tests/data/trt_surfaces; the tests' stand-in for TensorRT has what
they list.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

SURFACES = Path(__file__).parents[1] / "tests/data/trt_surfaces"
BINDINGS = "tensorrt_bindings"
IMPORTED, OVER_STUBS = "imported from the installed package", "imported from {wheel} over empty libraries"
SYSTEM = re.compile(r"@|^(_|Py|dl(close|open|sym)$|pthread_)")  # of libc, libstdc++ and Python


def surface_of(module: ModuleType, package: str, how: str) -> dict[str, Any]:
    """The public names of a package; a class has its own and those of the classes it is made from."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    own = {name: value for name, value in public.items() if _is_own(value, module)}
    kinds = {name: kind for name, kind in own.items() if isinstance(kind, type)}
    members = {name: kind.__members__ for name, kind in kinds.items() if hasattr(kind, "__members__")}
    return {
        "package": package,
        "version": module.__version__,
        "recorded": how,
        "functions": sorted(name for name, value in own.items() if callable(value) and name not in kinds),
        "enums": {name: list(members[name]) for name in sorted(members)},
        "classes": {name: _names(kinds[name]) for name in sorted(kinds) if name not in members},
    }


def _is_own(value: object, module: ModuleType) -> bool:
    return callable(value) and str(getattr(value, "__module__", "")).startswith((module.__name__, "tensorrt"))


def _names(kind: type) -> list[str]:
    return [name for name in dir(kind) if not name.startswith("_")]


def stub_libraries(bindings: Path, folder: Path) -> None:
    """Libraries that `bindings` needs and this machine lacks, with functions that do nothing."""
    wanted = _lines("readelf", "-d", str(bindings))
    needed = [name for name in re.findall(r"Shared library: \[(.*?)\]", wanted) if name.startswith("libnv")]
    symbols = [line.split()[-1] for line in _lines("nm", "-D", "--undefined-only", str(bindings)).splitlines()]
    source = "\n".join(f"void *{name}(void) {{ return 0; }}" for name in symbols if not SYSTEM.search(name))
    for name in needed:
        command = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run(command, input=source, text=True, check=True)


def _lines(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def record_wheel(wheel: Path) -> None:
    """In a process of its own: a library's folder must be known as Python starts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        zipfile.ZipFile(wheel).extractall(folder)
        for bindings in folder.glob(f"{BINDINGS}/tensorrt*.so"):
            stub_libraries(bindings, folder)
        variables = {"LD_LIBRARY_PATH": name, "PYTHONPATH": name}
        how = OVER_STUBS.format(wheel=wheel.name)
        command = [sys.executable, __file__, BINDINGS, "--as-package", "tensorrt", "--recorded", how]
        subprocess.run(command, env=os.environ | variables, check=True)


def record(module: str, package: str, how: str) -> None:
    surface = surface_of(importlib.import_module(module), package, how)
    SURFACES.mkdir(parents=True, exist_ok=True)
    path = SURFACES / f"{package}-{surface['version']}.json"
    path.write_text(compact(surface), encoding="utf-8")
    print(f"{path}: {len(surface['classes'])} classes, {len(surface['enums'])} enumerations, {how}")


def compact(surface: dict[str, Any]) -> str:
    """JSON with a line for each class, so that versions can be compared line by line."""
    parts = []
    for key, value in surface.items():
        text = json.dumps(value)
        if isinstance(value, dict):
            lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(listed)}" for name, listed in value.items())
            text = f"{{\n{lines}\n  }}"
        parts.append(f"  {json.dumps(key)}: {text}")
    lines = ",\n".join(parts)
    return f"{{\n{lines}\n}}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="an installed package, or a wheel of bindings")
    parser.add_argument("--as-package", help=argparse.SUPPRESS)
    parser.add_argument("--recorded", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for source in arguments.sources:
        if source.endswith(".whl"):
            record_wheel(Path(source))
        else:
            record(source, arguments.as_package or source, arguments.recorded or IMPORTED)


if __name__ == "__main__":
    main()
