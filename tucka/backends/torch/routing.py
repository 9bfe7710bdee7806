"""The router: one module that holds the centroids and turns hidden states into gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tucka.core.initialization import kaiming_centroids
from tucka.core.routing import affinity_logits, routing_feature, select_gates
from tucka.errors import RouteError, expected
from tucka.spec import TuckerSpec, check_count

__all__ = ["Router"]


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

    def __init__(self, spec: TuckerSpec, in_features: int, *, seed: int = 0) -> None:
        super().__init__()
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
            In float32 at least.

        Raises
        ------
        RouteError
            If the hidden states are not `in_features` wide.
        """
        if hidden.shape[-1] != self.in_features:
            rule = f"hidden states {self.in_features} wide, as the router"
            raise RouteError(expected("hidden", rule, f"shape {tuple(hidden.shape)}", where="Router"))
        wide = hidden if self.spec.routing == "token" else self._wide(hidden)
        feature: Tensor = routing_feature(wide, mask=mask, granularity=self.spec.routing)
        return self._wide(feature)

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
        with torch.autocast(hidden.device.type, enabled=False):
            gates: Tensor = select_gates(self.logits(self.feature(hidden, mask)), normalize=self.spec.gate_norm)
        return gates

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
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
