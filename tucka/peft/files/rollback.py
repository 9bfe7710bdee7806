"""Putting a model back as it was: when an adapter cannot be added, or its files turn out not to fit."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tucka.backends.torch.routing.scope import RoutingScope
from tucka.errors import CheckpointError, TuckaError, expected

__all__ = ["Loading", "Memory", "is_misfit", "misfit", "unchanged_on_error"]

# What an attribute is, and a copy of what it holds where that can change in place.
_Attributes = dict[str, tuple[Any, Any]]


class Memory:
    """What the modules, hooks, adapters, modes and flags of a model are; not what its tensors hold.

    Parameters
    ----------
    model : Module
        The model.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> memory = Memory(model)
    >>> model[0] = nn.ReLU()
    >>> memory.restore()
    >>> model[0]
    Linear(in_features=2, out_features=2, bias=True)
    """

    def __init__(self, model: nn.Module) -> None:
        owners: list[Any] = list(model.modules())
        found = (getattr(owner, "tucka_scope", None) for owner in owners)
        scopes = {id(scope): scope for scope in found if isinstance(scope, RoutingScope)}
        self._attributes = [(owner, _remember(owner)) for owner in [*owners, *scopes.values()]]
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back."""
        for owner, attributes in self._attributes:
            _put_back(owner, attributes)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


def _remember(owner: nn.Module | RoutingScope) -> _Attributes:
    return {
        name: (value, copy.copy(value) if isinstance(value, (dict, list, set)) else None)
        for name, value in vars(owner).items()
    }


def _put_back(owner: nn.Module | RoutingScope, attributes: _Attributes) -> None:
    """Restore attributes; containers are refilled and not replaced, since hook handles refer to them."""
    for name in [name for name in vars(owner) if name not in attributes]:
        del vars(owner)[name]
    for name, (value, content) in attributes.items():
        if isinstance(value, list):
            value[:] = content
        elif content is not None:
            value.clear()
            value.update(content)
        vars(owner)[name] = value


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[Memory]:
    """Put a model back as it was if the block raises; the block must not write to tensors.

    Parameters
    ----------
    model : Module
        The model.

    Yields
    ------
    Memory
        What the model was.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> try:
    ...     with unchanged_on_error(model):
    ...         model[0] = nn.ReLU()
    ...         raise ValueError
    ... except ValueError:
    ...     model[0]
    Linear(in_features=2, out_features=2, bias=True)
    """
    memory = Memory(model)
    try:
        yield memory
    except BaseException:
        memory.restore()
        raise


def misfit(error: BaseException, *, where: str) -> CheckpointError:
    """Say that files do not fit a model, whatever went wrong: targets that it lacks, sizes, options.

    Parameters
    ----------
    error : BaseException
        What adding the adapter raised.
    where : str
        The folder or the adapter.

    Returns
    -------
    CheckpointError
        To be raised instead.

    Examples
    --------
    >>> misfit(KeyError("head"), where="folder")
    CheckpointError("adapter: expected files that fit the model, got KeyError: 'head' (folder)")
    """
    got = str(error) if isinstance(error, TuckaError) else f"{type(error).__name__}: {error}"
    return CheckpointError(expected("adapter", "files that fit the model", got, where=where))


def is_misfit(error: BaseException) -> bool:
    """Tell whether an error has to be said in other words, see `misfit`.

    Parameters
    ----------
    error : BaseException
        What adding the adapter raised.

    Returns
    -------
    bool
        False for what says it already, for warnings that are errors, and for interruptions.

    Examples
    --------
    >>> is_misfit(KeyError("head")), is_misfit(KeyboardInterrupt())
    (True, False)
    """
    return isinstance(error, Exception) and not isinstance(error, (CheckpointError, Warning))


class Loading:
    """A load that PEFT has begun: it adds a new adapter first, and looks at the file afterwards.

    Parameters
    ----------
    keys : iterable of str
        Names of the tensors in the file.

    Attributes
    ----------
    keys : frozenset of str
        The same.

    Examples
    --------
    >>> Loading(["a"]).keys
    frozenset({'a'})
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self.keys = frozenset(keys)
        self._memory: Memory | None = None
        self._fresh: list[tuple[Tensor, int]] = []

    def begin(self, memory: Memory, fresh: Iterable[Tensor]) -> None:
        """Note what the model was before it got the adapter.

        Parameters
        ----------
        memory : Memory
            From before.
        fresh : iterable of Tensor
            The parameters of the new adapter.
        """
        self._memory = memory
        self._fresh = [(parameter, parameter._version) for parameter in fresh]

    def undo(self, model: Any, adapter: str) -> None:
        """Take the adapter out of the model again, unless it has been trained meanwhile and is no fresh one.

        Parameters
        ----------
        model : Module
            The model, with the adapter.
        adapter : str
            Its name.
        """
        if self._memory is None or any(parameter._version != version for parameter, version in self._fresh):
            return
        self._memory.restore()
        model.peft_config.pop(adapter, None)
