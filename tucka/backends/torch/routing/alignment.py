"""Fit masks and gates to inputs: padding, caches, prompts, beams, layers with other leading axes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["align_gates", "count_groups", "fitting_mask", "mean_over_tokens", "prompt_mask"]


def fitting_mask(mask: Any, x: Tensor, *, continues: bool = False) -> Tensor | None:
    """Return the part of an attention mask that is about the tokens of `x`.

    Parameters
    ----------
    mask : Tensor, shape (B, S'), or anything else
        With a filled cache S' covers earlier tokens too; the last ones are those of `x`.
    x : Tensor, shape (B, S, d)
        The input that is routed on.
    continues : bool
        Whether there is a filled cache; without one a longer mask is about something else.

    Returns
    -------
    Tensor, shape (B, S), or None
        None where there is no mask or one of another kind: all tokens count then.

    Examples
    --------
    >>> fitting_mask(torch.tensor([[0, 1, 1]]), torch.zeros(1, 2, 4), continues=True)
    tensor([[1, 1]])
    >>> fitting_mask(torch.tensor([[0, 1, 1]]), torch.zeros(1, 2, 4)) is None
    True
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or x.ndim != 3 or mask.shape[0] != x.shape[0]:
        return None
    if continues and mask.shape[1] > x.shape[1]:
        mask = mask[:, mask.shape[1] - x.shape[1] :]
    return mask.to(x.device) if mask.shape[1] == x.shape[1] else None


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
    gates : Tensor, shape (k, t), (B, k, t) or (B, S, ..., k, t)
        The route.
    x : Tensor, shape (..., d)
        The input of the layer that asks.
    mask : Tensor, shape (B, S), or None
        Which tokens count, where token gates have to be averaged.

    Returns
    -------
    Tensor, shape (..., k, t), or None
        Aligned with `x` from the left; None if the rows cannot be matched. A sample's gates are repeated for inputs
        that have several rows for each sample (beams, or tokens laid out in one axis). Token gates follow their tokens
        where these are laid out in more or fewer axes; for inputs without a token axis, or with another one, they
        become their mean over a sample's tokens.

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
    if len(lead) > 1 and len(lead) != len(rows) and math.prod(lead) == math.prod(rows):
        return gates.reshape(*rows, *gates.shape[-2:])
    if not rows or not lead[0] or rows[0] % lead[0]:
        return None
    if len(lead) > 1:
        gates = mean_over_tokens(gates, mask)
    return gates if rows[0] == lead[0] else gates.repeat_interleave(rows[0] // lead[0], dim=0)


def mean_over_tokens(gates: Tensor, mask: Tensor | None) -> Tensor:
    """Average token gates over each sample's unmasked tokens.

    Parameters
    ----------
    gates : Tensor, shape (B, S, ..., k, t)
        A gate tensor for each token.
    mask : Tensor, shape (B, S), or None
        Which tokens count.

    Returns
    -------
    Tensor, shape (B, k, t)
        The means; zero for a sample of which no token counts.

    Examples
    --------
    >>> mean_over_tokens(torch.tensor([[[[1.0]], [[3.0]]]]), torch.tensor([[1, 0]]))
    tensor([[[1.]]])
    """
    weights = torch.ones(gates.shape[:-2], dtype=gates.dtype, device=gates.device)
    weights = weights if mask is None else (mask != 0).to(gates.dtype)
    total = weights.flatten(1).sum(dim=1).clamp(min=1)
    return (gates * weights[..., None, None]).flatten(1, -3).sum(dim=1) / total[:, None, None]


@torch.no_grad()
def count_groups(gates: Tensor, mask: Tensor | None) -> Tensor:
    """Count how often each group was chosen, on the device of the gates.

    Parameters
    ----------
    gates : Tensor, shape (k, t), (B, k, t) or (B, S, ..., k, t)
        The route.
    mask : Tensor, shape (B, S), or None
        Masked tokens, and samples without any other, do not count.

    Returns
    -------
    Tensor, shape (k,)
        The counts, whole numbers.

    Examples
    --------
    >>> count_groups(torch.tensor([[[1.0], [0.0]], [[0.0], [1.0]]]), torch.tensor([[1, 1], [0, 0]])).tolist()
    [1, 0]
    """
    chosen = (gates != 0).any(dim=-1)
    if mask is not None and gates.ndim > 2:
        counted = mask != 0 if gates.ndim - 2 == mask.ndim else (mask != 0).flatten(1).any(dim=1)
        chosen = chosen & counted[..., None]
    return chosen.reshape(-1, chosen.shape[-1]).sum(dim=0)
