"""What the layers of one call share: as if each had made its own core."""

import copy
import gc
import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn

from support.adapting import config_for, visible
from support.changing import CHANGES
from support.tiny_models import text
from support.upstream import checkpoint_layers
from tucka.backends.torch import Router, thin, together
from tucka.backends.torch.routing.scope import scope_of
from tucka.backends.torch.thin import FEW
from tucka.backends.torch.together import Group, Opened, Shared
from tucka.peft import TuckAConfig, given_route, pin_route
from tucka.peft.layer import TuckALayer

ROUTINGS = ["batch", "sample", "token", "pinned"]
routings = pytest.mark.parametrize("routing", ROUTINGS)


def model_of(routing, kind="llama", **options):
    model = visible(kind, "batch" if routing == "pinned" else routing, k=3, **options).double()
    if routing == "pinned":
        pin_route(model, group=1)
    for module in model.modules():
        if isinstance(module, Router):  # else the first batches of a training would start it
            module.initialize(module.centroids.detach().clone())
    return model


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, TuckALayer)]


def inputs():
    return text(batch=3, length=9)  # more rows than those that a generation's steps take


@pytest.fixture
def made(monkeypatch):
    """Count the mixings of several layers at once."""
    found = []
    whole = Group.made
    monkeypatch.setattr(Group, "made", lambda self, gates: (found.append(len(self.parts)), whole(self, gates))[1])
    return found


@pytest.fixture
def alone(monkeypatch):
    """Let layers share nothing."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(Shared, "core", lambda self, *args: None)
            return function()

    return call


def outcome(model, act=lambda model: model(**inputs()).logits):
    """Run and train once: the outputs, and the gradient of every parameter."""
    model.zero_grad()
    logits = act(model)
    logits.square().sum().backward()
    return logits.detach(), {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


def assert_same(found, wanted):
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-10, atol=1e-12)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] is None) == (gradient is None), name
        if gradient is not None:
            torch.testing.assert_close(found[1][name], gradient, rtol=1e-8, atol=1e-12, msg=name)


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_outputs_and_gradients_are_those_of_layers_alone(routing, kind, alone, made):
    model = model_of(routing, kind).train()
    act = lambda model: model(**inputs(), **({"labels": inputs()["input_ids"]} if kind == "t5" else {})).logits  # noqa: E731
    assert_same(outcome(model, act), alone(lambda: outcome(model, act)))
    assert made[0] >= 2


@routings
@pytest.mark.parametrize("turns", [True, False])
def test_outputs_without_gradients_are_the_same_to_the_bit(routing, turns, alone, monkeypatch):
    monkeypatch.setattr(thin, "TURNS", turns)
    model = model_of(routing).float().eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs()).logits, alone(lambda: model(**inputs()).logits))


@routings
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(("rows", "shares"), [(FEW, False), (FEW + 1, True)])
def test_layers_after_the_first_go_on_with_what_it_has_found(monkeypatch, routing, trains, rows, shares):
    """But for few rows, which a generation's steps take."""
    found, adapted = [], Opened.adapted
    monkeypatch.setattr(Opened, "adapted", lambda self, layer, x: (found.append(adapted(self, layer, x)), found[-1])[1])
    model = model_of(routing)
    with torch.set_grad_enabled(trains):
        model(**text(batch=1, length=rows))
    assert [value is not None for value in found] == [True] * (len(layers_of(model)) - 1) * shares


@pytest.fixture
def sliced(monkeypatch):
    """Count how often the layers' slices are made together."""
    found, whole = [], together.Slices
    monkeypatch.setattr(together, "Slices", lambda *args, **options: (found.append(1), whole(*args, **options))[1])
    return found


@pytest.mark.each_value
@pytest.mark.parametrize("routing", ["batch", "token", "pinned"])  # samples have gates as batches have
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_calls_counts_in_the_next(routing, change, alone, sliced):
    """Calls without gradients go on with what the second of them has kept."""

    def run():
        model = model_of(routing).float().eval()
        with torch.no_grad():
            before = [model(**inputs()).logits for _ in range(4)]
            CHANGES[change](model)
            return [*before, *(model(**inputs()).logits for _ in range(3))]

    found = run()
    assert 2 <= len(sliced) <= 4
    assert all(map(torch.equal, found, alone(run)))
    assert all(torch.equal(found[0], later) for later in found[1:4])
    assert not torch.equal(found[3], found[4])


