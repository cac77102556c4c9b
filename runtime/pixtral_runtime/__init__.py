"""The torch-free runtime of pixtral: bundles in, answers out.

    from pixtral_runtime import load
    model = load("bundle")
    print(model.generate("What is this?", ["photo.jpg"]).text)

Names are imported on first use, so that importing the package costs nothing. No library that pixtral runs on reports
how it is used, unless the user's environment says that it may.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pixtral_runtime.generation.conversation import Conversation as Conversation
    from pixtral_runtime.generation.model import Answer as Answer
    from pixtral_runtime.generation.model import Model as Model
    from pixtral_runtime.generation.model import load as load
    from pixtral_runtime.generation.sampling import Sampling as Sampling
    from pixtral_runtime.inputs.conversation import Message as Message

# Read when each library starts. ONNX Runtime would also keep an id of the machine and its events under ~/.cache.
for _name, _value in {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_name, _value)

_HOME = {
    "Conversation": "generation.conversation",
    "load": "generation.model",
    "Model": "generation.model",
    "Answer": "generation.model",
    "Message": "inputs.conversation",
    "Sampling": "generation.sampling",
}
__all__ = ["Answer", "Conversation", "Message", "Model", "Sampling", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
