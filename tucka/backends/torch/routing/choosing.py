"""From hidden states to gates as `tucka.core.routing` does it, in a third of its operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tucka.spec import Affinity, Routing

__all__ = ["feature_of", "gates_of", "logits_of"]

# One route costs as much as several adapted layers: behind a large product, each operator's code has to come from the
# memory again. The reference's sizes and names are not checked here, which the router has done.


def feature_of(hidden: Tensor, mask: Tensor | None, routing: Routing) -> Tensor:
    """Average (B, ..., d) over unmasked tokens with sums in float32 at least, to (d,) or (B, d)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if mask is None and routing == "batch":
        return hidden.mean(dim=tuple(range(hidden.ndim - 1)), dtype=dtype)
    tokens = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
    if mask is None:
        return tokens.mean(dim=1, dtype=dtype)
    kept = mask.reshape(mask.shape[0], -1) != 0
    # where and not a product: whatever padding holds (NaN included), it must not reach the mean.
    tokens = torch.where(kept[..., None], tokens, torch.zeros_like(tokens[:1, :1]))
    counts = kept.sum(dim=1)
    samples = tokens.sum(dim=1, dtype=dtype) / counts.clamp(min=1)[:, None]
    return samples if routing == "sample" else samples.sum(dim=0) / (counts != 0).sum().clamp(min=1)


def logits_of(
    feature: Tensor, centroids: Tensor, *, affinity: Affinity, center: Tensor | None, temperature: float
) -> Tensor:
    """Compare features (..., d) with centroids (k, t, d) of their dtype, to (..., k, t)."""
    feature = feature if center is None else feature - center
    norms = None
    if affinity in ("group_norm", "directional"):
        feature = _scaled(feature)
    if affinity == "directional":
        norms = _norms(feature)
    logits = nn.functional.linear(feature, centroids.flatten(0, 1)).reshape(*feature.shape[:-1], *centroids.shape[:2])
    if affinity == "group_norm":
        logits = _scaled(logits)
        logits = logits / _norms(logits)
    elif norms is not None:
        logits = logits / norms[..., None]
    return logits if temperature == 1 else logits / temperature


def _scaled(rows: Tensor) -> Tensor:
    """Divide rows (..., d) by their largest entries."""
    # Squares of 1e25 overflow in float32, and those of 1e-25 vanish.
    largest = torch.linalg.vector_norm(rows.detach(), ord=torch.inf, dim=-1, keepdim=True)
    scaled: Tensor = rows / (largest + (largest == 0))
    return scaled


def _norms(scaled: Tensor) -> Tensor:
    """Return the norms (..., 1) of rows whose largest entry is one; one for rows of zeros."""
    norms: Tensor = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return norms.clamp(min=1.0)


def gates_of(logits: Tensor, *, gate_norm: bool, bias: Tensor | None = None, like: Tensor | None = None) -> Tensor:
    """Choose a group for each decision, or keep that of other gates, and gate its experts, (..., k, t) to the same."""
    if like is None:
        compared = logits.detach().amax(dim=-1)
        compared = compared if bias is None else compared + bias
    else:
        compared = like.sum(dim=-1)
    chosen = compared.argmax(dim=-1, keepdim=True)
    others = (torch.arange(logits.shape[-2], device=logits.device) != chosen)[..., None]
    # Before the scores: what the other groups hold must not reach the gradient, where an infinity would become NaN.
    kept = logits.masked_fill(others, 0.0)
    scores = nn.functional.logsigmoid(kept).softmax(dim=-1) if gate_norm else kept.sigmoid()
    return scores.masked_fill(others, 0.0)
