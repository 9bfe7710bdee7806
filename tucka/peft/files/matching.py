"""Comparing what a file holds with what an adapter of a model needs, before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor, nn

from tucka.errors import CheckpointError, expected
from tucka.peft.config import TuckAConfig
from tucka.peft.files.keys import Place, base_name, bias_places, first_few, places_of
from tucka.peft.files.reading import check_numbers, check_range
from tucka.spec import TuckerSpec

__all__ = ["check_file", "check_sizes", "checked_tensors", "sizes_of"]


def sizes_of(
    specs: Mapping[str, TuckerSpec], widths: Mapping[str, int], owners: Collection[str]
) -> dict[str, tuple[int, ...]]:
    """List key and shape of what an adapter has on layers of these specs and widths; `owners` have its routers."""
    sizes: dict[str, tuple[int, ...]] = {}
    for name, width in widths.items():
        spec = specs[name]
        sizes[f"{name}.tucka_experts.cores"] = (spec.groups, spec.expert_rank, spec.rank, spec.rank)
        sizes[f"{name}.tucka_experts.expert_factor"] = (spec.experts_per_group, spec.expert_rank)
        sizes[f"{name}.tucka_experts.basis"] = (width, spec.rank)
        if spec.factor_norm == "rotation":
            sizes[f"{name}.tucka_experts.strength"] = ()
        if name in owners:
            sizes[f"{name}.tucka_router.centroids"] = (spec.groups, spec.experts_per_group, width)
    return sizes


def check_sizes(tensors: Mapping[str, Tensor], sizes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise unless a file has tensors of these names and shapes: only then is memory for them allocated."""
    found = {base_name(key): tuple(tensor.shape) for key, tensor in tensors.items()}
    missing = [key for key in sizes if key not in found]
    if missing:
        got = f"none for {first_few(missing)}"
        raise CheckpointError(expected("file", f"at least {len(sizes)} tensors", got, where=where))
    for key, shape in sizes.items():
        if found[key] != shape:
            raise CheckpointError(expected(key, f"shape {shape}", f"shape {found[key]}", where=where))


def check_file(
    model: nn.Module,
    config: TuckAConfig,
    adapter: str,
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    widened: bool,
    late_heads: bool,
) -> None:
    """Compare the tensors of a file with a new adapter; PEFT may then widen it, or wrap the head, before it writes."""
    wanted = {place.in_file: place for place in places_of(model, adapter)}
    optional: Iterable[Place] = _optional(model, adapter, biased=config.bias != "none")
    if late_heads:
        optional = chain(optional, (Place(key, key, value) for key, value in model.state_dict().items()))

    def dtypes(place: Place) -> tuple[torch.dtype, ...]:
        dtype = place.tensor.dtype
        is_wide = widened and place.layer is not None and dtype.is_floating_point
        return (torch.promote_types(dtype, torch.float32) if is_wide else dtype,)

    _compare(_without_router(config, tensors), wanted, optional, dtypes, where)


def checked_tensors(
    model: nn.Module, config: TuckAConfig, adapter: str, tensors: Mapping[str, Tensor], *, narrowed: bool
) -> dict[str, Tensor]:
    """Return the tensors that may be written, by their keys in the model, or raise; PEFT may narrow them afterwards."""
    where = f"adapter {adapter!r}"
    check_numbers(tensors, where)
    tensors = _without_router(config, tensors)
    wanted = {place.in_model: place for place in places_of(model, adapter)}

    def dtypes(place: Place) -> tuple[torch.dtype, ...]:
        base = place.layer.base_dtype() if narrowed and place.layer is not None else None
        return (place.tensor.dtype,) if base is None else (place.tensor.dtype, base)

    # Biases that another configuration of the same adapter has trained are loaded too, as PEFT does.
    _compare(tensors, wanted, _optional(model, adapter, biased=True), dtypes, where)
    return tensors


def _without_router(config: TuckAConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave the router's tensors out where the adapter is pinned and has none."""
    has_router = config.pinned_gates is None or config.keeps_router
    return {key: value for key, value in tensors.items() if has_router or ".tucka_router." not in key}


def _optional(model: nn.Module, adapter: str, *, biased: bool) -> Iterator[Place]:
    """Go through what a file may have besides: trained biases, and embeddings whose vocabulary was resized."""
    for place in bias_places(model) if biased else ():
        yield place
        # With bias="all" PEFT writes a head's bias once more, under a key that it never reads.
        key = place.in_model.replace(f".modules_to_save.{adapter}.", ".modules_to_save.")
        yield Place(key, key, place.tensor)
    embeddings = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    for path, module in model.named_modules():
        if any(module is layer for layer in embeddings):
            for key, value in module.state_dict().items():
                name = base_name(f"{path}.{key}")
                yield Place(name, name, value)


def _compare(
    tensors: Mapping[str, Tensor],
    wanted: dict[str, Place],
    optional: Iterable[Place],
    dtypes: Callable[[Place], tuple[torch.dtype, ...]],
    where: str,
) -> None:
    found = {base_name(key): value for key, value in tensors.items()}
    missing = [key for key in wanted if key not in found]
    if missing:
        got = f"none for {first_few(missing)}"
        raise CheckpointError(expected("file", f"{len(wanted)} tensors", got, where=where))
    if len(found) > len(wanted):
        wanted = {**{place.in_file: place for place in optional}, **wanted}
    unknown = [key for key in found if key not in wanted]
    if unknown:
        raise CheckpointError(expected("file", "only tensors of the adapter", first_few(unknown), where=where))
    for key, tensor in found.items():
        value = wanted[key].tensor
        if tensor.shape != value.shape:
            rule = f"shape {tuple(value.shape)}"
            raise CheckpointError(expected(key, rule, f"shape {tuple(tensor.shape)}", where=where))
        is_flag = not value.ndim and tensor.dtype == torch.bool  # as earlier versions wrote it
        if tensor.is_floating_point() != value.is_floating_point() and not is_flag:
            raise CheckpointError(expected(key, f"{value.dtype}", tensor.dtype, where=where))
        for dtype in dtypes(wanted[key]):
            check_range(key, tensor, dtype, where)
