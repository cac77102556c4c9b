"""`pixtral sign`: who a bundle is from, so that others can check it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pixtral_cli import output
from pixtral_cli.options import BundleArgument, JsonOption

EPILOG = "Example: pixtral sign bundle --key private.pem"


def sign(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option(metavar="FILE", help="Private elliptic curve key, PEM, without a password.")],
    as_json: JsonOption = False,
) -> None:
    """Sign a bundle, so that others can check who it is from.

    In the OpenSSF model signing format, for 'pixtral verify --public-key' and for 'model_signing verify key'.
    """
    from pixtral_runtime.bundle.certificate import has_certificate
    from pixtral_runtime.bundle.manifest import open_bundle
    from pixtral_runtime.bundle.signature import sign_bundle

    opened = open_bundle(bundle)
    if not has_certificate(opened):
        output.warn(f"{bundle} has no certificate; one that is made later is not covered by the signature")
    summary = {"bundle": str(bundle), "fingerprint": opened.fingerprint, "signature": str(sign_bundle(opened, key))}
    if as_json:
        output.print_json(summary)
    else:
        output.print_pairs(summary)
