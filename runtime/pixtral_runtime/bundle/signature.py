"""A signature over a bundle's folder, in the OpenSSF's model signing format: `model_signing` reads and writes it too.

It covers every file but itself and the lock. Keys are elliptic curve keys in PEM. The package `model-signing` is an
extra, imported where it is used.
"""

from __future__ import annotations

import base64
import json
import os
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from pixtral_runtime.bundle.integrity import verify_bundle
from pixtral_runtime.bundle.manifest import LOCK, SIGNATURE, Bundle, open_bundle, writing
from pixtral_runtime.errors import BundleError, InputError, extra_missing

IGNORED = (SIGNATURE, LOCK)


def is_signed(folder: Path) -> bool:
    return os.path.isfile(folder / SIGNATURE)


def sign_bundle(bundle: Bundle, private_key: Path) -> Path:
    """Write the signature of a bundle, all files of which are as they were made; returns its path.

    Raises InputError for a key that is none, BundleError for a file that was changed.
    """
    signing: Any = _package("signing")
    _refuse_missing_key(private_key)
    path = bundle.path / SIGNATURE
    with writing(bundle.path):
        try:
            signer = signing.Config().use_elliptic_key_signer(private_key=private_key)
        except Exception as error:  # of the package for keys, which has many kinds
            raise InputError(
                f"{private_key} is no private elliptic curve key: {error}",
                "openssl ecparam -name prime256v1 -genkey -noout -out private.pem",
            ) from error
        for _ in verify_bundle(bundle):
            pass
        try:
            signer.set_hashing_config(_hashing()).sign(bundle.path, path)
        except (OSError, ValueError) as error:
            raise BundleError(f"{bundle.path} cannot be signed: {error}", f"ls -l {bundle.path}") from error
    return path


def check_signature(folder: Path, public_key: Path) -> None:
    """Raise BundleError unless a folder is, file by file, what the owner of this key signed."""
    verifying: Any = _package("verifying")
    _refuse_missing_key(public_key)
    path = folder / SIGNATURE
    if not is_signed(folder):
        raise BundleError(f"{folder} has no {SIGNATURE}, so nobody answers for it", "pixtral sign BUNDLE --key FILE")
    try:
        verifier = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
    except Exception as error:  # as above
        raise InputError(
            f"{public_key} is no public elliptic curve key: {error}",
            "openssl ec -in private.pem -pubout -out public.pem",
        ) from error
    try:
        verifier.set_hashing_config(_hashing()).verify(folder, path)
    except Exception as error:  # the file may hold anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise BundleError(
            f"{path} does not hold: {reason}", "do not use this bundle; get it anew from whom you trust"
        ) from error
    covered = _covered(path)
    for file in open_bundle(folder).own_files:
        name = file.relative_to(folder).as_posix()
        if name != SIGNATURE and name not in covered:
            raise BundleError(f"{path} does not cover {name}", "pixtral sign BUNDLE --key FILE signs all of it")


def _covered(path: Path) -> set[str]:
    """The names that a valid signature lists; of a file that was signed in pieces they have `:start:end` behind."""
    names: set[str] = set()
    with suppress(ValueError, KeyError, TypeError):
        payload = json.loads(base64.b64decode(json.loads(path.read_bytes())["dsseEnvelope"]["payload"]))
        for one in payload["predicate"]["resources"]:
            name = str(one["name"])
            names |= {name, name.partition(":")[0]}
    return names


def _hashing() -> Any:
    hashing: Any = _package("hashing")
    return hashing.Config().set_ignored_paths(paths=IGNORED)


def _refuse_missing_key(path: Path) -> None:
    if not os.path.isfile(path):
        raise InputError(f"{path} is no file", "openssl ecparam -name prime256v1 -genkey -noout -out private.pem")


def _package(module: str) -> Any:
    try:
        return import_module(f"model_signing.{module}")
    except ImportError as error:
        raise extra_missing("model-signing", "signing", "Signing") from error
