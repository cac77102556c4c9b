"""What building a bundle's engines takes, known before it starts: shapes, bytes of engines, memory, parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pixtral_engines.parts import even_cuts, memory_per_byte, part_bytes, part_memory, specs_of
from pixtral_engines.profiles import Profile, Shapes, read_profiles
from pixtral_engines.targets import Target, parse_targets, refuse_types
from pixtral_runtime.bundle.engine_list import name_of_fewer_rows
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.onnx_weights import weight_bytes
from pixtral_runtime.device.memory import available_memory_bytes
from pixtral_runtime.errors import Option, SettingError

BUILDER_MEMORY_BYTES = 1_000_000_000  # TensorRT loaded: 0.6 GB, and what vision takes beside its weights: 0.3
MOST_CHOSEN_PARTS = 8  # of a decoder, where nobody says how many


@dataclass(frozen=True)
class BuildPlan:
    """What building takes. `listed_as` is the target's name, or the one of its engines of fewer cache rows.

    `engine_bytes` are, by the engine's name, those of the weights that it reads, `profiles` by graph. `cuts`: where the
    decoder is cut into parts, see `decoder_parts`. `peak_memory_bytes` is what the engine takes that takes most: they
    are built one after another.
    """

    target: Target
    listed_as: str
    shapes: Shapes
    profiles: Mapping[str, list[Profile]]
    engine_bytes: Mapping[str, int]
    peak_memory_bytes: int
    cuts: tuple[int, ...] = ()


def plan_build(
    bundle: Bundle, target: Target, shapes: Shapes, own_profiles: Sequence[str] = (), parts: int | None = None
) -> BuildPlan:
    """Check that the target has the bundle's types, and say what building takes. Raises InputError.

    `own_profiles` are texts that `read_profiles` reads. `parts` of the decoder; None: 1, or as many as this machine's
    memory asks for.
    """
    refuse_types(bundle, target)
    layers = bundle.model.decoder.n_layers
    if parts is not None and not 1 <= parts <= layers:
        raise SettingError(f"a decoder of {layers} layers cannot be built in {parts} parts", Option("parts", "N"))
    profiles = read_profiles(bundle, shapes, own_profiles)
    available = available_memory_bytes()
    for count in [parts] if parts is not None else [1, 2, 4, MOST_CHOSEN_PARTS]:
        cuts = even_cuts(bundle, min(count, layers))
        others = {graph: sum(weight_bytes(bundle.graph_path(graph)).values()) for graph in ("vision", "embed")}
        decoder = dict(zip(specs_of(bundle, "decoder", cuts), part_bytes(bundle, cuts), strict=True))
        peak = BUILDER_MEMORY_BYTES + max(
            round(memory_per_byte(bundle) * max(others.values())), *part_memory(bundle, cuts)
        )
        plan = BuildPlan(target, target.name, shapes, profiles, others | decoder, peak, cuts)
        if available is None or plan.peak_memory_bytes <= available:
            break
    return plan


def plan_targets(
    bundle: Bundle, targets: str, shapes: Sequence[Shapes], own_profiles: Sequence[str] = (), parts: int | None = None
) -> list[BuildPlan]:
    """For each target of a comma-separated list a plan for each of the shapes, those of most rows first.

    Raises InputError.
    """
    plans = []
    for target in parse_targets(targets):
        for number, one in enumerate(sorted(shapes, key=lambda one: -one.context)):
            plan = plan_build(bundle, target, one, own_profiles, parts)
            listed_as = name_of_fewer_rows(target.name, one.context) if number else target.name
            plans.append(replace(plan, listed_as=listed_as))
    return plans


def build_summary(bundle: Bundle, plans: Sequence[BuildPlan], *, is_built: bool) -> dict[str, Any]:
    """What was built, or would be, as a JSON document: plans of one bundle and of alike shapes but for cache rows."""
    shapes = plans[0].shapes
    built = bundle.engines if is_built else {}
    return {
        "bundle": str(bundle.path),
        "precision": bundle.precision,
        "context": shapes.context,
        "batch": shapes.batch,
        "chunk": shapes.chunk,
        "parts": len(plans[0].cuts) + 1,
        "peak_memory_bytes": max(plan.peak_memory_bytes for plan in plans),
        "built": is_built,
        "targets": [
            {
                "target": plan.listed_as,
                "context": plan.shapes.context,
                "engine_bytes": {name: entry["bytes"] for name, entry in built[plan.listed_as]["graphs"].items()}
                if is_built
                else dict(plan.engine_bytes),
                "profiles": {graph: list(profiles) for graph, profiles in plan.profiles.items()},
            }
            for plan in plans
        ],
    }
