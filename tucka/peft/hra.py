r"""PEFT's own HRA, computed with thin products: the layers of a given model change class, nothing else changes.

PEFT's HRA multiplies torch's weight by a product of reflections, W Π, and forms Π and W Π in every forward. Here
:math:`\Pi = I + V U^\top` with two thin matrices, so a linear layer costs two thin products on activations more than
its base, and a convolution one convolution to r channels and one of size 1×1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.hra.layer import HRAConv2d, HRALayer, HRALinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from tucka.backends.torch.householder import householder_gamma
from tucka.errors import ConfigError, expected

__all__ = ["AcceleratedHRAConv2d", "AcceleratedHRALinear", "accelerate_hra", "restore_hra"]


class _ThinProducts:
    """What both kinds of layers share: the thin factors of Π, merging, and which way a forward goes."""

    active_adapters: list[str]
    merged_adapters: list[str]
    merged: bool
    disable_adapters: bool
    hra_r: dict[str, int]
    hra_apply_GS: dict[str, bool]  # noqa: N815 - PEFT's name
    hra_u: Any
    base_layer: Any
    get_base_layer: Callable[[], Any]
    cast_input_dtype_enabled: bool

    def thin_factors(self, name: str) -> tuple[Tensor, Tensor]:
        r"""Return the factors of one adapter's product of reflections.

        Parameters
        ----------
        name : str
            The adapter.

        Returns
        -------
        tuple of Tensor, both of shape (d, r)
            V and U with :math:`\Pi = I + V U^\top`.

        References
        ----------
        .. [1] arXiv:2511.06859, Eq. (1) and (2): V = U Γ.
        """
        vectors = self.hra_u[name]
        with torch.autocast(vectors.device.type, enabled=False):
            if self.hra_apply_GS[name]:
                unit = _orthonormal(vectors, self.hra_r[name])
                return -2.0 * unit, unit
            wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
            unit = wide / wide.norm(dim=0)
            return unit @ householder_gamma(unit), unit

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what PEFT's layer computes.

        Parameters
        ----------
        x : Tensor
            The layer's input.
        *args, **kwargs : object
            Further arguments of the base layer, used where no adapter works.

        Returns
        -------
        Tensor
            In the dtype of `x`.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            result: Tensor = self.base_layer(x, *args, **kwargs)
            return result.to(x.dtype)
        weight = self.get_base_layer().weight.data
        dtype = torch.promote_types(x.dtype, weight.dtype) if self.cast_input_dtype_enabled else weight.dtype
        bias = self.base_layer.bias
        factors = [self.thin_factors(name) for name in self.active_adapters if name in self.hra_u]
        thin = [(left.to(dtype), right.to(dtype)) for left, right in factors]
        bias = None if bias is None else bias.to(dtype)
        return self._adapted(x.to(dtype), weight.to(dtype), bias, thin).to(x.dtype)

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Multiply the base weight by each adapter's product, in the order of the names.

        Parameters
        ----------
        safe_merge : bool
            Whether to look for NaN and infinity before anything is written.
        adapter_names : list of str, optional
            Which; the active ones if None.

        Raises
        ------
        ValueError
            If `safe_merge` finds a number that is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.hra_u]
        if not names:
            return
        weight = self.get_base_layer().weight
        rows = weight.data.flatten(1)
        for name in names:
            left, right = self.thin_factors(name)
            rows = _multiplied(rows, left, right)
            if safe_merge and not torch.isfinite(rows).all():
                # PEFT's own sentence: its users look for it.
                msg = f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
                raise ValueError(msg)
        weight.data = rows.reshape(weight.shape).to(weight.dtype)
        self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Multiply the merged weight by the transposed products, which are the inverse ones."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        rows = weight.data.flatten(1)
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if name in self.hra_u:
                left, right = self.thin_factors(name)
                rows = _multiplied(rows, right, left)
        weight.data = rows.reshape(weight.shape).to(weight.dtype)


def _multiplied(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``rows (I + left rightᵀ)`` in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(rows.dtype, left.dtype), torch.float32)
    rows, left, right = rows.to(dtype), left.to(dtype), right.to(dtype)
    return torch.addmm(rows, rows @ left, right.t())


def _orthonormal(vectors: Tensor, rank: int) -> Tensor:
    """Orthonormalise columns in exactly PEFT's order of operations.

    Its default start has pairs of equal columns, of which this leaves rounding noise: another order, however exact,
    would give other outputs there.
    """
    columns = [(vectors[:, 0] / vectors[:, 0].norm()).view(-1, 1)]
    for i in range(1, rank):
        column = vectors[:, i].view(-1, 1)
        for known in columns:
            column = column - (known.t() @ column) * known
        columns.append((column / column.norm()).view(-1, 1))
    return torch.cat(columns, dim=1)


class AcceleratedHRALinear(_ThinProducts, HRALinear):
    """PEFT's HRA on a linear layer, with the reflections applied to the activations; made by `accelerate_hra`."""

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # x (W Π₁ Π₂)ᵀ = x Π₂ᵀ Π₁ᵀ Wᵀ: the last adapter comes first, and each product is transposed.
        for left, right in reversed(factors):
            rows = torch.addmm(rows, rows @ right, left.t())
        return functional.linear(rows.reshape(x.shape), weight, bias)