@pytest.mark.parametrize("routing", ["batch", "pinned"])
def test_routes_of_later_calls_are_their_own(routing, alone):
    """Of other inputs, given by a caller, and written past the counter of what is pinned."""
    model = model_of(routing).eval()
    pinned = scope_of(model).pinned if routing == "pinned" else {}

    def run():
        found = [model(**inputs()).logits for _ in range(3)]
        found.append(model(input_ids=inputs()["input_ids"].flip(0, 1)).logits)
        with given_route(model, groups=[0, 1, 2]):
            found.append(model(**inputs()).logits)
        for gates in pinned.values():
            gates.data.mul_(2.0)
        found.append(model(**inputs()).logits)
        for gates in pinned.values():
            gates.data.mul_(0.5)
        return found

    with torch.no_grad():
        found = run()
        assert all(map(torch.equal, found, alone(run)))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], found[5]) == (routing == "batch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cast_model_goes_on_with_gates_of_another_dtype(dtype, alone):
    def run():
        model = model_of("batch").eval()
        found = [model(**inputs()).logits for _ in range(3)]
        model.to(dtype)
        return [*found, *(model(**inputs()).logits for _ in range(3))]

    with torch.no_grad():
        assert all(map(torch.equal, run(), alone(run)))


def test_a_training_keeps_nothing_for_calls_without_gradients(sliced):
    """Each of its steps changes the numbers, and copying them would be for nothing."""
    model = model_of("batch")
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    for _ in range(3):
        outcome(model)
        optimizer.step()
        with torch.no_grad():
            model(**inputs())
    (group,) = scope_of(model).forwards.groups.values()
    assert len(sliced) == 3
    assert [kept._copies for kept in group._kept.values()] == [None]


def test_gates_that_are_written_in_place_are_others(monkeypatch):
    model, found, whole = model_of("batch"), [], Group.made
    monkeypatch.setattr(Group, "made", lambda self, gates: (found.append(whole(self, gates)), found[-1])[1])
    with torch.no_grad():
        model(**inputs())
    (made,) = found
    parts, gates = made.group.parts[0], made.gates
    assert made.core(parts, gates) is not None
    gates.mul_(1)
    assert made.core(parts, gates) is None


@pytest.mark.parametrize(("routing", "rows"), [("batch", 1), ("sample", 3), ("token", 0)])
@pytest.mark.parametrize("less", [0, 1])
def test_large_cores_are_made_layer_by_layer(monkeypatch, routing, rows, less):
    """Those of all experts, and of the rows that they are mixed for, unless these are as many as the tokens."""
    model, found, whole = model_of(routing), [], Group.made
    layers = layers_of(model)
    groups, slices, rank, _ = layers[0].experts("default").cores.shape
    numbers = len(layers) * rank**2 * (rows + groups * slices)
    monkeypatch.setattr("tucka.backends.torch.together._MOST", numbers - less)
    monkeypatch.setattr(Group, "made", lambda self, gates: (found.append(whole(self, gates)), found[-1])[1])
    model(**inputs())
    assert [made is not None for made in found] == [not less]


@routings
@pytest.mark.parametrize("norm", [None, "frobenius"])
def test_other_norms_of_the_factors(routing, norm, alone):
    model = model_of(routing, factor_norm=norm).train()
    assert_same(outcome(model), alone(lambda: outcome(model)))


@routings
def test_layers_have_scales_of_their_own(routing, alone):
    model = model_of(routing).train()
    for place, layer in enumerate(layers_of(model)):
        layer.set_scale("default", 1 + place / 4)
    assert_same(outcome(model), alone(lambda: outcome(model)))


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("norm", ["columns", "rotation"])
@pytest.mark.parametrize("name", ["cores", "expert_factor", "basis"])
def test_a_frozen_part_of_the_layers_hides_no_other_gradient(routing, norm, name):
    model = model_of(routing, factor_norm=norm)
    wanted = outcome(model)
    for layer in layers_of(model):
        getattr(layer.experts("default"), name).requires_grad_(False)
    found = outcome(model)
    assert_same(found, (wanted[0], {each: wanted[1][each] for each in found[1]}))
    assert len(wanted[1]) - len(found[1]) == len(layers_of(model))


@routings
def test_a_layer_that_is_not_used_gets_no_gradient(routing, alone):
    model = model_of(routing).train()
    last = layers_of(model)[-1]
    last.forward = last.base_layer.forward
    found = outcome(model)
    assert_same(found, alone(lambda: outcome(model)))
    assert last.experts("default").cores.grad is None
    assert last.experts("default").basis.grad is None


@routings
@pytest.mark.parametrize("reentrant", [False, True])
def test_regions_that_are_computed_again(routing, reentrant, alone):
    model = model_of(routing).train()
    wanted = alone(lambda: outcome(model))
    checkpoint_layers(model, reentrant=reentrant)
    model.enable_input_require_grads()
    assert_same(outcome(model), wanted)


def test_layers_in_graphs_of_their_own(alone):
    """Each half of a model has its own loss, and no gradient goes from one to the other."""
    model = model_of("pinned").train()
    blocks = model.base_model.model.model.layers

    def act():
        model.zero_grad()
        kept = []
        handle = blocks[0].register_forward_hook(lambda _m, _a, out: (kept.append(out), out.detach())[1])
        loss = model(**inputs()).logits.square().sum()
        handle.remove()
        loss.backward()
        kept[0].square().sum().backward()
        return loss.detach(), {name: value.grad for name, value in model.named_parameters() if value.requires_grad}

    assert_same(act(), alone(act))


@pytest.mark.parametrize("part", ["expert_factor", "strength"])
def test_a_part_that_is_written_before_the_backward_is_refused(part):
    model = model_of("batch").train()
    loss = model(**inputs()).logits.square().sum()
    with torch.no_grad():
        getattr(layers_of(model)[0].experts("default"), part).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _write(parts):
    with torch.no_grad():
        parts.cores.mul_(2.0)


def _strengthen(parts):
    parts.strength.mul_(1.5)


def _replace(parts):
    parts.basis = nn.Parameter(parts.basis.detach() * 1.5)


def _rescale(parts):
    parts.scale = 0.25


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("change", [_write, _strengthen, _replace, _rescale])
@pytest.mark.parametrize("trains", [False, True])
def test_a_hook_changes_a_later_layer_while_the_call_runs(routing, change, trains, alone):
    def act():
        model = model_of(routing).train(trains)
        first, last = layers_of(model)[0], layers_of(model)[-1]
        first.base_layer.register_forward_hook(lambda *_: change(last.experts("default")))
        with torch.set_grad_enabled(trains):
            return model(**inputs()).logits.detach()

    found = act()
    torch.testing.assert_close(found, alone(act), rtol=1e-10, atol=1e-12)
    undisturbed = model_of(routing).eval()(**inputs()).logits
    assert not torch.allclose(found, undisturbed)


def test_a_hook_disables_the_adapters_while_the_call_runs(alone):
    def act():
        model = model_of("sample").eval()
        first = layers_of(model)[0]
        first.base_layer.register_forward_hook(lambda *_: model.base_model.disable_adapter_layers())
        with torch.no_grad():
            return model(**inputs()).logits

    torch.testing.assert_close(act(), alone(act), rtol=0, atol=0)


@routings
def test_hooks_of_base_layers_see_each_call(routing):
    model = model_of(routing).eval()
    seen = []
    for layer in layers_of(model):
        layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(module))
    with torch.no_grad():
        model(**inputs())
    assert len(seen) == len(layers_of(model))


