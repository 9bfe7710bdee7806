"""Ways to start TuckA that the library does not have, for comparison. None changes the outputs of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.modules import ExpertParts
from tucka.peft.layer import TuckALayer

_KEPT = 4  # so many singular directions are kept between batches for each one that is wanted


def _reading(parts: ExpertParts) -> int:
    """Count the columns of a fresh basis that read the input; the others are zero."""
    return int(parts.basis.any(dim=0).sum())


def zero_cores(parts: ExpertParts, _inputs: Tensor) -> None:
    """Take an orthonormal basis and cores of zeros: the gradient reaches the basis through the cores only."""
    nn.init.orthogonal_(parts.basis)
    parts.cores.zero_()


def same_lead(parts: ExpertParts, _inputs: Tensor) -> None:
    """Start the cores of all layers with the same size, whatever the weights of the layers."""
    parts.load_state_dict(ExpertParts(parts.spec, len(parts.basis)).state_dict())


def long_reading(parts: ExpertParts, _inputs: Tensor) -> None:
    """Make the reading half of the basis four times as long and the cores smaller, so that a step turns it less."""
    parts.basis *= 4.0
    parts.cores /= 4.0


def both_ways(parts: ExpertParts, _inputs: Tensor) -> None:
    """Add the transposed cores, so that the zero half of the basis reads as well as writes."""
    parts.cores += parts.cores.mT.clone()


def rotation(parts: ExpertParts, _inputs: Tensor) -> None:
    """Subtract the transposed cores, so that the first steps rotate the input."""
    parts.cores -= parts.cores.mT.clone()


def kaiming(parts: ExpertParts, _inputs: Tensor) -> None:
    """Draw the reading half by Kaiming's rule, as LoRA draws its first factor, and scale it to length one."""
    read = _reading(parts)
    drawn = nn.init.kaiming_uniform_(torch.empty(read, parts.basis.shape[0]), a=5**0.5)
    parts.basis[:, :read] = drawn.T / drawn.norm(dim=1).mean()


def kaiming_factor(parts: ExpertParts, _inputs: Tensor) -> None:
    """Draw the expert factor by Kaiming's rule, so that the experts of a group differ in strength."""
    nn.init.kaiming_uniform_(parts.expert_factor)


def inputs(parts: ExpertParts, inputs: Tensor) -> None:
    """Read along the leading singular vectors of the layer's inputs, each scaled to the size of random directions."""
    read = _reading(parts)
    lengths, directions = torch.linalg.svd(inputs, full_matrices=False)[1:]
    typical = (inputs.square().sum() / inputs.shape[1]).sqrt()
    parts.basis[:, :read] = (directions[:read] * (typical / lengths[:read, None])).T


STARTS: dict[str, Callable[[ExpertParts, Tensor], None]] = {
    start.__name__: start
    for start in (zero_cores, same_lead, long_reading, both_ways, rotation, kaiming, kaiming_factor, inputs)
}


@torch.no_grad()
def restart(model: nn.Module, start: str, batches: Iterable[dict[str, Any]], seed: int) -> None:
    """Start the fresh TuckA adapters of a model by one of `STARTS`; "inputs" reads batches of the model's inputs."""
    layers = [layer for layer in model.modules() if isinstance(layer, TuckALayer)]
    seen = {layer: torch.zeros(0, layer.in_features) for layer in layers}

    def look(layer: TuckALayer, arguments: tuple[Tensor, ...]) -> None:
        kept = _KEPT * max(parts.spec.rank for parts in layer.tucka_experts.values())
        rows = torch.cat([seen[layer], arguments[0].reshape(-1, layer.in_features)])
        lengths, directions = torch.linalg.svd(rows, full_matrices=False)[1:]
        seen[layer] = (lengths[:, None] * directions)[:kept]

    hooks = [layer.register_forward_pre_hook(look) for layer in layers] if start == inputs.__name__ else []
    was_training = model.training
    model.eval()
    for batch in batches if hooks else ():
        model(**batch)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    torch.manual_seed(seed)
    for layer in layers:
        for parts in layer.tucka_experts.values():
            STARTS[start](parts, seen[layer])
