"""The gradient of a route in reentrant checkpoints, each of which has a backward of its own inside of the whole one."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tucka.backends.torch.private import at_end_of_backward, running_backward
from tucka.errors import RouteError, expected

if TYPE_CHECKING:
    from tucka.backends.torch.routing.routes import Route

__all__ = ["Collected", "Remake"]

# A reentrant checkpoint runs its layers without gradients. Its backward computes them again with gradients, and calls a
# backward for them. So no graph leads from the layers of one checkpoint to a route that was made elsewhere. They use a
# copy of the gates, which is a leaf, and the gradients of all copies are collected. The layer that made the route runs
# before the others, so its backward comes last: there the collected gradient is added to that of the gates themselves.


class Collected:
    """The gradients of copies of one route's gates, until they are added to that of the gates."""

    def __init__(self, where: str, *, is_needed: bool) -> None:
        self._where = where
        self._is_needed = is_needed  # whether the route may depend on anything that needs a gradient
        self._sums: dict[int, Tensor | None] = {}  # by the backward that runs
        self._constant: set[int] = set()  # those in which the gates turned out to depend on nothing that trains
        self._handed_on: set[int] = set()  # those in which the gates have got their gradient

    def copy_of(self, gates: Tensor, run: int | None) -> Tensor:
        """Copy gates to a leaf; `run` is the whole backward in which it is used, None for any that reaches it."""
        leaf = gates.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(functools.partial(self._add, run))
        return leaf

    def _add(self, run: int | None, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        if run is None:
            run = running_backward()
            self.begin(run)
        known = self._sums[run]
        self._sums[run] = gradient if known is None or gradient is None else known + gradient

    def begin(self, run: int) -> None:
        """Look, when a backward has ended, whether all that it collected was handed on."""
        if run not in self._sums:
            self._sums[run] = None
            at_end_of_backward(functools.partial(self._end, run))

    def hand_on(self, gates: Tensor, run: int | None) -> None:
        """Add what was collected to the gradient of the gates themselves, once this is known."""
        if gates.requires_grad:
            gates.register_hook(functools.partial(self._with_collected, run))
        elif run is not None:
            self._constant.add(run)

    def _with_collected(self, run: int | None, gradient: Tensor) -> Tensor:
        run = running_backward() if run is None else run
        self._handed_on.add(run)
        collected = self._sums.get(run)
        if collected is None:
            return gradient
        self._sums[run] = None
        return gradient + collected

    def _end(self, run: int) -> None:
        left = self._sums.pop(run)
        is_lost = left is not None and run not in self._constant and (self._is_needed or run in self._handed_on)
        self._constant.discard(run)
        self._handed_on.discard(run)
        if not is_lost:
            return
        rule = (
            "the backward of the layer that made the route to come after those of all checkpointed layers that use it"
        )
        cure = "Use gradient_checkpointing_kwargs={'use_reentrant': False}"
        got = "another order, or none, in reentrant checkpoints: part of the route's gradient would be lost"
        raise RouteError(expected("route", rule, got, where=self._where, cure=cure))


@dataclass(frozen=True, eq=False)
class Remake:
    """How to make a route once more, with gradients, when a checkpoint in which it was made is computed again."""

    route: Route  # as it was made, without a graph
    gates: Callable[[Tensor], Tensor]  # from the same layer's input
    regions: weakref.WeakSet[Any]  # the checkpoints around the layer
