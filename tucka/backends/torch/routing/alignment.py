"""Fit gates and masks to each other: pooling, prompts, documents, counting."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["before_labels", "count_groups", "first_tokens", "mean_over_tokens"]


def before_labels(mask: Tensor | None, labels: Tensor) -> Tensor:
    """Narrow a mask (B, S) to the tokens before the first label that is not ignored."""
    kept = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask != 0
    prompt = kept & ((labels != -100).cumsum(dim=1) == 0)
    first = kept & (kept.cumsum(dim=1) == 1)
    return torch.where(prompt.any(dim=1, keepdim=True), prompt, first)


def first_tokens(mask: Tensor | None, rows: int, tokens: int, count: int, device: torch.device) -> Tensor:
    """Narrow a mask (B, S) to the first `count` tokens of each row."""
    kept = (torch.arange(tokens, device=device) < count).expand(rows, tokens)
    return kept if mask is None else kept & (mask != 0)


def mean_over_tokens(gates: Tensor, mask: Tensor | None) -> Tensor:
    """Average token gates (B, ..., k, t) over each sample's unmasked tokens, to (B, k, t)."""
    if mask is None:
        return gates.flatten(1, -3).mean(dim=1)
    weights = (mask != 0).to(gates.dtype)
    total = weights.flatten(1).sum(dim=1).clamp(min=1)
    return (gates * weights[..., None, None]).flatten(1, -3).sum(dim=1) / total[:, None, None]


@torch.no_grad()
def count_groups(gates: Tensor, mask: Tensor | None) -> Tensor:
    """Count how often each group was chosen, (k), on the device of the gates."""
    chosen = (gates != 0).any(dim=-1)
    if mask is not None and gates.ndim > 2:
        counted = mask != 0 if gates.ndim - 2 == mask.ndim else (mask != 0).flatten(1).any(dim=1)
        chosen = chosen & counted[..., None]
    return chosen.reshape(-1, chosen.shape[-1]).sum(dim=0)
