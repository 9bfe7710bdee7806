"""From a row of a table to an adapted model: the paper's baselines and TuckA, all through PEFT."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from benchmarks.paper.experiments import Experiment, Row, Variant
from tucka.core.counts.paper_tables import MODEL_LAYERS
from tucka.errors import ConfigError, expected
from tucka.peft import TuckAConfig


def peft_config(experiment: Experiment, row: Row, variant: Variant | None, seed: int) -> peft.PeftConfig:
    """Make the configuration of a row's adapter."""
    sizes, model = dict(row.sizes), experiment.model
    options: dict[str, Any] = {"target_modules": list(model.targets), **row.options}
    if model.head:
        options["modules_to_save"] = list(model.head)
    if experiment.kind == "mathematics":
        options["task_type"] = "CAUSAL_LM"
    if row.method == "tucka" and variant is not None:
        if variant.name in experiment.alpha:
            options["alpha"] = experiment.alpha[variant.name]
        chosen = {name: None if value == "none" else value for name, value in variant.config.items()}
        return TuckAConfig(router_seed=seed, **sizes, **options, **chosen)
    if row.method == "oft":
        return peft.OFTConfig(r=0, oft_block_size=sizes["block_size"], **options)
    if row.method == "boft":
        return peft.BOFTConfig(boft_block_size=sizes["block_size"], **options)
    makers = {"lora": peft.LoraConfig, "dora": peft.LoraConfig, "vera": peft.VeraConfig, "hra": peft.HRAConfig}
    if row.method not in makers:
        known = ", ".join(sorted([*makers, "oft", "boft", "tucka with a variant"]))
        raise ConfigError(expected("method", f"one of {known}", row.method, where=row.name))
    return makers[row.method](**sizes, **options, **({"use_dora": True} if row.method == "dora" else {}))


def adapted(base: nn.Module, config: peft.PeftConfig, layers: str | None) -> peft.PeftModel:
    """Adapt a pretrained model, and check that its adapted layers are those of the paper's model `layers`."""
    with warnings.catch_warnings():
        # PEFT warns about versions of transformers and BOFT's CUDA extension. They do not change the results.
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    if layers is not None:
        found, wanted = Counter(adapted_widths(model)), Counter(MODEL_LAYERS[layers])
        if found != wanted:
            raise ConfigError(expected("targets", f"the layers {dict(wanted)}", dict(found), where=layers))
    return model


def adapted_widths(model: nn.Module) -> list[tuple[int, int]]:
    """List the input and output widths of the adapted layers."""
    bases = (module.get_base_layer() for module in model.modules() if isinstance(module, BaseTunerLayer))
    return [(base.in_features, base.out_features) for base in bases]


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Count what is trained, in the adapters and in the head."""
    sizes = {"adapter": 0, "head": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            sizes["head" if ".modules_to_save." in name else "adapter"] += parameter.numel()
    return sizes
