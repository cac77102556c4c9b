"""Our signatures are read by the package's own command, its own by ours; what was changed or left out is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shutil import copytree

import pytest

from helpers.bundles import export_tiny, seal_again
from helpers.places import DEMO
from pixtral_runtime.bundle.manifest import MANIFEST, SIGNATURE, WEIGHTS, open_bundle
from pixtral_runtime.bundle.signature import check_signature, sign_bundle
from pixtral_runtime.errors import BundleError, InputError, MissingPackageError

Keys = tuple[Path, Path]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Keys]:
    """Two pairs of a private and a public key, as openssl writes them."""
    pytest.importorskip("model_signing", reason="the extra `signing` brings it")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder, pairs = tmp_path_factory.mktemp("keys"), []
    for name in "ab":
        private = ec.generate_private_key(ec.SECP256R1())
        paths = folder / f"{name}.pem", folder / f"{name}.pub"
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        paths[0].write_bytes(private.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, plain))
        public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        paths[1].write_bytes(public)
        pairs.append(paths)
    return pairs


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return export_tiny(DEMO, tmp_path / "bundle")


def model_signing(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_signature_holds_here_and_for_the_package_itself(bundle: Path, keys: list[Keys]) -> None:
    (private, public), (_, other) = keys
    assert sign_bundle(open_bundle(bundle), private) == bundle / SIGNATURE
    check_signature(bundle, public)
    command = ("verify", "key", bundle, "--signature", bundle / SIGNATURE, "--public_key")
    assert model_signing(*command, public).returncode == 0
    assert model_signing(*command, other).returncode != 0
    moved = copytree(bundle, bundle.with_name("moved"))
    check_signature(moved, public)


def test_nobody_answers_for_a_damaged_bundle(bundle: Path, keys: list[Keys]) -> None:
    with (bundle / WEIGHTS).open("r+b") as file:
        file.write(b"?")
    with pytest.raises(BundleError, match="the file was changed"):
        sign_bundle(open_bundle(bundle), keys[0][0])
    assert not (bundle / SIGNATURE).exists()


def test_a_signature_of_the_package_itself_holds_here(bundle: Path, keys: list[Keys]) -> None:
    private, public = keys[0]
    command = ("sign", "key", bundle, "--signature", bundle / SIGNATURE, "--private_key", private)
    done = model_signing(*command)
    assert done.returncode == 0, done.stderr
    check_signature(bundle, public)
    done = model_signing(*command, "--ignore-paths", bundle / WEIGHTS)
    assert done.returncode == 0, done.stderr
    with pytest.raises(BundleError, match=f"does not cover {WEIGHTS}"):
        check_signature(bundle, public)


def test_what_was_changed_since_is_refused(bundle: Path, keys: list[Keys]) -> None:
    private, public = keys[0]
    with pytest.raises(BundleError, match=f"no {SIGNATURE}"):
        check_signature(bundle, public)
    sign_bundle(open_bundle(bundle), private)
    with pytest.raises(BundleError, match="does not hold: Key mismatch"):
        check_signature(bundle, keys[1][1])
    manifest = (bundle / MANIFEST).read_bytes()
    seal_again(bundle, preprocess="hf")  # which manifest and hashes do not show
    with pytest.raises(BundleError, match="does not hold"):
        check_signature(bundle, public)
    (bundle / MANIFEST).write_bytes(manifest)
    check_signature(bundle, public)
    (bundle / "more.txt").write_text("x")
    with pytest.raises(BundleError, match="does not hold"):
        check_signature(bundle, public)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"dsseEnvelope": 1}'], ids=repr)
def test_what_is_no_signature_is_refused(content: bytes, bundle: Path, keys: list[Keys]) -> None:
    (bundle / SIGNATURE).write_bytes(content)
    with pytest.raises(BundleError, match="does not hold"):
        check_signature(bundle, keys[0][1])


def test_what_is_no_key_is_refused(bundle: Path, keys: list[Keys], tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("no key")
    for path in (tmp_path / "absent.pem", tmp_path / "no.pem", keys[0][1]):
        with pytest.raises(InputError, match=r"no file|no private"):
            sign_bundle(open_bundle(bundle), path)
    sign_bundle(open_bundle(bundle), keys[0][0])
    with pytest.raises(InputError, match="no public"):
        check_signature(bundle, tmp_path / "no.pem")


def test_without_the_package_the_extra_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for module in ("model_signing.signing", "model_signing.verifying"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError) as caught:
        sign_bundle(open_bundle(bundle), bundle / "key.pem")
    assert "pixtral[signing]" in caught.value.hint
