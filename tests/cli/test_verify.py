"""`pixtral verify` and `sign`: what an export certifies passes, what differs ends with exit 6 and the next command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from typer.testing import CliRunner

from helpers.bundles import seal_again
from helpers.places import DEMO
from pixtral_cli.main import app
from pixtral_runtime.bundle.certificate import read_certificate
from pixtral_runtime.bundle.manifest import CERTIFICATE, SIGNATURE, open_bundle
from verify_faults import flip, rebind


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("verify") / "bundle"
    done = invoke("export", DEMO, "-o", target, "--max-context", 1024, "--json")
    assert (done.exit_code, json.loads(done.stdout)["certificate"]) == (0, True)
    return target


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    return copytree(bundle, tmp_path / "bundle")


def test_an_exported_bundle_passes_and_says_what_it_was_made_with(bundle: Path) -> None:
    done = invoke("verify", bundle, "--threads", 2, "--batch", 3)
    assert done.exit_code == 0, done.stderr
    assert "PASS: " in done.stdout and "FAILED" not in done.stdout
    document = json.loads(invoke("verify", bundle, "--backend", "ort-cpu", "--json").stdout)
    assert (document["verdict"], document["signature"], document["omitted"]) == ("PASS", "none", "")
    assert {"onnxruntime", "torch", "numpy"} <= set(document["made_with"])
    assert document["agreement"]["torch"]["decode"] < 0.02
    assert [stage["stage"] for stage in document["stages"]][-3:] == ["logits", "answers", "headroom"]
    assert json.loads(invoke("inspect", bundle, "--json").stdout)["certificate"] is True


def test_what_differs_is_named_with_what_looks_closer(copy: Path) -> None:
    flip(copy / "weights.bin")
    done = invoke("verify", copy)
    assert done.exit_code == 6
    assert "error: FAIL, files: " in done.stderr and "weights.bin: the file was changed" in done.stderr
    copy = copytree(copy, copy.with_name("other"))
    seal_again(copy, preprocess="hf")
    rebind(copy)
    done = invoke("verify", copy, "--json")
    document = json.loads(done.stdout)
    assert (done.exit_code, document["verdict"], document["stages"][-1]["stage"]) == (6, "FAIL", "preprocess")
    assert "is allowed" in done.stderr and "--verify" in done.stderr


def test_a_bundle_without_a_certificate_gets_one_by_name_only(copy: Path) -> None:
    (copy / CERTIFICATE).unlink()
    done = invoke("verify", copy)
    assert done.exit_code == 3
    assert f"has no {CERTIFICATE}" in done.stderr and "--certify" in done.stderr
    assert json.loads(invoke("inspect", copy, "--json").stdout)["certificate"] is False
    assert invoke("verify", copy, "--certify").exit_code == 0
    assert invoke("verify", copy).exit_code == 0


def test_export_may_leave_it_out_and_another_export_takes_it_away(copy: Path) -> None:
    arguments = ("export", DEMO, "-o", copy, "--max-context", 1024, "--force", "--no-certificate", "--json")
    assert json.loads(invoke(*arguments).stdout)["certificate"] is False
    assert not (copy / CERTIFICATE).exists()
    open_bundle(copy)


def test_a_signature_is_checked_first(copy: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing", reason="the extra `signing` brings it")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private, pem = ec.generate_private_key(ec.SECP256R1()), serialization.Encoding.PEM
    key, public = tmp_path / "key.pem", tmp_path / "key.pub"
    plain = serialization.NoEncryption()
    key.write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(private.public_key().public_bytes(pem, spki))
    assert invoke("verify", copy, "--public-key", public).exit_code == 3  # nobody signed it
    assert invoke("sign", copy, "--key", key).exit_code == 0
    done = invoke("verify", copy, "--public-key", public, "--json")
    assert (done.exit_code, json.loads(done.stdout)["signature"]) == (0, "verified")
    assert json.loads(invoke("verify", copy, "--json").stdout)["signature"] == "not checked"
    flip(copy / CERTIFICATE)
    refused = invoke("verify", copy, "--public-key", public)
    assert refused.exit_code == 3 and f"{SIGNATURE} does not hold" in refused.stderr


def test_an_infinite_difference_is_no_number_that_json_does_not_have(copy: Path) -> None:
    certificate = read_certificate(open_bundle(copy))
    replace(certificate, tensors=certificate.tensors | {"preprocess": {}}).write(copy)
    done = invoke("verify", copy, "--json")
    assert done.exit_code == 6
    assert "Infinity" not in done.stdout
    assert json.loads(done.stdout)["stages"][-1]["worst"] is None
