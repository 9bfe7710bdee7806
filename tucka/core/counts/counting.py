"""Count parameters, multiply-adds and bytes of an adapter from sizes alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tucka.checks import check_choice, check_count
from tucka.core.counts.costs import Amount
from tucka.core.counts.table import total_cost
from tucka.errors import ConfigError, expected

__all__ = ["count_activation_bytes", "count_file_bytes", "count_flops", "count_parameters"]


def count_parameters(method: str, layers: Iterable[tuple[int, int]], **sizes: Any) -> int:
    r"""Count the trainable numbers of an adapter.

    ===========  =====================================  ==========================================================
    method       sizes                                  parameters of a layer d×d'
    ===========  =====================================  ==========================================================
    ``"tucka"``  r, k, t, p (default 8, 2, 2, 2)        t·p + k·p·r² + d·r, and k·t·d₁ once for the router
    ``"lora"``   r                                      r·(d + d')
    ``"dora"``   r                                      r·(d + d') + d'
    ``"vera"``   r                                      r + d'
    ``"oft"``    block_size (b), variant                d·(b − 1)/2; ``"paper"``: d·b + d'
    ``"boft"``   block_size (b), variant                d·b + d'
    ``"hra"``    r                                      d·r
    ``"full"``                                          d·d'
    ===========  =====================================  ==========================================================

    ``"tucka"`` also takes ``routing`` (``"batch"``, ``"sample"`` or ``"token"``), which costs no parameters, and
    ``pinned=True`` for an adapter with a fixed route, which has no router. With ``rotation=True``, multiply-adds are
    those of ``factor_norm="rotation"``, the default of adapters, and else the paper's. ``variant`` is ``"peft"``
    (default), what PEFT 0.21 has, or ``"paper"``, what the paper's tables count.

    Parameters
    ----------
    method : str
        One of the names above.
    layers : iterable of tuple of int
        Input and output width (d, d') of each adapted layer, the one that runs first in front.
    **sizes : int or str or bool
        The method's sizes, by the names of its configuration.

    Returns
    -------
    int
        The number of parameters, without a classification head or other parts that are trained besides.

    Raises
    ------
    ConfigError
        If there is no such method, a layer is no pair of widths, or a size is missing, unknown or does not fit.

    References
    ----------
    .. [1] arXiv:2511.06859, "Expert Complexity" in Sec. 3.2, Eq. (5), and the router's cost in Sec. 3.3, Eq. (6).

    Examples
    --------
    >>> block = [(768, 768)] * 3 + [(768, 3072), (3072, 768)]
    >>> count_parameters("tucka", block * 12, r=6, k=1), count_parameters("lora", block * 12, r=8)
    (448464, 1179648)
    """
    return total_cost(method, layers, sizes, where="count_parameters").parameters


def count_flops(
    method: str,
    layers: Iterable[tuple[int, int]],
    *,
    tokens: int,
    samples: int | None = None,
    backward: bool = False,
    **sizes: Any,
) -> int:
    r"""Count the multiply-adds that an adapter adds to one forward, or to its backward.

    One multiply-add is two floating-point operations. Counted are matrix products, and not additions of whole tensors,
    element-wise products, norms, means, sigmoids and linear solves. The frozen layers' own products (d·d' for each
    token, in forward and in backward) are not in it. Baselines are counted as PEFT 0.21 computes them in training
    without dropout, which for HRA and BOFT means d×d matrices. A merged adapter costs nothing.

    Parameters
    ----------
    method : str
    layers : iterable of tuple of int
        As in `count_parameters`.
    tokens : int
        Rows that pass through the layers in one forward: samples times their length.
    samples : int, optional
        How many samples these are; needed for ``routing="sample"``, where each has its own route.
    backward : bool
        Count the backward instead, in which all inputs need a gradient.
    **sizes : int or str or bool
        As in `count_parameters`.

    Returns
    -------
    int
        Multiply-adds.

    Raises
    ------
    ConfigError
        As `count_parameters`; also for a wrong number of tokens or samples.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (9), computed as :math:`x + \alpha\, ((x U) \bar G)\, U^\top`.

    Examples
    --------
    >>> count_flops("tucka", [(768, 768)], tokens=100, r=8, k=2), count_flops("lora", [(768, 768)], tokens=100, r=8)
    (1238536, 1228800)
    """
    where = "count_flops"
    check_choice("backward", backward, (True, False), where=where)
    cost = total_cost(method, layers, sizes, where=where)
    return _at(cost.backward if backward else cost.forward, tokens, samples, where=where)


def count_file_bytes(method: str, layers: Iterable[tuple[int, int]], *, itemsize: int = 4, **sizes: Any) -> int:
    """Count the bytes of the tensors in an adapter's safetensors file.

    They are the parameters; for ``"tucka"`` also the router's centre and flag, and the strength of each rotation; for
    ``"vera"`` the random projections. The file's header comes on top: 8 bytes, and about 100 to 150 for each tensor.

    Parameters
    ----------
    method : str
    layers : iterable of tuple of int
        As in `count_parameters`.
    itemsize : int
        Bytes of one number: 4 for float32, 2 for float16 and bfloat16.
    **sizes : int or str or bool
        As in `count_parameters`.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ConfigError
        As `count_parameters`; also for a wrong `itemsize`.

    Examples
    --------
    >>> count_file_bytes("lora", [(768, 768)], r=8)
    49152
    """
    where = "count_file_bytes"
    cost = total_cost(method, layers, sizes, where=where)
    return check_count("itemsize", itemsize, where=where) * (cost.parameters + cost.buffers)


def count_activation_bytes(
    method: str,
    layers: Iterable[tuple[int, int]],
    *,
    tokens: int,
    samples: int | None = None,
    itemsize: int = 4,
    **sizes: Any,
) -> int:
    """Count the bytes that an adapter keeps from the forward to the backward.

    They are what autograd saves of the adapter's own computation: no parameters, frozen weights or buffers, and nothing
    that the frozen layers or their activation functions save. An input counts in every layer that keeps it, although
    layers that read the same one share a copy. Gradient checkpointing keeps less.

    Parameters
    ----------
    method : str
    layers : iterable of tuple of int
        As in `count_parameters`.
    tokens : int
    samples : int, optional
        As in `count_flops`.
    itemsize : int
        Bytes of one number.
    **sizes : int or str or bool
        As in `count_parameters`.

    Returns
    -------
    int
        Bytes.

    Raises
    ------
    ConfigError
        As `count_flops`; also for a wrong `itemsize`.

    Examples
    --------
    >>> count_activation_bytes("lora", [(768, 768)], tokens=100, r=8)
    310400
    """
    where = "count_activation_bytes"
    itemsize = check_count("itemsize", itemsize, where=where)
    cost = total_cost(method, layers, sizes, where=where)
    return itemsize * _at(cost.kept, tokens, samples, where=where)


def _at(amount: Amount, tokens: int, samples: int | None, *, where: str) -> int:
    """Evaluate an amount, after checking the numbers that it depends on."""
    tokens = check_count("tokens", tokens, where=where)
    if samples is None:
        if amount.per_sample:
            raise ConfigError(expected("samples", "the number of samples for routing='sample'", None, where=where))
        return amount.at(tokens=tokens)
    samples = check_count("samples", samples, where=where)
    if samples > tokens:
        raise ConfigError(expected("samples", f"at most the {tokens} tokens", samples, where=where))
    return amount.at(tokens=tokens, samples=samples)
