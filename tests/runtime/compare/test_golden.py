"""`pixtral check --golden`: a bundle against answers that another implementation gave.

The real ones need the real weights. Here torch's reference model, which shares no code with the graphs' backends,
answers for the demo checkpoint in the same shape of file; then what is wrong must be found.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from helpers.bundles import exported, seal_again
from helpers.places import DEMO, IMAGES
from helpers.reference import noise
from helpers.tiny import edit_json, tiny_config
from make_synthetic_checkpoint import packaged_tokenizer, pixtral_12b
from pixtral_cli.main import app
from pixtral_export.check import load_reference, reference_logits
from pixtral_export.checkpoint.reader import open_checkpoint
from pixtral_export.model.pixtral import Pixtral
from pixtral_export.plan import ExportSettings
from pixtral_runtime import load
from pixtral_runtime.bundle.config import Yarn
from pixtral_runtime.bundle.manifest import Limits, open_bundle
from pixtral_runtime.compare import golden as module
from pixtral_runtime.compare.golden import (
    Golden,
    GoldenPicture,
    GoldenRequest,
    check_request,
    find_pictures,
    packaged_golden,
    refuse_other_models,
)
from pixtral_runtime.errors import BundleError, InputError
from pixtral_runtime.generation.model import Model
from pixtral_runtime.inputs.conversation import Message
from pixtral_runtime.inputs.image_files import open_image
from pixtral_runtime.inputs.preprocess import default_preprocess
from pixtral_runtime.inputs.prompt import Prompt, PromptBuilder

PROMPT = "Describe each image in one short sentence."
FILES = {"1-120x96.png": "green_triangle_120x96.png", "2-64x64.png": "red_triangle_64x64.png"}
NEW_TOKENS = 8
EXACT_NATS = 1e-4  # float32 against torch; seen 3e-6


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(DEMO, tmp_path_factory.mktemp("golden") / "bundle", ExportSettings(dtype="float32")).path


@pytest.fixture(scope="module")
def model(bundle: Path) -> Model:
    return load(bundle)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name, source in FILES.items():
        copyfile(IMAGES / source, folder / name)
    return folder


@pytest.fixture(scope="module")
def golden(model: Model, pictures: Path) -> Golden:
    return answers(model, pictures, load_reference(open_checkpoint(DEMO), 1024))


def answers(model: Model, pictures: Path, reference: Pixtral) -> Golden:
    """What torch says: one request about a picture, one about two."""
    named = []
    for name in FILES:
        width, height = open_image(pictures / name).size
        named.append(GoldenPicture(name, f"https://example.org/{name}", width, height))
    requests = []
    for chosen in ((0,), (0, 1)):
        images = [open_image(pictures / named[index].name) for index in chosen]
        prompt = model.prompts.build([Message("user", (PROMPT, *images))])
        requests.append(replace(_answered(reference, prompt, model), pictures=chosen))
    return Golden("torch", model.bundle.model, PROMPT, tuple(named), tuple(requests))


def _answered(reference: Pixtral, prompt: Prompt, model: Model) -> GoldenRequest:
    ids, index = torch.from_numpy(prompt.token_ids), torch.from_numpy(prompt.feature_index)
    tokens, top_ids, top_logprobs = [], [], []
    with torch.inference_mode():
        features = torch.cat([reference.image_features(torch.from_numpy(image)[None])[0] for image in prompt.images])
        for _ in range(NEW_TOKENS):
            values, best = reference_logits(reference, ids, index, features)[-1].log_softmax(-1).topk(5)
            tokens.append(int(best[0]))
            top_ids.append(tuple(best.tolist()))
            top_logprobs.append(tuple(round(value, 5) for value in values.tolist()))
            ids, index = torch.cat([ids, best[:1]]), torch.cat([index, torch.tensor([-1])])
            if tokens[-1] == model.bundle.model.eos:
                break
    return GoldenRequest(
        (), len(prompt.token_ids), prompt.image_tokens, model.prompts.detokenize(tokens), tuple(tokens),
        tuple(top_ids), tuple(top_logprobs),
    )  # fmt: skip


def faults(model: Model, golden: Golden, folder: Path, request: int = 1) -> Sequence[str]:
    return check_request(model, golden, golden.requests[request], find_pictures(folder, golden)).faults


def changed(golden: Golden, request: int = 1, **changes: Any) -> Golden:
    requests = list(golden.requests)
    requests[request] = replace(requests[request], **changes)
    return replace(golden, requests=tuple(requests))


def test_a_float32_bundle_gives_torchs_answers(model: Model, golden: Golden, pictures: Path) -> None:
    found = find_pictures(pictures, golden)
    for request in golden.requests:
        done = check_request(model, golden, request, found)
        assert (done.faults, done.text) == ((), request.text)
        assert done.largest_nats < EXACT_NATS
        assert all(position.is_same_choice for position in done.positions)


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_quantized_bundles_pass_with_their_own_tolerance(
    precision: str, golden: Golden, pictures: Path, tmp_path: Path
) -> None:
    settings = ExportSettings(precision=precision, dtype="float32", method="rtn" if precision == "int4" else None)
    quantized = load(exported(DEMO, tmp_path / "bundle", settings).path)
    done = check_request(quantized, golden, golden.requests[1], find_pictures(pictures, golden))
    assert done.faults == ()
    assert done.largest_nats > EXACT_NATS


def test_swapped_pictures_are_found(model: Model, golden: Golden, pictures: Path) -> None:
    assert faults(model, changed(golden, pictures=(1, 0)), pictures)


def test_another_picture_changes_the_number_of_tokens(model: Model, golden: Golden, pictures: Path) -> None:
    found = faults(model, changed(golden, 0, pictures=(1,)), pictures, 0)
    assert any("tokens of pictures" in fault for fault in found)


def test_a_changed_token_is_found(model: Model, golden: Golden, pictures: Path) -> None:
    ids = golden.requests[1].token_ids
    found = faults(model, changed(golden, token_ids=(ids[0], ids[1] + 1, *ids[2:])), pictures)
    assert any(fault.startswith("token 1 is") for fault in found)


def test_one_log_probability_off_by_half_a_nat_is_found(model: Model, golden: Golden, pictures: Path) -> None:
    first, *others = golden.requests[1].top_logprobs
    found = faults(model, changed(golden, top_logprobs=((first[0] - 0.5, *first[1:]), *others)), pictures)
    assert any("token 0 differs by 0.50 nats" in fault for fault in found)


def test_another_rope_theta_is_refused_by_its_name_and_found_by_its_numbers(
    model: Model, golden: Golden, pictures: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(
        edit_json(copytree(DEMO, tmp_path / "other") / "params.json", lambda d: d.update(rope_theta=100.0)).parent
    )
    other = replace(answers(model, pictures, load_reference(checkpoint, 1024)), model=checkpoint.config)
    with pytest.raises(BundleError, match=r"decoder.rope_theta is 10000.0, not 100.0"):
        refuse_other_models(model.bundle, other)
    assert faults(model, other, pictures)


def test_a_choice_between_two_that_are_nearly_tied_is_no_fault(model: Model, golden: Golden, pictures: Path) -> None:
    ids, logprobs = golden.requests[0].top_ids, golden.requests[0].top_logprobs
    last = len(ids) - 1
    for gap, expected in ((0.1, 0), (0.4, 1)):
        swapped = (*ids[:last], (ids[last][1], ids[last][0], *ids[last][2:]))
        near = (logprobs[last][0], logprobs[last][0] - gap, *logprobs[last][2:])
        tied = changed(
            golden, 0, top_ids=swapped, top_logprobs=(*logprobs[:last], near),
            token_ids=(*golden.requests[0].token_ids[:last], ids[last][1]),
        )  # fmt: skip
        found = faults(model, tied, pictures, 0)
        assert sum("is no tie" in fault for fault in found) == expected


def test_pictures_are_found_by_bytes_or_by_name_and_size(golden: Golden, pictures: Path, tmp_path: Path) -> None:
    assert {n: f.is_known for n, f in find_pictures(pictures, golden).items()} == {0: None, 1: None}
    copyfile(pictures / "1-120x96.png", tmp_path / "dog.png")
    with pytest.raises(InputError) as caught:
        find_pictures(tmp_path, golden)
    assert f"https://example.org/1-120x96.png > {tmp_path / '1-120x96.png'}" in caught.value.hint
    known = module._hash(tmp_path / "dog.png")
    hashed = replace(golden, pictures=(replace(golden.pictures[0], sha256=known), golden.pictures[1]))
    assert find_pictures(tmp_path, hashed)[0].is_known
    Image.new("RGB", (120, 96)).save(tmp_path / "photo_1.png")  # other bytes of that name and size
    (tmp_path / "dog.png").unlink()
    assert find_pictures(tmp_path, hashed)[0].is_known is False
    Image.new("RGB", (96, 120)).save(tmp_path / "photo_1.png")
    with pytest.raises(InputError):
        find_pictures(tmp_path, hashed)


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_names_what_is_missing_and_fails_for_what_differs(
    bundle: Path, golden: Golden, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "packaged_golden", lambda: golden)
    done = invoke("check", bundle, "--golden", pictures)
    assert done.exit_code == 0, done.stderr
    assert "PASSED: 2 of 2 known answers" in done.stdout
    assert golden.requests[1].text in done.stdout
    copyfile(pictures / "1-120x96.png", tmp_path / "1.png")
    done = invoke("check", bundle, "--golden", tmp_path, "--json")
    document = json.loads(done.stdout)
    assert (done.exit_code, document["verdict"], len(document["golden"]["requests"])) == (0, "PASSED", 1)
    assert "not checked, 2 pictures: pictures are missing" in done.stderr
    assert "curl -L https://example.org/2-64x64.png" in done.stderr
    assert document["golden"]["not_checked"][0]["request"] == "2 pictures"
    monkeypatch.setattr(module, "packaged_golden", lambda: changed(golden, 0, prompt_tokens=5))
    done = invoke("check", bundle, "--golden", tmp_path)
    assert (done.exit_code, "FAILED: 0 of 1" in done.stdout) == (6, True)
    assert "5 are known" in done.stderr


def test_a_bundle_of_another_model_is_refused_with_what_differs(bundle: Path, pictures: Path) -> None:
    done = invoke("check", bundle, "--golden", pictures)
    assert done.exit_code == 3
    assert "vision.hidden_size is 128, not 1024" in done.stderr


def test_a_part_that_one_model_lacks_is_a_difference() -> None:
    ours = tiny_config()
    theirs = replace(ours, decoder=replace(ours.decoder, yarn=Yarn(64.0, 24)))
    assert ours.differences(theirs)["decoder.yarn.factor"] == (None, 64.0)
    assert theirs.differences(ours)["decoder.yarn.factor"] == (64.0, None)
    assert ours.differences(ours) == {}


@cache
def known() -> Golden:
    return packaged_golden()


def test_the_packaged_answers_are_whole() -> None:
    assert known().model == pixtral_12b()
    assert [picture.name for picture in known().pictures][:2] == ["237-400x300.jpg", "231-200x300.jpg"]
    for request in known().requests:
        assert len(request.token_ids) == len(request.top_ids) == len(request.top_logprobs)
        assert request.token_ids == tuple(ids[0] for ids in request.top_ids)  # greedy
        assert request.token_ids[-1] == known().model.eos
        for ids, logprobs in zip(request.top_ids, request.top_logprobs, strict=True):
            assert len(ids) == len(set(ids)) == len(logprobs) == 5
            assert list(logprobs) == sorted(logprobs, reverse=True)


def test_our_prompts_and_texts_are_those_of_the_packaged_answers(bundle: Path, tmp_path: Path) -> None:
    """With Pixtral-12B's own tokenizer, and pictures of these sizes, whatever they show."""
    copytree(bundle, tmp_path / "bundle")
    (tmp_path / "bundle" / "tekken.json").write_text(json.dumps(packaged_tokenizer()), encoding="utf-8")
    seal_again(tmp_path / "bundle")
    opened = replace(open_bundle(tmp_path / "bundle"), model=known().model, limits=Limits(4096, 1024))
    prompts = PromptBuilder(opened, default_preprocess(opened))
    for request in known().requests:
        images = [noise(known().pictures[n].width, known().pictures[n].height) for n in request.pictures]
        prompt = prompts.build([Message("user", (known().prompt, *images))], len(request.token_ids))
        assert (len(prompt.token_ids), prompt.image_tokens) == (request.prompt_tokens, request.image_tokens)
        assert prompts.detokenize(request.token_ids) == request.text
        text = [5847, 13089, 2744, 3937, 1294, 1925, 4958, 19286, 1046]  # the prompt, as the same test asks it in ids
        ids = prompt.token_ids.tolist()
        place = ids.index(text[0])
        assert ids[place : place + len(text)] == text
        assert (place == 2) == (len(images) > 1)  # a lone picture moves before the text


def test_the_known_picture_is_the_published_one(shared_images: Path) -> None:
    found = find_pictures(shared_images, known())
    assert found[0].is_known
    assert set(found) == {0}


def test_what_a_check_says_is_json(model: Model, golden: Golden, pictures: Path) -> None:
    done = check_request(model, golden, golden.requests[0], find_pictures(pictures, golden))
    assert json.loads(json.dumps(asdict(done), allow_nan=False))["request"] == "1 picture"
