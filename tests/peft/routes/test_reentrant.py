"""Reentrant gradient checkpointing, with routers that train: each checkpoint has a backward of its own."""

import copy
import gc

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM

from support.adapting import adapt, gradients
from support.tiny_models import VOCABULARY, WIDTH, inputs_for, loss_of, make, text
from support.upstream import checkpoint_layers
from tucka.backends.torch import routing_scope
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import RouteError
from tucka.peft import TuckAConfig, expert_load, given_route, pin_route

kinds = pytest.mark.parametrize("kind", ["llama", "bert", "opt", "gpt2", "t5", "vit"])
routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])
# Torch warns of a checkpoint inside of another, whose first run has no gradients.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def started(model):
    """Leave the centroids as they are in training, but make them tell groups apart."""
    for router in scope_of(model).routers("default").values():
        with torch.no_grad():
            router.is_initialized.fill_(1.0)
            router.centroids.mul_(3.0)
    return model


def pair(kind, routing="batch", **options):
    """Two equal models in training, the second one with reentrant checkpointing, as transformers switches it on."""
    plain = adapt(kind, dtype=torch.float64, routing=routing, init_weights=False, affinity="dot", **options).train()
    if "centroids" in "".join(plain.state_dict()):
        started(plain)
    checkpointed = copy.deepcopy(plain)
    checkpoint_layers(checkpointed, reentrant=True)
    for model in (plain, checkpointed):
        model.enable_input_require_grads()
    return plain, checkpointed


def assert_same(one, other, *, trains=True):
    ours, theirs = gradients(one), gradients(other)
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("centroids") for name in ours) == trains
    for name, gradient in ours.items():
        torch.testing.assert_close(theirs[name], gradient, **CLOSE)
        assert gradient.any() or not name.endswith("centroids")
    one.zero_grad()
    other.zero_grad()


@pytest.mark.each_value
@kinds
@routings
def test_it_changes_no_gradient(kind, routing):
    plain, checkpointed = pair(kind, routing, k=4)
    for model in (plain, checkpointed):
        loss_of(model, inputs_for(kind, dtype=torch.float64)).backward()
    assert_same(plain, checkpointed)
    assert expert_load(plain).tolist() == expert_load(checkpointed).tolist()


@pytest.mark.each_value
@kinds
@routings
def test_several_forwards_and_backwards_in_any_order(kind, routing):
    plain, checkpointed = pair(kind, routing, k=4)
    for model in (plain, checkpointed):
        first, second, third = (loss_of(model, inputs_for(kind, dtype=torch.float64, seed=seed)) for seed in (1, 2, 3))
        (first - 0.5 * third).backward(retain_graph=True)
        second.backward()
        (third - 2.0 * first).backward()
    assert_same(plain, checkpointed)


class Chain(nn.Module):
    """Adapted layers, of which some are checkpointed together."""

    def __init__(self, order):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.order = order
        self.kinds = {"first": None, "second": None}  # of checkpoints; None for no checkpointing

    def layer(self, *numbers):
        def run(x):
            for number in numbers:
                x = x + torch.tanh(self.layers[number](x))
            return x

        return run

    def again(self, run, x, kind="first"):
        reentrant = self.kinds[kind]
        return run(x) if reentrant is None else checkpoint(run, x, use_reentrant=reentrant)

    def forward(self, x):
        return ORDERS[self.order](self, x)


def nested(net, x, inner):
    def part(x):
        x = net.again(net.layer(0), x, inner)
        return net.again(net.layer(2), net.layer(1)(x), inner)

    return part


