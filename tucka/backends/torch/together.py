"""What the adapted layers of a model need of their cores, made for all of them in one go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any, Protocol

import torch
from torch import Tensor

from tucka.backends.torch.copies import Copies
from tucka.backends.torch.cores import Slices, cores_together, dtype_of
from tucka.backends.torch.functional import add_own_update
from tucka.backends.torch.mixing import has_own_gates, times_core, times_own
from tucka.backends.torch.modules import ExpertParts
from tucka.backends.torch.private import (
    are_transformations_on,
    checkpoint_frame,
    is_any_autocast_on,
    is_called_alone,
    parameters_by_name,
    running_backward,
    version_of,
    versions_of,
)
from tucka.backends.torch.thin import FEW, cast, into, turned
from tucka.backends.torch.update import add_update, is_plain

__all__ = ["Group", "Shared", "is_free"]

_LEAST = 2  # layers: fewer are done sooner one by one
_MOST = 1 << 22  # numbers that are copied together: where cores are large, the operators' own cost does not matter


class Remembered(Protocol):
    """How layers were."""

    def is_as_it_was(self) -> bool:
        """Tell whether they are so still."""


class Group:
    """Layers of a model whose cores can be made together, and the parts of their adapter."""

    def __init__(self, remembered: Remembered, pairs: Sequence[tuple[Any, ExpertParts]]) -> None:
        self.remembered = remembered
        self.pairs = [(layer, parts) for layer, parts in pairs if _is_like(parts, pairs[0][1])]
        self.parts = [parts for _, parts in self.pairs]
        self.flat = [tensor for parts in self.parts for tensor in _tensors_of(parts)]
        self.widths = [basis.shape[0] for basis in self.flat[2::3]]
        self.alphas = [parts.alpha for parts in self.parts]
        self.strengths = [strength for parts in self.parts for strength in parts.strengths]
        self.watched = [tensor for parts in self.parts for tensor in (*_tensors_of(parts), *parts.strengths)]
        self.norm = self.parts[0].spec.factor_norm if self.parts else None
        self.drops = any(parts.drops for parts in self.parts)
        self.place_of_parts = {id(parts): place for place, parts in enumerate(self.parts)}
        self.place_of_layer = {id(layer): place for place, (layer, _) in enumerate(self.pairs)}
        self._kept: dict[bool, _Kept] = {}  # by whether there are gates: what calls without gradients go on with

    def is_as_it_was(self) -> bool:
        """Tell whether the layers are as they were when the group was made."""
        if not self.remembered.is_as_it_was() or any(map(any, map(_HOOKS, self.parts))):
            return False
        return not any(map(vars, self.flat)) or all(map(is_free, self.parts))

    def made(self, gates: Tensor | None) -> Made | None:
        """Make the cores of all layers, if that pays."""
        if len(self.parts) < _LEAST:
            return None
        groups, slices, rank, _ = self.flat[0].shape
        numbers = rank**2 * ((0 if gates is None else gates.shape[:-2].numel()) + groups * slices)
        if len(self.parts) * numbers > _MOST:
            return None
        # Without a norm the cores do not depend on the bases, so there is too little to keep.
        if torch.is_grad_enabled() or self.norm is None or not self.flat[0].is_cpu:
            cores = cores_together(gates, self.flat, self.alphas, norm=self.norm, strengths=self.strengths)
        else:
            cores = self._at_rest(gates).mixed(gates)
        return Made(self, gates, cores)

    def _at_rest(self, gates: Tensor | None) -> _Kept:
        """Return what cores are mixed of, from an earlier call if the layers have the same numbers still."""
        kept = self._kept.get(gates is None)
        if kept is None or not kept.serves(gates, self):
            slices = Slices(gates, self.flat, self.alphas, norm=self.norm, strengths=self.strengths)
            kept = self._kept[gates is None] = _Kept(slices, self.watched, kept)
        return kept


_HOOKS = attrgetter("_forward_hooks", "_forward_pre_hooks")


class _Kept:
    """What the cores of a group's layers are mixed of, kept while the numbers that it was made of stay the same."""

    def __init__(self, slices: Slices, tensors: Sequence[Tensor], before: _Kept | None) -> None:
        self._slices = slices
        self._versions = versions_of(tensors)
        # The second call with these numbers copies them. In a training, none has a second one.
        is_second = before is not None and before._versions == self._versions
        self._copies = Copies(tensors) if is_second else None
        self._mixed: tuple[Tensor | None, Copies, list[Tensor]] | None = None  # gates, their copy, the cores

    def serves(self, gates: Tensor | None, group: Group) -> bool:
        """Tell whether all numbers are those that the slices were made of, for gates of this dtype."""
        if self._copies is None or self._slices.dtype is not dtype_of(gates, group.flat):
            return False
        return self._copies.are_those_of(group.watched)

    def mixed(self, gates: Tensor | None) -> list[Tensor]:
        """Mix the cores, unless the last call had the same gates, as with a pinned route."""
        given = [] if gates is None else [gates]
        if self._mixed is not None and self._mixed[0] is gates and self._mixed[1].are_those_of(given):
            return self._mixed[2]
        cores = self._slices.mixed(gates)
        if self._copies is not None:
            self._mixed = gates, Copies(given), cores
        return cores


