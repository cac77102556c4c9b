"""Devices beside a bundle: what it takes on each and whether that fits, as rows of `pixtral plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pixtral_cli import output

if TYPE_CHECKING:
    from pixtral_runtime.bundle.device_catalog import KnownDevice
    from pixtral_runtime.bundle.footprint import Footprint

THIS_MACHINE = "cpu"


def device_rows(footprint: Footprint, names: Sequence[str] | None, context: int, batch: int) -> list[dict[str, Any]]:
    """A row for each device of these names, all where there are none. Raises InputError for an unknown name."""
    return [_row(footprint, device, context, batch) for device in _devices(names)]


def print_device_rows(rows: Sequence[dict[str, Any]]) -> None:
    header = ("device", "memory", "weights", "KV cache", "activations", "largest context", "largest batch", "fits")
    sizes = ("memory_bytes", "weight_bytes", "kv_cache_bytes", "activation_bytes")
    output.print_table(
        header,
        [
            (
                row["device"],
                *(output.size(row[key]) for key in sizes),
                f"{row['largest_context']:,}",
                f"{row['largest_batch']:,}",
                "yes" if row["fits"] else f"no: {row['advice']}",
            )
            for row in rows
        ],
    )


def _devices(names: Sequence[str] | None) -> list[KnownDevice]:
    from pixtral_runtime.bundle.device_catalog import CPU_RESERVE_BYTES, KNOWN_DEVICES, KnownDevice
    from pixtral_runtime.device.memory import available_memory_bytes
    from pixtral_runtime.errors import InputError

    known = dict(KNOWN_DEVICES)
    if memory := available_memory_bytes():
        known[THIS_MACHINE] = KnownDevice(THIS_MACHINE, memory, CPU_RESERVE_BYTES, 0)
    unknown = set(names or ()) - set(known)
    if unknown:
        raise InputError(f"no device '{min(unknown)}'", f"--device {'|'.join(known)}")
    return [known[name] for name in names or known]


def _row(footprint: Footprint, device: KnownDevice, context: int, batch: int) -> dict[str, Any]:
    advice = " ".join(map(output.remedy_text, footprint.advice(device, context, batch)))
    return {
        "device": device.name,
        "memory_bytes": device.memory_bytes,
        "reserved_bytes": device.reserved_bytes,
        "weight_bytes": footprint.weight_bytes(device),
        "kv_cache_bytes": footprint.cache_bytes(context, batch),
        "activation_bytes": footprint.activation_bytes(device, context, batch),
        "fits": not advice,
        "largest_context": footprint.largest_context(device, batch) if footprint.supported(device) else 0,
        "largest_batch": footprint.largest_batch(device, context) if footprint.supported(device) else 0,
        "advice": advice,
    }
