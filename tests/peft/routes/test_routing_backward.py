"""Gradients when layers are computed again in the backward: gradient checkpointing that is not reentrant."""

import copy
import functools

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AlbertConfig, AlbertForSequenceClassification

from support.adapting import adapt, gradients
from support.tiny_models import VOCABULARY, WIDTH, inputs_for, loss_of, text
from support.upstream import checkpoint_layers, free_layers
from tucka.backends.torch import routing_scope
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import TuckAConfig, expert_load

kinds = pytest.mark.parametrize("kind", ["llama", "bert", "opt", "gpt2", "t5", "vit"])
routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


def pair(kind, routing="batch", **options):
    """Two equal models in training, the second one with gradient checkpointing."""
    options = {"init_weights": False, "affinity": "dot", **options}
    plain = adapt(kind, dtype=torch.float64, routing=routing, **options).train()
    checkpointed = copy.deepcopy(plain)
    checkpoint_layers(checkpointed)
    checkpointed.enable_input_require_grads()
    plain.enable_input_require_grads()
    return plain, checkpointed


def assert_same_gradients(one, other):
    ours, theirs = gradients(one), gradients(other)
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("centroids") for name in ours)
    for name, gradient in ours.items():
        torch.testing.assert_close(theirs[name], gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.each_value
@kinds
@routings
def test_checkpointing_changes_no_gradient(kind, routing):
    plain, checkpointed = pair(kind, routing)
    for model in (plain, checkpointed):
        loss_of(model, inputs_for(kind, dtype=torch.float64)).backward()
    assert_same_gradients(plain, checkpointed)
    assert expert_load(plain).tolist() == expert_load(checkpointed).tolist()


@pytest.mark.each_value
@kinds
@routings
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_forwards_before_one_backward(kind, routing, order):
    plain, checkpointed = pair(kind, routing, k=4)
    for model in (plain, checkpointed):
        losses = [loss_of(model, inputs_for(kind, dtype=torch.float64, seed=seed)) for seed in (1, 2)]
        (losses[order[0]] - 0.5 * losses[order[1]]).backward()
    assert_same_gradients(plain, checkpointed)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_two_forwards_and_two_backwards_in_any_order(kind):
    plain, checkpointed = pair(kind, "sample")
    for model in (plain, checkpointed):
        losses = [loss_of(model, inputs_for(kind, dtype=torch.float64, seed=seed)) for seed in (1, 2)]
        losses[0].backward()
        losses[1].backward(retain_graph=True)
        losses[1].backward()
    assert_same_gradients(plain, checkpointed)


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_accumulated_gradients(routing):
    plain, checkpointed = pair("bert", routing)
    for model in (plain, checkpointed):
        for seed in (1, 2, 3):
            loss_of(model, inputs_for("bert", seed=seed)).backward()
    assert_same_gradients(plain, checkpointed)


@routings
def test_layers_that_share_their_weights_route_once(routing):
    """One layer is called at each depth; only its first call makes the route."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "embedding_size": 8, "intermediate_size": 24, "num_attention_heads": 2}
    config = AlbertConfig(vocab_size=VOCABULARY, num_hidden_layers=4, initializer_range=0.3, **sizes)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = config.classifier_dropout_prob = 0.0
    base = AlbertForSequenceClassification(config).double()
    adapter = TuckAConfig(r=4, target_modules=["query", "ffn"], routing=routing, init_weights=False)
    plain = get_peft_model(base, adapter).train()
    checkpointed = copy.deepcopy(plain)
    layer = checkpointed.base_model.model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(inner, *args, use_reentrant=False, **kwargs)
    inputs = {**text(), "labels": torch.tensor([0, 1, 1])}
    for model in (plain, checkpointed):
        loss_of(model, inputs).backward()
        assert int(expert_load(model).sum()) == {"batch": 1, "sample": 3, "token": 18}[routing]
    assert_same_gradients(plain, checkpointed)


@routings
def test_selective_checkpointing_changes_no_gradient(routing):
    """It keeps some operations' results by their number, so the route's own must not count among them."""
    plain, checkpointed = pair("bert", routing, affinity="directional")
    free_layers(checkpointed)
    kept = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    for layer in checkpointed.base_model.model.bert.encoder.layer:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
    for model in (plain, checkpointed):
        loss_of(model, inputs_for("bert", dtype=torch.float64)).backward()
    assert_same_gradients(plain, checkpointed)


def test_a_loss_on_hidden_states_that_bypass_the_output():
    plain, checkpointed = pair("llama", "sample")
    for model in (plain, checkpointed):
        caught = []
        norm = model.base_model.model.model.norm
        norm.register_forward_hook(lambda module, args, out, caught=caught: caught.append(out))
        model(**inputs_for("llama"))
        caught[0].square().mean().backward()
    assert_same_gradients(plain, checkpointed)


def test_a_backbone_in_a_routing_scope():
    plain, checkpointed = pair("llama", "sample")
    for model in (plain, checkpointed):
        inputs = text()
        with routing_scope(model, attention_mask=inputs["attention_mask"]):
            hidden = model.base_model.model.model(**inputs).last_hidden_state
        hidden.square().mean().backward()
    assert_same_gradients(plain, checkpointed)


@routings
def test_two_forwards_that_are_read_by_hooks_before_one_backward(routing):
    plain, checkpointed = pair("llama", routing, k=4)
    for model in (plain, checkpointed):
        caught = []
        norm = model.base_model.model.model.norm
        norm.register_forward_hook(lambda module, args, out, caught=caught: caught.append(out))
        for seed in (1, 2):
            model(**inputs_for("llama", seed=seed))
        (caught[0] - 0.5 * caught[1]).square().mean().backward()
    assert_same_gradients(plain, checkpointed)


def test_copies_and_outputs_hold_no_graph_of_the_scope():
    _, model = pair("llama", "sample")
    output = model(**inputs_for("llama"))
    twin = copy.deepcopy(model)
    output.loss.backward()
    assert not gradients(twin)
    scope = scope_of(model)
    assert scope.last["default"][""].shape == (3, 3, 2)
    assert not any(gates.requires_grad for parts in scope.last.values() for gates in parts.values())


def test_functional_transformations_work_on_an_adapted_model():
    model = adapt("plain", dtype=torch.float64, routing="sample", init_weights=False)
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        return torch.func.functional_call(model, values, (x,)).square().mean()

    functional = torch.func.grad(loss)(parameters)
    model(x).square().mean().backward()
    for name, gradient in functional.items():
        torch.testing.assert_close(gradient, parameters[name].grad)


class Mixed(nn.Module):
    """Returns something that torch's tree functions do not open."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        class Result:
            value = checkpoint(lambda y: self.second(torch.tanh(self.first(y))), x, use_reentrant=False)

        return Result()


def test_an_output_of_an_unknown_kind():
    torch.manual_seed(0)
    config = TuckAConfig(r=4, target_modules=["first", "second"], init_weights=False, routing="sample")
    model = get_peft_model(Mixed().double(), config).eval()  # in training the router would start itself in between
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    model(x).value.square().sum().backward()
    root = model.base_model.model
    got = gradients(model)
    model.zero_grad()
    with routing_scope(model):
        root.second(torch.tanh(root.first(x))).square().sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=1e-12)