class Made:
    """The cores of a group of layers in one call, and what they were made of."""

    def __init__(self, group: Group, gates: Tensor | None, cores: Sequence[Tensor]) -> None:
        self.group, self.cores = group, cores
        self.gates, self._version = gates, _version(gates)
        versions = versions_of(group.watched)
        # By layer: what its numbers are now, and were when the cores were made.
        size = len(group.watched) // len(group.parts)
        places = [slice(first, first + size) for first in range(0, len(group.watched), size)]
        self.entries = [
            (parameters_by_name(parts), parts, parts.scale, group.watched[place], versions[place])
            for parts, place in zip(group.parts, places, strict=True)
        ]

    def core(self, parts: ExpertParts, gates: Tensor | None) -> Tensor | None:
        """Return a layer's core for the gates that it was made of, unless the layer has changed meanwhile."""
        place = self.group.place_of_parts.get(id(parts))
        if place is None or gates is not self.gates or _version(gates) != self._version:
            return None
        return self.cores[place] if self.is_as_it_was(place) else None

    def is_as_it_was(self, place: int) -> bool:
        """Tell whether nothing, a hook for instance, has changed a layer's numbers since."""
        named, parts, scale, tensors, versions = self.entries[place]
        return all(map(is_, _PARAMETERS(named), tensors)) and versions_of(tensors) == versions and parts.scale == scale


class Shared:
    """The cores of a model's layers in one of its calls, made for all layers when the first of them asks."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, bool], Made | None] = {}
        self._grad = torch.is_grad_enabled()
        self.opened: Opened | None = None  # until a call inside has ended: then layers ask for their route again

    def core(self, adapter: str, parts: ExpertParts, gates: Tensor | None, group: Callable[[], Group]) -> Tensor | None:
        """Return a layer's core (..., r, r) mixed by gates, or those of its experts; None if it makes its own."""
        # With α and what the basis does to them. Tokens with gates of their own need all experts'.
        if not _may_share():
            return None
        key = adapter, torch.is_grad_enabled()
        if key not in self._made:
            self._made[key] = group().made(gates)
        made = self._made[key]
        return None if made is None else made.core(parts, gates)

    def open(self, adapter: str, layer: Any, x: Tensor, gates: Tensor) -> None:
        """Let other layers take inputs like one of a layer, whose gates they have."""
        if torch.is_grad_enabled() is not self._grad:
            return  # in a reentrant checkpoint, of which each layer has to be known
        made = self._made.get((adapter, self._grad))
        own = None if has_own_gates(x, gates) else gates
        # Made of other gates, it serves other layers than this one.
        if made is None or made.gates is not own or id(layer) not in made.group.place_of_layer:
            return
        if x.shape[:-1].numel() > FEW and not made.group.drops:
            self.opened = Opened(made, layer, x, gates)


