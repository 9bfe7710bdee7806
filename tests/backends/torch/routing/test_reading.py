"""What a call was given, read without running a model: sizes, documents, and masks as models take them."""

import copy
from types import MethodType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from support.adapting import adapt, visible
from support.refusals import refused
from support.routed import causal, family
from support.tiny_models import WIDTH, make, text, tokens
from tucka.backends.torch.routing.caches import attach_routes, routes_of
from tucka.backends.torch.routing.generation import Generation
from tucka.backends.torch.routing.inputs import Inputs, read_inputs
from tucka.backends.torch.routing.layouts import Layout, View, view_of
from tucka.backends.torch.routing.masks import fitting_mask
from tucka.backends.torch.routing.router import Router
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import RouteError
from tucka.peft import given_route, last_route, pin_route
from tucka.spec import TuckerSpec


def model(name="Model", **attributes):
    """A module of a class of this name; nothing else of it is asked for."""
    made = type(name, (nn.Module,), {"forward": lambda self, x, mask=None: x})()
    vars(made).update(attributes)
    return made


def read(*args, of=None, **kwargs):
    return read_inputs(model() if of is None else of, args, kwargs)


# --- sizes


def test_each_choice_of_a_sample_is_a_row():
    found = read(input_ids=torch.zeros(2, 3, 5, dtype=torch.long))
    assert (found.rows, found.tokens) == (6, 5)


def test_music_has_a_row_for_each_codebook():
    ids = torch.zeros(8, 5, dtype=torch.long)
    assert read(input_ids=ids, of=model("MusicgenForCausalLM", num_codebooks=4)).rows == 2
    assert read(input_ids=ids, of=model("Others", num_codebooks=4)).rows == 8


@pytest.mark.parametrize("wrap", [lambda x: {"inner": x}, lambda x: (x,), lambda x: [x, None]])
def test_an_input_may_come_in_a_container(wrap):
    found = read(first=wrap(torch.ones(2, 3, 4)), second=1)
    assert (found.rows, found.tokens) == (2, 3)
    assert read(first="text", second=2).rows is None


# --- documents


def test_images_of_several_sizes_in_one_row_are_documents():
    found = read(torch.ones(22, 4), grid_thw=torch.tensor([[1, 2, 3], [2, 2, 4]]))
    assert found.lengths.tolist() == [0, 6, 22]
    assert (found.are_images, found.rows, found.tokens) == (True, 1, 22)
    assert found.documents(1, 22).tolist() == [[0] * 6 + [1] * 16]


def test_positions_in_time_height_and_width_follow_those_of_the_text():
    text_positions = torch.tensor([[0, 1, 0, 1, 2]])
    positions = torch.stack([text_positions, *[torch.zeros(1, 5, dtype=torch.long)] * 3])
    found = read(input_ids=torch.zeros(1, 5, dtype=torch.long), position_ids=positions)
    assert found.documents(1, 5).tolist() == [[0, 0, 1, 1, 1]]
    assert read(input_ids=torch.zeros(1, 5), position_ids=positions[:3]).positions is None


def test_positions_of_other_sizes_tell_of_no_documents():
    positions = torch.arange(4).expand(3, 4)
    assert Inputs(positions=positions).documents(3, 5) is None
    assert Inputs(positions=positions).documents(2, 4) is None
    assert Inputs(positions=positions[:1]).documents(2, 4).tolist() == [[0] * 4] * 2
    assert Inputs().documents(2, 4) is None


def test_a_batch_of_documents_has_the_gates_of_the_mean_of_their_means():
    torch.manual_seed(0)
    router, hidden = Router(TuckerSpec(rank=2, groups=3, routing="batch"), in_features=4), torch.randn(1, 6, 4)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1]])
    means = torch.stack([hidden[0, :4].mean(dim=0), hidden[0, 4:].mean(dim=0)])
    desired = router.gates(router.logits(means.mean(dim=0)))
    torch.testing.assert_close(router.of_documents(hidden, None, documents), desired)
    masked = torch.tensor([[1, 1, 1, 1, 0, 0]])  # the second document does not count at all
    desired = router.gates(router.logits(means[0]))
    torch.testing.assert_close(router.of_documents(hidden, masked, documents), desired)


@pytest.mark.parametrize(("shape", "fits"), [((1, 7, 4), True), ((2, 7, 4), False), ((7, 4), False)])
def test_tokens_of_all_samples_in_one_row_are_one_row(shape, fits):
    assert view_of(torch.ones(shape), Inputs(rows=2, tokens=None), Layout.PACKED) == (View() if fits else None)


@pytest.mark.parametrize(
    ("layout", "view"), [(Layout.SAMPLES_FIRST, View()), (Layout.CACHED_TOKENS, View(lead=(2, 3)))], ids=str
)
def test_an_axis_of_one_is_left_out_of_cached_tokens_alone(layout, view):
    assert view_of(torch.ones(2, 1, 3, 4), Inputs(rows=2, tokens=3), layout) == view


# --- states of earlier calls


