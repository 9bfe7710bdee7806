"""The tasks by name, each imported only when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

from benchmarks.quality.problem import Task
from examples.data import DataError
from tucka.errors import expected


def _task(name: str) -> Task:
    try:
        found: Task = importlib.import_module(f"{__name__}.{name}").TASK
    except ModuleNotFoundError as error:
        cure = f"Run: pip install {error.name}"
        raise DataError(expected(name, "the packages that the task imports", f"no {error.name}", cure=cure)) from error
    return found


TASKS: dict[str, Callable[[], Task]] = {
    name: partial(_task, name)
    for name in ("sentences", "reviews", "images", "causal", "glosses", "sounds", "languages")
}
