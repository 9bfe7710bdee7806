"""Adapt tiny models, train them a little, look at what they hold."""

import torch
from peft import get_peft_model

from support.tiny_models import KINDS, inputs_for, loss_of, make
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import TuckAConfig


def config_for(kind, **options):
    """A small configuration with the kind's targets."""
    sizes = {"r": 4, "k": 3, "t": 2, "p": 2}
    given = {**sizes, "routing": "batch", "target_modules": KINDS[kind].targets, **options}
    return TuckAConfig(task_type=KINDS[kind].task_type, **given)


def adapt(kind, *, dtype=torch.float32, seed=0, model=None, **options):
    """A tiny model with one adapter, in evaluation mode."""
    base = make(kind, dtype=dtype, seed=seed) if model is None else model
    torch.manual_seed(seed + 100)
    return get_peft_model(base, config_for(kind, **options)).eval()


def train(model, inputs, *, steps=3, lr=0.05):
    """Take a few optimiser steps on one batch."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()
    return model.eval()


def trained(kind, *, steps=3, **options):
    """An adapted model after a few steps, whose update is visible, with inputs."""
    inputs = inputs_for(kind, dtype=options.get("dtype", torch.float32))
    return train(adapt(kind, **options), inputs, steps=steps), inputs


def snapshot(model):
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def gradients(model):
    """The gradients of what is trained."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def visible(kind, routing="sample", **options):
    """A model whose adapters show at once and route by products."""
    return adapt(kind, routing=routing, init_weights=False, affinity="dot", **options)


def watched(model, adapter="default"):
    """The routing decisions from now on, as (input, mask, gates)."""
    made = []
    scope_of(model).observers[adapter] = lambda _router, *decision: made.append(decision)
    return made
