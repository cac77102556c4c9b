"""Which bundles `pixtral tune` makes of a checkpoint, and why one of them could not be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pixtral_export.checkpoint.reader import Checkpoint
    from pixtral_export.plan import ExportPlan, ExportSettings
    from pixtral_runtime.bundle.device_catalog import KnownDevice
    from pixtral_runtime.errors import Remedy

SAME = "same"  # a cache in the dtype of the activations
FINEST_FIRST = ("float32", "bfloat16", "float16", "int8", "fp8", "nvfp4", "int4")
"""All precisions. The first bundle's answers take the place of right ones where there are none."""
EXAMPLES = {"--precision": "float16,int4", "--kv-cache": "same,int8"}


@dataclass(frozen=True)
class ExportWishes:
    """Options of the exports as they were typed."""

    precision: str | None
    kv_cache: str | None
    max_context: int | None
    calibration: Path | None
    calibration_samples: int | None

    def grid(self) -> dict[str, ExportSettings]:
        """Every precision with every cache by the name of its bundle, the finest first. Raises InputError."""
        from pixtral_export.plan import ExportSettings
        from pixtral_export.quantization.recipes import KV_CACHES
        from pixtral_runtime.bundle.spec import ACTIVATION_DTYPES
        from pixtral_runtime.errors import InputError

        default, grid = ExportSettings().dtype, {}
        precisions = _words("--precision", self.precision, default, FINEST_FIRST)
        caches = _words("--kv-cache", self.kv_cache, SAME, (SAME, *ACTIVATION_DTYPES, *KV_CACHES))
        for precision in precisions:
            dtype = precision if precision in ACTIVATION_DTYPES else default
            for cache in caches:
                if cache not in (SAME, dtype, *KV_CACHES):
                    raise InputError(f"{precision} has no cache in {cache}", f"--kv-cache {EXAMPLES['--kv-cache']}")
                coded = cache if cache in KV_CACHES else None
                name = precision if coded is None else f"{precision}-kv-{coded}"
                grid[name] = ExportSettings(
                    dtype, self.max_context, precision=None if precision == dtype else precision, kv_cache=coded
                )
        return grid

    def plan(self, checkpoint: Checkpoint, settings: ExportSettings) -> ExportPlan:
        """With the user's samples where the bundle is calibrated. Raises SettingError."""
        from pixtral_export.plan import plan_export
        from pixtral_runtime.errors import Option, SettingError

        try:
            plan = plan_export(checkpoint, settings)
        except SettingError as error:
            ours = [one for one in error.remedies if not isinstance(one, Option) or one.name in vars(self)]
            raise SettingError(str(error), *(ours or ("'pixtral export', and tune the bundle",))) from error
        if not plan.recipe.calibrated:
            return plan
        own = replace(settings, calibration=self.calibration, calibration_samples=self.calibration_samples)
        return plan_export(checkpoint, own)


def _words(option: str, text: str | None, default: str, known: Sequence[str]) -> list[str]:
    """What the user typed with commas between, in the order of `known`. Raises InputError for another word."""
    from pixtral_runtime.errors import InputError

    words = [default] if text is None else [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise InputError(f"{option} {text}: {word!r} is none of {', '.join(known)}", f"{option} {EXAMPLES[option]}")
    return sorted(set(words), key=known.index)


def refuse_what_cannot_run(
    planned: Sequence[tuple[Checkpoint, ExportPlan]], backend: str, device: KnownDevice | None, batch: int
) -> None:
    """Raise InputError for bundles that no backend here could run, or the device no `batch` requests at a time."""
    from pixtral_runtime.backends.choose import BACKENDS, FLAVORS
    from pixtral_runtime.errors import InputError, Option, SettingError

    if backend not in BACKENDS:
        raise SettingError(f"no backend '{backend}'", Option("backend", BACKENDS))
    if backend in FLAVORS:
        raise InputError(
            f"--backend {backend} runs engines, which bundles that are exported now do not have",
            "--backend auto, or a bundle for which 'pixtral build' made engines",
        )
    reasons: dict[tuple[str, str], str] = {}  # by option and word
    for checkpoint, plan in planned:
        precision = plan.recipe.name
        if reason := _missing_kernels(precision, plan.settings.dtype, backend):
            reasons["--precision", precision] = f"{precision} {reason}"
        elif device is not None and (option := _too_much_for(device, batch, checkpoint, plan)):
            what = precision if option == "--precision" else "a cache in int8"
            reasons[option, precision if option == "--precision" else "int8"] = f"{what} does not run on {device.name}"
    if not reasons:
        return
    raise InputError("; ".join(dict.fromkeys(reasons.values())), *_without(list(reasons), planned))


def _missing_kernels(precision: str, dtype: str, backend: str) -> str:
    """Why nothing here runs a bundle without engines; nothing where something does."""
    from pixtral_runtime.backends.ort_cuda import WIDENED
    from pixtral_runtime.bundle.device_catalog import NOT_ON_CPU

    if {precision, dtype} & set(NOT_ON_CPU):  # ONNX Runtime's CUDA has no kernels for them either
        return "runs in TensorRT only, for which a bundle that is exported now has no engines"
    if backend == "ort-cuda" and precision in WIDENED:
        return "has no products in ONNX Runtime's CUDA"
    return ""


def _too_much_for(device: KnownDevice, batch: int, checkpoint: Checkpoint, plan: ExportPlan) -> str:
    """The option whose word a device cannot take; nothing where it runs the bundle."""
    from pixtral_export.plan import plan_footprint
    from pixtral_runtime.bundle.spec import kv_cache_bytes_per_token
    from pixtral_runtime.evaluation.tuning_costs import PREDICTED_CONTEXT

    footprint, context = plan_footprint(checkpoint, plan), min(plan.limits.max_context, PREDICTED_CONTEXT)
    if not footprint.advice(device, context, batch):
        return ""
    per_token = kv_cache_bytes_per_token(checkpoint.config, plan.settings.dtype)
    has_plain_rival = not replace(footprint, cache_bytes_per_token=per_token).advice(device, context, batch)
    return "--kv-cache" if has_plain_rival else "--precision"


def _without(refused: Sequence[tuple[str, str]], planned: Sequence[tuple[Checkpoint, ExportPlan]]) -> list[Remedy]:
    """What to leave away of each option, or what to name instead of all its words."""
    given = (
        ("--precision", {plan.recipe.name for _, plan in planned}, "int4"),
        ("--kv-cache", {plan.recipe.kv_cache or SAME for _, plan in planned}, SAME),
    )
    remedies: list[Remedy] = []
    for option, all_words, instead in given:
        words = [word for name, word in refused if name == option]
        if words and all_words - set(words):
            remedies.append(f"leave {' and '.join(words)} out of {option}")
        elif words:
            remedies.append("another device" if instead in words else f"{option} {instead}")
    return remedies
