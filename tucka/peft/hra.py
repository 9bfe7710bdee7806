"""PEFT's own HRA, computed with thin products: the layers of a given model change class, nothing else changes."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from peft.tuners.hra.layer import HRAConv2d, HRALayer, HRALinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional

from tucka.backends.torch.copies import Copies
from tucka.backends.torch.householder import householder_gamma
from tucka.backends.torch.private import are_transformations_on
from tucka.backends.torch.thin import cast, into, is_token, wide_dtype, without_autocast
from tucka.errors import ConfigError, expected

__all__ = ["AcceleratedHRAConv2d", "AcceleratedHRALinear", "accelerate_hra", "restore_hra"]

# PEFT's HRA multiplies torch's weight by a product of reflections, W Π, and forms Π and W Π in every forward. Here
# Π = I + V Uᵀ with two thin matrices (d, r), so a linear layer costs two thin products on activations more than its
# base, and a convolution one convolution to r channels and one of size 1×1.
Factors: TypeAlias = tuple[Tensor, Tensor]
_BASES = (nn.Linear, nn.Conv2d)  # wrap no other layer
# Takes x, weight and bias in one dtype, and computes the layer whose weight is multiplied by the factors' products.
Product: TypeAlias = Callable[[Tensor, Tensor, Tensor | None, list[Factors]], Tensor]


def _thin_factors(layer: Any, name: str) -> Factors:
    """Return V = U Γ and U of one adapter, both (d, r): arXiv:2511.06859, Eq. (1) and (2)."""
    vectors = layer.hra_u[name]
    with without_autocast(vectors.device.type):
        if layer.hra_apply_GS[name]:
            unit = _orthonormal(vectors, layer.hra_r[name])
            return -2.0 * unit, unit
        wide = vectors.to(wide_dtype(vectors))
        unit = wide / wide.norm(dim=0)
        return unit @ householder_gamma(unit), unit


class _Kept(NamedTuple):
    """Factors of one adapter, and all that they were made of."""

    vectors: Copies
    options: tuple[Any, ...]
    factors: Factors


# What calls without gradients share. Beside the layers, so that copies and files of them hold nothing of it.
_kept: weakref.WeakKeyDictionary[nn.Module, dict[str, _Kept]] = weakref.WeakKeyDictionary()


def _factors(layer: Any, name: str, dtype: torch.dtype) -> Factors:
    """Return the factors of one adapter in a dtype, those of an earlier call where its vectors are still the same."""
    vectors = layer.hra_u[name]
    is_plain = type(vectors) in (nn.Parameter, Tensor) and vectors.is_cpu
    if not is_plain or torch.is_grad_enabled() or torch.compiler.is_compiling() or are_transformations_on():
        left, right = _thin_factors(layer, name)
        return left.to(dtype), right.to(dtype)
    kept = _kept.get(layer)
    if kept is None:
        kept = _kept[layer] = {}
    options = (layer.hra_apply_GS[name], layer.hra_r[name], dtype)
    known = kept.get(name)
    if known is None or known.options != options or not known.vectors.are_those_of([vectors]):
        # Turned, as few rows are multiplied best.
        left, right = (factor.to(dtype).t().contiguous().t() for factor in _thin_factors(layer, name))
        known = kept[name] = _Kept(Copies([vectors]), options, (left, right))
    return known.factors


def _orthonormal(vectors: Tensor, rank: int) -> Tensor:
    """Orthonormalise columns in exactly PEFT's order of operations."""
    # PEFT's default start has pairs of equal columns, of which this leaves rounding noise: another order, however
    # exact, would give other outputs there.
    columns = [(vectors[:, 0] / vectors[:, 0].norm()).view(-1, 1)]
    for i in range(1, rank):
        column = vectors[:, i].view(-1, 1)
        for known in columns:
            column = column - (known.t() @ column) * known
        columns.append((column / column.norm()).view(-1, 1))
    return torch.cat(columns, dim=1)


