"""Fit masks and gates to inputs: padding, caches, prompts, beams, layers with other leading axes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["align_gates", "fitting_mask", "prompt_mask"]


def fitting_mask(mask: Any, x: Tensor) -> Tensor | None:
    """Return the part of an attention mask that is about the tokens of `x`.

    Parameters
    ----------
    mask : Tensor, shape (B, S'), or anything else
        With a cache S' covers earlier tokens too; the last ones are those of `x`.
    x : Tensor, shape (B, S, d)
        The input that is routed on.

    Returns
    -------
    Tensor, shape (B, S), or None
        None where there is no mask or one of another kind: all tokens count then.

    Examples
    --------
    >>> fitting_mask(torch.tensor([[0, 1, 1]]), torch.zeros(1, 2, 4))
    tensor([[1, 1]])
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or x.ndim != 3 or mask.shape[0] != x.shape[0]:
        return None
    if mask.shape[1] > x.shape[1]:
        mask = mask[:, mask.shape[1] - x.shape[1] :]
    return mask if mask.shape[1] == x.shape[1] else None


def prompt_mask(mask: Tensor | None, labels: Tensor, x: Tensor) -> Tensor | None:
    """Narrow a mask to the tokens before the first label that counts.

    Parameters
    ----------
    mask : Tensor, shape (B, S), or None
        The attention mask.
    labels : Tensor
        Labels that are not -100 belong to the answer. Ignored unless they have the shape of the tokens.
    x : Tensor, shape (B, S, d)
        The input that is routed on.

    Returns
    -------
    Tensor, shape (B, S), or None
        A row without a prompt keeps its first unmasked token.

    Examples
    --------
    >>> prompt_mask(None, torch.tensor([[-100, -100, 7], [5, 6, 7]]), torch.zeros(2, 3, 4))
    tensor([[ True,  True, False],
            [ True, False, False]])
    """
    if tuple(labels.shape) != tuple(x.shape[:-1]):
        return mask
    kept = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask != 0
    prompt = kept & ((labels != -100).cumsum(dim=1) == 0)
    first = kept & (kept.cumsum(dim=1) == 1)
    return torch.where(prompt.any(dim=1, keepdim=True), prompt, first)


def align_gates(gates: Tensor, x: Tensor, mask: Tensor | None) -> Tensor | None:
    """Fit gates to an input that may have other leading axes than the one they were made from.

    Parameters
    ----------
    gates : Tensor, shape (k, t), (B, k, t) or (B, S, k, t)
        The route.
    x : Tensor, shape (..., d)
        The input of the layer that asks.
    mask : Tensor, shape (B, S), or None
        Which tokens count, where token gates have to be averaged.

    Returns
    -------
    Tensor, shape (..., k, t), or None
        Aligned with `x` from the left; None if the rows cannot be matched. A sample's gates are repeated for inputs
        that have several rows for each sample (beams, or tokens laid out in one axis); token gates become their mean
        over a sample's tokens for inputs without a token axis, or with another one.

    Examples
    --------
    >>> align_gates(torch.ones(2, 3, 1), torch.ones(4, 5), None).shape
    torch.Size([4, 3, 1])
    >>> align_gates(torch.ones(2, 3, 1), torch.ones(5, 5), None) is None
    True
    """
    lead, rows = tuple(gates.shape[:-2]), tuple(x.shape[:-1])
    if lead == rows[: len(lead)]:
        return gates
    if len(lead) > 1 and len(rows) == 1 and rows[0] == lead[0] * lead[1]:
        return gates.flatten(0, 1)
    if not rows or rows[0] % lead[0]:
        return None
    if len(lead) > 1:
        gates = _masked_mean(gates, mask)
    return gates if rows[0] == lead[0] else gates.repeat_interleave(rows[0] // lead[0], dim=0)


def _masked_mean(gates: Tensor, mask: Tensor | None) -> Tensor:
    """Average token gates over each sample's unmasked tokens."""
    weights = torch.ones(gates.shape[:-2], dtype=gates.dtype, device=gates.device)
    weights = weights if mask is None else (mask != 0).to(gates.dtype)
    total = weights.flatten(1).sum(dim=1).clamp(min=1)
    return (gates * weights[..., None, None]).flatten(1, -3).sum(dim=1) / total[:, None, None]
