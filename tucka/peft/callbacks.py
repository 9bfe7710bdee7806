"""The Trainer's callback: starts the router from training data and logs how evenly groups are used."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from tucka.backends.torch.scope import scope_of
from tucka.core.routing import load_entropy
from tucka.peft.routes import initialize_router

__all__ = ["RouterCallback"]


class RouterCallback(TrainerCallback):
    """Initialise routers from data at the start of training, and log the load of the expert groups.

    At each log of the Trainer, for each routed adapter, ``tucka/load_entropy`` (1 = perfectly balanced) and
    ``tucka/share_i`` of each group i are added: of the routings since the log before. With several adapters the
    adapter's name stands before the metric's.

    Parameters
    ----------
    max_batches : int
        How many training batches to look at for the initialisation; 0 leaves it out.
    progress : bool
        Whether to show a progress bar meanwhile.

    Examples
    --------
    >>> callback = RouterCallback(max_batches=8)
    """

    def __init__(self, *, max_batches: int = 32, progress: bool = True) -> None:
        self.max_batches = max_batches
        self.progress = progress
        self._seen: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Initialise each router that no data has initialised yet.

        Parameters
        ----------
        args, state, control : object
            The Trainer's.
        **kwargs : object
            Has ``model`` and ``train_dataloader``.
        """
        model, loader = kwargs["model"], kwargs.get("train_dataloader")
        scope = scope_of(model)
        self._seen = {}
        for name in list(scope.owners):
            router = scope.router(name)
            waits = router is not None and name not in scope.pinned and not bool(router.is_initialized)
            if waits and loader is not None and self.max_batches:
                with _untouched_randomness():
                    batches = itertools.islice(loader, self.max_batches)
                    initialize_router(model, batches, adapter_name=name, progress=self.progress)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the load since the last log to this one.

        Parameters
        ----------
        args, state, control : object
            The Trainer's.
        logs : dict, optional
            What is logged; entries are added.
        **kwargs : object
            Has ``model``.
        """
        metrics: dict[str, float] = {}
        loads = scope_of(kwargs["model"]).load
        for name, total in loads.items():
            load = total - self._seen.get(name, torch.zeros_like(total))
            self._seen[name] = total.clone()
            if float(load.sum()) <= 0:
                continue
            prefix = "tucka/" if len(loads) == 1 else f"tucka/{name}/"
            metrics[f"{prefix}load_entropy"] = load_entropy(load)
            metrics.update({f"{prefix}share_{i}": float(share) for i, share in enumerate(load / load.sum())})
        for entries in (logs, state.log_history[-1] if state.log_history else None):
            if entries is not None:
                entries.update(metrics)


@contextmanager
def _untouched_randomness() -> Iterator[None]:
    """Put all random states back, so that looking at the data does not change the training that follows."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