@pytest.mark.parametrize("when", ["one layer has both", "all layers have both"])
def test_two_active_adapters(when, alone):
    model = model_of("sample").eval()
    torch.manual_seed(5)
    config = config_for("llama", routing="sample", init_weights=False, affinity="dot")
    if when == "one layer has both":
        config.target_modules = {"q_proj"}
    model.add_adapter("other", config)
    model.double().base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        found = model(**inputs()).logits
        torch.testing.assert_close(found, alone(lambda: model(**inputs()).logits), rtol=1e-10, atol=1e-12)
        model.base_model.set_adapter("default")
        assert not torch.allclose(model(**inputs()).logits, found)


@routings
def test_inputs_that_are_dropped(routing, alone):
    model = model_of(routing, dropout=0.5).train()

    def act(model):
        torch.manual_seed(7)
        return model(**inputs()).logits

    assert_same(outcome(model, act), alone(lambda: outcome(model, act)))


def test_a_route_that_is_given_to_a_pinned_model(alone):
    model = model_of("pinned").eval()
    with torch.no_grad(), given_route(model, groups=[0, 1, 2]):
        found = model(**inputs()).logits
        assert torch.equal(found, alone(lambda: model(**inputs()).logits))
    assert not torch.allclose(found, model(**inputs()).logits)


