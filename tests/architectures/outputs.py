"""What models return: run them, take rows of it, and say how far two results are apart."""

from typing import Any

import torch
from torch import Tensor, nn

Values = dict[str, Tensor]


def run(model: nn.Module, inputs: dict[str, Any]) -> Values:
    """Call a model without gradients; return its floating-point tensors by their places."""
    with torch.no_grad():
        return call(model, inputs)


def call(model: nn.Module, inputs: dict[str, Any]) -> Values:
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
            if name not in ("past_key_values", "cache_params", "rnn_state", "state"):
                _collect(inner, f"{place}.{name}", found)
    elif isinstance(value, (tuple, list)):
        for index, inner in enumerate(value):
            _collect(inner, f"{place}.{index}", found)


def same(left: Values, right: Values) -> bool:
    """Tell whether two results are equal bit for bit."""
    return left.keys() == right.keys() and all(
        value.shape == right[name].shape and torch.equal(value.nan_to_num(), right[name].nan_to_num())
        for name, value in left.items()
    )


def gap(left: Tensor, right: Tensor) -> float:
    """Measure the largest difference of two tensors, relative to the size of their values."""
    kept = left.isfinite() & right.isfinite() & (left.abs() < 1e4) & (right.abs() < 1e4)  # no masks' fillings
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


def row_of(value: Any, row: int, batch: int) -> Any:
    """Take what belongs to one sample, where each has the same number of rows."""
    if not isinstance(value, Tensor) or not value.ndim or value.shape[0] % batch:
        return value
    each = value.shape[0] // batch
    return value[row * each : (row + 1) * each]


def inputs_of(inputs: dict[str, Any], row: int, batch: int) -> dict[str, Any]:
    """Take one sample's inputs out of a batch's, without its padding."""
    own = {name: row_of(value, row, batch) for name, value in inputs.items()}
    for mask_name, mask in masks_in(own).items():
        prefix = "decoder_" if mask_name.startswith("decoder_") else ""
        for name, value in own.items():
            mine = name.startswith("decoder_") == bool(prefix)
            if mine and isinstance(value, Tensor) and value.ndim > 1 and value.shape[1] == mask.shape[1]:
                own[name] = value[:, mask[0] != 0]
    return own


def masks_in(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Find the masks (B, S) of inputs that tell padding from tokens."""
    return {
        name: value
        for name, value in inputs.items()
        if name.endswith("attention_mask") and isinstance(value, Tensor) and value.ndim == 2
    }


def outputs_of(values: Values, row: int, batch: int, inputs: dict[str, Any], like: Values) -> Values:
    """Take one sample's outputs out of a batch's, without those of its padding."""
    found = {}
    for name, value in values.items():
        own = row_of(value, row, batch)
        wanted = like[name].shape if name in like else own.shape
        if own.shape != wanted and own.ndim > 1 and own.ndim == len(wanted) and own.shape[1] > wanted[1]:
            own = _without_padding(own, row, inputs, int(wanted[1]))
        found[name] = own
    return found


def _without_padding(value: Tensor, row: int, inputs: dict[str, Any], length: int) -> Tensor:
    for mask in masks_in(inputs).values():
        kept = mask[row] != 0 if row < len(mask) else mask[0] != 0
        if kept.shape[0] == value.shape[1] and int(kept.sum()) == length:
            return value[:, kept]
    return value[:, :length]