ORDERS = {
    "all inside": lambda net, x: net.again(net.layer(4), net.again(net.layer(2, 3), net.again(net.layer(0, 1), x))),
    "the first outside": lambda net, x: net.again(net.layer(3, 4), net.again(net.layer(1, 2), net.layer(0)(x))),
    "one between": lambda net, x: net.again(net.layer(3, 4), net.layer(2)(net.again(net.layer(0, 1), x))),
    "the last outside": lambda net, x: net.layer(4)(net.again(net.layer(2, 3), net.again(net.layer(0, 1), x))),
    "means over tokens": lambda net, x: net.layer(4)(net.again(net.layer(3), net.again(net.layer(0), x).mean(1))),
    "one layer often": lambda net, x: net.again(net.layer(0, 1, 0), net.again(net.layer(0, 0), x)),
    "inside of each other": lambda net, x: net.again(net.layer(3, 4), net.again(nested(net, x, "first"), x)),
    "three deep": lambda net, x: net.again(
        net.layer(3, 4), net.again(lambda x: net.again(nested(net, x, "first"), x).sin(), x)
    ),
    "both kinds": lambda net, x: net.again(net.layer(3, 4), net.again(nested(net, x, "second"), x)),
    "both kinds, the other inside": lambda net, x: net.again(
        net.layer(3, 4), net.again(nested(net, x, "first"), x, "second")
    ),
    "branches": lambda net, x: net.again(net.layer(0, 1), x) * net.again(net.layer(2, 3, 4), x.sin()),
    "a branch without gradients": lambda net, x: (
        net.again(net.layer(0, 1), x).detach() * net.again(net.layer(2, 3, 4), x.sin())
    ),
}
WITHOUT_END = ("a branch without gradients",)
orders = pytest.mark.parametrize("order", [order for order in ORDERS if order not in WITHOUT_END])


def chains(order, routing="sample", **options):
    torch.manual_seed(0)
    config = TuckAConfig(
        r=4, k=4, target_modules=r"layers\.\d", routing=routing, init_weights=False, affinity="dot", **options
    )
    plain = started(get_peft_model(Chain(order).double(), config, autocast_adapter_dtype=False)).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.base_model.model.kinds = {"first": True, "second": False}
    return plain, checkpointed


