"""Wrong calls: each is refused with the name, the rule, the value and the cure, in the caller's own words."""

import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import tucka
from support.tiny_models import bert
from tucka import TuckerSpec
from tucka.backends.torch import (
    HouseholderAdapter,
    Router,
    TuckerAdapter,
    householder_adapt,
    routing_scope,
    tucker_adapt_gated,
)
from tucka.errors import TuckaError
from tucka.peft import (
    RouterCallback,
    TuckAConfig,
    add_group,
    balance_router,
    expert_load,
    export_lora,
    given_route,
    initialize_router,
    last_route,
    load_adapter,
    load_official_checkpoint,
    pin_route,
)
from tucka.plots import group_by_label, load_bars, routing_map, tradeoff

MESSAGE = re.compile(r"^[^:]+: expected .+, got .+", re.DOTALL)


def adapted(**options):
    given = {"r": 4, "target_modules": ["query", "value"], "routing": "batch", **options}
    return get_peft_model(bert(), TuckAConfig(**given))


def lora():
    return get_peft_model(bert(), LoraConfig(target_modules=["query"]))


def adapter(**options):
    return TuckerAdapter(nn.Linear(4, 4), TuckerSpec(rank=2), **options)


def mlp(**options):
    """A model of one's own, adapted."""
    base = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return get_peft_model(base, TuckAConfig(**{"r": 2, "target_modules": ["0", "2"], **options}))


def after_a_forward(model):
    model(torch.ones(2, 4))
    return model


def pinned():
    model = mlp()
    pin_route(model, group=0)
    return model


def call_given(model, groups):
    with given_route(model, groups=groups):
        return model(torch.ones(6, 4))


def router(**options):
    return Router(TuckerSpec(rank=2, groups=2, **options), in_features=4)


