"""A forward with gradients and no backward leaves nothing behind."""

import gc

import pytest
import torch

from support.adapting import adapt
from support.routed import FAMILIES, routed
from support.tiny_models import WIDTH, inputs_for, tokens
from support.upstream import checkpoint_layers
from tucka.backends.torch import routing_scope
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import ShapeError
from tucka.peft import given_route

routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


def started(model):
    """A model whose routers collect no first batches any more."""
    for router in scope_of(model).routers("default").values():
        router.is_initialized.fill_(True)
    return model


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """Objects that tests find are not looked at again and again: there are a million."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tensors_left(run, *, times=20):
    """How many more tensors there are after many runs than after a few."""

    def alive():
        gc.collect()
        # By their types: some objects warn when they are asked for their class.
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    for _ in range(4):
        run()
    before = alive()
    for _ in range(times):
        run()
    return alive() - before


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "clip", "plain"])
@routings
@pytest.mark.parametrize("checkpointed", [False, True])
def test_forwards_whose_outputs_are_dropped(kind, routing, checkpointed):
    model, inputs = started(adapt(kind, routing=routing)).train(), inputs_for(kind)
    if checkpointed:
        if kind == "plain":
            pytest.skip("a plain model has no checkpointing of its own")
        checkpoint_layers(model)
        model.enable_input_require_grads()
    assert tensors_left(lambda: model(**inputs)) == 0


@routings
def test_forwards_that_return_a_cache(routing):
    model, inputs = started(adapt("llama", routing=routing)).train(), inputs_for("llama")
    assert tensors_left(lambda: model(**inputs, use_cache=True)) == 0


@routings
def test_layers_that_see_cached_tokens_again(routing):
    base = FAMILIES["deepseek-v3"].build()
    base.set_experts_implementation("eager")
    model = started(routed(base, ["q_b_proj", "kv_b_proj"], routing)).train()
    assert tensors_left(lambda: model(input_ids=tokens(2, 5), use_cache=True), times=5) == 0


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_gradient_of_a_part_of_the_graph(routing, checkpointed):
    """The backward does not reach the layers before."""
    model = started(adapt("llama", routing=routing)).train()
    head = model.base_model.model.lm_head.weight.requires_grad_(True)
    if checkpointed:
        checkpoint_layers(model)
        model.enable_input_require_grads()
    ids = tokens(2, 5)
    assert tensors_left(lambda: torch.autograd.grad(model(input_ids=ids).logits.sum(), [head])) == 0


@routings
def test_scopes_given_routes_and_errors(routing):
    model, x = started(adapt("plain", routing=routing)).train(), torch.randn(3, WIDTH)
    root = model.base_model.model

    def run():
        with routing_scope(model):
            root.second(root.first(x))
        with given_route(model, groups=[0, 1, 2]):
            model(x)
        with pytest.raises(ShapeError), routing_scope(model):
            root.second(root.head(root.first(x)))

    assert tensors_left(run, times=5) == 0


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["llama", "t5"])
@routings
def test_generation(kind, routing):
    model, ids = started(adapt(kind, routing=routing)), tokens(1, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    assert tensors_left(lambda: model.generate(input_ids=ids, **options), times=3) == 0


@routings
def test_training_steps(routing):
    model, inputs = started(adapt("bert", routing=routing)).train(), inputs_for("bert")

    def run():
        model(**inputs).loss.backward()

    assert tensors_left(run) == 0