class Opened:
    """What layers need that get inputs of one kind, once one of them has found out which gates they have."""

    # Behind a large product, each function has to come from the memory again. So there is one, and not a dozen.
    def __init__(self, made: Made, layer: Any, x: Tensor, gates: Tensor) -> None:
        self._made, self._places, self._cores = made, made.group.place_of_layer, made.cores
        self._gates = gates if has_own_gates(x, gates) else None
        self._active, self._at = layer._active_adapter, layer.tucka_place
        self._dtype, self._device, self._grad = x.dtype, x.device, torch.is_grad_enabled()
        self._is_plain = is_plain(x)
        shapes = {width: (*x.shape[:-1], width) for width in made.group.widths}
        self._shapes = [shapes[width] for width in made.group.widths]

    def adapted(self, layer: Any, x: Tensor) -> Tensor | None:
        """Return a layer's adapted input; None where it must ask what its route is."""
        place = self._places.get(id(layer))
        if (
            place is None
            or x.shape != self._shapes[place]
            or x.dtype is not self._dtype
            or x.device != self._device
            or layer.tucka_place != self._at
            or layer._active_adapter != self._active
            or layer._disable_adapters
            or layer.merged_adapters
            or torch.is_grad_enabled() is not self._grad
            or not _may_share()
            or not self._made.is_as_it_was(place)
        ):
            return None
        _, factor, basis, *_ = self._made.entries[place][3]
        core, gates = self._cores[place], self._gates
        if basis.dtype is not x.dtype:
            return None
        if self._grad and not self._is_plain:
            return add_update(x, x, basis, core) if gates is None else add_own_update(x, x, basis, core, factor, gates)
        rows = x.reshape(-1, x.shape[-1])
        laid = basis.t() if self._grad else turned(basis, x.dtype, rows.shape[0])
        inner = torch.mm(rows, basis) if self._grad else into(rows, laid)
        if gates is None:
            inner = times_core(inner, cast(core, x.dtype))
        else:
            inner = times_own(inner, core, factor, gates, alpha=1.0)
        return torch.addmm(rows, inner, laid).view(x.shape)


def _may_share() -> bool:
    """Tell whether one node of the graph may serve layers that run later."""
    # A checkpoint computes its region again, and has to find in it all that its layers have saved.
    if torch.is_grad_enabled() and (checkpoint_frame()[0] is not None or running_backward() != -1):
        return False
    return not (is_any_autocast_on() or are_transformations_on())


def _version(gates: Tensor | None) -> int:
    return -1 if gates is None else version_of(gates)


_PARAMETERS = itemgetter("cores", "expert_factor", "basis")


def _tensors_of(parts: ExpertParts) -> tuple[Tensor, Tensor, Tensor]:
    cores, factor, basis = _PARAMETERS(parameters_by_name(parts))
    return cores, factor, basis


def is_free(parts: ExpertParts) -> bool:
    """Tell whether nobody else takes part in the calls of a layer's parts, or in where their numbers are."""
    is_own = type(parts) is ExpertParts and parts.spec.factor_norm != "frobenius"
    return is_own and is_called_alone(parts) and parts.is_at_rest()


def _is_like(parts: ExpertParts, first: ExpertParts) -> bool:
    """Tell whether the cores of a layer can be stacked with those of another."""
    mine, its = _tensors_of(parts), _tensors_of(first)
    return (
        mine[0].shape == its[0].shape
        and mine[1].shape == its[1].shape
        and mine[2].shape[-1] == its[2].shape[-1]
        and all(own.dtype is other.dtype and own.device == other.device for own, other in zip(mine, its, strict=True))
        and parts.spec.factor_norm == first.spec.factor_norm
    )
