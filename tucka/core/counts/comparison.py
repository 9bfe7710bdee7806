"""All counts of several methods on the same layers, side by side."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tucka.core.counts.counting import count_activation_bytes, count_file_bytes, count_flops, count_parameters

__all__ = ["MethodCounts", "compare_methods"]


@dataclass(frozen=True)
class MethodCounts:
    """What one method costs.

    Parameters
    ----------
    method : str
    sizes : mapping
        Its name, and the sizes given.
    parameters : int
        Trainable numbers.
    share : float
        Parameters divided by the weights of the layers.
    forward, backward : int
        Multiply-adds of one forward and of its backward, beyond the frozen layers'.
    file_bytes : int
        Bytes of the tensors in the adapter's file.
    activation_bytes : int
        Bytes kept from the forward to the backward.

    Examples
    --------
    >>> MethodCounts("hra", {"r": 1}, 4, 0.25, 96, 144, 16, 152).parameters
    4
    """

    method: str
    sizes: Mapping[str, Any]
    parameters: int
    share: float
    forward: int
    backward: int
    file_bytes: int
    activation_bytes: int


def compare_methods(
    layers: Iterable[tuple[int, int]],
    methods: Mapping[str, Mapping[str, Any]],
    *,
    tokens: int,
    samples: int | None = None,
    itemsize: int = 4,
) -> list[MethodCounts]:
    """Count everything for several methods on the same layers.

    Parameters
    ----------
    layers : iterable of tuple of int
        Input and output width of each adapted layer.
    methods : mapping of str to mapping
        For each method its sizes, as `tucka.count_parameters` takes them.
    tokens : int
    samples : int, optional
        As in `tucka.count_flops`.
    itemsize : int
        Bytes of one number.

    Returns
    -------
    list of MethodCounts
        In the order of `methods`.

    Raises
    ------
    ConfigError
        As `tucka.count_flops` and `tucka.count_file_bytes`.

    Examples
    --------
    >>> [row.parameters for row in compare_methods([(8, 8)], {"lora": {"r": 1}, "full": {}}, tokens=4)]
    [16, 64]
    """
    layers = list(layers)
    weights = count_parameters("full", layers)
    rows = []
    for method, sizes in methods.items():
        parameters = count_parameters(method, layers, **sizes)
        passed: dict[str, Any] = {"tokens": tokens, "samples": samples, **sizes}
        row = MethodCounts(
            method=method,
            sizes=sizes,
            parameters=parameters,
            share=parameters / weights,
            forward=count_flops(method, layers, **passed),
            backward=count_flops(method, layers, backward=True, **passed),
            file_bytes=count_file_bytes(method, layers, itemsize=itemsize, **sizes),
            activation_bytes=count_activation_bytes(method, layers, itemsize=itemsize, **passed),
        )
        rows.append(row)
    return rows
