"""The benchmarks by name."""

from __future__ import annotations

from pixtral_runtime.errors import Option, SettingError
from pixtral_runtime.evaluation.task import Task
from pixtral_runtime.evaluation.tasks import chartqa, custom, docvqa, easy_vqa, mathvista, mm_mt_bench, mmmu, vqav2

TASKS: dict[str, Task] = {
    module.TASK.name: module.TASK for module in (mm_mt_bench, mmmu, mathvista, chartqa, docvqa, vqav2, easy_vqa, custom)
}


def task_named(name: str) -> Task:
    """Raises SettingError."""
    if name not in TASKS:
        raise SettingError(f"there is no task {name!r}", Option("task", tuple(TASKS)))
    return TASKS[name]