def _multiplied(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``rows (I + left rightᵀ)``."""
    # Torch differentiates the plain product faster.
    inner = rows @ left if torch.is_grad_enabled() else into(rows, left.t())
    return torch.addmm(rows, inner, right.t())


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[Factors]) -> Tensor:
    # x (W Π₁ Π₂)ᵀ = x Π₂ᵀ Π₁ᵀ Wᵀ: the last adapter comes first, and each product is transposed.
    # Not for a compiler, which would compile anew for few samples.
    if is_token(x.shape) and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for left, right in reversed(factors):
            inner = torch.bmm(x, right.expand(len(x), -1, -1))
            x = torch.baddbmm(x, inner, left.t().expand(len(x), -1, -1))
        return functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    for left, right in reversed(factors):
        rows = _multiplied(rows, right, left)
    return functional.linear(rows.reshape(x.shape), weight, bias)


def _conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[Factors], *, padding: int, stride: int
) -> Tensor:
    result = functional.conv2d(x, weight, bias, padding=padding, stride=stride)
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
    inner = functional.conv2d(x, kernel, padding=padding, stride=stride)
    return result + functional.conv2d(inner, torch.cat(lefts, dim=1)[:, :, None, None])


def _forward(layer: Any, product: Product, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Compute what PEFT's layer computes, in the dtype of `x`."""
    if layer._disable_adapters or layer.merged_adapters:
        if layer._disable_adapters and layer.merged_adapters:
            layer.unmerge()
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        return result.to(x.dtype)
    base, vectors = layer.base_layer, layer.hra_u
    if type(base) not in _BASES:
        base = layer.get_base_layer()
    weight, bias = base.weight.data, base.bias
    dtype = weight.dtype
    if x.dtype is not dtype and layer.cast_input_dtype_enabled:
        dtype = torch.promote_types(x.dtype, dtype)
    names = [name for name in layer.active_adapters if name in vectors]
    factors = [_factors(layer, name, dtype) for name in names]
    bias = None if bias is None else cast(bias, dtype)
    return cast(product(cast(x, dtype), cast(weight, dtype), bias, factors), x.dtype)


def _wide_multiplied(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``rows (I + left rightᵀ)`` in float32 at least."""
    dtype = wide_dtype(rows, left)
    return _multiplied(rows.to(dtype), left.to(dtype), right.to(dtype))


@torch.no_grad()
def _merge(layer: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Multiply the base weight by each adapter's product, in the order of the names."""
    names = [name for name in check_adapters_to_merge(layer, adapter_names) if name in layer.hra_u]
    if not names:
        return
    weight = layer.get_base_layer().weight
    rows = weight.data.flatten(1)
    for name in names:
        rows = _wide_multiplied(rows, *_thin_factors(layer, name))
        if safe_merge and not torch.isfinite(rows).all():
            # PEFT's own sentence: its users look for it.
            msg = f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
            raise ValueError(msg)
    weight.data = rows.reshape(weight.shape).to(weight.dtype)
    layer.merged_adapters.extend(names)


@torch.no_grad()
def _unmerge(layer: Any) -> None:
    """Multiply the merged weight by the transposed products, which are the inverse ones."""
    if not layer.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        return
    weight = layer.get_base_layer().weight
    rows = weight.data.flatten(1)
    while layer.merged_adapters:
        name = layer.merged_adapters.pop()
        if name in layer.hra_u:
            left, right = _thin_factors(layer, name)
            rows = _wide_multiplied(rows, right, left)
    weight.data = rows.reshape(weight.shape).to(weight.dtype)


class AcceleratedHRALinear(HRALinear):
    """PEFT's HRA on a linear layer, with the reflections applied to the activations; made by `accelerate_hra`."""

    merge, unmerge = _merge, _unmerge

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what PEFT's layer computes, in the dtype of `x`."""
        return _forward(self, _linear, x, *args, **kwargs)


class AcceleratedHRAConv2d(HRAConv2d):
    """PEFT's HRA on a convolution, with two thin convolutions beside the base's; made by `accelerate_hra`."""

    merge, unmerge = _merge, _unmerge

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute what PEFT's layer computes, in the dtype of `x`."""
        base = self.base_layer
        # As PEFT: one padding and one stride for both axes, no dilation.
        product = functools.partial(_conv2d, padding=base.padding[0], stride=base.stride[0])
        return _forward(self, product, x, *args, **kwargs)


_ACCELERATED: dict[type[nn.Module], type[nn.Module]] = {
    HRALinear: AcceleratedHRALinear,
    HRAConv2d: AcceleratedHRAConv2d,
}
_ORIGINAL = {fast: slow for slow, fast in _ACCELERATED.items()}


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
    changed = [layer for _, layer in _hra_layers(model) if type(layer) in _ORIGINAL]
    for layer in changed:
        layer.__class__ = _ORIGINAL[type(layer)]
    return len(changed)


def _hra_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Go through the layers whose arithmetic is known here; other kinds of a later PEFT stay as they are."""
    for name, module in model.named_modules():
        if isinstance(module, HRALayer) and isinstance(module, tuple(_ACCELERATED)):
            yield name, module


def _check(name: str, layer: Any) -> None:
    """Raise for a layer that PEFT's own HRA crashes on or that another library wrapped."""
    if type(layer) not in (*_ACCELERATED, *_ORIGINAL):
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
