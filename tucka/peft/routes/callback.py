"""The Trainer's callback: starts the router from training data, watches it, and balances it where asked to."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from tucka.backends.torch.routing.ranks import sum_over_ranks
from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.scope import RoutingScope, scope_of
from tucka.checks import check_count, check_finite
from tucka.core.balance import CollapseAlarm, load_entropy
from tucka.errors import ConfigError, expected
from tucka.peft.adapters import layers_of
from tucka.peft.files.sharded import whole_copy
from tucka.peft.routes.observation import has_inputs
from tucka.peft.routes.start import initialize_router

__all__ = ["RouterCallback"]

# The last steps of a training may not fill a window. With fewer routings for each group, an uneven load is chance.
_LEAST_ROUTINGS = 16


class RouterCallback(TrainerCallback):
    r"""Initialise routers from data at the start of training, log how they do, and warn if one collapses.

    Each log of the training gets these metrics of each routed adapter, over the steps since the log before:

    - ``tucka/load_entropy``: 1 if the groups were chosen equally often, 0 if one took everything;
    - ``tucka/share_i``: the share of group i;
    - ``tucka/gate_entropy``: 1 if the experts of a chosen group had equal gates, 0 if one had all; not with t = 1;
    - ``tucka/centroid_drift``: :math:`\lVert E - E_0 \rVert / \lVert E_0 \rVert`, how far the centroids have moved
      since training began.

    With several adapters, the adapter's name stands before the name of the metric. The metrics are in the Trainer's
    ``state.log_history``, and in the logs of the callbacks that come later. Reporters (TensorBoard and others) come
    before the callbacks that users pass, so put this one before them with ``callback.install(trainer)``. With
    ``balance_rate`` in the configuration, it moves the bias on the choice after each step. It warns once for each
    adapter when a few groups take almost all routings. Numbers are read from the device for logs and once in a window.

    Parameters
    ----------
    max_batches : int
        How many training batches to look at for the initialisation; 0 leaves it out.
    scale : float, optional
        As in `initialize_router`: the paper's a, where the router is started by Eq. (10).
    progress : bool
        Whether to show a progress bar meanwhile.
    collapse_window : int
        Steps that are looked at together for a collapse.
    collapse_below : float
        The load entropy under which it warns; above 0.

    Raises
    ------
    ConfigError
        If a number is outside its rule.

    Examples
    --------
    >>> callback = RouterCallback(max_batches=8)
    """

    def __init__(
        self,
        *,
        max_batches: int = 32,
        scale: float | None = None,
        progress: bool = True,
        collapse_window: int = 32,
        collapse_below: float = 0.5,
    ) -> None:
        self.max_batches = check_count("max_batches", max_batches, least=0, where="RouterCallback")
        self.scale = scale
        self.progress = progress
        self.collapse_window = collapse_window
        self.collapse_below = collapse_below
        check_count("collapse_window", collapse_window, where="RouterCallback")
        if not 0 < check_finite("collapse_below", collapse_below, where="RouterCallback") <= 1:
            rule = "a load entropy, above 0 and at most 1"
            raise ConfigError(expected("collapse_below", rule, collapse_below, where="RouterCallback"))
        self._watches: dict[tuple[str, str], _Watch] = {}

    def install(self, trainer: Any) -> None:
        """Put this callback before all others of a trainer, so that its reporters get the metrics too."""
        callbacks = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Initialise each active router that no data has initialised yet."""
        model: Any = kwargs["model"]
        loader: Any = kwargs.get("train_dataloader")
        scope = scope_of(model)
        active = {name for _, layer in layers_of(model) for name in layer.active_adapters}
        for name in scope.owners:
            waits = name not in scope.pinned and any(router.waits for router in scope.routers(name).values())
            # Without data that can be looked at, it starts itself on the first batches.
            if waits and name in active and self.max_batches and has_inputs(loader, model):
                initialize_router(
                    model,
                    loader,
                    adapter_name=name,
                    max_batches=self.max_batches,
                    scale=self.scale,
                    progress=self.progress and not args.disable_tqdm,
                )
        self._watches = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember the counts, so that training alone is counted and no evaluation."""
        model = kwargs["model"]
        scope = scope_of(model)
        for name, part, router in _routed(scope):
            if (name, part) not in self._watches:
                whose = f"router of {name!r}" + (f" in {part}" if part else "")
                alarm = CollapseAlarm(whose, window=self.collapse_window, below=self.collapse_below)
                self._watches[name, part] = _Watch(whole_copy(model, router, "centroids"), alarm)
            self._watches[name, part].begin(scope.load[name][part])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in the load of the step, move the bias against it, and warn if the router has collapsed."""
        model = kwargs["model"]
        scope = scope_of(model)
        for name, part, router in _routed(scope):
            watch = self._watches.get((name, part))
            if watch is None:
                continue
            load = watch.end(scope.load[name][part], scope.last.get(name, {}).get(part))
            if router.choice_bias is not None:
                router.update_bias(sum_over_ranks(load, scope.group))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the steps that did not fill a window."""
        for watch in self._watches.values():
            watch.alarm.check(least=_LEAST_ROUTINGS)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add to this log, and to the Trainer's history, what happened since the last one."""
        if any(key.startswith("eval_") for key in logs or ()):
            return
        model = kwargs["model"]
        scope = scope_of(model)
        metrics: dict[str, float] = {}
        for name, part, router in _routed(scope):
            if (name, part) in self._watches:
                prefix = "/".join(["tucka", *([name] if len(scope.owners) > 1 else []), *([part] if part else []), ""])
                found = self._watches[name, part].report(whole_copy(model, router, "centroids"))
                metrics.update({f"{prefix}{key}": value for key, value in found.items()})
        for entries in (logs, state.log_history[-1] if state.log_history else None):
            if entries is not None:
                entries.update(metrics)