class AcceleratedHRAConv2d(_ThinProducts, HRAConv2d):
    """PEFT's HRA on a convolution, with two thin convolutions beside the base's; made by `accelerate_hra`."""

    def _adapted(self, x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[tuple[Tensor, Tensor]]) -> Tensor:
        # As PEFT: one padding and one stride for both axes, no dilation.
        geometry = {"padding": self.base_layer.padding[0], "stride": self.base_layer.stride[0]}
        result = functional.conv2d(x, weight, bias, **geometry)
        if not factors:
            return result
        # W (I + V₁U₁ᵀ)(I + V₂U₂ᵀ) = W + L₁U₁ᵀ + L₂U₂ᵀ with L₁ = W V₁ and L₂ = (W + L₁U₁ᵀ) V₂.
        rows = weight.flatten(1)
        lefts: list[Tensor] = []
        for left, _ in factors:
            reduced = rows @ left
            for known, (_, before) in zip(lefts, factors, strict=False):
                reduced = reduced + known @ (before.t() @ left)
            lefts.append(reduced)
        kernel = torch.cat([right for _, right in factors], dim=1).t().reshape(-1, *weight.shape[1:])
        inner = functional.conv2d(x, kernel, **geometry)
        return result + functional.conv2d(inner, torch.cat(lefts, dim=1)[:, :, None, None])


_ACCELERATED: dict[type[nn.Module], type[nn.Module]] = {
    HRALinear: AcceleratedHRALinear,
    HRAConv2d: AcceleratedHRAConv2d,
}


def accelerate_hra(model: nn.Module) -> int:
    """Let every HRA layer of a model compute with thin products.

    The model stays a PEFT HRA model: same parameters, same checkpoints in both directions, same outputs and gradients
    up to rounding. Only the classes of its layers change, so call it again after an adapter with new targets was added.

    Parameters
    ----------
    model : Module
        A model adapted with PEFT's `HRAConfig`.

    Returns
    -------
    int
        How many of its layers compute with thin products now.

    Raises
    ------
    ConfigError
        If a convolution's kernel is not square or its padding is given by name, where PEFT's own HRA crashes, or a
        layer was already wrapped by another library. No layer is changed then.

    Notes
    -----
    PEFT's HRA on a convolution takes the stride and padding of the first axis for both and no dilation. So does this,
    or a trained adapter would give other outputs.

    Examples
    --------
    >>> from peft import HRAConfig, get_peft_model
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), HRAConfig(r=2, target_modules=["0"]))
    >>> accelerate_hra(model)
    1
    """
    found = list(_hra_layers(model))
    for name, layer in found:
        _check(name, layer)
    for _, layer in found:
        layer.__class__ = _ACCELERATED.get(type(layer), type(layer))
    return len(found)


def restore_hra(model: nn.Module) -> int:
    """Give every accelerated HRA layer of a model PEFT's own class back.

    Parameters
    ----------
    model : Module
        A model that `accelerate_hra` was called on.

    Returns
    -------
    int
        How many layers were changed back.

    Examples
    --------
    >>> restore_hra(nn.Linear(2, 2))
    0
    """
    original = {fast: slow for slow, fast in _ACCELERATED.items()}
    changed = [layer for _, layer in _hra_layers(model) if type(layer) in original]
    for layer in changed:
        layer.__class__ = original[type(layer)]
    return len(changed)


def _hra_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Go through the layers whose arithmetic is known here; other kinds of a later PEFT stay as they are."""
    for name, module in model.named_modules():
        if isinstance(module, HRALayer) and isinstance(module, tuple(_ACCELERATED)):
            yield name, module


def _check(name: str, layer: Any) -> None:
    if type(layer) not in (*_ACCELERATED, *_ACCELERATED.values()):
        cure = "Call accelerate_hra before the model is sharded or wrapped"
        rule = "layers of PEFT's own classes"
        raise ConfigError(expected("model", rule, type(layer).__name__, where=name, cure=cure))
    if not isinstance(layer, HRAConv2d):
        return
    base = layer.get_base_layer()
    cure = "Leave the layer out with exclude_modules, or adapt it with TuckA"
    if base.kernel_size[0] != base.kernel_size[1]:
        rule = "square kernels, as PEFT's HRA"
        raise ConfigError(expected("kernel_size", rule, tuple(base.kernel_size), where=name, cure=cure))
    if isinstance(base.padding, str):
        rule = "padding as numbers, as PEFT's HRA"
        raise ConfigError(expected("padding", rule, repr(base.padding), where=name, cure=cure))
