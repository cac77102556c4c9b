"""`pixtral verify`: does a bundle compute on this machine what it computed where it was made?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli import output
from pixtral_cli.options import (
    BackendOption,
    BundleArgument,
    DeviceOption,
    JsonOption,
    ThreadsOption,
    refuse_unused,
    refuse_unused_by_backend,
    warn_of_unused,
)
from pixtral_cli.verify_report import report_checks

EPILOG = "Example: pixtral verify bundle"


def verify(
    context: typer.Context,
    bundle: BundleArgument,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    threads: ThreadsOption = 0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures encoded, and requests answered, at a time.")] = 1,
    public_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check the signature first, with this elliptic curve key.")
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify", help="Make the certificate anew, of what ONNX Runtime computes here.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Replay a bundle's certificate: PASS, or the stage that differs."""
    from pixtral_runtime.bundle.certificate import read_certificate
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.bundle.signature import check_signature, is_signed
    from pixtral_runtime.compare.certify import certify_again
    from pixtral_runtime.compare.verify import verify as replay

    if certify:
        unused = ("backend", "device", "batch", "public_key")
        refuse_unused(context, unused, "with --certify, which runs ONNX Runtime on the CPU", "another verify after it")
    refuse_unused_by_backend(context, backend)
    if public_key is not None:
        check_signature(bundle, public_key)
    opened = open_bundle(bundle)
    if certify:
        made = certify_again(opened, threads)
        if is_signed(bundle):
            output.warn(f"{bundle} was signed before: sign it again")
        if made.omitted:
            output.warn(f"the certificate has no tensors: {made.omitted}")
    certificate = read_certificate(opened)
    checks = []
    for check in replay(opened, certificate, "ort-cpu" if certify else backend, threads=threads, batch=batch):
        checks.append(check)
        if check.stage.startswith("graphs, "):
            warn_of_unused(context, check.stage.removeprefix("graphs, "))
        output.verbose(f"{check.stage:10} {check.worst:.1e} {check.case}")
    signature = "verified" if public_key else "not checked" if is_signed(bundle) else "none"
    report_checks(opened, certificate, checks, signature, as_json=as_json)
