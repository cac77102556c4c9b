"""A bundle's engines, opened: three graphs, the decoder perhaps in parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np

from pixtral_runtime.backends.cuda import DeviceStream
from pixtral_runtime.backends.device_buffers import DeviceCache
from pixtral_runtime.backends.session import Array, Buffer, KVCache, Sessions, own_cache
from pixtral_runtime.backends.trt_context import Scratch
from pixtral_runtime.backends.trt_kernel_cache import compiles_kernels, kernel_file
from pixtral_runtime.backends.trt_session import TrtSession, TrtSettings
from pixtral_runtime.bundle.decoder_parts import engine_specs
from pixtral_runtime.bundle.engine_list import EngineSet
from pixtral_runtime.bundle.manifest import Bundle
from pixtral_runtime.bundle.spec import GraphSpec
from pixtral_runtime.errors import InputError

RTX_PROMPT_STEP = 32  # tokens


class TrtParts:
    """A decoder as several engines, one after the other over one cache, as `TrtSession` is it as one.

    What several parts take goes to the device once; hidden states stay there.
    """

    def __init__(self, parts: Sequence[TrtSession]) -> None:
        self._parts = parts
        self.picks, self.graph_use = parts[-1].picks, parts[0].graph_use
        for part in parts:
            part.graph_use = self.graph_use
        caches = tuple(pair for part in parts for pair in part.spec.caches)
        cached, made = {past for past, _ in caches}, {tensor for part in parts for tensor in part.spec.outputs}
        taken = Counter(tensor for part in parts for tensor in part.spec.inputs if tensor not in cached)
        self._shared = [tensor.name for tensor, count in taken.items() if count > 1]
        fed = tuple(tensor for tensor in taken if tensor not in made)
        self._spec = GraphSpec("decoder", fed, parts[-1].spec.outputs, caches)

    def run(self, feeds: Mapping[str, Array | Buffer], cache: KVCache | None = None) -> dict[str, Buffer]:
        """Queue one run of every part. Raises InputError as `TrtSession.run` does."""
        past = own_cache(self._spec, cache, DeviceCache)
        names = {tensor.name for tensor in self._spec.inputs}
        if past is None or set(feeds) != names:
            odd = sorted(set(feeds) ^ names)
            raise InputError(f"decoder takes {', '.join(sorted(names))}; missing or unknown: {', '.join(odd)}")
        values = dict(feeds)
        for name in self._shared:
            if isinstance(value := values[name], np.ndarray):
                values[name] = self._parts[0].upload(name, value)
        outputs: dict[str, Buffer] = {}
        for part in self._parts:
            taken = [tensor.name for tensor in part.spec.inputs if tensor.name in values]
            outputs = part.run({name: values[name] for name in taken}, past.of(part.spec.caches))
            values |= outputs
        return outputs

    def new_cache(self, slots: int, rows: int) -> DeviceCache:
        """A zeroed cache of all parts. Raises InputError where it is larger than the engines'."""
        return self._parts[0].new_cache(slots, rows, self._spec.caches)


def open_sessions(
    trt: ModuleType,
    bundle: Bundle,
    engines: EngineSet,
    device: DeviceStream,
    settings: TrtSettings,
) -> Sessions:
    """A target's engines on one device. Raises InputError and MachineError as `TrtSession` does."""
    scratch = Scratch(device)

    def session(name: str) -> TrtSession:
        engine = engines.graphs[name]
        kernels = kernel_file(name, engine.sha256, device.name)
        path = bundle.path / engine.file
        return TrtSession(trt, path, bundle, name, device, settings, scratch, kernels, engines.cuts)

    vision, embed = map(session, ("vision", "embed"))
    parts = list(map(session, engine_specs(bundle.graph_spec("decoder"), engines.cuts)))
    decoder = TrtParts(parts) if len(parts) > 1 else parts[0]
    return Sessions(
        vision,
        embed,
        decoder,
        picks=decoder.picks,
        replays=settings.cuda_graphs,
        chunk=engines.chunk,
        prompt_step=min(RTX_PROMPT_STEP, engines.chunk) if compiles_kernels(trt) else 1,
        slots=engines.batch,
        context=engines.context,
        drafts=False,
    )