@routings
def test_a_strength_counts_after_the_model_was_moved(routing, alone):
    model = model_of(routing).eval()
    with torch.no_grad():
        before = model(**inputs()).logits
        model.float()  # which puts other tensors in the places of buffers
        assert torch.equal(model(**inputs()).logits, alone(lambda: model(**inputs()).logits))
        for layer in layers_of(model):
            layer.experts("default").strength.mul_(1.5)
        found = model(**inputs()).logits
        assert torch.equal(found, alone(lambda: model(**inputs()).logits))
    assert not torch.allclose(found.double(), before, atol=1e-4)


def test_a_copy_of_a_model_shares_among_its_own_layers(alone):
    model = model_of("batch").eval()
    with torch.no_grad():
        before = [model(**inputs()).logits for _ in range(3)][-1]
        other = copy.deepcopy(model)
        for layer in layers_of(other):
            layer.experts("default").cores.mul_(3.0)
        assert torch.equal(model(**inputs()).logits, before)
        found = other(**inputs()).logits
        assert torch.equal(found, alone(lambda: other(**inputs()).logits))
    assert not torch.allclose(found, before)


@routings
def test_second_derivatives(routing, alone):
    model = model_of(routing).train()
    model.base_model.model.set_attn_implementation("eager")  # torch's own attention has no second derivative
    parts = layers_of(model)[1].experts("default")

    def act():
        loss = model(**inputs()).logits.square().mean()
        gradients = torch.autograd.grad(loss, [parts.cores, parts.basis, parts.expert_factor], create_graph=True)
        total = sum(gradient.square().sum() for gradient in gradients)
        return torch.autograd.grad(total, [parts.cores, parts.basis, parts.expert_factor])

    for found, wanted in zip(act(), alone(act), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-12)


def test_a_convolution_whose_inputs_look_like_those_of_linear_layers(alone):
    """Its channels are on the axis on which they have tokens, and all sizes are equal."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.Conv1d(8, 8, 1), nn.Linear(8, 8))
    names = [str(place) for place in range(6)]
    config = TuckAConfig(r=4, k=2, target_modules=names, routing="sample", init_weights=False)
    model = get_peft_model(base, config).double().eval()
    x = torch.randn(5, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), alone(lambda: model(x)), rtol=1e-12, atol=1e-12)


def test_a_deleted_adapter_leaves_nothing_behind():
    model = model_of("sample").eval()
    model.add_adapter("other", config_for("llama", routing="sample", init_weights=False, affinity="dot"))
    model.double().base_model.set_adapter("other")
    with torch.no_grad():
        model(**inputs())
    kept = [weakref.ref(layer.experts("other")) for layer in layers_of(model)]
    model.base_model.set_adapter("default")  # PEFT warns where an active one is deleted
    model.delete_adapter("other")
    gc.collect()
    assert kept
    assert [each() for each in kept] == [None] * len(kept)
