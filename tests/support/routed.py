"""Adapted models of all kinds in float64, whose adapters show at once and route by products."""

import torch
from peft import get_peft_model

from architectures.families import FAMILIES
from support.tiny_models import make
from tucka.peft import TuckAConfig, last_route

EXACT = {"rtol": 0, "atol": 1e-11}


def routed(base, targets, routing="sample", **options):
    """Adapt a model; in evaluation mode."""
    torch.manual_seed(5)
    sizes = {"r": 4, "k": 4, "routing": routing, "affinity": "dot", "init_weights": False, "target_modules": targets}
    config = TuckAConfig(**{**sizes, **options})
    return get_peft_model(base.double(), config, autocast_adapter_dtype=False).eval()


def causal(routing="sample", targets=("q_proj", "v_proj"), **options):
    """A causal model."""
    return routed(make("llama"), list(targets), routing, **options)


def family(name, routing="sample", targets=None, **options):
    """One of the architectures."""
    found = FAMILIES[name]
    return routed(found.build(), targets or list(found.targets), routing, **options)


def inputs_of(name, batch=3, length=7, **options):
    """Its inputs."""
    return as_double(FAMILIES[name].inputs(batch, length, **options))


def as_double(inputs):
    """Inputs of which the numbers are float64."""
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def logits(model, inputs):
    """The first tensor that a call returns."""
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output.logits if "logits" in output else output[0]


def row_of(inputs, row):
    """One sample of inputs."""
    return {key: value[row : row + 1] for key, value in inputs.items()}


def assert_rows_stand_alone(model, inputs, rows=3):
    """Assert that each sample's output is the same in a batch and alone, and that the adapter shows."""
    together = logits(model, inputs)
    with model.disable_adapter():
        assert not torch.allclose(logits(model, inputs), together, atol=1e-3)
    for row in range(rows):
        torch.testing.assert_close(logits(model, row_of(inputs, row)), together[row : row + 1], **EXACT)


def route_of(model, inputs):
    """The route of a call."""
    logits(model, inputs)
    return last_route(model)


def greedy(model, ids, *, new=6, **options):
    """The tokens of a generation."""
    mask = {"attention_mask": torch.ones_like(ids)}
    return model.generate(**{"input_ids": ids, **mask, "max_new_tokens": new, "do_sample": False, **options})
