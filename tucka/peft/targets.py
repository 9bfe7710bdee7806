"""What an adapter is refused for before anything of the model changes."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from tucka.backends.torch.base_layers import is_convolution, is_cut_along_input, is_experts, width_of
from tucka.backends.torch.routing.layouts import Layout, layout_of
from tucka.backends.torch.routing.parts import Anatomy
from tucka.errors import ConfigError, expected
from tucka.peft.config import TuckAConfig

__all__ = [
    "NAMES_OF_EXPERTS",
    "base_of",
    "check_adapter_name",
    "check_experts_are_named",
    "check_names",
    "check_targets",
    "ends_with_name",
    "no_targets",
    "owners_of",
    "place_of",
]


def ends_with_name(name: str, ending: str) -> bool:
    """Tell whether a module's full name is `ending` or ends with it; "query" is no ending of "layer.0.subquery"."""
    return name == ending or name.endswith("." + ending)


# What runs first and is registered after others: by the class of the model, and in OPT, whose decoder has it.
_RUNS_FIRST = {
    "CogVideoXTransformer3DModel": "time_embedding.linear_1",
    "FluxTransformer2DModel": "x_embedder",
    "HunyuanDiT2DModel": "timestep_embedder.linear_1",
    "LatteTransformer3DModel": "timestep_embedder.linear_1",
    "Lumina2Transformer2DModel": "timestep_embedder.linear_1",
    "PixArtTransformer2DModel": "timestep_embedder.linear_1",
    "QwenImageTransformer2DModel": "img_in",
    "StableAudioDiTModel": "cross_attention_proj.0",
}


def owners_of(config: TuckAConfig, places: Mapping[str, Place], model: nn.Module) -> set[str]:
    """Return the layers that are to own a router: in each part of the model the first, or the first that was named."""
    if not config.has_router:
        return set()
    owners: dict[str, str] = {}
    runs_first = _RUNS_FIRST.get(type(model).__name__, "project_in")
    for name, place in places.items():
        named = config.router_module is not None and ends_with_name(name, config.router_module)
        first = owners.get(place.part)
        # Tables of positions tell nothing of a sample.
        is_first = first is None and place.layout is not Layout.NO_SAMPLE
        if is_first or ((named or ends_with_name(name, runs_first)) and not _is_named(config, first)):
            owners[place.part] = name
    return set(owners.values())


def _is_named(config: TuckAConfig, name: str | None) -> bool:
    return config.router_module is not None and name is not None and ends_with_name(name, config.router_module)


@dataclass(frozen=True)
class Place:
    """Where in a model a layer is, and what the rows of its inputs are."""

    part: str
    role: str
    layout: Layout


def place_of(anatomy: Anatomy, name: str, config: TuckAConfig) -> Place:
    """Find out about one layer."""
    layout = layout_of(anatomy.root, name, samples_first=config.samples_first)
    return Place(anatomy.part_of(name), anatomy.role_of(name), layout)


def base_of(module: nn.Module) -> nn.Module:
    """Return the layer inside whatever PEFT has wrapped around it."""
    return cast(nn.Module, module.get_base_layer()) if isinstance(module, BaseTunerLayer) else module


