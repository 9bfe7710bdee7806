"""Adapt a plain torch model: in one line with PEFT, and by hand with the modules that PEFT's method is made of.

Run it: python examples/own_model.py
It takes seconds on a CPU. Replace `Network` and `load_data`.
"""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import Tensor, nn

from tucka import TuckerSpec, balanced_centroids
from tucka.backends.torch import Router, TuckerAdapter
from tucka.peft import TuckAConfig, initialize_router

WIDTH = 16


class Network(nn.Module):
    """Your model; here two layers, whose weights stand for pretrained ones."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class ByHand(nn.Module):
    """The same model with adapters of your own making: the gates are an argument, and nothing is hidden."""

    def __init__(self, base: Network, spec: TuckerSpec) -> None:
        super().__init__()
        base.requires_grad_(False)
        self.router = Router(spec, in_features=WIDTH)
        self.up, self.down = TuckerAdapter(base.up, spec), TuckerAdapter(base.down, spec)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x)  # one route for each sample, (B, k, t)
        return self.down(self.up(x, gates).relu(), gates)


def load_data(count: int = 256) -> tuple[Tensor, Tensor]:
    """Make samples of two kinds, with inputs around +1 and -1, whose targets need different experts."""
    generator = torch.Generator().manual_seed(1)
    sign = torch.ones(count, 1).copysign(torch.arange(count)[:, None] % 2 - 0.5)
    x = torch.randn(count, WIDTH, generator=generator) + sign
    return x, sign * x[:, :4].sum(dim=1, keepdim=True)


def fit(model: nn.Module, x: Tensor, target: Tensor, steps: int) -> float:
    """Train what is trainable and return the share of the loss that is left."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"{sum(parameter.numel() for parameter in trained):,} parameters: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses[-1] / losses[0]


def main(steps: int = 200) -> tuple[float, float]:
    """Adapt and train in both ways; return the share of the loss that is left in each."""
    x, target = load_data()

    # With PEFT. It finds the layers by name, shares one router among them, and saves, merges and pins.
    torch.manual_seed(0)
    model = get_peft_model(Network(), TuckAConfig(r=4, k=2, routing="sample", target_modules=["up", "down"]))
    initialize_router(model, [{"x": x}], progress=False)
    with_peft = fit(model, x, target, steps)

    # By hand. The router starts from directions that split the data evenly.
    torch.manual_seed(0)
    spec = TuckerSpec(rank=4, groups=2, routing="sample")
    by_hand = ByHand(Network(), spec)
    by_hand.router.initialize(*balanced_centroids(x, groups=2, experts_per_group=2, seed=0))
    return with_peft, fit(by_hand, x, target, steps)


if __name__ == "__main__":
    main()
