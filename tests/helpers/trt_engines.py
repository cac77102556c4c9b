"""Sessions and models over stand-in engines of a bundle, and what tests feed them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from helpers.places import IMAGES
from helpers.trt_standin import StandIn, write_engine
from pixtral_engines.parts import specs_of
from pixtral_engines.profiles import Shapes, profiles
from pixtral_runtime import Model, load
from pixtral_runtime.backends.session import Array
from pixtral_runtime.backends.trt_bundle import open_sessions
from pixtral_runtime.backends.trt_session import TrtSession, TrtSettings
from pixtral_runtime.bundle.engine_list import Engine, EngineSet
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import GRAPHS
from pixtral_runtime.inputs.conversation import user_message
from pixtral_runtime.inputs.image_files import open_image
from pixtral_runtime.inputs.prompt import Prompt

QUESTION = "Describe this image in one short sentence."
IMAGE = "gray_circle_99x70.png"
SHAPES = Shapes(context=256, batch=2, chunk=16)
TOKENS = 12
PLAIN = TrtSettings()


def engine_file(bundle: Bundle, name: str, shapes: Shapes = SHAPES, cuts: Sequence[int] = ()) -> Path:
    sizes = profiles(bundle, name.partition(".")[0], shapes)
    return write_engine(bundle.path / f"{name}.engine", bundle, name, shapes.context, sizes, cuts)


def session(trt: StandIn, bundle: Bundle, graph: str, settings: TrtSettings = PLAIN) -> TrtSession:
    return TrtSession(trt, engine_file(bundle, graph), bundle, graph, trt.device, settings)


def engines(
    trt: StandIn, bundle: Bundle, settings: TrtSettings = PLAIN, shapes: Shapes = SHAPES, cuts: Sequence[int] = ()
) -> Model:
    names = [name for graph in GRAPHS for name in specs_of(bundle, graph, cuts)]
    listed = {name: Engine(engine_file(bundle, name, shapes, cuts).name, 0, "", "", []) for name in names}
    listing = EngineSet("stand-in", "", "", shapes.context, shapes.batch, shapes.chunk, listed, cuts=list(cuts))
    sessions = open_sessions(trt, bundle, listing, trt.device, settings)
    return Model(bundle, sessions, load(bundle.path).prompts)


def answer(model: Model, *images: str) -> tuple[int, ...]:
    return model.generate(QUESTION, [IMAGES / image for image in images], max_new_tokens=TOKENS).token_ids


def prompt_of(model: Model, *images: str) -> Prompt:
    return model.prompts.build(user_message(QUESTION, [open_image(IMAGES / image) for image in images], None))


def step_feeds(bundle: Bundle, hidden: Array, positions: Array) -> dict[str, Array]:
    """A step of the decoder with logits of every slot's last token."""
    slots, tokens = positions.shape
    return {
        "hidden": hidden,
        "position_ids": positions,
        "write_index": positions[:, 0].copy(),
        "logits_index": np.arange(slots) * tokens + tokens - 1,
        "inverse_temperature": np.ones(slots, np.float32),
    }


def hidden_of(bundle: Bundle, slots: int, tokens: int, seed: int = 0) -> Array:
    shape = (slots, tokens, bundle.model.decoder.dim)
    return np.random.default_rng(seed).standard_normal(shape).astype(bundle.dtype)