def drawn(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 6, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.each_value
@orders
@routings
def test_checkpoints_in_any_order(order, routing):
    plain, checkpointed = chains(order, routing)
    inputs = []
    for model in (plain, checkpointed):
        x, y = drawn(1), drawn(2)
        first, second = model(x).square().sum(), model(y).cos().sum()
        (first - second).backward(retain_graph=True)
        second.backward()
        first.backward()
        inputs.append((x.grad, y.grad))
    torch.testing.assert_close(*inputs, **CLOSE)
    assert_same(plain, checkpointed)
    assert expert_load(plain).tolist() == expert_load(checkpointed).tolist()


@routings
def test_a_gradient_that_would_be_lost_is_refused(routing):
    _, model = chains("a branch without gradients", routing)
    with pytest.raises(RouteError, match="part of the route's gradient would be lost"):
        model(drawn()).sum().backward()


def train_only_experts(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".tucka_experts." in name)


def test_a_gradient_of_the_inputs_that_would_be_lost_is_refused():
    _, model = chains("a branch without gradients")
    train_only_experts(model)
    with pytest.raises(RouteError, match="part of the route's gradient would be lost"):
        model(drawn()).sum().backward()


def test_a_router_without_gradients_loses_none():
    """Only the last checkpoint gets a gradient, and nothing trains that its route depends on."""
    plain, checkpointed = chains("all inside")
    for model in (plain, checkpointed):
        train_only_experts(model)
        net = model.base_model.model
        with routing_scope(model):
            x = net.again(net.layer(0, 1), drawn().detach())
            net.again(net.layer(2, 3), x.detach().requires_grad_()).sum().backward()
    assert_same(plain, checkpointed, trains=False)


def test_a_route_that_turns_out_to_be_constant_loses_none():
    plain, checkpointed = chains("all inside")
    for model in (plain, checkpointed):
        train_only_experts(model)
        net = model.base_model.model
        with routing_scope(model):
            x = net.again(lambda x, net=net: net.layer(1)(net.layer(0)(x.detach()) + x), drawn())
            net.again(net.layer(2, 3), x).square().sum().backward()
    assert_same(plain, checkpointed, trains=False)


@pytest.mark.parametrize("order", ["all inside", "inside of each other", "the last outside"])
def test_nothing_is_left_behind(order):
    _, model = chains(order, "token")
    forwards = scope_of(model).forwards
    gc.collect()
    gc.disable()
    try:
        for backward in (False, True):
            y = model(drawn()).sum()
            assert len(forwards._by_frame) > 0
            if backward:
                y.backward()
            del y
            assert len(forwards._by_frame) == 0
            assert len(forwards._now) == 0
    finally:
        gc.enable()


def test_a_backward_inside_of_an_open_scope():
    plain, checkpointed = chains("all inside")
    for model in (plain, checkpointed):
        with routing_scope(model):
            ORDERS["all inside"](model.base_model.model, drawn()).square().sum().backward()
    assert_same(plain, checkpointed)


def test_a_backward_that_fails_leaves_nothing_for_the_next():
    plain, checkpointed = chains("all inside")
    model, x, failures = checkpointed, drawn(), [ValueError("once")]

    def fail_once(_gradient):
        if failures:
            raise failures.pop()

    loss = model(x).square().sum()
    x.register_hook(fail_once)
    with pytest.raises(ValueError, match="once"):
        loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    plain(drawn()).square().sum().backward()
    assert_same(plain, checkpointed)


def test_the_route_is_that_of_the_forward():
    """The choice is not made anew, though the bias that counts in it has moved."""
    plain, checkpointed = chains("all inside", balance_rate=1.0)
    for model in (plain, checkpointed):
        loss = model(drawn()).square().sum()
        chosen = scope_of(model).last["default"][""]
        router = scope_of(model).router("default")
        router.choice_bias.copy_(1e3 * (chosen.sum(dim=(0, 2)) == 0))  # else all would choose another group now
        loss.backward()
    assert_same(plain, checkpointed)


def test_the_numbers_of_the_route_are_those_of_the_forward():
    """Rounding may differ in the recomputation; here it does by a half."""
    plain, checkpointed = chains("all inside")
    scope_of(checkpointed).router("default").register_forward_hook(
        lambda _router, _args, gates: gates * 1.5 if gates.requires_grad else gates
    )
    for model in (plain, checkpointed):
        model(drawn()).square().sum().backward()
    ours, theirs = gradients(plain), gradients(checkpointed)
    for name, gradient in ours.items():
        if not name.endswith("centroids"):
            torch.testing.assert_close(theirs[name], gradient, **CLOSE)


def test_documents_that_share_a_row():
    plain, checkpointed = pair("llama", "sample", k=4)
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    for model in (plain, checkpointed):
        # Without a cache, as in checkpoints: transformers then keeps the documents apart in attention.
        loss_of(model, {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}).backward()
    assert_same(plain, checkpointed)


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["llama", "t5"])
@routings
def test_a_router_that_does_not_train(kind, routing):
    """The gradient of the inputs still goes through the route."""
    plain, checkpointed = pair(kind, routing, k=4)
    found = []
    for model in (plain, checkpointed):
        train_only_experts(model)
        caught = []
        model.get_input_embeddings().register_forward_hook(lambda _m, _a, out, caught=caught: caught.append(out))
        losses = [loss_of(model, inputs_for(kind, seed=seed)) for seed in (1, 2)]
        for embedded in caught:
            embedded.retain_grad()
        (losses[1] - 0.5 * losses[0]).backward()
        found.append([embedded.grad for embedded in caught])
    torch.testing.assert_close(*found, **CLOSE)
    assert_same(plain, checkpointed, trains=False)


