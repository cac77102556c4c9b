"""The torch-free runtime of pixtral: bundles in, answers out.

    from pixtral_runtime import load
    model = load("bundle")
    print(model.generate("What is this?", ["photo.jpg"]).text)

Names are imported on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixtral_runtime.generation.model import Answer as Answer
    from pixtral_runtime.generation.model import Model as Model
    from pixtral_runtime.generation.model import load as load
    from pixtral_runtime.generation.sampling import Sampling as Sampling
    from pixtral_runtime.inputs.conversation import Message as Message

_HOME = {
    "load": "generation.model",
    "Model": "generation.model",
    "Answer": "generation.model",
    "Message": "inputs.conversation",
    "Sampling": "generation.sampling",
}
__all__ = ["Answer", "Message", "Model", "Sampling", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