x, gates = torch.ones(2, 4), torch.ones(4, 2)
# What is called, and words that its message has to have.
CALLS = {
    # Configurations and sizes
    "r below one": (lambda: TuckAConfig(r=-1), ["r:", "at least 1", "-1", "TuckAConfig"]),
    "r no whole number": (lambda: TuckAConfig(r=8.5), ["r:", "whole number", "8.5"]),
    "r as text": (lambda: TuckAConfig(r="8"), ["r:", "whole number", "'8'"]),
    "k zero": (lambda: TuckAConfig(k=0), ["k:", "at least 1", "0"]),
    "t a truth": (lambda: TuckAConfig(t=True), ["t:", "whole number", "True"]),
    "rank of the config": (lambda: TuckAConfig(rank=8), ["rank:", "The word here is r"]),
    "r of the spec": (lambda: TuckerSpec(r=8), ["r:", "The word here is rank"]),
    "alpha of LoRA": (lambda: TuckAConfig(lora_alpha=16), ["lora_alpha:", "The word here is alpha"]),
    "dropout of LoRA": (lambda: TuckAConfig(lora_dropout=0.1), ["lora_dropout:", "The word here is dropout"]),
    "start of LoRA": (lambda: TuckAConfig(init_lora_weights=True), ["The word here is init_weights"]),
    "parameters as targets": (lambda: TuckAConfig(target_parameters=["w"]), ["target_parameters:", "target_modules"]),
    "a typing error": (lambda: TuckAConfig(target_module=["q"]), ["The word here is target_modules"]),
    "alpha without end": (lambda: TuckAConfig(alpha=float("inf")), ["alpha:", "finite", "inf"]),
    "a routing that is none": (lambda: TuckAConfig(routing="tokens"), ["routing:", "'token'", "'tokens'"]),
    "an affinity that is none": (lambda: TuckAConfig(affinity="cosine"), ["affinity:", "'directional'", "'cosine'"]),
    "no temperature": (lambda: TuckAConfig(temperature=0), ["temperature:", "positive", "0"]),
    "a negative rate": (lambda: TuckAConfig(balance_rate=-1), ["balance_rate:", "not negative", "-1"]),
    "a start that does not fit": (
        lambda: TuckAConfig(router_init="balanced", affinity="dot"),
        ["router_init:", "affinity='dot'", "Use affinity='directional'"],
    ),
    # Where a spec belongs
    "a config for an adapter": (lambda: TuckerAdapter(nn.Linear(4, 4), TuckAConfig()), ["spec:", "Give config.spec"]),
    "a config for a router": (lambda: Router(TuckAConfig(), in_features=4), ["spec:", "Give config.spec"]),
    "a dictionary": (lambda: Router({"rank": 2}, in_features=4), ["spec:", "dict", "TuckerSpec"]),
    # Layers
    "a target that is no linear layer": (
        lambda: adapted(target_modules=["LayerNorm"]),
        ["target_modules:", "linear layers", "LayerNorm", "exclude_modules"],
    ),
    "an embedding as target": (
        lambda: adapted(target_modules=["word_embeddings"]),
        ["target_modules:", "Embedding", "exclude_modules"],
    ),
    "a target that is missing": (lambda: adapted(target_modules=["kuery"]), ["target_modules:", "kuery", "query"]),
    "a router's layer that is missing": (
        lambda: adapted(router_module="encoder.layer.0.attention.self.kuery"),
        ["router_module:", "kuery", "self.query"],
    ),
    "r above a width": (lambda: adapted(r=64), ["r:", "at most the width 16", "64", "Choose a smaller r"]),
    "token routing of a convolution in PEFT": (
        lambda: get_peft_model(
            nn.Sequential(nn.Conv2d(4, 4, 3)), TuckAConfig(r=2, routing="token", target_modules=["0"])
        ),
        ["routing:", "convolution", "'token'"],
    ),
    "token routing of a convolution": (
        lambda: TuckerAdapter(nn.Conv2d(4, 4, 3), TuckerSpec(rank=2, routing="token")),
        ["routing:", "convolution", "'token'"],
    ),
    "another width than the layer's": (lambda: adapter(in_features=5), ["in_features:", "4", "5", "Leave it out"]),
    "a norm to adapt": (
        lambda: TuckerAdapter(nn.LayerNorm(4), TuckerSpec(rank=2)),
        ["base_layer:", "LayerNorm", "Pass in_features"],
    ),
    "a norm to reflect": (lambda: HouseholderAdapter(nn.LayerNorm(4), rank=2), ["base_layer:", "LayerNorm"]),
    "a rank above the width": (
        lambda: TuckerAdapter(nn.Linear(4, 4), TuckerSpec(rank=9)),
        ["rank:", "4", "9", "smaller rank"],
    ),
    "reflections above the width": (lambda: HouseholderAdapter(nn.Linear(4, 4), rank=9), ["rank:", "4", "9"]),
    "a name with dots": (
        lambda: get_peft_model(bert(), TuckAConfig(r=4, target_modules=["query"]), adapter_name="a.b"),
        ["adapter_name:", "without dots", "'a.b'"],
    ),
    # Inputs
    "an input of another width": (lambda: adapter()(torch.ones(2, 5), gates), ["x:", "d = 4", "(2, 5)"]),
    "whole numbers": (lambda: adapter()(x.long(), gates), ["x:", "floating-point", "int64", "x.to("]),
    "NumPy gates in a module": (lambda: adapter()(x, gates.numpy()), ["gates:", "ndarray", "torch.as_tensor"]),
    "NumPy gates in a function": (
        lambda: tucker_adapt_gated(x, torch.ones(4, 2), torch.ones(1, 1, 2, 2), torch.ones(1, 1), np.ones((1, 1))),
        ["gates:", "ndarray", "torch.as_tensor"],
    ),
    "gates of other sizes": (lambda: adapter()(x, torch.ones(3, 2)), ["gates:", "(2, 2)", "(3, 2)"]),
    "NumPy activations": (lambda: householder_adapt(x.numpy(), torch.ones(4, 1)), ["x:", "ndarray"]),
    "a NumPy input of a router": (lambda: router()(np.ones((2, 4), np.float32)), ["hidden:", "ndarray"]),
    "an input without samples": (lambda: router()(torch.ones(4)), ["hidden:", "(B, ..., d)", "(4,)"]),
    "two libraries": (
        lambda: tucka.affinity_logits(np.ones(4), torch.ones(2, 2, 4)),
        ["centroids:", "numpy", "pytorch"],
    ),
    # Routers
    "centroids of other sizes": (lambda: router().initialize(torch.ones(3, 2, 4)), ["centroids:", "(2, 2, 4)", "(3,"]),
    "centroids to broadcast": (lambda: router().initialize(torch.ones(1, 2, 4)), ["centroids:", "(2, 2, 4)", "(1,"]),
    "centroids that are NaN": (lambda: router().initialize(torch.full((2, 2, 4), torch.nan)), ["centroids:", "NaN"]),
    "NumPy centroids": (lambda: router().initialize(np.ones((2, 2, 4))), ["centroids:", "ndarray", "torch.as_tensor"]),
    "a centre of another size": (
        lambda: router(affinity="centered").initialize(torch.ones(2, 2, 4), torch.ones(3)),
        ["center:", "(4,)", "(3,)"],
    ),
    "one batch for a router": (lambda: initialize_router(adapted(), torch.ones(3, 4)), ["batches:", "[batch]"]),
    "no batch for a router": (lambda: initialize_router(adapted(), []), ["batches:", "at least one batch", "none"]),
    "a router of no adapter": (lambda: initialize_router(bert(), [{}]), ["model:", "TuckAConfig", "BertFor"]),
    # Routes
    "a pin without a route": (lambda: pin_route(adapted()), ["gates:", "none of them", "pin_route(model, group=0)"]),
    "a pin of two routes": (lambda: pin_route(adapted(), group=0, gates=gates), ["gates:", "gates and one of"]),
    "a pin of a plain model": (lambda: pin_route(bert(), group=0), ["model:", "BertFor", "get_peft_model"]),
    "a pin of LoRA": (lambda: pin_route(lora(), group=0), ["model:", "LORA", "get_peft_model"]),
    "a pin of a group that is none": (lambda: pin_route(adapted(), group=9), ["group:", "from 0 to 1", "9"]),
    "a pin of other sizes": (lambda: pin_route(adapted(), gates=torch.ones(3, 3)), ["gates:", "(2, 2)"]),
    "a route of a plain model": (lambda: last_route(bert()), ["model:", "BertFor"]),
    "a load of a plain model": (lambda: expert_load(bert()), ["model:", "BertFor"]),
    "a group of a plain model": (lambda: add_group(bert()), ["model:", "BertFor"]),
    "neither groups nor gates": (lambda: given_route(adapted()).__enter__(), ["groups:", "either them or gates"]),
    "groups and gates": (lambda: given_route(adapted(), groups=0, gates=gates).__enter__(), ["groups:", "both"]),
    "groups of no samples": (lambda: given_route(adapted(), groups=[]).__enter__(), ["groups:", "each sample", "none"]),
    "given gates of other sizes": (
        lambda: given_route(adapted(), gates=torch.ones(3, 3)).__enter__(),
        ["gates:", "(2, 2)", "(3, 3)"],
    ),
    "given gates of several lengths": (
        lambda: given_route(adapted(), gates=[[1.0], [0.0, 1.0]]).__enter__(),
        ["gates:", "(2, 2)", "[[1.0], [0.0, 1.0]]"],
    ),
    "given gates that are NaN": (
        lambda: given_route(adapted(), gates=torch.full((2, 2), torch.nan)).__enter__(),
        ["gates:", "finite"],
    ),
    "a group of a router": (lambda: add_group(adapted()), ["adapter_name:", "routing='given'"]),
    "a group without a name": (
        lambda: add_group(adapted(routing="given", group_names=["a", "b"])),
        ["name:", "other than ['a', 'b']", "None"],
    ),
    "a group with a name": (lambda: add_group(adapted(routing="given"), name="a"), ["name:", "no name", "'a'"]),
    "too few names of groups": (lambda: TuckAConfig(k=2, group_names=["a"]), ["group_names:", "2 different names"]),
    "equal names of groups": (lambda: TuckAConfig(k=2, group_names=["a", "a"]), ["group_names:", "['a', 'a']"]),
    "a given group that is none": (lambda: given_route(adapted(), groups=[11]).__enter__(), ["group", "11"]),
    "a merge of a routed adapter": (lambda: adapted().merge_and_unload(), ["merge:", "pinned", "pin_route"]),
    # A model of one's own
    "no targets": (lambda: mlp(target_modules=None), ["target_modules:", "None", "'0', '2'", "'all-linear'"]),
    "k as text": (lambda: mlp(k="4"), ["k:", "whole number", "'4'", "TuckAConfig"]),
    "a dropout above one": (lambda: mlp(dropout=1.5), ["dropout:", "below 1", "1.5"]),
    "a norm of factors that is none": (lambda: mlp(factor_norm="unit"), ["factor_norm:", "'columns'", "'unit'"]),
    "a kind of tokens that is none": (lambda: mlp(route_tokens="answer"), ["route_tokens:", "'prompt'", "'answer'"]),
    "an input that is none": (lambda: mlp(input_names={"pad": "mask"}), ["input_names['pad']:", "'mask'"]),
    "LoRA's word for biases": (lambda: mlp(bias="lora_only"), ["bias:", "'tucka_only'", "'lora_only'"]),
    "a size that is a word": (lambda: mlp(alpha_pattern={"0": "big"}), ["alpha_pattern['0']:", "finite", "'big'"]),
    "pinned gates of other sizes": (lambda: mlp(pinned_gates=[[1.0]]), ["pinned_gates:", "2 lists of 2", "[[1.0]]"]),
    "a router at a layer without adapter": (lambda: mlp(router_module="1"), ["router_module:", "adapted layer", "'1'"]),
    "inputs of another width": (lambda: mlp()(torch.ones(6, 5)), ["x:", "d = 4", "(6, 5)", "width"]),
    "a load of another adapter": (lambda: expert_load(mlp(), adapter_name="b"), ["adapter_name:", "TuckA", "'b'"]),
    "a route of another part": (
        lambda: last_route(after_a_forward(mlp()), part="tower"),
        ["part:", "one of ''", "'tower'", "last_route"],
    ),
    "a route before a forward": (lambda: last_route(mlp()), ["model:", "has not", "Call the model first"]),
    "a load of another length": (lambda: balance_router(mlp(balance_rate=0.1), [1, 2, 3]), ["load:", "k = 2", "(3,)"]),
    "a start of a pinned router": (
        lambda: initialize_router(pinned(), [torch.ones(2, 4)]),
        ["adapter_name:", "pinned", "unpin_route(model)"],
    ),
    "a start of a router that there is not": (
        lambda: initialize_router(mlp(routing="given"), [torch.ones(2, 4)]),
        ["adapter_name:", "no router"],
    ),
    "NumPy batches": (
        lambda: initialize_router(mlp(), [np.ones((2, 4))], progress=False),
        ["batches:", "ndarray", "torch.as_tensor"],
    ),
    "no batches at most": (lambda: initialize_router(mlp(), [], max_batches=0), ["max_batches:", "at least 1", "0"]),
    "a name that no group has": (
        lambda: call_given(mlp(routing="given", group_names=["a", "b"]), ["c"] * 6),
        ["group:", "['a', 'b']", "'c'"],
    ),
    "groups of fewer samples": (lambda: call_given(mlp(routing="given"), [0, 1]), ["route:", "2", "(6, 4)"]),
    "no groups": (lambda: mlp(routing="given")(torch.ones(2, 4)), ["route:", "no router", "given_route(model"]),
    "an export with other gates": (lambda: export_lora(mlp(), "x", gates=[[1.0]]), ["gates:", "(2, 2)", "[[1.0]]"]),
    "an export of a plain model": (lambda: export_lora(nn.Linear(2, 2), "x"), ["model:", "Linear", "get_peft_model"]),
    "a scope of a plain model": (lambda: routing_scope(nn.Linear(2, 2)).__enter__(), ["model:", "get_peft_model"]),
    "a window of no steps": (lambda: RouterCallback(collapse_window=0), ["collapse_window:", "at least 1", "0"]),
    "an entropy above one": (lambda: RouterCallback(collapse_below=2), ["collapse_below:", "at most 1", "2"]),
    "an alarm that always rings": (lambda: tucka.CollapseAlarm("a", below=2), ["below:", "at most 1", "2"]),
    # Figures
    "a table that is an array": (
        lambda: group_by_label(np.ones((2, 3))),
        ["load_table:", "ndarray", "{'news'"],
    ),
    "a table that is a model": (lambda: group_by_label(mlp()), ["load_table:", "mapping", "expert_load(model)"]),
    "a model before its batches": (
        lambda: routing_map(mlp(), [torch.ones(2, 4)]),
        ["features:", "PeftModel", "routing_map(batches, model)"],
    ),
    "a map of a plain model": (lambda: routing_map([torch.ones(2, 4)], nn.Linear(4, 4)), ["model:", "get_peft_model"]),
    "bars of a plain model": (lambda: load_bars(nn.Linear(4, 4)), ["model:", "Linear", "get_peft_model"]),
    "bars of nothing": (lambda: load_bars([]), ["load:", "counts (k)", "(0,)"]),
    "a method without accuracy": (
        lambda: tradeoff([("a", 5)]),
        ["points:", "accuracy)", "('a', 5)"],
    ),
    # Counts and files
    "a word of another count": (
        lambda: tucka.compare_methods([(4, 4)], {"lora": {"rank": 2}}, tokens=3),
        ["rank:", "The word here is r"],
    ),
    "a count of no tokens": (
        lambda: tucka.count_flops("lora", [(4, 4)], tokens=0, r=2),
        ["tokens:", "at least 1", "0"],
    ),
    "a folder that there is not": (lambda: load_adapter(nn.Linear(4, 4), "nowhere"), ["nowhere/adapter_config.json"]),
    "a mode too many": (
        lambda: tucka.mode_product(np.ones((2, 3)), np.ones((4, 3)), mode=5),
        ["mode:", "-2 to 1"],
    ),
    "a mask of other sizes": (
        lambda: tucka.routing_feature(np.ones((2, 3, 4)), mask=np.ones((2, 4)), routing="sample"),
        ["mask:", "(2, 3)", "(2, 4)"],
    ),
    "a method that is none": (lambda: tucka.count_parameters("loar", [(4, 4)], r=2), ["method:", "'lora'", "'loar'"]),
    "a count without rank": (lambda: tucka.count_parameters("lora", [(4, 4)], r=0), ["r:", "at least 1", "0"]),
    "a layer of one width": (lambda: tucka.count_parameters("lora", [(4,)], r=2), ["layers[0]:", "(in, out)", "(4,)"]),
    "the other word in a count": (lambda: tucka.count_parameters("lora", [(4, 4)], rank=2), ["The word here is r"]),
    "a file for another affinity": (
        lambda: load_official_checkpoint(adapted(), "missing"),
        ["affinity:", "'group_norm'", "TuckAConfig(affinity='group_norm'"],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_says_what_is_wrong_and_what_helps(name):
    call, words = CALLS[name]
    with pytest.raises(TuckaError) as caught:
        call()
    message = str(caught.value)
    assert MESSAGE.match(message)
    assert [word for word in words if word not in message] == []


def test_there_are_many():
    assert len(CALLS) >= 85
