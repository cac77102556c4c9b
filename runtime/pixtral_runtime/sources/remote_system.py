"""File systems of `fsspec` by the scheme of an address, what is tried again of theirs, and what their errors say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pixtral_runtime.errors import InputError, MissingPackageError, PixtralError, Remedy, extra_missing
from pixtral_runtime.sources.data_file import reason_of

TIMEOUT_S = 60.0  # without a byte, and for a whole picture
PAUSES_S = (0.5, 2.0)  # before it is tried again
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface-hub"}
WEB = ("http", "https")

Result = TypeVar("Result")


def scheme_of(address: str) -> str:
    return address.partition("://")[0].lower()


def file_system(address: str) -> Any:
    """The file system of an address. Raises MissingPackageError."""
    try:
        import fsspec
    except ImportError as error:
        raise extra_missing("fsspec", "remote", f"Reading {scheme_of(address)}://") from error
    scheme = scheme_of(address)
    try:
        return fsspec.filesystem(scheme, **(_web_options() if scheme in WEB else {}))
    except ImportError as error:
        if scheme in PACKAGES and scheme != "hf":
            package = PACKAGES[scheme]
            raise MissingPackageError(
                f"Reading {scheme}:// needs the package '{package}'", f"pip install {package}"
            ) from error
        raise extra_missing(PACKAGES.get(scheme, "aiohttp"), "remote", f"Reading {scheme}://") from error


def _web_options() -> dict[str, Any]:
    """A long job keeps a connection for hours: only its silences are limited."""
    from aiohttp import ClientTimeout

    timeout = ClientTimeout(total=None, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def path_of(address: str) -> str:
    """What the file system calls it."""
    return address if scheme_of(address) in WEB else address.partition("://")[2]


def retried(work: Callable[[], Result]) -> Result:
    for pause_s in PAUSES_S:
        try:
            return work()
        except Exception as error:  # of whatever library
            if not may_pass(error):
                raise
        time.sleep(pause_s)
    return work()


def _status(error: BaseException) -> int | None:
    """The status of HTTP that an error tells of."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def may_pass(error: Exception) -> bool:
    if isinstance(error, PixtralError | FileNotFoundError | PermissionError | ValueError | NotImplementedError):
        return False
    return (status := _status(error)) is None or status >= 500 or status in (408, 429)


@contextmanager
def refusing(address: str) -> Iterator[None]:
    """Errors of whatever library as InputError that says what to do."""
    try:
        yield
    except PixtralError:
        raise
    except Exception as error:
        raise refusal(error, address) from error


def refusal(error: Exception, address: str) -> InputError:
    reason, remedies = _explained(error, address)
    return InputError(f"{address}: {reason}", *remedies)


def _explained(error: Exception, address: str) -> tuple[str, tuple[Remedy, ...]]:
    causes = [error, *(cause for cause in (error.__cause__, error.__context__) if cause is not None)]
    status = next((found for cause in causes if (found := _status(cause))), None)
    is_hub = scheme_of(address) == "hf"
    login = "hf auth login" if is_hub else "check the credentials and permissions of this machine"
    if any(type(cause).__name__ == "GatedRepoError" for cause in causes):
        return "its owner gives it to those who accept the conditions", ("accept them on its page", login)
    if status in (401, 403) or isinstance(error, PermissionError):
        return "it may not be read from here", (login,)
    if "credentials" in str(error).lower():
        return f"cannot be read: {reason_of(error)}", (login,)
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return "there is nothing", ("check the address", *((f"{login}, if it is private",) if is_hub else ()))
    if status is not None:
        return f"its server says {status}", ("try it again later",)
    return f"cannot be read: {reason_of(error)}", ("check the address and the connection",)
