"""What models return: run them, take one sample's share, and say how far two results are apart."""

from typing import Any

import torch
from torch import Tensor, nn

Values = dict[str, Tensor]
Inputs = dict[str, Any]
# Rows of results that are no outputs: states for later calls.
_STATES = ("past_key_values", "cache_params", "rnn_state", "state")
# Beyond this a number stands for minus infinity, as in masked scores.
_LARGE = 1e4


def run(model: nn.Module, inputs: Inputs) -> Values:
    """Call a model without gradients; return its floating-point tensors by their places."""
    with torch.no_grad():
        return call(model, inputs)


def call(model: nn.Module, inputs: Inputs) -> Values:
    """Call a model; return its floating-point tensors by their places."""
    torch.manual_seed(0)  # some families draw numbers in evaluation too
    found: Values = {}
    _collect(model(**inputs), "", found)
    return found


def _collect(value: Any, place: str, found: Values) -> None:
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.ndim:
            found[place] = value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in _STATES:
                _collect(inner, f"{place}.{name}", found)
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            _collect(inner, f"{place}.{index}", found)


def in_bf16(value: Any) -> Any:
    """Convert the floating-point tensors of inputs."""
    if isinstance(value, dict):
        return {name: in_bf16(inner) for name, inner in value.items()}
    return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value


def same(left: Values, right: Values) -> bool:
    """Tell whether two results are equal bit for bit."""
    return left.keys() == right.keys() and all(
        value.shape == right[name].shape and torch.equal(value.nan_to_num(), right[name].nan_to_num())
        for name, value in left.items()
    )


def gap(left: Tensor, right: Tensor) -> float:
    """Measure the largest difference of two tensors, relative to the size of their values."""
    if not torch.equal(left.isnan(), right.isnan()):
        return float("inf")
    kept = left.isfinite() & right.isfinite() & (left.abs() < _LARGE) & (right.abs() < _LARGE)
    if not kept.any():
        return 0.0
    left, right = left[kept].double(), right[kept].double()
    return float((left - right).abs().max() / (right.abs().max() + 1e-6))


def gaps(left: Values, right: Values) -> dict[str, float]:
    """Measure the differences of all tensors that have equal shapes."""
    return {
        name: gap(value, right[name])
        for name, value in left.items()
        if name in right and value.shape == right[name].shape
    }


def worst(found: dict[str, float]) -> tuple[float, str]:
    """Find the largest difference, and where it is."""
    return max(((value, name) for name, value in found.items()), default=(0.0, ""))


def masks_in(inputs: Inputs) -> Values:
    """Find the masks (B, S) that tell padding from tokens, true where a token is."""
    found = {
        name: value
        for name, value in inputs.items()
        if name.endswith(("mask", "valid")) and isinstance(value, Tensor) and value.ndim == 2
    }
    return {name: value == 0 if "padding" in name else value != 0 for name, value in found.items()}


def row_of(value: Any, row: int, batch: int) -> Any:
    """Take what belongs to one sample, where each has the same number of rows."""
    if isinstance(value, dict):
        return {name: row_of(inner, row, batch) for name, inner in value.items()}
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] % batch:
        return value
    each = value.shape[0] // batch
    return value[row * each : (row + 1) * each]


def inputs_of(inputs: Inputs, row: int, batch: int) -> Inputs:
    """Take one sample's inputs out of a batch's, without its padding."""
    own = {name: row_of(value, row, batch) for name, value in inputs.items()}
    masks = masks_in(own)
    for name, value in own.items():
        for mask_name, mask in masks.items():
            fits = isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == mask.shape[1]
            if fits and name.startswith("decoder_") == mask_name.startswith("decoder_"):
                own[name] = value[:, mask[0]]
    return own


def outputs_of(values: Values, row: int, batch: int, inputs: Inputs, alone: Values) -> Values:
    """Take one sample's outputs out of a batch's, without those of its padding, as many as it has alone."""
    found = {}
    for name, value in values.items():
        own = row_of(value, row, batch)
        wanted = alone[name].shape if name in alone else own.shape
        if own.ndim > 1 and own.ndim == len(wanted) and own.shape[1] > wanted[1]:
            own = _without_padding(own, row, inputs, int(wanted[1]))
        found[name] = own
    return found


def _without_padding(value: Tensor, row: int, inputs: Inputs, length: int) -> Tensor:
    for mask in masks_in(inputs).values():
        kept = mask[row] if row < len(mask) else mask[0]
        if kept.shape[0] == value.shape[1] and int(kept.sum()) == length:
            return value[:, kept]
    return value[:, :length]


def with_other_padding(inputs: Inputs) -> Inputs:
    """Put other values where a mask says that there is padding."""
    other = dict(inputs)
    for mask_name, mask in masks_in(inputs).items():
        for name, value in inputs.items():
            of_mask = name.startswith("decoder_") == mask_name.startswith("decoder_") and "mask" not in name
            if not isinstance(value, Tensor):
                continue
            # Only tokens and features: small numbers are kinds of tokens, of which there are few.
            replaceable = value.is_floating_point() or int(value.max()) >= 17
            if of_mask and replaceable and value.ndim > 1 and value.shape[:2] == mask.shape:
                kept = mask.reshape(*mask.shape, *[1] * (value.ndim - 2))
                other[name] = torch.where(kept, value, torch.full_like(value, 2.5 if value.is_floating_point() else 17))
    return other


def of_tokens(values: Values, inputs: Inputs) -> Values:
    """Leave out the outputs of padding, as far as shapes tell."""
    found = {}
    for name, value in values.items():
        fitting = (mask for mask in masks_in(inputs).values() if value.shape[:2] == mask.shape)
        mask = next(fitting, None)
        found[name] = value if mask is None else value[mask]
    return found
