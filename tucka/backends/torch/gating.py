"""From logits to gates in few operators: a router runs once in a forward, but on a short one that is felt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["gates_of"]


def gates_of(logits: Tensor, *, normalize: bool, bias: Tensor | None = None) -> Tensor:
    """Choose a group and gate its experts as `tucka.select_gates` does, with a third of its operators.

    Parameters
    ----------
    logits : Tensor, shape (..., k, t)
        In float32 at least.
    normalize : bool
        Whether the gates of the chosen group sum to one.
    bias : Tensor, shape (k,), optional
        Added to the logits of each group for the choice alone.

    Returns
    -------
    Tensor, shape (..., k, t)
        Zero outside the chosen group.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (6), (7), (8).

    Examples
    --------
    >>> gates_of(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), normalize=True)
    tensor([[0.0000, 0.0000],
            [0.5000, 0.5000]])
    """
    groups, experts = logits.shape[-2:]
    compared = logits.detach() if bias is None else logits.detach() + bias[:, None]
    chosen = compared.flatten(-2).argmax(dim=-1, keepdim=True) // experts
    others = (torch.arange(groups, device=logits.device) != chosen)[..., None]
    # Before the scores: what the other groups hold must not reach the gradient, where an infinity would become NaN.
    kept = logits.masked_fill(others, 0.0)
    scores = nn.functional.logsigmoid(kept).softmax(dim=-1) if normalize else kept.sigmoid()
    return scores.masked_fill(others, 0.0)
