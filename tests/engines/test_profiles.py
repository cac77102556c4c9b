"""`pixtral build --profile`: users' own sizes are what engines are built for, or are refused with the valid ones."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from helpers.bundles import exported
from helpers.host_device import HostDevice
from helpers.places import DEMO, ROOT
from helpers.trt_standin import StandIn, write_engine
from pixtral_cli.main import app
from pixtral_engines.profiles import Shapes, profiles, read_profiles
from pixtral_export.plan import ExportSettings
from pixtral_runtime.backends.trt_package import import_tensorrt, version_of
from pixtral_runtime.backends.trt_session import TrtSession
from pixtral_runtime.bundle.engine_list import open_engines
from pixtral_runtime.bundle.manifest import Bundle, open_bundle
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.errors import InputError

SHAPES = Shapes(context=256, batch=4, chunk=64)
DECODER = ("decoder:B=1,T=1..32..64", "decoder:B=1..2..4,T=1")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exported(DEMO, tmp_path_factory.mktemp("b") / "b", ExportSettings(max_context=512))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_own_profiles_replace_those_of_their_graph_and_the_rest_follows(bundle: Bundle) -> None:
    found = read_profiles(bundle, SHAPES, ("vision:H=32..48..64,W=16..64,B=1..4", *DECODER))
    assert found["vision"] == [{"B": (1, 4, 4), "H": (32, 48, 64), "W": (16, 64, 64)}]
    assert found["decoder"] == [
        {"B": (1, 1, 1), "T": (1, 32, 64), "R": (1, 1, 1), "C": (256, 256, 256)},
        {"B": (1, 2, 4), "T": (1, 1, 1), "R": (1, 2, 4), "C": (256, 256, 256)},
    ]
    assert found["embed"] == profiles(bundle, "embed", SHAPES)
    assert read_profiles(bundle, SHAPES, ()) == {graph: profiles(bundle, graph, SHAPES) for graph in GRAPHS}
    (embed,) = read_profiles(bundle, SHAPES, ("embed:T=1..8..64",))["embed"]
    assert embed == {"B": (1, 4, 4), "T": (1, 8, 64), "F": (1, 8, 64)}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("visoin:H=16", "no graph 'visoin'", "vision|embed|decoder"),
        ("vision", "no graph 'vision'|cannot be read", "vision|embed|decoder:LETTER=SIZES"),
        ("vision:T=1", "'T' is no dimension of vision", "vision has B, H, W"),
        ("decoder:H=16", "'H' is no dimension of decoder", "decoder has B, T, R, C"),
        ("vision:H=16,H=32", "'H' is there twice", "B, H, W"),
        ("vision:H=sixteen", "H cannot be 'sixteen'", "smallest, usual, largest"),
        ("vision:H=16..32..48..64", "cannot be", "smallest, usual, largest"),
        ("vision:H=64..16", "not a rising range", "--max-image-side"),
        ("vision:H=16..100000", r"not a rising range within 8\.\.", "--max-image-side"),
        ("vision:H=16..20..66", "not multiples of 8", "64"),
        ("decoder:B=1..8,T=1", r"B=1\.\.8 is not a rising range within 1\.\.4", "batch="),
        ("decoder:B=0..4", "not a rising range within 1", "batch="),
        ("decoder:T=1..65", r"within 1\.\.64", "chunk="),
        ("decoder:C=1..256", r"within 256\.\.256", "context="),
        ("decoder:B=1..4,T=1", "no profile of decoder takes B=1,T=2,R=1", "profile=decoder:"),
        ("decoder:B=1,T=1..64", "no profile of decoder takes B=2,T=1,R=2", "batch="),
        ("embed:T=1..64,F=1", "no profile of embed takes B=1,T=2,F=2", "profile=embed"),
        ("vision:B=1,H=16..64,W=16..64", "no profile of vision takes B=4,H=64,W=64", "batch="),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(text: str, message: str, hint: str, bundle: Bundle) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_profiles(bundle, SHAPES, (text,))
    assert hint in caught.value.hint


def test_the_examples_of_the_page_are_accepted(bundle: Bundle) -> None:
    """With limits as large as Pixtral's."""
    page = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    examples = [line.split() for line in page.splitlines() if line.startswith("pixtral build") and "--profile" in line]
    assert len(examples) == 2
    large = replace(bundle, limits=replace(bundle.limits, max_image_side=1024))
    for words in examples:
        options = list(itertools.pairwise(words))
        (batch,) = (int(value) for name, value in options if name == "--batch")
        texts = [value for name, value in options if name == "--profile"]
        found = read_profiles(large, Shapes(context=256, batch=batch), texts)
        assert [len(found[graph]) for graph in {text.partition(":")[0] for text in texts}] == [2]


def test_sessions_take_the_profile_that_a_call_fits(bundle: Bundle) -> None:
    """A small image runs in the profile for small ones, and none takes what lies between."""
    texts = ("vision:H=16..32,W=16..32", "vision:B=1,H=136..256,W=136..256")
    own = read_profiles(bundle, SHAPES, texts)["vision"]
    trt = StandIn(HostDevice())
    file = write_engine(bundle.path / "vision.engine", bundle, "vision", SHAPES.context, own)
    vision = TrtSession(trt, file, bundle, "vision", trt.device)
    for images, side in ((4, 32), (1, 256), (2, 16)):
        vision.run({"pixels": np.zeros((images, 3, side, side), bundle.dtype)})
    assert trt.runs("vision") == [(0, 2), (1, 1)]
    with pytest.raises(InputError, match=r"the engine takes .*, or .*") as caught:
        vision.run({"pixels": np.zeros((1, 3, 64, 64), bundle.dtype)})
    assert "--profile" in caught.value.hint


def test_the_command_shows_builds_and_records_them(bundle: Bundle) -> None:
    sides = "H=32..64..128,W=32..64..128"
    options = ["--target", "rtx:sm89", "--context", 256, "--batch", 4, "--chunk", 64, "--opt-level", 0]
    own = [part for text in (f"vision:{sides}", *DECODER) for part in ("--profile", text)]
    dry = invoke("build", bundle.path, *options, *own, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    assert f"B=1..4,{sides}" in dry.stdout and "B=1..2..4,T=1" in dry.stdout
    done = invoke("build", bundle.path, *options, *own, "--json")
    assert done.exit_code == 0, done.stderr
    built = open_engines(open_bundle(bundle.path), "rtx:sm89", version_of(import_tensorrt("rtx")))
    assert built.graphs["vision"].profiles == [{"B": [1, 4, 4], "H": [32, 64, 128], "W": [32, 64, 128]}]
    assert [one["B"] for one in built.graphs["decoder"].profiles] == [[1, 1, 1], [1, 2, 4]]
    listed = json.loads(done.stdout)["targets"][0]["profiles"]
    assert listed["decoder"] == built.graphs["decoder"].profiles
    wrong = invoke("build", bundle.path, *options, "--profile", "vision:X=1")
    assert wrong.exit_code == 3 and "vision has B, H, W" in wrong.stderr
