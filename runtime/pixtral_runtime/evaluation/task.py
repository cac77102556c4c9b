"""What a benchmark is, as data: rows of a dataset in, examples out.

A row is a dictionary with the columns of the published dataset. A task says which it needs, what is asked about them,
and how answers are scored. One that cannot be understood becomes a broken row, with the reason, and stops nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pixtral_runtime.inputs.conversation import Message

Row = Mapping[str, Any]


class RowError(ValueError):
    """A row that is not as its dataset publishes them. The text says what is wrong."""


@dataclass(frozen=True)
class Example:
    """One question. `id` names it within its task; images in the messages are paths.

    `group` is a part of the dataset that gets a score of its own, such as MM-MT-Bench's categories. `metric` takes the
    place of the task's metrics (`custom`). `details` are facts that a metric or the judge needs, as JSON would hold it:
    `choices` are the texts of lettered choices, `final_answer` says that the prompt asks for "Final Answer: …".
    """

    id: str
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    group: str = ""
    metric: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The last message's text, for people to read."""
        return "\n".join(part for part in self.messages[-1].content if isinstance(part, str))

    @property
    def images(self) -> tuple[Path, ...]:
        return tuple(part for message in self.messages for part in message.content if isinstance(part, Path))


@dataclass(frozen=True)
class BrokenRow:
    """A row of the dataset that gave no example."""

    id: str
    reason: str


SaveImage = Callable[[object], Path]
"""Turns a row's image, as its dataset publishes it, into a file: `{"bytes": …, "path": …}` of a parquet file, a path
relative to the dataset's folder, base64. Raises RowError where there is none."""


@dataclass(frozen=True)
class Shots:
    """Solved questions that stand before each one: the usual number, and the split that they are the first rows of.

    `before` puts these rows and their number before the questions: it gives what is to take the place of
    `Task.examples`, and raises RowError. `read` finds them in files of the authors' own kind.
    """

    number: int
    split: str
    before: Callable[[Sequence[Row], int], Callable[[Row, int, SaveImage], list[Example]]]
    read: Callable[[Path], Iterable[Row | BrokenRow]]


@dataclass(frozen=True)
class Task:
    """A benchmark (specification section 5.3).

    `dataset`, `config` and `split` are those on the Hugging Face hub, empty where it is not there. `metrics` are names
    of `metrics.METRICS`, the headline first; empty where a judge rates. `columns` are those of its parquet files, a
    tuple where another edition names one otherwise. `examples` makes a row's examples, one each but for conversations;
    `number` is the row's place in the dataset, from 0. It raises RowError. `read` takes the place of
    `dataset.read_rows` for a dataset in files of its own kind.

    `asks` says what the model does: it answers, or reads the question and has its `choice` of letters, or reads a text
    and is told how well it predicts the `tokens`. `shots` are solved questions before each. `files` name what the hub
    has in the place of parquet files.
    """

    name: str
    dataset: str
    config: str
    split: str
    max_new_tokens: int
    metrics: tuple[str, ...]
    columns: tuple[str | tuple[str, ...], ...]
    examples: Callable[[Row, int, SaveImage], list[Example]]
    read: Callable[[Path], Iterable[Row | BrokenRow]] | None = None
    asks: Literal["answer", "choice", "tokens"] = "answer"
    has_pictures: bool = True
    shots: Shots | None = None
    files: tuple[str, ...] = ()