@pytest.mark.parametrize(
    ("state", "has"),
    [
        (torch.ones(2), True), ([None, torch.ones(2)], True), ({"a": torch.ones(2)}, True), ([], False),
        (SimpleNamespace(inner=torch.ones(2)), True), (SimpleNamespace(size=3), False), (True, False), ("text", False),
    ],
)  # fmt: skip
def test_states_are_those_that_hold_tensors(state, has):
    assert read(input_ids=torch.zeros(2, 3, dtype=torch.long), state=state).has_states is has


# --- masks

TEXT = torch.tensor([[1, 1, 0], [1, 1, 1]])
ONES = torch.ones(2, 2, dtype=torch.long)
VISUAL = torch.tensor([[1, 0], [1, 1]])


def fitted(mask, length, of, **others):
    x = torch.ones(len(mask), length, 4)
    return fitting_mask(Inputs(rows=len(mask), tokens=mask.shape[1], mask=mask, others=others), of, x, past=False)


CONVERTED = {
    "an image after the text": ("LayoutLMv3Model", {}, torch.cat([TEXT, ONES], dim=1)),
    "an image before the text": ("GitModel", {}, torch.cat([ONES, TEXT], dim=1)),
    "an image without a mask": ("ViltModel", {}, torch.cat([TEXT, ONES], dim=1)),
    "visual tokens": ("VisualBertModel", {"visual_attention_mask": VISUAL}, torch.cat([TEXT, VISUAL], dim=1)),
    "visual tokens without a mask": ("VisualBertModel", {}, torch.cat([TEXT, ONES], dim=1)),
    "entities": ("LukeModel", {"entity_attention_mask": VISUAL}, torch.cat([TEXT, VISUAL], dim=1)),
    "a block": ("LongformerModel", {}, torch.cat([TEXT, 0 * ONES], dim=1)),
    "the image after a text": ("ChromaTransformer2DModel", {}, TEXT[:, 1:]),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_a_mask_is_converted_as_its_model_converts_its_inputs(name):
    kind, others, desired = CONVERTED[name]
    found = fitted(TEXT, desired.shape[1], model(kind, config=None), **others)
    assert torch.equal(found != 0, desired != 0)


@pytest.mark.parametrize(("kind", "others"), [("LukeModel", {"entity_attention_mask": VISUAL}), ("GitModel", {})])
def test_a_mask_that_cannot_be_converted_is_refused(kind, others):
    with refused(RouteError, "attention_mask", f"(2, 3) | {kind}"):
        fitted(TEXT, 6 if kind == "LukeModel" else 2, model(kind), **others)


def test_patches_of_images_of_several_sizes_are_masked():
    pixels = torch.ones(2, 4, 4)
    pixels[0, 2:] = 0
    of = model("ViltModel", config=SimpleNamespace(patch_size=2))
    found = fitted(TEXT, 3 + 1 + 4, of, pixel_mask=pixels)
    assert found.tolist() == [[1, 1, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]]


def test_sound_is_masked_in_its_strides():
    mask = torch.ones(1, 3 * 384)
    mask[:, 384:] = 0
    assert fitted(mask, 3, model("MoonshineEncoder")).tolist() == [[1, 0, 0]]


def test_of_a_mask_for_each_kind_of_layer_that_of_full_attention_counts():
    inputs = Inputs(rows=2, tokens=3, mask={"sliding_attention": 0 * TEXT, "full_attention": TEXT})
    assert torch.equal(fitting_mask(inputs, model(), torch.ones(2, 3, 4), past=False), TEXT)
    inputs = Inputs(rows=2, tokens=3, mask={"sliding_attention": TEXT})
    assert fitting_mask(inputs, model(), torch.ones(2, 3, 4), past=False) is None


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, "large numbers"])
def test_a_mask_of_queries_and_keys_tells_which_tokens_are_attended_to(dtype):
    mask = (TEXT != 0)[:, None, None, :].expand(2, 1, 3, 3)
    mask = torch.where(mask, 0.0, -1e9) if dtype == "large numbers" else mask.to(dtype)
    assert torch.equal(fitted(mask[:, 0], 3, model()), TEXT != 0)
    assert torch.equal(fitted(mask, 3, model()), TEXT != 0)


def test_a_mask_of_pixels_shrinks_with_the_image():
    mask = torch.ones(2, 4, 6)
    mask[0, :, 3:] = 0
    inputs = Inputs(rows=2, mask=mask)
    found = fitting_mask(inputs, model(), torch.ones(2, 2, 2, 8), past=False)
    assert found.tolist() == [[[True, False]] * 2, [[True, True]] * 2]


@pytest.mark.parametrize(
    ("mask", "word"), [("text", "str"), (torch.ones(2, 4), "(2, 4)"), (torch.ones(3, 3), "(3, 3)")]
)
def test_a_mask_that_fits_nowhere_is_refused(mask, word):
    inputs = Inputs(rows=2, tokens=3, mask=mask)
    with refused(RouteError, "attention_mask", f"{word} | routing='token'"):
        fitting_mask(inputs, model(), torch.ones(2, 3, 4), past=False)


