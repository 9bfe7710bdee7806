"""What the calls of a generation share: as if each had been made alone, whatever is changed between two tokens."""

import pytest
import torch

from support.adapting import config_for, visible
from support.changing import CHANGES, parts_of
from support.tiny_models import text
from tucka.backends.torch import laid_out
from tucka.backends.torch.laid_out import LaidOut
from tucka.backends.torch.routing.generation import Generation
from tucka.backends.torch.steps import Steps
from tucka.backends.torch.thin import FEW
from tucka.peft import given_route, pin_route, unpin_route
from tucka.peft.layer import TuckALayer

ROUTINGS = ["batch", "sample", "token", "pinned"]
routings = pytest.mark.parametrize("routing", ROUTINGS)


def model_of(routing, kind="llama"):
    model = visible(kind, "batch" if routing == "pinned" else routing, k=3)
    if routing == "pinned":
        pin_route(model, group=1)
    return model.eval()


def scores(model, inputs=None, *, between=None, tokens=6, **options):
    """Generate, let `between` act after each token, and return the scores of all tokens."""
    torch.manual_seed(3)
    processors = [] if between is None else [lambda ids, found: (between(ids.shape[1]), found)[1]]
    inputs = text(batch=2) if inputs is None else inputs
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=tokens,
        return_dict_in_generate=True,
        output_scores=True,
        logits_processor=processors,
        **{"do_sample": False, **options},
    )
    return torch.stack(out.scores)


@pytest.fixture
def alone(monkeypatch):
    """Let calls share nothing."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(Steps, "open", lambda self, size: None)
            return function()

    return call


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "t5"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_a_generation_is_the_same_to_the_bit(routing, kind, search, alone):
    model = model_of(routing, kind)
    assert torch.equal(scores(model, **search), alone(lambda: scores(model, **search)))


@routings
def test_later_tokens_ask_for_nothing_again(routing, monkeypatch):
    model = model_of(routing)
    layers = sum(isinstance(module, TuckALayer) for module in model.modules())
    calls = []
    whole = TuckALayer._adapted
    monkeypatch.setattr(TuckALayer, "_adapted", lambda self, *args: (calls.append(self), whole(self, *args))[1])
    scores(model, tokens=8)
    assert len(calls) <= layers + 1  # of the prompt, and of one layer for the first token after it


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_tokens_counts_from_the_next_on(routing, change, alone):
    def run():
        model = model_of(routing)
        length = text(batch=2)["input_ids"].shape[1]
        act = torch.no_grad()(CHANGES[change])
        return scores(model, between=lambda now: act(model) if now == length + 3 else None)

    shared = run()
    assert torch.equal(shared, alone(run))
    undisturbed = scores(model_of(routing))
    assert torch.equal(shared[:4], undisturbed[:4])
    assert not torch.equal(shared[4], undisturbed[4])


def test_another_adapter_becomes_active_between_two_tokens(alone):
    def run(*, is_switched=True):
        model = model_of("sample")
        torch.manual_seed(1)
        model.add_adapter("other", config_for("llama", routing="sample", init_weights=False, affinity="dot"))
        model.set_adapter("default")
        length = text(batch=2)["input_ids"].shape[1]
        act = lambda now: model.base_model.set_adapter("other") if is_switched and now == length + 2 else None  # noqa: E731
        # Without a cache: the other adapter has its own route of the whole text.
        return scores(model, between=act, use_cache=False)

    shared = run()
    assert torch.equal(shared, alone(run))
    undisturbed = run(is_switched=False)
    assert torch.equal(shared[:3], undisturbed[:3])
    assert not torch.equal(shared[3], undisturbed[3])


def test_a_route_that_is_unpinned_between_two_tokens(alone):
    def run():
        model = model_of("pinned")
        length = text(batch=2)["input_ids"].shape[1]
        return scores(model, between=lambda now: unpin_route(model) if now == length + 2 else None, use_cache=False)

    assert torch.equal(run(), alone(run))


@pytest.mark.each_value
@routings
@pytest.mark.parametrize("other", ["the same size", "given", "written"])
def test_somebody_elses_call_between_two_tokens_has_its_own_route(routing, other, alone):
    ids = text(batch=2, length=1, seed=9)["input_ids"]

    def run():
        model, seen = model_of(routing), []

        @torch.no_grad()
        def between(_):
            if other == "written":
                CHANGES["written"](model)
            if other == "given":
                with given_route(model, groups=[2, 2]):
                    seen.append(model(input_ids=ids).logits)
            else:
                seen.append(model(input_ids=ids).logits)
            if other == "written":
                for parts in parts_of(model):
                    parts.cores.div_(1.5)

        return scores(model, between=between), torch.stack(seen)

    for shared, apart in zip(run(), alone(run), strict=True):
        assert torch.equal(shared, apart)


def test_nothing_outlives_its_generation(monkeypatch):
    made = []
    begin = Generation.__init__
    monkeypatch.setattr(Generation, "__init__", lambda self, *args: (begin(self, *args), made.append(self))[0])
    model = model_of("batch")
    scores(model)
    with torch.no_grad():
        for parts in parts_of(model):
            parts.cores.data.mul_(2.0)  # which leaves no trace
    assert torch.equal(scores(model), scores(model))
    assert not model.base_model.model.forward.scope.forwards.state.generations
    assert len({id(generation.steps) for generation in made}) == len(made) == 3


@pytest.mark.parametrize("tokens", [3, 6])
def test_factors_are_laid_out_once_in_a_generation(monkeypatch, tokens):
    """Though the prompt and the tokens after it differ in size."""
    made, begin = [], LaidOut.__init__
    monkeypatch.setattr(LaidOut, "__init__", lambda self, *args: (begin(self, *args), made.append(self))[0])
    model = model_of("batch")
    scores(model, tokens=tokens)
    assert len(made) == len(parts_of(model))


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1])
def test_few_tokens_with_gates_of_their_own_mix_cores_in_one_product(monkeypatch, rows):
    seen, plain = [], laid_out.times_own
    monkeypatch.setattr(
        laid_out, "times_own", lambda *args, **options: (seen.append(len(args[0])), plain(*args, **options))[1]
    )
    scores(model_of("token"), text(batch=rows, length=3), tokens=3)
    assert (rows in seen) == (rows > FEW)


def test_autocast_and_gradients_share_nothing():
    steps = Steps()
    steps.open("size")
    assert steps.now is None  # gradients
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        steps.open("size")
        assert steps.now is None
    with torch.no_grad():
        steps.open("size")
        assert steps.now == {}
