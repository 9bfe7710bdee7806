"""The router: one module that holds the centroids and turns hidden states into gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tucka.backends.torch.thin import without_autocast
from tucka.core.initialization import kaiming_centroids
from tucka.core.routing import affinity_logits, routing_feature, select_gates
from tucka.errors import RouteError, ShapeError, expected
from tucka.spec import TuckerSpec, check_count

__all__ = ["Router"]

_HALF = (torch.float16, torch.bfloat16)
_PIECE = 1024  # tokens that are widened at a time


class Router(nn.Module):
    r"""Route a batch, its samples or its tokens to a group of experts.

    All of its arithmetic runs in float32 at least. A forward changes no parameter and no buffer.

    Parameters
    ----------
    spec : TuckerSpec
        Groups, experts, granularity, affinity.
    in_features : int
        Width of the hidden states (d).
    seed : int
        Of the starting directions; they are replaced by data-aware ones in `initialize`.
    count_padding : bool
        Whether masked tokens count in the feature too, as in the authors' code.

    Attributes
    ----------
    centroids : Parameter, shape (k, t, d)
        One vector for each expert; trained.
    center : buffer, shape (d,)
        The centre μ that the centred affinities subtract; saved.
    is_initialized : buffer, bool
        Whether the centroids came from data; saved, so that loading never initialises again.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (6), (7), (8).

    Examples
    --------
    >>> router = Router(TuckerSpec(groups=3, experts_per_group=2), in_features=8)
    >>> gates = router(torch.randn(4, 5, 8))
    >>> gates.shape, int((gates.sum(dim=1) > 0).sum())
    (torch.Size([3, 2]), 1)
    """

    center: Tensor
    is_initialized: Tensor

    def __init__(self, spec: TuckerSpec, in_features: int, *, seed: int = 0, count_padding: bool = False) -> None:
        super().__init__()
        self.count_padding = count_padding
        self.spec = spec
        self.seed = seed
        self.in_features = check_count("in_features", in_features, where="Router")
        shape = (spec.groups, spec.experts_per_group, self.in_features)
        self.centroids = nn.Parameter(
            torch.from_numpy(kaiming_centroids(shape, seed=seed)).to(torch.get_default_dtype())
        )
        self.register_buffer("center", torch.zeros(self.in_features))
        self.register_buffer("is_initialized", torch.tensor(False))

    def extra_repr(self) -> str:
        """Describe the router in its module's line.

        Returns
        -------
        str
            Sizes, granularity and affinity.
        """
        sizes = f"groups={self.spec.groups}, experts_per_group={self.spec.experts_per_group}"
        return f"{sizes}, in_features={self.in_features}, {self.spec.routing}, {self.spec.affinity}"

    def feature(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Average hidden states to the granularity of this router.

        Parameters
        ----------
        hidden : Tensor, shape (B, ..., d)
            Inputs of the first adapted layer.
        mask : Tensor, shape (B, ...), optional
            Non-zero where a token counts.

        Returns
        -------
        Tensor, shape (d,), (B, d) or (B, ..., d)
            In float32 at least; for tokens the hidden states themselves.

        Raises
        ------
        RouteError
            If the hidden states are not `in_features` wide, or on another device.
        ShapeError
            If `mask` does not have the shape of `hidden` without its last axis.
        """
        self._check(hidden)
        mask = None if self.count_padding else mask
        if hidden.dtype not in _HALF or self.spec.routing == "token":
            feature: Tensor = routing_feature(hidden, mask=mask, granularity=self.spec.routing)
            return feature
        if mask is not None and mask.shape != hidden.shape[:-1]:
            rule = f"shape {tuple(hidden.shape[:-1])} to match hidden"
            raise ShapeError(expected("mask", rule, f"shape {tuple(mask.shape)}", where="Router"))
        samples, present = _sample_means(hidden, mask)
        return samples if self.spec.routing == "sample" else samples.sum(dim=0) / present.sum().clamp(min=1)

    def _check(self, hidden: Tensor) -> None:
        if hidden.ndim < 2 or hidden.shape[-1] != self.in_features:
            rule = f"axes (B, ..., d) with d = {self.in_features}, the router's width"
            cure = "Make the router for the layer that runs first"
            raise RouteError(expected("hidden", rule, f"shape {tuple(hidden.shape)}", where="Router", cure=cure))
        if hidden.device != self.centroids.device:
            rule, cure = f"a tensor on {self.centroids.device}, as the router", "Move one of them with .to(device)"
            raise RouteError(expected("hidden", rule, f"one on {hidden.device}", where="Router", cure=cure))

    def logits(self, feature: Tensor) -> Tensor:
        """Compare features with the centroids.

        Parameters
        ----------
        feature : Tensor, shape (..., d)
            From `feature`.

        Returns
        -------
        Tensor, shape (..., k, t)
            In float32 at least.
        """
        center = self._wide(self.center) if self.spec.affinity in ("centered", "directional") else None
        dtype = torch.promote_types(feature.dtype, self._wide(self.centroids).dtype)
        center = center if center is None else center.to(dtype)
        centroids = self.centroids.to(dtype)
        logits: Tensor = affinity_logits(feature.to(dtype), centroids, kind=self.spec.affinity, center=center)
        return logits

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Turn hidden states into gates.

        Parameters
        ----------
        hidden : Tensor, shape (B, ..., d)
            Inputs of the first adapted layer.
        mask : Tensor, shape (B, ...), optional
            Non-zero where a token counts.

        Returns
        -------
        Tensor, shape (k, t), (B, k, t) or (B, ..., k, t)
            Gates for batch, sample or token routing, zero outside the chosen group.

        Raises
        ------
        RouteError
            If the hidden states are not `in_features` wide.
        """
        with without_autocast(hidden.device.type):
            feature = self.feature(hidden, mask)
            logits = self.logits(feature) if feature.dtype not in _HALF else self._logits_of_tokens(feature)
            gates: Tensor = select_gates(logits, normalize=self.spec.gate_norm)
        return gates

    def _logits_of_tokens(self, hidden: Tensor) -> Tensor:
        """Compare tokens in half precision: in float32, but a piece at a time, and computed again for the backward."""
        if torch.compiler.is_compiling():  # a compiler widens number by number and keeps no copy
            return self.logits(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1])
        pieces = [
            checkpoint(self.logits, piece, use_reentrant=False, preserve_rng_state=False)
            for piece in rows.split(_PIECE)
        ]
        return torch.cat(pieces).reshape(*hidden.shape[:-1], *self.centroids.shape[:2])

    @torch.no_grad()
    def initialize(self, centroids: Tensor, center: Tensor | None = None) -> None:
        """Take data-aware centroids over and remember that it was done.

        Parameters
        ----------
        centroids : Tensor, shape (k, t, d)
            For instance from `tucka.balanced_centroids`.
        center : Tensor, shape (d,), optional
            The centre of the features; zero if None.
        """
        self.centroids.copy_(centroids)
        self.center.copy_(torch.zeros_like(self.center) if center is None else center)
        self.is_initialized.fill_(True)

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in _HALF else tensor


def _sample_means(hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Average (B, ..., d) in half precision over unmasked tokens with float32 sums; also say which samples have any."""
    tokens = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
    if mask is None:
        present = torch.ones(hidden.shape[0], device=hidden.device)
        return tokens.mean(dim=1, dtype=torch.float32), present
    kept = mask.reshape(mask.shape[0], -1) != 0
    # where and not a product: whatever padding holds (NaN included), it must not reach the mean.
    tokens = torch.where(kept[..., None], tokens, torch.zeros_like(tokens[:1, :1]))
    counts = kept.sum(dim=1)
    means = tokens.sum(dim=1, dtype=torch.float32) / counts.clamp(min=1)[:, None]
    return means, (counts != 0).float()
