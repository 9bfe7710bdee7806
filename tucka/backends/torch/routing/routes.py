"""A route: its gates, what they belong to, and how they fit a layer's input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tucka.backends.torch.private import outside_checkpoints
from tucka.backends.torch.routing.alignment import mean_over_tokens
from tucka.backends.torch.routing.layouts import View
from tucka.backends.torch.routing.reentrant import Collected

__all__ = ["AS_IT_IS", "Fit", "Route", "even_mixture"]


@dataclass(frozen=True, eq=False)
class Route:
    """Gates and what they belong to."""

    gates: Tensor  # (k, t), (B, k, t) or (B, S, k, t)
    mask: Tensor | None = None  # (B, S), the tokens that count where token gates are averaged
    documents: bool = False  # token gates that belong to documents, of which several share a row
    given: bool = False  # by the caller
    unknown: bool = False  # averages that were not to be taken
    ordered: bool = True  # whether the tokens of token gates are those of other layers, in their order
    averages: bool = True  # whether token gates may be averaged: their mask is known, and no token comes later
    cut: bool = False  # made without a graph in a call that a backward computes again as a whole, with another route
    collected: Collected | None = None  # what reentrant checkpoints add to the gradient of the gates
    of: Route | None = None  # the gates that these are the averages of

    @property
    def rows(self) -> int | None:
        """How many samples the gates are for; None for all."""
        return None if self.gates.ndim == 2 else self.gates.shape[0]

    def averaged(self) -> Route:
        """Average token gates over the tokens of each sample."""
        if self.gates.ndim < 4:
            return self
        with outside_checkpoints():  # layers of several regions share what one of them has averaged
            gates = mean_over_tokens(self.gates, self.mask)
        of = self if gates.requires_grad else None
        return Route(gates, given=self.given, unknown=not self.averages, cut=self.cut, of=of)

    def on(self, device: torch.device) -> Route:
        """Move the gates to where a layer is, which may be on another device than the one that made them."""
        if self.gates.device == device:
            return self
        mask = None if self.mask is None else self.mask.to(device, non_blocking=True)
        return replace(self, gates=self.gates.to(device, non_blocking=True), mask=mask)

    def repeated(self, times: int) -> Route:
        """Repeat each sample's gates, as generation repeats the inputs for its beams."""
        if times == 1 or self.rows is None:
            return self
        mask = None if self.mask is None else self.mask.repeat_interleave(times, dim=0)
        return replace(self, gates=self.gates.repeat_interleave(times, dim=0), mask=mask)

    def detached(self, *, leaf: bool = False) -> Route:
        """Leave the graph behind; as a leaf that needs a gradient where the gates did, if asked for."""
        if self.of is None and not (leaf or self.gates.requires_grad):
            return self  # the same gates, so that what was made of them is known again
        gates, of = self.gates.detach(), None
        if leaf:
            gates.requires_grad_(self.gates.requires_grad)
            of = None if self.of is None else self.of.detached(leaf=True)
        return replace(self, gates=gates, of=of)

    def collecting(self, where: str) -> Route:
        """Let gradients of copies come back to the gates, where these have a graph."""
        if self.of is not None:
            return replace(self, of=self.of.collecting(where))
        if self.collected is not None or not self.gates.requires_grad:
            return self
        collected = Collected(where, is_needed=True)
        collected.hand_on(self.gates, None)
        return replace(self, collected=collected)

    def copied(self, run: int) -> Route:
        """Copy the gates for a checkpoint that is computed again in a backward, which collects their gradient."""
        if self.of is not None and self.of.collects():
            return self.of.copied(run).averaged()
        if self.collected is None:
            return self
        self.collected.begin(run)
        return replace(self, gates=self.collected.copy_of(self.gates, run))

    def collects(self) -> bool:
        """Tell whether gradients of copies come back to the gates."""
        return self.collected is not None or (self.of is not None and self.of.collects())


# The view of inputs whose first axis counts samples already.
AS_IT_IS = View()


@dataclass(frozen=True, eq=False)
class Fit:
    """Gates for one layer's input, and how to see the input so that its leading axes are those of the gates."""

    gates: Tensor
    view: View

    def rows(self, x: Tensor) -> Tensor:
        """Bring an input (..., d) into the view."""
        x = x.transpose(0, 1) if self.view.swap else x
        return x if self.view.lead is None else x.reshape(*self.view.lead, x.shape[-1])

    def back(self, rows: Tensor, x: Tensor) -> Tensor:
        """Undo `rows`."""
        if self.view.lead is not None:
            shape = (x.shape[1], x.shape[0], *x.shape[2:]) if self.view.swap else x.shape
            rows = rows.reshape(shape)
        if not self.view.swap:
            return rows
        # Laid out in memory as x, so that the layer rounds in the same way.
        return rows.transpose(0, 1).contiguous() if x.is_contiguous() else rows.transpose(0, 1)


def fitted(route: Route, view: View | None, x: Tensor, *, same_tokens: bool, longer: bool) -> Fit | None:
    """Fit a route to an input (..., d); None where it is not known which rows are whose."""
    # `same_tokens`: the route was made from tokens of this kind. `longer`: tokens of earlier calls may be among `x`.
    if route.gates.ndim == 2:
        return Fit(route.gates, AS_IT_IS)
    if view is None or route.unknown:
        return None
    view = AS_IT_IS if view == AS_IT_IS else view
    shape = view.lead or ((x.shape[1], x.shape[0]) if view.swap else tuple(x.shape[:-1]))
    if shape[0] != route.gates.shape[0]:
        return None
    if route.gates.ndim == 3:
        return Fit(route.gates, view)
    if same_tokens and shape[: route.gates.ndim - 2] == tuple(route.gates.shape[:-2]):
        return Fit(route.gates, view)
    if same_tokens and math.prod(shape) == math.prod(route.gates.shape[:-2]):  # with their axes joined or parted
        return Fit(route.gates.reshape(*shape, *route.gates.shape[-2:]), view)
    if (route.documents and not torch.compiler.is_compiling()) or (
        longer and len(shape) > 1 and shape[1] > route.gates.shape[1]
    ):
        return None
    return Fit(route.averaged().gates, view) if route.averages else None


def even_mixture(groups: int, experts: int, like: Tensor) -> Tensor:
    """Return the route (k, t) of inputs that depend on no sample: all experts of all groups in equal parts."""
    return torch.full((groups, experts), 1.0 / (groups * experts), dtype=torch.float32, device=like.device)
