"""Build the CUDA stand-in: ONNX Runtime with CUDA in an environment of its own, on libraries that need no GPU.

    python scripts/cuda_standin/build.py artifacts/cuda-standin    # 0.8 GB; a minute once, seconds afterwards
    env $(python scripts/cuda_standin/build.py artifacts/cuda-standin) -m pixtral_cli run BUNDLE photos/

It prints the variables and the Python to start with. ONNX Runtime's CUDA provider is the one users install; what it
calls of CUDA is read from its file. Functions that mean something are in C++ here, all others do nothing. Needs g++ and
the package index.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
HEADERS = ("nvidia-cuda-runtime==13.*", "nvidia-cuda-crt==13.*")
LIBRARIES: dict[str, tuple[str, ...]] = {
    "libcudart.so.13": ("cudart.cpp", "device.cpp"),
    "libcublas.so.13": (),
    "libcublasLt.so.13": ("cublas.cpp",),
    "libcudnn.so.9": ("cudnn.cpp",),
    "libcurand.so.10": (),
    "libcuda.so.1": (),
}
COMPUTES = re.compile(r"cublas[SD](ge|copy|scal)|Gemm|LtMatmul$|LtMatrixTransform$")
GIVES = {  # through their first argument
    "cudaGetDevice": 0,
    "cudaRuntimeGetVersion": 13000,
    "cudaDriverGetVersion": 13000,
    "cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags": 1,
    "cublasGetMathMode": 0,
}


@dataclass(frozen=True)
class StandIn:
    """An environment: its Python, and the variables that it runs with."""

    python: Path
    variables: dict[str, str]


def requirements() -> list[str]:
    """What pixtral's runtime needs on CUDA, by its own list, without what brings CUDA."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    wanted = [re.sub(r"\[.*?\]", "", requirement) for requirement in wanted]  # of onnxruntime-gpu: its CUDA libraries
    return [requirement for requirement in wanted if not requirement.startswith(("cuda-bindings", "nvidia-"))]


def called_functions(provider: Path) -> dict[str, str]:
    """Functions of CUDA that the provider calls, with the library that has each.

    All but cuDNN's are undefined symbols, which name their library; cuDNN is opened when a node wants it, and its
    functions are looked up by names that lie in the file as text.
    """
    symbols = run("nm", "-D", "--undefined-only", "--with-symbol-versions", provider)
    found = dict(re.findall(r"U (\w+)@(lib(?:cudart|cublas|cublasLt|curand)\.so\.\d+)", symbols))
    found |= dict.fromkeys(re.findall(r"U (cu[A-Z]\w+)$", symbols, re.MULTILINE), "libcuda.so.1")
    names = re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", provider.read_bytes())
    return found | {name.decode(): "libcudnn.so.9" for name in names}


def stub(name: str) -> str:
    """A function, in C++, that does nothing: it says that all went well, and gives a handle where it makes one."""
    if name in GIVES:
        return f"int {name}(int* value) {{ *value = {GIVES[name]}; return 0; }}"
    if "Create" in name:
        return f"int {name}(void** made) {{ *made = new char; return 0; }}"
    if name.endswith(("ErrorName", "ErrorString", "StatusName", "StatusString")):
        return f'const char* {name}(int) {{ return "error of the stand-in"; }}'
    if COMPUTES.search(name):
        return f'int {name}() {{ standin_launch("{name}"); return 0; }}'
    return f"int {name}() {{ return 0; }}"


def build_libraries(provider: Path, headers: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    called = called_functions(provider)
    for library, names in LIBRARIES.items():
        sources = [HERE / name for name in names]
        written = "".join(source.read_text(encoding="utf-8") for source in sources)
        missing = [name for name, home in sorted(called.items()) if home == library and f" {name}(" not in written]
        rest = target / f"{library}.cpp"
        lines = ['extern "C" {', "void standin_launch(const char*);", *map(stub, missing), "}", ""]
        rest.write_text("\n".join(lines), encoding="utf-8")
        below = [target / "libcudart.so.13"] if library != "libcudart.so.13" else []
        options = ("-std=c++20", "-O1", "-shared", "-fPIC", "-Wall", f"-I{headers}", f"-Wl,-soname,{library}")
        # The provider asks for versions of symbols, which are the names of libraries.
        run("g++", *options, "-Wl,--default-symver", "-o", target / library, *sources, rest, *below)


def build(folder: Path, python: Path = Path(sys.executable)) -> StandIn:
    """The stand-in in a folder, which keeps its packages from one time to the next."""
    if absent := [tool for tool in ("g++", "nm") if shutil.which(tool) is None]:
        raise SystemExit(f"{' and '.join(absent)} not found: apt-get install g++")
    folder = folder.resolve()
    own, headers, stamp = folder / "venv" / "bin" / "python", folder / "headers", folder / "installed"
    wanted = "\n".join((*requirements(), *HEADERS))
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        run(python, "-m", "venv", "--clear", folder / "venv")
        pip = (own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        run(*pip, *requirements())
        run(*pip, "--no-deps", "--upgrade", "--target", headers, *HEADERS)  # apart: the runtime would be found
        stamp.write_text(wanted, encoding="utf-8")
    [provider] = (folder / "venv").glob("lib/python*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so")
    build_libraries(provider, headers / "nvidia" / "cu13" / "include", folder / "lib")
    paths = [HERE / "python", ROOT, ROOT / "runtime", ROOT / "engines", ROOT / "scripts"]
    return StandIn(own, {"LD_LIBRARY_PATH": str(folder / "lib"), "PYTHONPATH": os.pathsep.join(map(str, paths))})


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="3.11 or newer, of the environment")
    args = parser.parse_args()
    standin = build(args.folder, args.python)
    print(*(f"{name}={value}" for name, value in standin.variables.items()), standin.python)


if __name__ == "__main__":
    main()
