"""Llamas of given sizes with random weights: one base, and a copy for each method that shares the base's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from benchmarks.adapted_models import METHODS, Stack, targets_of
from tucka.backends.torch import Router

__all__ = ["LINEARS", "SIZES", "adapted", "base_of"]

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The head is not adapted and takes the same time with every method. A small vocabulary leaves less of it to measure.
VOCABULARY = 2048


def _sizes(hidden: int, intermediate: int, heads: int, key_heads: int) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (hidden, intermediate, heads, key_heads), strict=True))


SIZES = {
    "tiny": _sizes(32, 48, 4, 2),
    "smollm2-135m": _sizes(576, 1536, 9, 3),
    "llama-1b": _sizes(2048, 8192, 32, 8),
    "llama-7b": _sizes(4096, 11008, 32, 32),
}
LARGEST = 4096  # positions


def base_of(kind: str, sizes: str, layers: int) -> nn.Module:
    """Make the base of a kind of model: a decoder, a classifier or two linear layers."""
    if kind == "two linear layers":
        return Stack(768 if sizes != "tiny" else 32, 2)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        max_position_embeddings=LARGEST,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        num_labels=2,
        **SIZES[sizes],  # type: ignore[arg-type]
    )
    model = {"decoder": LlamaForCausalLM, "classifier": LlamaForSequenceClassification}[kind]
    return model(config).eval()


def adapted(base: nn.Module, method: str, rank: int, targets: list[str] | None = None) -> nn.Module:
    """Adapt a copy of the base; the copies share its weights, so they lie in the same places of the memory."""
    known: dict[int, Any] = {} if method == "tucka merged" else {id(value): value for value in base.parameters()}
    names = targets or (targets_of(base) if isinstance(base, Stack) else LINEARS)
    torch.manual_seed(0)
    model = METHODS[method](copy.deepcopy(base, known), names, rank)
    for module in model.modules():
        if isinstance(module, Router):  # as if data had started it: a router that waits for its start looks at batches
            module.initialize(module.centroids.detach().clone())
    return model
