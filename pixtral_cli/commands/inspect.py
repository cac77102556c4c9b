"""`pixtral inspect`: what a bundle holds, and whether it is whole."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pixtral_cli import output
from pixtral_cli.options import BundleArgument, JsonOption

EPILOG = "Example: pixtral inspect bundle --verify"


def inspect(
    bundle: BundleArgument,
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare checksums.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a bundle's model, limits, tensors and files."""
    from pixtral_runtime.bundle.certificate import has_certificate
    from pixtral_runtime.bundle.engine_list import listed_engines, verify_engines
    from pixtral_runtime.bundle.integrity import verify_bundle
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.bundle.signature import is_signed
    from pixtral_runtime.bundle.spec import GRAPHS

    opened = open_bundle(bundle)
    if verify:
        with output.progress() as bars:
            for done, _ in enumerate(verify_bundle(opened), start=1):
                bars.stage("verifying files", done, len(opened.files))
            for target in opened.engines:
                verify_engines(opened, listed_engines(opened, target))
    summary: dict[str, Any] = {
        "bundle": str(opened.path),
        "fingerprint": opened.fingerprint,
        "schema": opened.schema,
        "dtype": opened.dtype,
        "precision": opened.precision,
        "kv_cache": opened.cache_dtype,
        "lora": opened.lora and str(opened.lora),
        "opset": opened.opset,
        "preprocess": opened.preprocess,
        "max_context": opened.limits.max_context,
        "max_image_side": opened.limits.max_image_side,
        "sampling": "greedy"
        if opened.sampling is None
        else f"temperature {opened.sampling.temperature:g}, top-p {opened.sampling.top_p:g}",
        "kv_cache_bytes_per_token": opened.kv_cache_bytes_per_token,
        "bundle_bytes": sum(entry.bytes for entry in opened.files.values()),
        "verified": verify,
        "certificate": has_certificate(opened),
        "signed": is_signed(opened.path),
    }
    if as_json:
        graphs = {name: opened.graph_spec(name) for name in GRAPHS}
        output.print_json(
            summary
            | {
                "model": opened.model.to_dict(),
                "lora": opened.lora and vars(opened.lora),
                "tools": opened.tools,
                "files": {name: vars(entry) for name, entry in opened.files.items()},
                "graphs": {
                    name: {
                        "inputs": [vars(tensor) for tensor in spec.inputs],
                        "outputs": [vars(tensor) for tensor in spec.outputs],
                    }
                    for name, spec in graphs.items()
                },
                "engines": opened.engines,
            }
        )
        return
    output.print_pairs(summary)
    output.print_table(
        ("file", "bytes", "sha256"), [(n, f"{e.bytes:,}", e.sha256[:16]) for n, e in opened.files.items()]
    )
    if opened.engines:
        listed = {target: listed_engines(opened, target) for target in opened.engines}
        engines = [(target, graph, e) for target, built in listed.items() for graph, e in built.graphs.items()]
        output.print_table(
            ("engine", "graph", "bytes", "sha256"), [(t, g, f"{e.bytes:,}", e.sha256[:16]) for t, g, e in engines]
        )
    specs = [opened.graph_spec(name) for name in GRAPHS]
    alike = {tensor for spec in specs for pair in spec.caches[1:] for tensor in pair}  # as the first, layer by layer
    rows = [
        (spec.name, kind, tensor.name, " x ".join(map(str, tensor.shape)), tensor.dtype)
        for spec in specs
        for kind, tensors in (("in", spec.inputs), ("out", spec.outputs))
        for tensor in tensors
        if tensor not in alike
    ]
    output.print_table(("graph", "", "tensor", "shape", "dtype"), rows)
