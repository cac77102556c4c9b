"""Pack what a borrowed GPU machine lacks into `.device/`, for `device_check.sh`: one transfer of less than 64 MiB.

    python scripts/device_pack.py --ort UNZIPPED_WHEEL --provider PROVIDER.so.xz --site SITE_PACKAGES

`--ort` is the folder into which the wheel of onnxruntime-gpu for the other machine's Python was unzipped; `--provider`
its CUDA provider without other GPUs' code, compressed; `--site` a folder of that Python's packages. Besides these the
pack holds the demo checkpoint's bundles and Pixtral-12B's graphs, whose weights are written over there.
"""

from __future__ import annotations

import argparse
import io
import lzma
import shutil
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from demo_bundles import HALF, make_bundle
from make_synthetic_checkpoint import pixtral_12b
from pixtral_export.graphs.assemble import build_graph
from pixtral_export.quantization.recipes import make_recipe
from pixtral_export.weight_names import ExternalWeight
from pixtral_export.weights.plan import aligned, plan_weights, weight_file_bytes
from pixtral_runtime.bundle.config import ModelConfig
from pixtral_runtime.bundle.manifest import TOKENIZER, WEIGHTS, Bundle, FileEntry, Limits
from pixtral_runtime.bundle.spec import GRAPHS

ROOT = Path(__file__).parents[1]
DEMOS = {
    "float16": HALF,
    "int4-128": replace(HALF, precision="int4", group_size=128),
    "int4-32": replace(HALF, precision="int4", group_size=32),
    "float16-kv8": replace(HALF, kv_cache="int8"),
}
LARGE = {"int4": ("int4", 128), "int4-32": ("int4", 32), "float16": ("float16", None)}
WIDTHS = (2, 1, 8192)  # layers, vision layers and tokens of the large bundles that a CPU is to compute
PACKAGES = (
    "annotated_types", "typing_inspection", "typing_extensions.py", "pydantic", "pydantic_core", "pydantic_extra_types",
    "pycountry", "jsonschema", "jsonschema_specifications", "referencing", "rpds", "mistral_common",
)  # fmt: skip
UNUSED = {
    "onnxruntime": ("tools", "quantization", "transformers", "datasets", "backend", "ThirdPartyNotices.txt"),
    "mistral_common": ("data", "experimental/app"),
    "pycountry": ("locales",),
}
UNUSED_LIBRARIES = ("libonnxruntime.so", "libonnxruntime_providers_cuda", "libonnxruntime_providers_tensorrt")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "tests", "*.pyi", *(f"{name}*" for name in UNUSED_LIBRARIES))


def large_bundle(folder: Path, config: ModelConfig, precision: str, group: int | None) -> None:
    """A bundle's graphs and manifest without its weights."""
    limits = Limits(16_384, 1024)
    method = "rtn" if precision == "int4" else None
    recipe = make_recipe(precision, "float16", group_size=group, method=method)
    plan = plan_weights(config, "float16", limits, recipe)
    places, end = {}, 0
    for item in plan:
        start = aligned(end)
        places[item.name] = ExternalWeight(item.name, item.shape, item.dtype, start, item.nbytes)
        end = start + item.nbytes
    folder.mkdir(parents=True)
    for graph in GRAPHS:
        model = ir.to_proto(build_graph(graph, config, "float16", None, places, {}, WEIGHTS))
        (folder / f"{graph}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    (folder / TOKENIZER).write_text("{}", encoding="utf-8")
    files = {path.name: FileEntry(path.stat().st_size, "0" * 64) for path in folder.iterdir()}
    files[WEIGHTS] = FileEntry(weight_file_bytes(plan), "0" * 64)
    Bundle(folder, config, "float16", precision, limits, 24, files, {}).write()
    print(f"{folder.name}: weights of {files[WEIGHTS].bytes:,} bytes", flush=True)


def copy_package(source: Path, target: Path) -> None:
    """A package without what only its developers need."""
    if source.is_file():
        shutil.copy(source, target)
        return
    unused = {(source / name) for name in UNUSED.get(source.name, ())}

    def ignored(folder: str, names: list[str]) -> set[str]:
        dropped = {name for name in names if Path(folder, name) in unused}
        return dropped | set(LEFT_OUT(folder, names))

    shutil.copytree(source, target, ignore=ignored)


def compress(folder: Path, target: Path) -> None:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.add(path, str(path.relative_to(folder)))
    target.write_bytes(lzma.compress(memory.getvalue(), preset=9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ort", type=Path, required=True)
    parser.add_argument("--provider", type=Path, required=True)
    parser.add_argument("--site", type=Path, required=True)
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="pictures to be asked about")
    parser.add_argument("--demos", type=Path, default=ROOT / "artifacts" / "device-demos", help="kept for another pack")
    parser.add_argument("--layers", type=int, default=40, help="of the large decoder; fewer to rehearse")
    parser.add_argument("--vision-layers", type=int, default=24)
    parser.add_argument("--vocab", type=int, default=131_072)
    parser.add_argument("--target", type=Path, default=ROOT / ".device")
    arguments = parser.parse_args()
    arguments.demos.mkdir(parents=True, exist_ok=True)
    arguments.target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as held:
        stage = Path(held)
        for name in PACKAGES:
            (stage / "site").mkdir(exist_ok=True)
            copy_package(arguments.site / name, stage / "site" / name)
        for info in arguments.site.glob("mistral_common-*.dist-info"):  # its version is asked for by metadata
            copy_package(info, stage / "site" / info.name)
        copy_package(arguments.ort / "onnxruntime", stage / "site" / "onnxruntime")
        for name, settings in DEMOS.items():
            bundle = make_bundle(name, settings, None, arguments.demos)
            shutil.copytree(bundle.path, stage / "demo" / name, ignore=shutil.ignore_patterns(".*"))
        shape = (arguments.layers, arguments.vision_layers, arguments.vocab)
        for name, recipe in LARGE.items():
            large_bundle(stage / "large" / name, pixtral_12b(*shape), *recipe)
            large_bundle(stage / "large" / f"widths-{name}", pixtral_12b(*WIDTHS), *recipe)
        (stage / "images").mkdir()
        for image in arguments.images:
            shutil.copy(image, stage / "images")
        compress(stage, arguments.target / "pack.tar.xz")
        for top in sorted(stage.iterdir()):
            size = sum(path.stat().st_size for path in top.rglob("*") if path.is_file())
            print(f"{top.name}: {size:,} bytes before compression")
    shutil.copy(arguments.provider, arguments.target / "provider.so.xz")
    total = sum(path.stat().st_size for path in arguments.target.iterdir())
    print(f"{arguments.target}: {total:,} bytes")


if __name__ == "__main__":
    main()
