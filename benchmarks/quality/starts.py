"""Other starts of TuckA than the library's, to compare with it. Each leaves the model's outputs as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tucka.backends.torch.modules import ExpertParts
from tucka.peft.layer import TuckALayer

_KEPT = 4  # singular directions kept while inputs stream by, for each that is wanted


def _reading(parts: ExpertParts) -> int:
    """Count the columns of a fresh basis that read: the others are zero."""
    return int(parts.basis.any(dim=0).sum())


def zero_cores(parts: ExpertParts, _inputs: Tensor) -> None:
    """Take an orthonormal basis and cores of zeros: the gradient reaches the basis through the cores only."""
    nn.init.orthogonal_(parts.basis)
    parts.cores.zero_()


def same_lead(parts: ExpertParts, _inputs: Tensor) -> None:
    """Let the cores of all layers lead alike, whatever the layers' weights."""
    parts.load_state_dict(ExpertParts(parts.spec, len(parts.basis)).state_dict())


def long_reading(parts: ExpertParts, _inputs: Tensor) -> None:
    """Make the half that reads four times as long and the cores shorter: each step then turns it less."""
    parts.basis *= 4.0
    parts.cores /= 4.0


def both_ways(parts: ExpertParts, _inputs: Tensor) -> None:
    """Let the cores lead from the zero half back as well: its directions read and write at once."""
    parts.cores += parts.cores.mT.clone()


def rotation(parts: ExpertParts, _inputs: Tensor) -> None:
    """Let the cores lead back with the opposite sign: the first steps rotate the input."""
    parts.cores -= parts.cores.mT.clone()


def kaiming(parts: ExpertParts, _inputs: Tensor) -> None:
    """Draw the reading half by Kaiming's rule, as LoRA's first factor is, with the length that ours has."""
    read = _reading(parts)
    drawn = nn.init.kaiming_uniform_(torch.empty(read, parts.basis.shape[0]), a=5**0.5)
    parts.basis[:, :read] = drawn.T / drawn.norm(dim=1).mean()


def kaiming_factor(parts: ExpertParts, _inputs: Tensor) -> None:
    """Draw the expert factor by Kaiming's rule: the experts of a group lead with different strength."""
    nn.init.kaiming_uniform_(parts.expert_factor)


def inputs(parts: ExpertParts, inputs: Tensor) -> None:
    """Read along the leading singular vectors of the layer's inputs, each as strongly as directions at random are."""
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
    """Start the adapters of a model anew.

    Parameters
    ----------
    model : Module
        With fresh TuckA adapters.
    start : str
        One of `STARTS`.
    batches : iterable of dict
        Keyword arguments of the model, to see the layers' inputs.
    seed : int
        Of what is drawn.
    """
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
