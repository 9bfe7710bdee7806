"""Ways in which the numbers or options of an adapted model change while nobody calls it."""

import torch

from tucka.peft import pin_route
from tucka.peft.layer import TuckALayer

__all__ = ["CHANGES", "parts_of"]


def parts_of(model):
    """List the parts of each adapted layer's own adapter."""
    return [layer.experts("default") for layer in model.modules() if isinstance(layer, TuckALayer)]


def _write(model):
    for parts in parts_of(model):
        parts.cores.mul_(1.5)


def _strengthen(model):
    for parts in parts_of(model):
        parts.strength.mul_(1.5)


def _replace_strength(model):
    for parts in parts_of(model):
        parts.strength = parts.strength * 1.5


def _write_past_the_counter(model):
    for parts in parts_of(model):
        parts.basis.data = parts.basis.data * 1.25


def _replace(model):
    for parts in parts_of(model):
        parts.cores = torch.nn.Parameter(parts.cores.detach() * 0.5)


def _load(model):
    state = {name: value * 0.75 for name, value in model.state_dict().items() if ".tucka_experts." in name}
    model.load_state_dict(state, strict=False, assign=True)


def _scale(model):
    for layer in model.modules():
        if isinstance(layer, TuckALayer):
            layer.set_scale("default", 0.5)


def _disable(model):
    model.base_model.disable_adapter_layers()


def _narrow(model):
    for parts in parts_of(model):
        parts.to(torch.float64)
        parts.to(torch.float32)
        parts.cores.data += 0.25


CHANGES = {
    "written": _write,
    "strengthened": _strengthen,
    "strength replaced": _replace_strength,
    "written past the counter": _write_past_the_counter,
    "replaced": _replace,
    "loaded": _load,
    "scaled": _scale,
    "disabled": _disable,
    "cast": _narrow,
    "pinned": lambda model: pin_route(model, group=2),
}
