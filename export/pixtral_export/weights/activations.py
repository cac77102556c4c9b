"""What units of the model gave for the calibration samples, kept on disk between one unit and the next."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pixtral_runtime.errors import CheckpointError
from pixtral_runtime.files import sync


class Activations:
    """Outputs of units for every sample, a file each, so that memory holds one sample at a time.

    They are on the disk before the journal says that a unit is done: a walk that goes on reads them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, unit: str, values: Iterable[Tensor]) -> None:
        self.drop(unit)
        place = self._folder / unit
        place.mkdir(parents=True)
        for index, value in enumerate(values):
            if not value.isfinite().all():
                raise overflow(f"the output of {unit}")
            path = place / f"{index:06}.pt"
            torch.save(value.clone(), path)
            sync(path)
        for folder in (place, self._folder):
            sync(folder)

    def load(self, unit: str, only: range | None = None) -> Iterator[Tensor]:
        """All values in their order, or those whose numbers are in `only`. Raises CheckpointError where damaged."""
        for number, path in enumerate(sorted((self._folder / unit).glob("*.pt"))):
            if only is None or number in only:
                try:
                    value = torch.load(path, weights_only=True)
                except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                    raise CheckpointError(
                        f"{path}, which an earlier calibration left, is damaged: {str(error) or 'it ends too early'}",
                        f"delete {self._folder}, and run the same command again",
                    ) from error
                yield value

    def drop(self, unit: str) -> None:
        shutil.rmtree(self._folder / unit, ignore_errors=True)


def overflow(where: str) -> CheckpointError:
    """Finite weights, yet no answer: no number format can help."""
    return CheckpointError(
        f"{where} is not finite on the calibration samples, even in float32",
        "the weights are damaged or of a model that was not trained",
    )
