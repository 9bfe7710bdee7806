"""The router: one module that holds the centroids and turns hidden states into gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tucka.backends.torch.checks import check_spec_type, check_tensors
from tucka.backends.torch.private import version_of
from tucka.backends.torch.routing.choosing import feature_of, gates_of, logits_of
from tucka.backends.torch.thin import cast, without_autocast
from tucka.checks import check_count
from tucka.core.centroids import kaiming_centroids
from tucka.errors import ArrayError, ConfigError, RouteError, ShapeError, expected
from tucka.spec import TuckerSpec

__all__ = ["Router"]

_HALF = (torch.float16, torch.bfloat16)
_PIECE = 1024  # tokens that are widened at a time


class Router(nn.Module):
    r"""Route a batch, its samples or its tokens to a group of experts.

    All of its arithmetic runs in float32 at least. A forward changes no parameter and no buffer. With
    ``spec.balance_rate`` above zero, each group has a bias that counts in the choice alone and that `update_bias`
    moves against the load: balance without an auxiliary loss [2]_.

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
    is_initialized : buffer, shape ()
        1 if the centroids came from data, else 0; saved, so that loading never initialises again.
    choice_bias : buffer, shape (k,), or None
        The bias of each group, float32 at least; saved. None where ``spec.balance_rate`` is zero.

    References
    ----------
    .. [1] arXiv:2511.06859, Eq. (6), (7), (8).
    .. [2] arXiv:2408.15664; used by DeepSeek-V3, arXiv:2412.19437, Sec. 2.1.2.

    Examples
    --------
    >>> router = Router(TuckerSpec(groups=3, experts_per_group=2), in_features=8)
    >>> gates = router(torch.randn(4, 5, 8))
    >>> gates.shape, int((gates.sum(dim=1) > 0).sum())
    (torch.Size([3, 2]), 1)
    """

    center: Tensor
    is_initialized: Tensor
    choice_bias: Tensor | None

    if TYPE_CHECKING:  # calls of a module are Any to type checkers

        def __call__(self, hidden: Tensor, mask: Tensor | None = None, like: Tensor | None = None) -> Tensor: ...

    def __init__(self, spec: TuckerSpec, in_features: int, *, seed: int = 0, count_padding: bool = False) -> None:
        super().__init__()
        check_spec_type(spec, "Router")
        self.count_padding = count_padding
        self.spec = spec
        self.seed = seed
        self.in_features = check_count("in_features", in_features, where="Router")
        self.centroids = nn.Parameter(_seeded_centroids(spec, self.in_features, seed).to(torch.get_default_dtype()))
        self.register_buffer("center", torch.zeros(self.in_features))
        self.register_buffer("is_initialized", torch.tensor(0.0))  # a number, since tools average all buffers
        self._read: tuple[Tensor, int, bool] | None = None  # the buffer, its version and what it said then
        self._is_copy: bool | None = None  # whether the centroids were another router's when that was first asked
        self.may_change = False  # whether a start may overwrite the centroids while graphs wait for their backward
        self.register_buffer("choice_bias", torch.zeros(spec.groups) if spec.balance_rate else None)

    def extra_repr(self) -> str:
        """Describe the router in its module's line."""
        sizes = f"groups={self.spec.groups}, experts_per_group={self.spec.experts_per_group}"
        return f"{sizes}, in_features={self.in_features}, {self.spec.routing}, {self.spec.affinity}"

    def feature(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Average hidden states (B, ..., d) over unmasked tokens, to (d,), (B, d) or, for tokens, what they are."""
        self._check(hidden)
        mask = None if self.count_padding else mask
        if 0 in hidden.shape:
            return self._feature_of_nothing(hidden)
        if mask is not None and mask.shape != hidden.shape[:-1]:
            rule = f"shape {tuple(hidden.shape[:-1])} to match hidden"
            raise ShapeError(expected("mask", rule, f"shape {tuple(mask.shape)}", where="Router"))
        return hidden if self.spec.routing == "token" else feature_of(hidden, mask, self.spec.routing)

    def _feature_of_nothing(self, hidden: Tensor) -> Tensor:
        if self.spec.routing == "token":
            return hidden
        wide = self._wide(hidden)
        samples = wide.flatten(1, -2).sum(dim=1) if hidden.ndim > 2 else wide
        return samples if self.spec.routing == "sample" else samples.sum(dim=0)

    def _check(self, hidden: Tensor) -> None:
        if hidden.ndim < 2 or hidden.shape[-1] != self.in_features:
            rule = f"axes (B, ..., d) with d = {self.in_features}, the router's width"
            cure = "Make the router for the layer that runs first"
            raise RouteError(expected("hidden", rule, f"shape {tuple(hidden.shape)}", where="Router", cure=cure))
        if hidden.device != self.centroids.device:
            rule, cure = f"a tensor on {self.centroids.device}, as the router", "Move one of them with .to(device)"
            raise ArrayError(expected("hidden", rule, f"one on {hidden.device}", where="Router", cure=cure))

    def _compared(self) -> Tensor:
        """Return the centroids, or a copy where graphs must do without what the start overwrites."""
        return self.centroids.clone() if self.may_change else self.centroids

    def logits(self, feature: Tensor, centroids: Tensor | None = None) -> Tensor:
        """Compare features (..., d) with the centroids, to (..., k, t) in float32 at least."""
        centroids = self._compared() if centroids is None else centroids
        dtype = torch.promote_types(feature.dtype, self._wide(centroids).dtype)
        return logits_of(
            cast(feature, dtype),
            cast(centroids, dtype),
            affinity=self.spec.affinity,
            center=cast(self.center, dtype) if self.spec.has_center else None,
            temperature=self.spec.temperature,
        )

    def gates(self, logits: Tensor, like: Tensor | None = None) -> Tensor:
        """Choose a group for each decision, or keep that of other gates, and gate its experts, (..., k, t)."""
        bias = None if self.choice_bias is None else self.choice_bias.to(logits.dtype)
        return gates_of(logits, gate_norm=self.spec.gate_norm, bias=bias, like=like)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, like: Tensor | None = None) -> Tensor:
        """Turn hidden states into gates.

        Parameters
        ----------
        hidden : Tensor, shape (B, ..., d)
            Inputs of the first adapted layer.
        mask : Tensor, shape (B, ...), optional
            Non-zero where a token counts.
        like : Tensor, of the result's shape, optional
            Gates whose groups are kept, as where a forward is computed again.

        Returns
        -------
        Tensor, shape (k, t), (B, k, t) or (B, ..., k, t)
            Gates for batch, sample or token routing, zero outside the chosen group.

        Raises
        ------
        RouteError
            If the hidden states are not `in_features` wide.
        ArrayError
            If they are no tensor, or on another device.
        """
        check_tensors("Router", hidden=hidden)
        with without_autocast(hidden.device.type):
            feature = self.feature(hidden, mask)
            logits = self.logits(feature) if feature.dtype not in _HALF else self._logits_of_tokens(feature)
            return self.gates(logits, like)

    def of_documents(
        self, hidden: Tensor, mask: Tensor | None, documents: Tensor, like: Tensor | None = None
    ) -> Tensor:
        """Route the documents of packed rows (B, S, d), to gates (B, S, k, t), or (k, t) for a batch of documents."""
        rows, tokens = documents.shape
        with without_autocast(hidden.device.type):
            feature, counts, places = self.means_of_documents(hidden, mask, documents)
            if self.spec.routing == "batch":
                return self.gates(self.logits(feature.sum(dim=0) / (counts > 0).sum().clamp(min=1)), like)
            logits = self.logits(feature)
            if like is not None:  # by token, as the result
                like = torch.zeros_like(logits).index_copy(0, places, like.flatten(0, 1).to(logits.dtype))
            gates = self.gates(logits, like)[places]
        return gates.reshape(rows, tokens, *gates.shape[-2:])

    def means_of_documents(
        self, hidden: Tensor, mask: Tensor | None, documents: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Average the documents of packed rows (B, S, d), to (B·S, d); their lengths, where each token's mean is."""
        rows, tokens = documents.shape
        places = (documents + tokens * torch.arange(rows, device=documents.device)[:, None]).flatten()
        wide = self._wide(hidden).flatten(0, 1)
        weights = torch.ones(len(wide), device=wide.device) if mask is None else (mask != 0).flatten()
        weights = weights.to(wide.dtype)
        kept = torch.where(weights[:, None] != 0, wide, torch.zeros_like(wide[:1]))
        sums = torch.zeros_like(wide).index_add(0, places, kept)
        counts = torch.zeros_like(weights).index_add(0, places, weights)
        return sums / counts.clamp(min=1)[:, None], counts, places

    def _logits_of_tokens(self, hidden: Tensor) -> Tensor:
        """Compare tokens in half precision: in float32, but a piece at a time, and computed again for the backward."""
        if torch.compiler.is_compiling():  # a compiler widens number by number and keeps no copy
            return self.logits(hidden)
        rows = hidden.reshape(-1, hidden.shape[-1])
        centroids = self._compared()
        pieces = [
            checkpoint(self.logits, piece, centroids, use_reentrant=False, preserve_rng_state=False)
            for piece in rows.split(_PIECE)
        ]
        return torch.cat(pieces).reshape(*hidden.shape[:-1], *self.centroids.shape[:2])

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Move each group's bias against its load (k,): b_i += balance_rate · sign(mean load − load_i)."""
        if tuple(load.shape) != (self.spec.groups,):
            rule = f"axes (k) with k = {self.spec.groups}"
            raise ShapeError(expected("load", rule, f"shape {tuple(load.shape)}", where="Router.update_bias"))
        if self.choice_bias is not None:
            counts = load.to(self.choice_bias.device, torch.float32)
            step = torch.sign(counts.mean() - counts)
            self.choice_bias += self.spec.balance_rate * step.to(self.choice_bias.dtype)

    @torch.no_grad()
    def initialize(self, centroids: Tensor, center: Tensor | None = None) -> None:
        """Take data-aware centroids over, all or nothing; a bias on the choice starts from zero again.

        Parameters
        ----------
        centroids : Tensor, shape (k, t, d)
            For instance from `tucka.balanced_centroids`.
        center : Tensor, shape (d,), optional
            The centre of the features; zero if None.

        Raises
        ------
        ArrayError
            If one of them is no tensor.
        ShapeError
            If one of them has another shape.
        ConfigError
            If one of them holds NaN or infinity.

        Examples
        --------
        >>> router = Router(TuckerSpec(groups=2), in_features=4)
        >>> router.initialize(torch.randn(2, 2, 4))
        >>> bool(router.is_initialized)
        True
        """
        center = torch.zeros_like(self.center) if center is None else center
        given: dict[str, tuple[Tensor, tuple[int, ...]]] = {
            "centroids": (centroids, tuple(self.centroids.shape)),
            "center": (center, tuple(self.center.shape)),
        }
        check_tensors("Router.initialize", centroids=centroids, center=center)
        for name, (tensor, shape) in given.items():
            if tuple(tensor.shape) != shape:
                got = f"shape {tuple(tensor.shape)}"
                raise ShapeError(expected(name, f"shape {shape}", got, where="Router.initialize"))
            if not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
                raise ConfigError(expected(name, "finite numbers", "NaN or infinity", where="Router.initialize"))
        if self.choice_bias is not None:
            self.choice_bias.zero_()
        self.centroids.copy_(centroids)
        self.center.copy_(center)
        self.is_initialized.fill_(1.0)
        self.look()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_copy = None
        self.look()

    @torch.no_grad()
    def take_measured(self, other: Router) -> None:
        """Copy what another router of the same sizes has measured and is no parameter: its centre and its bias."""
        self.center.copy_(other.center)
        if self.choice_bias is not None and other.choice_bias is not None:
            self.choice_bias.copy_(other.choice_bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Convert as torch does, but leave the bias wide: in half precision it would soon be too coarse to be moved."""
        before = self.choice_bias
        super()._apply(fn, recurse)
        after = self.choice_bias
        if before is not None and after is not None and after.dtype in _HALF:
            self.choice_bias = self._wide(after if before.is_meta or after.is_meta else before.to(after.device))
        return self

    @property
    def waits(self) -> bool:
        """Whether nothing has started this router: no data, and no centroids that it was given."""
        self.look()
        if self._read is None or self._read[2]:
            return False
        if self._is_copy is None and not torch.compiler.is_compiling():
            self._is_copy = not self._has_seeded_centroids()
        return not self._is_copy

    def _has_seeded_centroids(self) -> bool:
        """Tell whether the centroids are those of the seed; as if they were where they are in pieces."""
        now, seeded = self.centroids.detach(), _seeded_centroids(self.spec, self.in_features, self.seed)
        if type(now) is not Tensor or now.is_meta or now.shape != seeded.shape:
            return True
        return torch.allclose(now.float().cpu(), seeded, rtol=0, atol=1e-2 * float(seeded.abs().max()))

    def look(self) -> None:
        """Read whether data has started this router, if its buffer has changed; a compiled call cannot."""
        buffer = self.is_initialized
        if torch.compiler.is_compiling() or buffer.is_meta:
            return
        known = self._read
        if known is None or known[0] is not buffer or known[1] != version_of(buffer):
            self._read = (buffer, version_of(buffer), bool(buffer))

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        return tensor.float() if tensor.dtype in _HALF else tensor


def _seeded_centroids(spec: TuckerSpec, in_features: int, seed: int) -> Tensor:
    """Return the random directions (k, t, d) that a router has before it is started, in float32."""
    shape = (spec.groups, spec.experts_per_group, in_features)
    return torch.from_numpy(kaiming_centroids(shape, seed=seed)).float()