def check_adapter_name(name: str) -> None:
    """Refuse names that a module's container or a folder cannot have."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict(), name):
        rule = "a name without dots that is no attribute of torch's ModuleDict"
        raise ConfigError(expected("adapter_name", rule, repr(name), where="TuckAModel"))
    if Path(name).is_absolute():
        rule = "no absolute path, since PEFT saves the adapter in a folder of this name"
        raise ConfigError(expected("adapter_name", rule, repr(name), where="TuckAModel"))


def check_targets(
    config: TuckAConfig, targets: Mapping[str, nn.Module], places: Mapping[str, Place], model: nn.Module
) -> None:
    """Refuse layers that cannot be adapted, and options that do not fit them."""
    for name, module in targets.items():
        layer = base_of(module)
        _check_kind(layer, name)
        width = width_of(layer, name)
        rank = config.spec_for(name).rank
        if rank > width:
            cure = "Choose a smaller r or exclude the layer"
            raise ConfigError(expected("r", f"at most the width {width}", rank, where=name, cure=cure))
        if is_convolution(layer) and config.routing == "token":
            rule = "'batch' or 'sample' where a convolution is adapted"
            raise ConfigError(expected("routing", rule, "'token'", where=name))
        if is_cut_along_input(layer):
            rule, got = "a layer that sees its whole input", f"{name}, which tensor parallelism cuts along it"
            cure = "Take it out with exclude_modules; layers that are cut along their output work"
            raise ConfigError(expected("target_modules", rule, got, where="TuckAConfig", cure=cure))
        _check_is_called(layer, name, model)
        _check_rows(config, name, places[name])
    named = config.router_module
    if targets and named is not None and not any(ends_with_name(name, named) for name in targets):
        raise ConfigError(
            expected(
                "router_module",
                "the name of an adapted layer",
                repr(named),
                where="TuckAConfig",
                cure=near(named, targets),
            )
        )


def check_names(config: TuckAConfig, model: nn.Module) -> None:
    """Raise where no module has any of the names of the targets; PEFT's own message does not say which are near."""
    named, known = config.target_modules, [name for name, _ in model.named_modules() if name]
    if not isinstance(named, (set, list)) or not named:
        return
    if not any(ends_with_name(name, str(target)) for target in named for name in known):
        cure = near(" ".join(map(str, named)), {name.rpartition(".")[2] for name in known})
        rule = "names of modules of the model"
        got = f"names that were not found in the base model: {sorted(map(str, named))}"
        raise ConfigError(expected("target_modules", rule, got, where="TuckAConfig", cure=cure))


def no_targets(model: nn.Module) -> ConfigError:
    """Make the error of a configuration without targets, for a model whose usual ones nobody knows."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = ", ".join(map(repr, list(dict.fromkeys(name.rpartition(".")[2] for name in linear))[:6]))
    rule = "names of layers, for a model of this class"
    cure = f"Its linear layers are called {names}; 'all-linear' takes all"
    return ConfigError(expected("target_modules", rule, None, where="TuckAConfig", cure=cure))


def near(word: str, known: Iterable[str]) -> str:
    """List the names that are most like a word."""
    found = difflib.get_close_matches(word, sorted(known), n=4, cutoff=0.5)
    return f"Names like it are {', '.join(found)}" if found else "print(model) shows the names"


def _check_kind(layer: nn.Module, name: str) -> None:
    """Refuse layers that are no linear ones and no convolutions, in the words of the configuration."""
    known = isinstance(getattr(layer, "in_features", None), int) or type(layer).__name__ == "Conv1D"
    if not (known or is_convolution(layer) or is_experts(layer) or isinstance(layer, nn.MultiheadAttention)):
        rule, got = "linear layers, convolutions and experts", f"{name}, which is of class {type(layer).__name__}"
        cure = "Take it out of target_modules, or name it in exclude_modules"
        raise ConfigError(expected("target_modules", rule, got, where="TuckAConfig", cure=cure))


def check_experts_are_named(config: TuckAConfig, model: nn.Module) -> None:
    """Refuse names of the layers of experts that are no layers here: PEFT's LoRA would turn them into the experts."""
    if not isinstance(config.target_modules, (set, list)) or not any(map(is_experts, model.modules())):
        return
    names = [name for name, _ in model.named_modules()]
    missing = [target for target in config.target_modules if not any(ends_with_name(name, target) for name in names)]
    if missing and NAMES_OF_EXPERTS & set(missing):
        rule = "names of layers of this model, whose mixture keeps its experts as one weight"
        cure = "Use 'experts': their common input is adapted, d·r numbers whatever the number of experts"
        got = ", ".join(repr(name) for name in sorted(missing))
        raise ConfigError(expected("target_modules", rule, got, where="TuckAConfig", cure=cure))


