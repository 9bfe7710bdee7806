"""The Trainer's callback: starts the router from training data and logs how evenly groups are used."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from tucka.backends.torch.scope import scope_of
from tucka.core.load import load_entropy
from tucka.peft.adapters import layers_of
from tucka.peft.routes import initialize_router

__all__ = ["RouterCallback"]


class RouterCallback(TrainerCallback):
    """Initialise routers from data at the start of training, and log the load of the expert groups.

    At each log of the Trainer, for each routed adapter, ``tucka/load_entropy`` (1 = perfectly balanced) and
    ``tucka/share_i`` of each group i are added: of the routings since the log before. With several adapters the
    adapter's name stands before the metric's. They are in the Trainer's ``state.log_history``, and in the logs that
    callbacks see which come later. Reporters (TensorBoard and others) come before the callbacks that users pass, so
    put this one before them with `install`.

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

    def install(self, trainer: Any) -> None:
        """Put this callback before all others of a trainer, so that its reporters get the metrics too.

        Parameters
        ----------
        trainer : Trainer
            May have this callback already.
        """
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Initialise each active router that no data has initialised yet.

        Parameters
        ----------
        args, state, control : object
            The Trainer's.
        **kwargs : object
            Has ``model`` and ``train_dataloader``.
        """
        model, loader = kwargs["model"], kwargs.get("train_dataloader")
        # Accelerate's loaders keep books about being iterated; the one inside is torch's.
        loader = getattr(loader, "base_dataloader", loader)
        scope = scope_of(model)
        self._seen = {}
        active = {name for _, layer in layers_of(model) for name in layer.active_adapters}
        for name in scope.owners:
            router = scope.router(name)
            waits = router is not None and name not in scope.pinned and not bool(router.is_initialized)
            if waits and name in active and loader is not None and self.max_batches:
                initialize_router(
                    model, loader, adapter_name=name, max_batches=self.max_batches, progress=self.progress
                )
        # What was counted before is not of this training.
        self._seen = {name: total.clone() for name, total in scope.load.items()}

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
            seen = self._seen.get(name, torch.zeros_like(total)).to(total.device)
            # Fewer than before: somebody has reset the counts meanwhile.
            load = total if bool((total < seen).any()) else total - seen
            self._seen[name] = total.clone()
            if int(load.sum()) == 0:
                continue
            prefix = "tucka/" if len(loads) == 1 else f"tucka/{name}/"
            metrics[f"{prefix}load_entropy"] = load_entropy(load)
            metrics.update({f"{prefix}share_{i}": float(share) for i, share in enumerate(load / load.sum())})
        for entries in (logs, state.log_history[-1] if state.log_history else None):
            if entries is not None:
                entries.update(metrics)
