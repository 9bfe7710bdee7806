"""A progress bar for the Trainer."""

# ruff: noqa: ARG002 - the Trainer calls with all of its arguments

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from transformers import TrainerCallback

__all__ = ["TrainingBar", "training_bar"]


class TrainingBar(TrainerCallback):
    """Move a bar with the Trainer's steps and show what it logs.

    Parameters
    ----------
    progress : Progress
        Shows the bar.
    task : TaskID
        The bar.
    """

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn the number of steps.

        Parameters
        ----------
        args, state, control : object
            The Trainer's.
        **kwargs : object
            Unused.
        """
        self._progress.update(self._task, total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move on.

        Parameters
        ----------
        args, state, control : object
            The Trainer's.
        **kwargs : object
            Unused.
        """
        self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss and, of a routed method, how evenly the groups are used.

        Parameters
        ----------
        args, state, control : object
            The Trainer's.
        logs : dict, optional
            What is logged.
        **kwargs : object
            Unused.
        """
        logs = logs or {}
        told = [f"loss {float(logs['loss']):.3f}"] if "loss" in logs else []
        if "tucka/load_entropy" in logs:
            told.append(f"load entropy {float(logs['tucka/load_entropy']):.2f}")
        if "loss" in logs:
            self._progress.update(self._task, told=", ".join(told))


@contextmanager
def training_bar(console: Console, name: str) -> Iterator[TrainingBar]:
    """Show a progress bar while a method is trained.

    Parameters
    ----------
    console : Console
        Where to.
    name : str
        What stands before the bar.

    Yields
    ------
    TrainingBar
        For the Trainer.
    """
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(24),
        TimeElapsedColumn(),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield TrainingBar(progress, progress.add_task(name, total=None, told=""))