NAMES_OF_EXPERTS = {"w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "gate_up_proj"}
# By the class of the parent: layers whose weights it reads, instead of calling them.
_READ = {
    "MambaMixer": ("dt_proj",),
    "FalconMambaMixer": ("dt_proj",),
    "JambaMambaMixer": ("dt_proj",),
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "LongcatFlashTopkRouter": ("classifier",),
    "MobileBertLMPredictionHead": ("dense", "decoder"),
    "DetrMHAttentionMap": ("k_proj",),
    "ConditionalDetrMHAttentionMap": ("k_proj",),
    "DabDetrMHAttentionMap": ("k_linear",),
    "MaskFormerDetrMHAttentionMap": ("k_proj",),
}
# Their fast kernels read these too, where they are installed.
_READ_BY_KERNELS = {
    "MambaMixer": ("x_proj", "out_proj"),
    "FalconMambaMixer": ("x_proj", "out_proj"),
    "Mamba2Mixer": ("out_proj",),
    "BambaMixer": ("out_proj",),
    "FalconH1Mixer": ("out_proj",),
    "GraniteMoeHybridMambaLayer": ("out_proj",),
    "NemotronHMamba2Mixer": ("out_proj",),
    "Zamba2MambaMixer": ("out_proj",),
}
# Layers that are linear or convolutions by their class, and compute something else.
_OTHERS = (
    "Llama4Router",
    "PhimoeTopKRouter",
    "DeepseekV4GroupedLinear",
    "IdeficsDecoupledLinear",
    "ParakeetEncoderCTCHead",
    "LasrEncoderCTCHead",
)


def _check_is_called(layer: nn.Module, name: str, model: nn.Module) -> None:
    """Refuse layers that an adapter of the input would not reach, or would change in another way."""
    parent = model.get_submodule(name.rpartition(".")[0])
    kind, own = type(parent).__name__, name.rpartition(".")[2]
    cure = "Take it out with exclude_modules"
    if own == "qkv" and _adds_bias_itself(parent):
        rule = f"a layer that its parent calls, but {kind} only reads its weight"
        cure = f"Set qkv_bias_separate = True on each {kind}: then it calls the layer, and computes the same"
        raise ConfigError(expected("target_modules", rule, name, where="TuckAConfig", cure=cure))
    if isinstance(parent, nn.MultiheadAttention) or own in _READ.get(kind, ()):
        rule = f"a layer that its parent calls, but {kind} only reads its weight"
        raise ConfigError(expected("target_modules", rule, name, where="TuckAConfig", cure=cure))
    if own in _READ_BY_KERNELS.get(kind, ()):
        rule = f"a layer that its parent always calls, but the kernels of {kind} read its weight"
        raise ConfigError(expected("target_modules", rule, name, where="TuckAConfig", cure=cure))
    if type(layer).__name__ in _OTHERS:
        rule = "a layer that computes x W + b"
        raise ConfigError(
            expected("target_modules", rule, f"{name} ({type(layer).__name__})", where="TuckAConfig", cure=cure)
        )


def _adds_bias_itself(parent: nn.Module) -> bool:
    """Tell whether an attention of timm reads the weight of its `qkv`, whose bias it keeps in parts."""
    has_parts = getattr(parent, "q_bias", None) is not None and hasattr(parent, "qkv_bias_separate")
    return has_parts and not parent.qkv_bias_separate


_UNKNOWN_ROWS = {
    Layout.DISPATCHED: "tokens that a mixture sends to one of its experts",
    Layout.PACKED: "the tokens of all samples in one row",
    Layout.UNKNOWN: "other rows",
}


def _check_rows(config: TuckAConfig, name: str, place: Place) -> None:
    """Refuse layers of which it is known that their inputs do not tell which row belongs to which sample."""
    routed = config.pinned_gates is None and config.routing != "batch"
    if not routed or place.layout not in _UNKNOWN_ROWS or (place.layout is Layout.PACKED and config.routing == "token"):
        return
    what = _UNKNOWN_ROWS[place.layout]
    rule = f"a layer whose input has rows of known samples (routing={config.routing!r})"
    known = "'batch' or 'token'" if place.layout is Layout.PACKED else "'batch'"
    cure = f"Take it out with exclude_modules, use routing={known}, or say samples_first if the model is your own"
    raise ConfigError(expected("target_modules", rule, f"{name}, which gets {what}", where="TuckAConfig", cure=cure))
