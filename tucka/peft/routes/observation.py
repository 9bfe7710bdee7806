"""Running a model over batches to see its routes: modes, random states and counts are restored afterwards."""

from __future__ import annotations

import inspect
import itertools
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from tucka.backends.torch.routing.ranks import gather_rows
from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import ConfigError, expected
from tucka.peft.adapters import layers_of

__all__ = ["RowSample", "Watch", "has_inputs", "is_one_shot", "observe", "unmasked"]

Watch = Callable[[Router, Tensor, Tensor | None, Tensor], None]


class RowSample:
    """A uniform sample of at most `limit` rows of a stream, without replacement; the same stream gives the same one."""

    def __init__(self, limit: int, width: int, *, seed: int) -> None:
        self._limit = limit
        self._draws = torch.Generator().manual_seed(seed)
        # The last column is a random number for each row; those with the smallest are the sample.
        self._kept = torch.zeros(0, width + 1)

    def add(self, rows: Tensor) -> None:
        """Look at more rows (n, d), on any device."""
        numbers = torch.rand(len(rows), 1, generator=self._draws)
        self._kept = self._smallest(torch.cat([self._kept, torch.cat([rows.float().cpu(), numbers], dim=1)]))

    def gather(self, group: Any = None) -> Tensor:
        """Return the sample (n, d) of the streams of all ranks together, in float32 on the CPU."""
        return self._smallest(gather_rows(self._kept, group))[:, :-1]

    def _smallest(self, rows: Tensor) -> Tensor:
        if len(rows) <= self._limit:
            return rows
        return rows[rows[:, -1].topk(self._limit, largest=False).indices.sort().values]


@torch.no_grad()
def observe(
    model: nn.Module,
    adapter: str,
    batches: Iterable[Any],
    watch: Watch,
    *,
    title: str,
    limit: int | None = None,
    progress: bool = True,
) -> None:
    """Run a model in evaluation mode over at most `limit` batches; `watch` is called with each route that is made."""
    layers = layers_of(model, adapter)
    if not any(adapter in layer.active_adapters and not layer.disable_adapters for _, layer in layers):
        raise ConfigError(expected("adapter_name", "an active adapter", repr(adapter), cure="Call set_adapter first"))
    # The first axis of a tensor with more than two counts batches.
    is_one = isinstance(batches, Mapping | str) or (isinstance(batches, Tensor) and batches.ndim < 3)
    if is_one or not isinstance(batches, Iterable):
        cure = "Put one batch into a list: [batch]"
        got = f"one {type(batches).__name__}"
        raise ConfigError(expected("batches", "an iterable of batches", got, cure=cure))
    # Accelerate's loader counts its epochs; torch's loader inside it does not.
    batches = getattr(batches, "base_dataloader", batches)
    if is_one_shot(batches):
        rule, got = "data that can be gone through again", "a loader of a stream, which loses the batches looked at"
        warnings.warn(expected("batches", rule, got, cure="Pass a list of some batches"), stacklevel=3)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # ranks may have different numbers of batches, and DDP would wait
    scope = scope_of(model)
    # Where parameters are offloaded, Accelerate brings the inputs to where the model is executed.
    device = next((each.device for each in model.parameters() if not each.is_meta), None)
    load = {part: counts.clone() for part, counts in scope.load[adapter].items()}
    with ExitStack() as stack:
        stack.enter_context(_untouched_randomness(batches))
        stack.enter_context(_evaluating(model))
        scope.observers[adapter] = watch
        stack.callback(scope.observers.pop, adapter, None)
        stack.callback(scope.load.__setitem__, adapter, load)
        for batch in tqdm(itertools.islice(batches, limit), desc=title, disable=not progress, leave=False):
            _run(model, batch, device)


def unmasked(decisions: Tensor, mask: Tensor | None, *, ndim: int) -> Tensor:
    """Return the decisions that no padding made: rows (n, ...) of arrays with `ndim` axes, for tokens or samples."""
    leading = decisions.ndim - ndim
    if mask is not None and leading:
        # A token counts where it is unmasked, a sample where one of its tokens is.
        decisions = decisions[mask != 0 if leading == mask.ndim else (mask != 0).flatten(1).any(dim=1)]
    return decisions.reshape(-1, *decisions.shape[decisions.ndim - ndim :])


def _run(model: nn.Module, batch: Any, device: torch.device | None) -> None:
    if isinstance(batch, Tensor):
        model(batch.to(device))
    elif isinstance(batch, Mapping):
        model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    else:
        rule = "mappings of the model's keyword arguments, or tensors"
        cure = "Give {'name of the argument': value}, or arrays as torch.as_tensor(array)"
        raise ConfigError(expected("batches", rule, type(batch).__name__, cure=cure))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation, and each module back to the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _untouched_randomness(batches: Any) -> Iterator[None]:
    """Put all random states back, so that looking at data does not change the training that follows."""
    python, numpy = random.getstate(), np.random.get_state()
    own = {id(generator): generator for generator in _generators(batches)}
    states = {key: generator.get_state() for key, generator in own.items()}
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for key, generator in own.items():
                generator.set_state(states[key])


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """Find the generators of a data loader and its samplers, which may be wrapped in others."""
    generator = getattr(loader, "generator", None)
    if isinstance(generator, torch.Generator):
        yield generator
    for name in ("sampler", "batch_sampler"):
        inner = getattr(loader, name, None)
        if inner is not None:
            yield from _generators(inner)


def has_inputs(loader: Any, model: Any) -> bool:
    """Tell whether a loader gives a model's inputs, and looking takes none away; some trainers prepare others."""
    loader = getattr(loader, "base_dataloader", loader)
    if loader is None or is_one_shot(loader):
        return False
    with _untouched_randomness(loader):
        batch = next(iter(loader), None)
    if not isinstance(batch, Mapping):
        return isinstance(batch, Tensor)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        inspect.signature(inner.forward).bind(**batch)
    except TypeError:
        return False
    return True


def is_one_shot(loader: Any) -> bool:
    """Tell whether a loader's data is a stream that does not start anew."""
    stream = getattr(loader, "dataset", None)
    return isinstance(stream, Iterable) and iter(stream) is iter(stream)
