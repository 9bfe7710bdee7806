"""What is done with a model: the regimes in which methods are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoders import VOCABULARY
from benchmarks.turns import Work

__all__ = ["REGIMES", "Regime", "inputs_of", "work"]

PROMPT, NEW = 16, 16  # tokens of a generation


@dataclass(frozen=True)
class Regime:
    """One way in which a model is used."""

    title: str
    model: str  # a kind of `decoders.base_of`
    kind: str  # of `RUNS`
    samples: int
    tokens: int
    calls: int  # in one turn, as many as make up about a second
    new: int = NEW  # tokens that are generated


REGIMES = {
    "generate-1": Regime("generate, 1 row", "decoder", "generate", 1, PROMPT, 3),
    "generate-8": Regime("generate, 8 rows", "decoder", "generate", 8, PROMPT, 3),
    "forward-1x32": Regime("forward, 1×32", "decoder", "forward", 1, 32, 5),
    "train-1x32": Regime("training step, 1×32", "decoder", "train", 1, 32, 5),
    "forward-8x128": Regime("forward, 8×128", "decoder", "forward", 8, 128, 2),
    "train-8x128": Regime("training step, 8×128", "decoder", "train", 8, 128, 1),
    "prefill-512": Regime("prefill, 1×512", "decoder", "prefill", 1, 512, 2),
    "classify-32": Regime("classify, 32×64", "classifier", "classify", 32, 64, 1),
    "forward-two": Regime("forward, two linear layers, 8×32", "two linear layers", "forward", 8, 32, 9),
    "train-two": Regime("training step, two linear layers, 8×32", "two linear layers", "train", 8, 32, 9),
}


def _forward(model: nn.Module, inputs: dict[str, Any]) -> None:
    with torch.inference_mode():
        model(**inputs)


def _train(model: nn.Module, inputs: dict[str, Any]) -> None:
    output = model(**inputs)
    loss = output.float().square().mean() if isinstance(output, Tensor) else output.loss
    loss.backward()


def _generate(model: Any, inputs: dict[str, Any]) -> None:
    model.generate(**inputs)


RUNS: dict[str, Callable[[nn.Module, dict[str, Any]], None]] = {
    "generate": _generate,
    "forward": _forward,
    "prefill": _forward,
    "classify": _forward,
    "train": _train,
}


def inputs_of(regime: Regime, base: Any) -> dict[str, Any]:
    """Make the inputs of a regime, the same for all methods."""
    generator = torch.Generator().manual_seed(0)
    weight = next(base.parameters())
    shape = (regime.samples, regime.tokens)
    if regime.model == "two linear layers":
        x = torch.randn(*shape, weight.shape[1], generator=generator).to(weight)
        return {"x": x.requires_grad_(regime.kind == "train")}
    ids = torch.randint(3, VOCABULARY, shape, generator=generator).to(weight.device)
    if regime.kind == "train":
        # The input gets a gradient too, as it would from layers below: the base then has a backward to compare with.
        embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
        return {"inputs_embeds": embedded, "labels": ids, "use_cache": False}
    if regime.kind == "classify":
        lengths = torch.linspace(regime.tokens // 4, regime.tokens, regime.samples, device=ids.device).long()
        mask = (torch.arange(regime.tokens, device=ids.device) < lengths[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask, "use_cache": False}
    if regime.kind == "generate":
        length = {"max_new_tokens": regime.new, "min_new_tokens": regime.new}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **length, "do_sample": False}
    return {"input_ids": ids, **({"logits_to_keep": 1} if regime.kind == "prefill" else {"use_cache": False})}


def work(regime: Regime, base: nn.Module, model: nn.Module) -> Work:
    """Say what a model does in one turn of a regime."""
    inputs = inputs_of(regime, base)
    trains = regime.kind == "train"

    def run() -> None:
        RUNS[regime.kind](model, inputs)

    def clear() -> None:
        if trains:
            for tensor in (*inputs.values(), *model.parameters()):
                if isinstance(tensor, Tensor):
                    tensor.grad = None

    return Work(run, clear, regime.calls)
