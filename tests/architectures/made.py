"""Rows of architectures of other libraries than transformers: a function makes the tiny model. No tests in it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from architectures.families import Draws, Inputs, MakeInputs


@dataclass(frozen=True)
class Made:
    """One architecture of a library: what the checks ask of a family."""

    name: str
    kind: str
    library: str
    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    make_inputs: MakeInputs
    options: dict[str, Any] = field(default_factory=dict)
    rounds: bool = False  # a kernel computes the unadapted model in another order
    by_methods: Callable[..., torch.Tensor] | None = None  # the same result by methods that are called instead
    generates: bool = False

    def build(self, seed: int = 0) -> nn.Module:
        """The model, in evaluation mode."""
        torch.manual_seed(seed)
        model = self.make().eval()
        _show(model)
        return model

    def inputs(self, batch: int, length: int, *, padding: bool = False, seed: int = 0) -> Inputs:
        return self.make_inputs(Draws(seed), batch, length, padding)

    @property
    def pads(self) -> bool:
        """Whether there are inputs with padding."""
        plain, padded = (self.inputs(2, 7, padding=padding) for padding in (False, True))
        return plain.keys() != padded.keys() or any(not torch.equal(plain[key], padded[key]) for key in plain)


def _show(model: nn.Module) -> None:
    """Give a model weights that show: none that is zero or tiny, as gates and scales at their start are."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=(parameter.numel() / parameter.shape[0]) ** -0.5)
        elif not name.endswith("bias") and parameter.abs().max() < 0.5:
            nn.init.ones_(parameter)