# --- generation


def test_the_mask_of_a_prompt_serves_its_beams_and_candidates():
    generation = Generation(torch.zeros(2, 3), TEXT, times=2)
    made = object()
    assert generation.mask_for(torch.ones(4, 5, 8), made).tolist() == [[1, 1, 0, 1, 1]] * 2 + [[1] * 5] * 2
    for rows in (torch.ones(3, 5, 8), torch.ones(4, 8)):
        assert generation.mask_for(rows, made) is made
    assert Generation(torch.zeros(2, 3), None, times=2).mask_for(torch.ones(4, 5, 8), made) is made


def test_outputs_that_generation_did_not_repeat_have_no_known_route():
    generation, hidden = Generation(torch.zeros(2, 3), None, times=2), torch.randn(2, 3, 4)
    generation.encoded.append((hidden, {}))
    assert generation.expanded(hidden.repeat_interleave(2, dim=0)) == {}
    assert generation.expanded(hidden.repeat(2, 1, 1)) is None
    assert generation.expanded(hidden) is None


# --- caches


@torch.no_grad()
def test_a_cache_that_was_reset_has_no_route():
    adapted, cache = causal(), DynamicCache()
    adapted(input_ids=tokens(2, 5), past_key_values=cache, use_cache=True)
    key = scope_of(adapted).key
    assert routes_of(cache, key) is not None
    cache.reset()
    assert routes_of(cache, key) is None


def test_an_empty_cache_and_rows_of_other_sizes_have_no_route():
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=None)])
    attach_routes(cache, "key", {}, {})
    assert routes_of(cache, "key") is not None  # as empty as it was
    cache.layers[0].keys = torch.ones(2, 1, 3, 4)
    assert routes_of(cache, "key") is None
    attach_routes(cache, "key", {}, {})
    kept = copy.copy(cache.layers[0].keys)
    cache.layers[0].keys = torch.cat([kept, kept], dim=2)  # longer, with the same beginning
    assert routes_of(cache, "key") is not None
    for keys in (torch.ones(3, 1, 3, 4), torch.ones(2, 1, 3, 5), torch.ones(2, 1, 0, 4), 2 * kept):
        cache.layers[0].keys = keys
        assert routes_of(cache, "key") is None
    attach_routes(object(), "key", {}, {})  # what can carry nothing


# --- calls


class LateFirst(nn.Module):
    """A model that calls its layers in another order than it lists them."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(8, 4)
        self.narrow = nn.Linear(4, 8)

    def forward(self, x):
        return self.wide(self.narrow(x))


def test_a_first_layer_of_another_width_than_the_routers_is_refused():
    adapted = adapt("plain", model=LateFirst(), routing="sample", target_modules=["wide", "narrow"], r=2)
    with refused(RouteError, "route", "8 wide | (2, 3, 4) | router_module"):
        adapted(torch.ones(2, 3, 4))


def test_a_stage_without_the_routers_layer_is_refused():
    adapted = adapt("plain", routing="sample")
    adapted.base_model.model.first = nn.Identity()
    with refused(RouteError, "route", "router to be in the model | stages of a pipeline"):
        adapted(torch.ones(2, WIDTH))


def test_a_route_for_other_samples_than_a_pinned_models_is_refused():
    adapted = adapt("plain", routing="sample")
    pin_route(adapted, group=0)
    with given_route(adapted, groups=[0, 1]), refused(RouteError, "route", "2 | (3, 16)"):
        adapted(torch.ones(3, WIDTH))


def test_what_another_library_put_on_a_model_is_there_again_afterwards():
    base, calls = make("llama"), []

    def forward(self, *args, **kwargs):
        calls.append("forward")
        return type(self).forward(self, *args, **kwargs)

    def generate(self, *args, **kwargs):
        calls.append("generate")
        return type(self).generate(self, *args, **kwargs)

    base.forward, base.generate = MethodType(forward, base), MethodType(generate, base)
    before = vars(base)["forward"], vars(base)["generate"]
    adapted = adapt("llama", model=base, routing="sample")
    adapted.generate(input_ids=tokens(2, 3), max_new_tokens=1, do_sample=False)
    assert calls == ["generate", "forward"]
    adapted.unload()
    assert (vars(base)["forward"], vars(base)["generate"]) == before


def test_a_model_that_was_unloaded_has_no_hooks_left():
    adapted = family("deberta-v3", targets=["query_proj", "dense"])
    base = adapted.base_model.model
    assert any(module._forward_pre_hooks for module in base.modules())
    adapted.unload()
    assert not any(module._forward_pre_hooks for module in base.modules())


def test_a_text_and_a_mask_may_be_given_by_their_places():
    adapted, inputs = visible("bert"), text(batch=2)
    inputs["attention_mask"][0, 3:] = 0
    adapted(**inputs)
    route = last_route(adapted)
    adapted.base_model.model(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(last_route(adapted), route)
