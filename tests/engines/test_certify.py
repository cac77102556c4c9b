"""A build adds its engines to the bundle's certificate, with how far TensorRT's network is from ONNX Runtime."""

from __future__ import annotations

from typer.testing import CliRunner

from pixtral_cli.main import app
from pixtral_engines import certify as module
from pixtral_runtime.bundle.certificate import read_certificate
from pixtral_runtime.bundle.manifest import CERTIFICATE, SIGNATURE, Bundle, open_bundle
from pixtral_runtime.compare.certify import certify
from pixtral_runtime.compare.verify import verify

TARGET = "rtx:sm89"


def test_a_build_refreshes_the_certificate(copy: Bundle) -> None:
    certify(copy)
    command = ["build", str(copy.path), "--target", TARGET, "--context", "256,512", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    built = open_bundle(copy.path)
    certificate = read_certificate(built)
    assert set(certificate.engines) == set(built.engines) == {TARGET, f"{TARGET}@256"}
    network = certificate.engines[TARGET].network
    assert set(network) == {"vision", "embed", "decoder"} and max(network.values()) <= 0.01
    engines = next(check for check in verify(built, certificate, "ort-cpu") if check.stage == "engines")
    assert engines.passed and engines.compared == 2


def test_a_bundle_without_a_certificate_gets_none_by_a_build(copy: Bundle) -> None:
    said: list[str] = []
    (copy.path / SIGNATURE).touch()
    module.certify_engines(copy, [TARGET], said.append)
    assert not (copy.path / CERTIFICATE).exists()
    assert "sign it again" in said[0] and "no certificate" in said[1]