@routings
def test_a_router_that_starts_itself(routing):
    plain, checkpointed = chains("all inside", routing)
    for model in (plain, checkpointed):
        router = scope_of(model).router("default")
        router._is_copy = False
        router.is_initialized.zero_()
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=1e-2)
        for seed in range(12):
            model(drawn(seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert bool(router.is_initialized)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(checkpointed.state_dict()[name], value, **CLOSE)
    assert expert_load(plain).tolist() == expert_load(checkpointed).tolist()


def test_a_start_between_a_forward_and_its_backward_is_refused():
    _, model = chains("all inside")
    router = scope_of(model).router("default")
    router._is_copy = False
    router.is_initialized.zero_()
    losses = [model(drawn(seed)).sum() for seed in range(4)]
    assert bool(router.is_initialized)
    with pytest.raises(RouteError, match="initialize_router"):
        losses[0].backward()
    losses[-1].backward()


@routings
def test_half_precision(routing):
    plain, checkpointed = (model.bfloat16() for model in chains("one between", routing))
    for model in (plain, checkpointed):
        model(drawn().detach().bfloat16().requires_grad_()).float().square().sum().backward()
    ours, theirs = gradients(plain), gradients(checkpointed)
    for name, gradient in ours.items():
        assert (theirs[name] - gradient).abs().max() <= 1e-2 * gradient.abs().max()


class Whole(LlamaForCausalLM):
    """Checkpoints the whole body."""

    reentrant = None

    def forward(self, input_ids, attention_mask):
        def body(x):
            return self.model(inputs_embeds=x, attention_mask=attention_mask, use_cache=False).last_hidden_state

        x = self.model.embed_tokens(input_ids).requires_grad_()
        x = body(x) if self.reentrant is None else checkpoint(body, x, use_reentrant=self.reentrant)
        return self.lm_head(x)


def wholes(reentrant, targets):
    torch.manual_seed(0)
    base = Whole(make("llama").config).double()
    options = {"routing": "sample", "init_weights": False, "affinity": "dot"}
    plain = get_peft_model(base, TuckAConfig(r=4, k=4, target_modules=targets, **options)).train()
    checkpointed = copy.deepcopy(started(plain))
    checkpointed.base_model.model.reentrant = reentrant
    return plain, checkpointed


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_call_in_a_checkpoint_counts_once(reentrant):
    plain, checkpointed = wholes(reentrant, ["q_proj", "down_proj"])
    for model in (plain, checkpointed):
        model(**text()).square().sum().backward()
    assert_same(plain, checkpointed)
    assert expert_load(plain).tolist() == expert_load(checkpointed).tolist()


def test_a_head_that_uses_the_route_of_a_call_in_a_checkpoint():
    plain, other = wholes(False, ["q_proj", "lm_head"])
    for model in (plain, other):
        model(**text()).square().sum().backward()
    assert_same(plain, other)
    _, model = wholes(True, ["q_proj", "lm_head"])
    with pytest.raises(RouteError, match="gradients where the route is made"):
        model(**text())
    pin_route(model, group=1)
    model(**text()).square().sum().backward()


def test_another_librarys_checkpoints_are_refused():
    class Theirs(torch.autograd.Function):
        @staticmethod
        def forward(ctx, run, x):
            with torch.no_grad():
                return run(x)

    _, model = chains("all inside")
    net = model.base_model.model
    net.again = lambda run, x: Theirs.apply(run, x)
    with pytest.raises(RouteError, match="another library"):
        model(drawn())


@pytest.mark.parametrize("options", [{"routing": "given"}, {"routing": "sample"}, {"pinned": True}], ids=str)
def test_a_route_that_the_caller_gives(options):
    options = dict(options)
    pinned = options.pop("pinned", False)
    plain, model = pair("llama", **options)
    for each in (plain, model):
        if pinned:
            pin_route(each, group=0)
        with given_route(each, groups=[0, 2, 1]):
            first = loss_of(each, inputs_for("llama"))
        with given_route(each, groups=[1, 1, 2]):
            (first - 0.5 * loss_of(each, inputs_for("llama"))).backward()
    assert_same(plain, model, trains=False)


def test_gates_of_the_caller_that_need_a_gradient():
    found = []
    for model in chains("the first outside"):
        gates = torch.rand(3, 4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with given_route(model, gates=gates.sin()):
            model(drawn()).square().sum().backward()
        found.append(gates.grad)
    torch.testing.assert_close(*found, **CLOSE)
    _, model = chains("all inside")
    with given_route(model, gates=gates), pytest.raises(RouteError, match="would be lost"):  # nothing makes them
        model(drawn()).square().sum().backward()


def test_a_pinned_route():
    plain, model = pair("llama")
    for each in (plain, model):
        pin_route(each, group=1)
        loss_of(each, inputs_for("llama")).backward()
    assert_same(plain, model, trains=False)
    with model.disable_adapter():
        loss_of(model, inputs_for("llama"))


@pytest.mark.parametrize("training", [False, True])
def test_it_evaluates(training):
    _, model = chains("all inside")
    router = scope_of(model).router("default")
    router._is_copy = False
    router.is_initialized.zero_()
    with torch.no_grad():
        for seed in range(6):
            model.train(training)(drawn(seed))
    assert not bool(router.is_initialized)  # nothing trains, so no router starts itself
    model.train()(drawn()).sum().backward()
