"""How the tensors of an adapter are called: their keys in the model, and their keys in its file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from tucka.errors import ConfigError, expected
from tucka.peft.config import TuckAConfig
from tucka.peft.layer import TuckALayer

__all__ = ["PREFIX", "Place", "base_name", "bias_places", "check_names_survive", "places_of", "plain_name"]

# A PeftModel puts it before the keys of its base model; files always have it.
PREFIX = "base_model.model."
PARTS = ("tucka_experts", "tucka_router")


def plain_name(name: str) -> str:
    """Name a module or tensor without the wrappers of torch's older FSDP, as its state dicts do."""
    return name.replace("_fsdp_wrapped_module.", "")


def base_name(name: str) -> str:
    """Name a module or tensor as the base model does, whatever is wrapped around it."""
    return plain_name(name).removeprefix(PREFIX)


@dataclass(frozen=True)
class Place:
    """A tensor of the model, with its key there and its key in an adapter's file, both without `PREFIX`."""

    in_model: str
    in_file: str
    tensor: Tensor
    layer: TuckALayer | None = None


def places_of(model: nn.Module, adapter: str) -> Iterator[Place]:
    """Go through the tensors that the file of an adapter must have."""
    state: dict[str, Tensor] | None = None
    for path, module in model.named_modules():
        name = base_name(path)
        if isinstance(module, TuckALayer):
            for part in PARTS:
                if adapter in getattr(module, part):
                    for key, value in getattr(module, part)[adapter].state_dict().items():
                        yield Place(f"{name}.{part}.{adapter}.{key}", f"{name}.{part}.{key}", value, module)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            state = {base_name(key): value for key, value in model.state_dict().items()} if state is None else state
            for saved, kept in module.adapter_state_dict_load_map(adapter).items():
                yield Place(f"{name}.{kept}", f"{name}.{saved}", state[f"{name}.{kept}"])


def bias_places(model: nn.Module) -> Iterator[Place]:
    """Go through the biases that PEFT saves with an adapter where they are trained."""
    for key, value in model.state_dict().items():
        if key.endswith("bias"):
            yield Place(base_name(key), base_name(key), value)


def check_names_survive(
    model: nn.Module, adapter: str, configs: Mapping[str, TuckAConfig], strip: Callable[[str, str], str]
) -> None:
    """Raise where PEFT would lose tensors at saving by a new adapter's name; `strip` takes a name out of a key."""
    # It leaves out the keys with another adapter's name among their parts, and then strips the adapter's own name.
    for name, config in configs.items():
        foreign = set(configs) - {name} if name == adapter else {adapter}
        # With bias="all" PEFT saves the bias of a head twice; only what `places_of` lists is read again.
        biases = () if config.bias == "none" else bias_places(model)
        places = {place.in_model: place for place in (*biases, *places_of(model, name))}
        for place in places.values():
            lost = foreign.intersection((PREFIX + place.in_model).split("."))
            # The key of a module that is saved whole has no adapter's name any more when it is stripped.
            before = place.in_file if place.layer is None else place.in_model
            if strip(PREFIX + before, name) != PREFIX + place.in_file:
                lost.add(name)
            if lost:
                raise _lost(adapter, lost.pop(), PREFIX + place.in_model)


def _lost(adapter: str, name: str, key: str) -> ConfigError:
    rule = "a name with which PEFT can save all adapters of this model"
    got = repr(adapter) if name == adapter else f"{adapter!r} beside {name!r}"
    cure = f"{name!r} is a part of {key!r}, and PEFT takes adapters' names out of such keys. Choose another name"
    return ConfigError(expected("adapter_name", rule, got, where="TuckAModel", cure=cure))


def first_few(names: Iterable[str]) -> str:
    """List at most three names for a message."""
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more
