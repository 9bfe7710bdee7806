"""The models and adapters that are compared: each adapter is put on the same layers of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

from tucka import count_flops
from tucka.backends.torch import HouseholderAdapter
from tucka.peft import TuckAConfig, accelerate_hra, pin_route

Build = Callable[[nn.Module, list[str], int], nn.Module]

GROUPS = 4  # of tucka
BLOCK = 8  # of OFT and BOFT; their parameters are then about as many as rank 8 has elsewhere


def frozen(model: nn.Module, _targets: list[str], _rank: int) -> nn.Module:
    return model.requires_grad_(False)


def _peft(make: Callable[[int, list[str]], peft.PeftConfig]) -> Build:
    def build(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
        with warnings.catch_warnings():
            # PEFT warns about versions of transformers. They do not change what is measured.
            warnings.simplefilter("ignore")
            config = make(rank, targets)
            if getattr(model, "can_generate", bool)():
                config.task_type = "CAUSAL_LM"
            return peft.get_peft_model(model, config)

    return build


def _reflections(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    model.requires_grad_(False)
    for name in [name for name, _ in model.named_modules() if name.rpartition(".")[2] in targets]:
        model.set_submodule(name, HouseholderAdapter(model.get_submodule(name), rank))
    return model


def _accelerated(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    adapted = METHODS["PEFT HRA"](model, targets, rank)
    accelerate_hra(adapted)
    return adapted


def _pinned(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    adapted = METHODS["tucka batch"](model, targets, rank)
    pin_route(adapted, group=0)
    return adapted


def _merged(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
    adapted = _pinned(model, targets, rank)
    adapted.merge_adapter()
    return adapted


METHODS: dict[str, Build] = {
    "frozen": frozen,
    "PEFT LoRA": _peft(lambda r, names: peft.LoraConfig(r=r, target_modules=names)),
    "PEFT DoRA": _peft(lambda r, names: peft.LoraConfig(r=r, use_dora=True, target_modules=names)),
    "PEFT VeRA": _peft(lambda r, names: peft.VeraConfig(r=r, target_modules=names)),
    "PEFT OFT": _peft(lambda _, names: peft.OFTConfig(r=0, oft_block_size=BLOCK, target_modules=names)),
    "PEFT BOFT": _peft(lambda _, names: peft.BOFTConfig(boft_block_size=BLOCK, target_modules=names)),
    "PEFT HRA": _peft(lambda r, names: peft.HRAConfig(r=r, target_modules=names)),
    "PEFT Lily": _peft(lambda r, names: peft.LilyConfig(r=r, stride_A=1, num_B=2, target_modules=names)),
    "PEFT HRA, accelerated": _accelerated,
    "tucka HRA": _reflections,
    "tucka batch": _peft(lambda r, names: TuckAConfig(r=r, k=GROUPS, routing="batch", target_modules=names)),
    "tucka sample": _peft(lambda r, names: TuckAConfig(r=r, k=GROUPS, routing="sample", target_modules=names)),
    "tucka token": _peft(lambda r, names: TuckAConfig(r=r, k=GROUPS, routing="token", target_modules=names)),
    "tucka pinned": _pinned,
    "tucka merged": _merged,  # for inference only: no parameter takes part
}


class Stack(nn.Module):
    """Square linear layers, one after the other."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        for index in range(depth):
            self.add_module(f"dense{index}", nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers."""
        for layer in self.children():
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Encoder blocks of BERT-base's sizes, from transformers."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertLayer

        config = BertConfig(hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64)
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        config._attn_implementation = "sdpa"
        self.blocks = nn.ModuleList([BertLayer(config) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        """Run the blocks."""
        for block in self.blocks:
            output = block(x)
            x = output if isinstance(output, Tensor) else output[0]
        return x


def targets_of(model: nn.Module) -> list[str]:
    """Name the layers that are adapted: all linear ones, query, value and all dense layers of an encoder."""
    if isinstance(model, Stack):
        return [name for name, _ in model.named_children()]
    return ["query", "key", "value", "dense"]


def widths_of(model: nn.Module) -> list[tuple[int, int]]:
    """List input and output width of the adapted layers, in the order in which they run."""
    names, layers = targets_of(model), dict(model.named_modules())
    found = [layer for name, layer in layers.items() if name.rpartition(".")[2] in names]
    return [(layer.in_features, layer.out_features) for layer in found if isinstance(layer, nn.Linear)]


FORMULAS: dict[str, dict[str, Any]] = {
    "PEFT LoRA": {"method": "lora"},
    "tucka batch": {"method": "tucka", "k": GROUPS, "routing": "batch"},
    "tucka sample": {"method": "tucka", "k": GROUPS, "routing": "sample"},
    "tucka token": {"method": "tucka", "k": GROUPS, "routing": "token"},
}


def formula_of(method: str, model: nn.Module, rank: int, *, tokens: int, samples: int) -> dict[str, int] | None:
    """Count what a method adds to a forward and a backward by `tucka.count_flops`; None without a formula for it."""
    sizes = dict(FORMULAS.get(method, {}))
    if not sizes:
        return None
    name, widths = sizes.pop("method"), widths_of(model)
    options = {"tokens": tokens, "samples": samples, "r": rank, **sizes}
    return {
        "multiply_adds": count_flops(name, widths, **options),
        "multiply_adds_backward": count_flops(name, widths, backward=True, **options),
    }


def built(method: str, model: nn.Module, rank: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Adapt a model by a method, and move it."""
    return METHODS[method](model.to(dtype), targets_of(model), rank).to(device).train()
