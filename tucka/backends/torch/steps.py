"""What the layers of a model do again for each token of a generation, once their route is known."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from tucka.backends.torch.laid_out import LaidOut, update_of
from tucka.backends.torch.private import is_any_autocast_on, parameters_by_name, pointers_of, versions_of

__all__ = ["Remembered", "Step", "Steps"]

# At one token, the products take a third of an adapted call's time. The rest goes into asking what the call belongs to,
# and most of that into reading objects that the base layer's weight has driven out of the processor's caches. So all
# layers are looked at together, once for each token, and a call touches little but what it multiplies.


class Remembered(Protocol):
    """What the updates of layers depend on, besides the numbers in tensors."""

    def add(self, layer: Any, adapter: str, parts: Any) -> None:
        """Remember one more layer."""

    def is_as_it_was(self) -> bool:
        """Tell whether nothing of it has changed."""


class Step:
    """One layer's update of inputs of one shape, by gates that stay as they are or by each token's own."""

    __slots__ = ("adapter", "add_update", "count", "dtype", "kind", "shape")

    def __init__(
        self,
        laid: LaidOut,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        gates: Tensor | None = None,
        adapter: str | None = None,
        place: str | None = None,
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.add_update = update_of(laid, shape, gates)
        self.adapter = adapter  # whose gates are to be asked for, if they do not stay as they are
        self.kind = adapter, place, shape[:-1]  # of the inputs that have the same gates in one token's call
        self.count = -1  # of the token that it was last used for


class Steps:
    """What the calls of one generation share in each layer, while all that it was made of is as it was."""

    # Not from one generation to the next: optimisers and writes to `.data` change parameters without a trace.
    def __init__(self) -> None:
        self.now: dict[int, Step] | None = None  # by layer, those of the call that runs; None in somebody else's
        self._count = 0  # tokens
        self._by_size: dict[Hashable, dict[int, Step]] = {}
        self._laid: dict[int, LaidOut] = {}  # by the parts of a layer
        self._gates: dict[Hashable, tuple[int, Tensor]] = {}
        self._forget()

    def _forget(self) -> None:
        self._by_size.clear()
        self._laid.clear()
        self._remembered: Remembered | None = None
        self._watched: dict[int, Tensor] = {}
        self._versions: list[int] = []
        self._pointers: list[int] = []

    def open(self, size: Hashable) -> None:
        """Let a call's layers go on with what earlier calls of its size, and so of its gates and rows, have left."""
        if torch.is_grad_enabled() or is_any_autocast_on():
            self.now = None
            return
        tensors = self._watched.values()
        is_same = versions_of(tensors) == self._versions and pointers_of(tensors) == self._pointers
        if not is_same or (self._remembered is not None and not self._remembered.is_as_it_was()):
            self._forget()
        self._count += 1
        self.now = self._by_size.setdefault(size, {})

    def gates(self, kind: Hashable) -> Tensor | None:
        """Return the gates that inputs of a kind have for the token of the running call, if they are known."""
        count, gates = self._gates.get(kind, (-1, None))
        return gates if count == self._count else None

    def tell(self, kind: Hashable, gates: Tensor) -> None:
        """Say which gates inputs of a kind have for the token of the running call."""
        self._gates[kind] = self._count, gates

    def close(self) -> None:
        """Share nothing in a call of somebody else's."""
        self.now = None

    # What is shared is used once for each token: what is called again may be somebody else, after a change.

    def take(self, layer: object, x: Tensor) -> Step | None:
        """Return a layer's step for an input."""
        step = None if self.now is None else self.now.get(id(layer))
        if step is None or step.count == self._count or step.shape != x.shape or step.dtype is not x.dtype:
            return None
        step.count = self._count
        return step

    def laid_out(self, parts: object, dtype: torch.dtype) -> LaidOut | None:
        """Return what the calls of a layer have in common."""
        laid = None if self.now is None else self._laid.get(id(parts))
        if laid is None or laid.count == self._count or laid.dtype is not dtype:
            return None
        laid.count, laid.is_used_again = self._count, True
        return laid

    def keep(self, layer: Any, adapter: str, parts: Any, laid: LaidOut, kind: Callable[[], Remembered]) -> None:
        """Keep what the calls of a layer have in common, with all that it was made of."""
        if self.now is None or id(parts) in self._laid:
            return
        laid.count = self._count
        self._laid[id(parts)] = laid
        self._remembered = kind() if self._remembered is None else self._remembered
        self._remembered.add(layer, adapter, parts)
        self._watch((*parameters_by_name(parts).values(), *parts.strengths))

    def has(self, layer: object) -> bool:
        """Tell whether a layer has a step in calls of this size, or none is kept."""
        return self.now is None or id(layer) in self.now

    def note(self, layer: object, step: Step, gates: Tensor | None, *, is_used: bool) -> None:
        """Keep a layer's step for calls of this size, from this one on if it is not used in it yet."""
        if self.now is not None and id(layer) not in self.now:
            step.count = self._count if is_used else self._count - 1
            self.now[id(layer)] = step
            if gates is not None and id(gates) not in self._watched:
                self._watch([gates])

    def _watch(self, tensors: Iterable[Tensor]) -> None:
        # They are held, so that nothing else comes to stand at the same address.
        new = {id(tensor): tensor for tensor in tensors}
        self._watched.update(new)
        self._versions += versions_of(new.values())
        self._pointers += pointers_of(new.values())