def _routed(scope: RoutingScope) -> list[tuple[str, str, Router]]:
    names = [name for name in scope.owners if name not in scope.pinned]
    return [(name, part, router) for name in names for part, router in scope.routers(name).items()]


class _Watch:
    """What is kept of one router between two logs: small tensors on its device, which nothing reads meanwhile."""

    def __init__(self, centroids: Tensor, alarm: CollapseAlarm) -> None:
        self.alarm = alarm
        self._start = centroids
        self._before: Tensor | None = None
        self._load: Tensor | None = None
        self._entropies: list[Tensor] = []

    def begin(self, total: Tensor) -> None:
        self._before = total.clone()

    def end(self, total: Tensor, gates: Tensor | None) -> Tensor:
        """Return the load of the step."""
        before = torch.zeros_like(total) if self._before is None else self._before.to(total.device)
        # If the counts were reset during the step, all that they hold is of this step.
        load = torch.where((total < before).any(), total, total - before)
        self._load = load if self._load is None else self._load.to(load.device) + load
        if gates is not None and gates.shape[-1] > 1:
            self._entropies.append(_gate_entropy(gates))
        self.alarm.add(load)
        return load

    def report(self, centroids: Tensor) -> dict[str, float]:
        """Return the metrics of the steps since the last report; none if there was no routing."""
        load, entropies = self._load, self._entropies
        self._load, self._entropies = None, []
        if load is None or int(load.sum()) == 0:
            return {}
        metrics = {"load_entropy": load_entropy(load)}
        metrics |= {f"share_{group}": share for group, share in enumerate((load / load.sum()).tolist())}
        if entropies:
            metrics["gate_entropy"] = float(torch.stack(entropies).mean())
        start = self._start.to(centroids.device)
        metrics["centroid_drift"] = float((centroids - start).norm() / start.norm().clamp(min=1e-12))
        return metrics


def _gate_entropy(gates: Tensor) -> Tensor:
    """Average, over the decisions, the entropy of the chosen group's gates divided by log t."""
    chosen = gates.detach().float().sum(dim=-2)
    shares = chosen / chosen.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    entropies: Tensor = torch.special.entr(shares).sum(dim=-1)
    return entropies.mean() / math.log(gates.shape[-1])
