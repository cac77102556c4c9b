"""The same job on several machines: a Ray Data pipeline with one copy of the model in each worker.

Requests travel in blocks; a worker runs a block as a `Job` of its own and hands its records back. Ray starts a worker
that died anew and gives its block to another. Every worker must find the bundle and the images under the same paths.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pixtral_runtime.batch.records import Record, Request, Settings
from pixtral_runtime.batch.worker import Worker, WorkerOptions
from pixtral_runtime.errors import MachineError, Option, extra_missing

LOCAL = "local"
CONNECT_TIMEOUT_S = 10.0
REQUESTS_PER_SLOT = (
    4  # requests for each slot of a worker: large enough to keep slots busy, small enough to share out evenly
)


class RayJob:
    """Requests to be answered by `workers` copies of the model on the cluster at `address`, "local" for one here.

    Has the face of a `Job`. Stopping leaves the blocks that are under way unfinished; `--resume` does them again.
    """

    def __init__(
        self,
        bundle: Path,
        requests: Sequence[Request],
        settings: Settings,
        options: WorkerOptions,
        done: Mapping[str, Record],
        *,
        address: str = LOCAL,
        workers: int = 1,
    ) -> None:
        self._bundle, self._requests, self._settings, self._options = bundle, requests, settings, options
        self._done, self._address, self._workers = done, address, workers
        self._stopped = False
        self.order = [request.id for request in requests]
        self.kept = 0
        self.idle_s: float | None = None  # each worker waits for its own images

    def stop(self) -> None:
        self._stopped = True

    def records(self) -> Iterator[Record]:
        """Yield records as blocks are done. Raises MachineError where the cluster cannot be had or a worker fails."""
        ray = _connect(self._address, self._workers)
        try:
            import ray.data as data

            block = REQUESTS_PER_SLOT * (self._options.batch or 1)
            rows = [
                {"request": pickle.dumps(request), "before": pickle.dumps(self._done.get(request.id))}
                for request in self._requests
            ]
            answered = data.from_items(rows, override_num_blocks=max(1, len(rows) // block)).map_batches(
                _BlockWorker,
                batch_size=block,
                fn_constructor_args=(Path.cwd(), self._bundle, self._settings, self._local_threads()),
                compute=data.ActorPoolStrategy(size=self._workers),
                num_cpus=1,
                num_gpus=self._gpus_of_worker(ray),
            )
            for row in answered.iter_rows():
                if row["record"] is None:
                    self.kept += 1
                else:
                    yield Record.from_dict(json.loads(row["record"]))
                if self._stopped:
                    return
        except ray.exceptions.RayError as error:
            raise MachineError(
                f"a worker failed: {error}", "ray status", Option("resume", note="goes on with what is missing")
            ) from error
        finally:
            ray.shutdown()

    def _gpus_of_worker(self, ray: Any) -> int | None:
        """One of its own where the cluster has any and they are not left alone."""
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if not gpus or self._options.backend == "ort-cpu":
            return None
        if self._workers > gpus:
            raise MachineError(
                f"{self._workers} workers are to have a GPU each, and the cluster has {gpus}",
                Option("ray_workers", gpus),
                Option("backend", "ort-cpu"),
            )
        return 1

    def _local_threads(self) -> WorkerOptions:
        """Workers on one machine share its cores, unless the user said how many each may take."""
        if self._address != LOCAL or self._options.threads:
            return self._options
        return replace(self._options, threads=max(1, (os.cpu_count() or 1) // self._workers))


class _BlockWorker:
    """In a worker's process, which works in `folder`: the model, and a job for each block of requests."""

    def __init__(self, folder: Path, bundle: Path, settings: Settings, options: WorkerOptions) -> None:
        os.chdir(folder)
        self._worker = Worker(bundle, settings, options)

    def __call__(self, block: Mapping[str, Any]) -> dict[str, Any]:
        """A block's records as JSON, None for a request whose record from before still holds."""
        requests: list[Request] = [pickle.loads(item) for item in block["request"]]
        before: list[Record | None] = [pickle.loads(item) for item in block["before"]]
        job = self._worker.job(requests, {record.id: record for record in before if record is not None})
        records = {record.id: json.dumps(record.to_dict()) for record in job.records()}
        return {"record": np.array([records.get(request.id) for request in requests], object)}


def _connect(address: str, workers: int) -> Any:
    try:
        import ray
    except ImportError as error:
        raise extra_missing("ray", "ray", "Running on a cluster") from error
    try:
        if address != LOCAL:
            _refuse_deaf(address)
        here = {"num_cpus": workers, "include_dashboard": False} if address == LOCAL else {"address": address}
        ray.init(**here, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise MachineError(
            f"no Ray cluster at {address}: {error}", "ray start --head", Option("ray", "local")
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray


def _refuse_deaf(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
