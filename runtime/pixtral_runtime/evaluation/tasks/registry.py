"""The benchmarks by name."""

from __future__ import annotations

from pixtral_runtime.errors import Option, SettingError
from pixtral_runtime.evaluation.task import Task
from pixtral_runtime.evaluation.tasks import (
    chartqa,
    custom,
    docvqa,
    easy_vqa,
    gsm8k,
    ifeval,
    math,
    mathvista,
    mm_mt_bench,
    mmlu,
    mmmu,
    perplexity,
    vqav2,
)

PICTURES = (mm_mt_bench, mmmu, mathvista, chartqa, docvqa, vqav2, easy_vqa, custom)
TEXTS = (perplexity, mmlu, gsm8k, math, ifeval)
TASKS: dict[str, Task] = {module.TASK.name: module.TASK for module in (*PICTURES, *TEXTS)}


def task_named(name: str) -> Task:
    """Raises SettingError."""
    if name not in TASKS:
        raise SettingError(f"there is no task {name!r}", Option("task", tuple(TASKS)))
    return TASKS[name]
