"""The engines' part of a certificate: what was built from what, and how far TensorRT's network is from ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pixtral_engines.check import NetworkCheck
from pixtral_runtime.backends.trt_package import import_tensorrt
from pixtral_runtime.bundle.certificate import has_certificate, read_certificate, with_listed_engines
from pixtral_runtime.bundle.engine_list import EngineSet, listed_engines, names_of_target
from pixtral_runtime.bundle.manifest import Bundle, writing
from pixtral_runtime.bundle.signature import is_signed
from pixtral_runtime.compare.certify import rounded_up
from pixtral_runtime.compare.replay import Replay
from pixtral_runtime.errors import PixtralError
from pixtral_runtime.inputs.preprocess import default_preprocess
from pixtral_runtime.inputs.prompt import PromptBuilder

INTERPRETED_BYTES = 100_000_000
"""The largest bundle whose network is interpreted in NumPy by the way: 5 s for the demo checkpoint. For others
`pixtral check --engine` does it, in its own time."""


def certify_engines(bundle: Bundle, targets: Iterable[str], say: Callable[[str], None]) -> None:
    """Add engines that were just built to a bundle's certificate. What cannot be said of them is told by `say`."""
    if is_signed(bundle.path):
        say(f"{bundle.path} was signed before these engines were built: sign it again")
    if not has_certificate(bundle):
        say(f"{bundle.path} has no certificate that its engines could be added to")
        return
    with writing(bundle.path):
        try:
            certificate = read_certificate(bundle)
        except PixtralError as error:
            say(f"the engines were not added to the certificate: {error}")
            return
        networks: dict[str, dict[str, float]] = {}
        for target in dict.fromkeys(targets):
            for name in names_of_target(bundle, target):
                networks[name] = _network_errors(bundle, listed_engines(bundle, name), say)
        with_listed_engines(certificate, bundle, networks).write(bundle.path)


def _network_errors(bundle: Bundle, engines: EngineSet, say: Callable[[str], None]) -> dict[str, float]:
    """The largest error of each stage, as a share of the largest value; empty where that was not compared."""
    if sum(entry.bytes for entry in bundle.files.values()) > INTERPRETED_BYTES:
        say(f"the network of {engines.target} was not compared; pixtral check {bundle.path} --engine {engines.target}")
        return {}
    replay = Replay(PromptBuilder(bundle, default_preprocess(bundle)))
    pictures = [(name, pixels[None]) for name, pixels in replay.vision_inputs().items()]
    errors: dict[str, float] = {}
    try:
        check = NetworkCheck(
            bundle,
            replay.builder,
            import_tensorrt("trt" if engines.target.startswith("trt") else "rtx"),
            compat=engines.compat is not None,
            cuts=engines.cuts,
            pictures=pictures,
            asked=replay.prompts.items(),
        )
        for one in check.run():
            errors[one.stage] = max(errors.get(one.stage, 0.0), one.error)
    except PixtralError as error:
        say(f"the network of {engines.target} was not compared: {error}")
        return {}
    return {stage: rounded_up(error) for stage, error in errors.items()}
