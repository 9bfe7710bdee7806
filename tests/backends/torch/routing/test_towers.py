"""Towers: each has a router and a route of its own, whatever their widths and numbers of samples."""

from typing import ClassVar

import pytest
import torch
from transformers import CLIPVisionModel, DynamicCache, LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel

from support.adapting import watched
from support.refusals import refused
from support.routed import EXACT, FAMILIES, assert_rows_stand_alone, inputs_of, route_of, routed
from support.tiny_models import clip, inputs_for, llama, loss_of
from tucka.backends.torch.routing.layouts import Layout
from tucka.backends.torch.routing.parts import Anatomy
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import RouteError
from tucka.peft import expert_load, initialize_router, last_route, pin_route

routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])
TARGETS = ["q_proj", "v_proj"]
# Models of two towers, and the size of their images.
PAIRS = {
    "SigLIP": (lambda: FAMILIES["siglip"].build(), 32),
    "CLIP": (lambda: FAMILIES["clip"].build(), 32),
    "CLIP of equal widths": (lambda: clip(16, 16), 8),
    "CLIP of other widths": (lambda: clip(16, 24), 8),
}
pairs = pytest.mark.parametrize("name", PAIRS)


def adapted(name, routing="sample", **options):
    build, size = PAIRS[name]
    torch.manual_seed(0)
    return routed(build(), TARGETS, routing, **options), size


def texts(batch=3, seed=1):
    return torch.randint(4, 50, (batch, 7), generator=torch.Generator().manual_seed(seed))


def pictures(size, batch=3, seed=1):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.each_value
@pairs
@routings
@torch.no_grad()
def test_no_tower_changes_with_the_others_input(name, routing):
    model, size = adapted(name, routing)
    ids, pixels = texts(), pictures(size)
    both = model(input_ids=ids, pixel_values=pixels)
    routes = [last_route(model, part=part) for part in ("", "vision_model")]
    other_image = model(input_ids=ids, pixel_values=pictures(size, seed=2))
    assert torch.equal(other_image.text_embeds, both.text_embeds)
    assert torch.equal(last_route(model, part=""), routes[0])
    assert not torch.equal(last_route(model, part="vision_model"), routes[1])
    other_text = model(input_ids=texts(seed=2), pixel_values=pixels)
    assert torch.equal(other_text.image_embeds, both.image_embeds)
    assert torch.equal(last_route(model, part="vision_model"), routes[1])
    with model.disable_adapter():
        plain = model(input_ids=ids, pixel_values=pixels)
    assert not torch.allclose(plain.text_embeds, both.text_embeds, atol=1e-3)
    assert not torch.allclose(plain.image_embeds, both.image_embeds, atol=1e-3)


@pairs
@pytest.mark.parametrize("routing", ["sample", "token"])
@torch.no_grad()
def test_as_many_texts_and_images_as_one_likes(name, routing):
    """Each row is routed by its own input alone."""
    model, size = adapted(name, routing)
    ids, pixels = texts(5), pictures(size, 2)
    both = model(input_ids=ids, pixel_values=pixels)
    one = model(input_ids=ids[3:4], pixel_values=pixels[1:])
    torch.testing.assert_close(one.text_embeds, both.text_embeds[3:4], **EXACT)
    torch.testing.assert_close(one.image_embeds, both.image_embeds[1:], **EXACT)


@pytest.mark.each_value
@pairs
@routings
@torch.no_grad()
def test_features_and_towers_that_are_called_by_themselves(name, routing):
    model, size = adapted(name, routing)
    root, ids, pixels = model.base_model.model, texts(), pictures(size)
    model(input_ids=ids, pixel_values=pixels)
    routes = {part: last_route(model, part=part) for part in ("", "vision_model")}
    calls = {
        "": lambda: (root.get_text_features(input_ids=ids), root.text_model(input_ids=ids)),
        "vision_model": lambda: (root.get_image_features(pixel_values=pixels), root.vision_model(pixel_values=pixels)),
    }
    for part, call in calls.items():
        call()
        assert torch.equal(last_route(model, part=part), routes[part])


def test_a_router_a_load_and_a_route_for_each_part():
    model, size = adapted("CLIP of other widths", k=3)
    scope = scope_of(model)
    assert {part: router.in_features for part, router in scope.routers("default").items()} == {
        "": 16,
        "vision_model": 24,
    }
    with torch.no_grad():
        model(input_ids=texts(4), pixel_values=pictures(size, 2))
    assert {part: int(load.sum()) for part, load in scope.load["default"].items()} == {"": 4, "vision_model": 2}
    assert {part: gates.shape for part, gates in scope.last["default"].items()} == {
        "": (4, 3, 2),
        "vision_model": (2, 3, 2),
    }
    assert int(expert_load(model, reset=True).sum()) == 6
    assert int(expert_load(model).sum()) == 0


def test_the_observers_of_a_model_get_the_router_of_the_part():
    model, size = adapted("CLIP of other widths")
    seen = []
    scope_of(model).observers["default"] = lambda router, x, mask, gates: seen.append((router, x.shape[-1]))
    with torch.no_grad():
        model(input_ids=texts(), pixel_values=pictures(size))
    routers = scope_of(model).routers("default")
    assert {id(router): width for router, width in seen} == {
        id(routers[""]): 16,
        id(routers["vision_model"]): 24,
    }
    assert len(watched(model)) == 0


def test_all_parts_are_started_trained_and_pinned():
    model, size = adapted("CLIP of equal widths", k=3)
    model.train()
    batch = {"input_ids": texts(), "pixel_values": pictures(size)}
    initialize_router(model, [batch], progress=False)
    routers = scope_of(model).routers("default").values()
    assert all(bool(router.is_initialized) for router in routers)
    loss_of(model, {**batch, "return_loss": True}).backward()
    assert all(router.centroids.grad.abs().sum() > 0 for router in routers)
    pin_route(model, group=1)
    assert not any(router.centroids.requires_grad for router in routers)
    model.merge_adapter()


def test_a_tower_alone_is_adapted_like_any_model():
    config = PAIRS["CLIP of other widths"][0]().config.vision_config
    torch.manual_seed(0)
    model = routed(CLIPVisionModel(config), TARGETS)
    pixels = pictures(8, 3)
    assert_rows_stand_alone(model, {"pixel_values": pixels})
    assert list(scope_of(model).owners["default"]) == [""]


@torch.no_grad()
def test_router_module_names_a_layer_of_one_part():
    layer = "{}_model.encoder.layers.{}.self_attn.q_proj"
    inputs = inputs_for("clip", dtype=torch.float64)
    model = routed(clip(), ["q_proj"], router_module=layer.format("vision", 0))
    model(**inputs)
    assert scope_of(model).path(scope_of(model).owners["default"]["vision_model"]) == layer.format("vision", 0)
    late = routed(clip(), ["q_proj"], router_module=layer.format("vision", 1))
    with refused(RouteError, "route", "router_module | vision_model.encoder.layers.1 | to run first"):
        late(**inputs)


class SpeakerConfig(PreTrainedConfig):
    model_type = "speaker"
    sub_configs: ClassVar = {"text_config": LlamaConfig, "voice_config": LlamaConfig}

    def __init__(self, **options):
        self.text_config, self.voice_config = llama().config, llama(hidden_size=24).config
        super().__init__(**options)


class Speaker(PreTrainedModel):
    """A language model with a voice: each has a cache of its own."""

    config_class = SpeakerConfig

    def __init__(self, config):
        super().__init__(config)
        self.text, self.voice = LlamaModel(config.text_config), LlamaModel(config.voice_config)
        self.post_init()

    def forward(self, input_ids, sounds, text_cache=None, voice_cache=None):
        said = self.text(input_ids=input_ids, past_key_values=text_cache).last_hidden_state
        heard = self.voice(input_ids=sounds, past_key_values=voice_cache).last_hidden_state
        return torch.cat([said, heard], dim=-1)


@routings
@torch.no_grad()
def test_a_cache_of_a_tower_carries_the_towers_route(routing):
    torch.manual_seed(0)
    model = routed(Speaker(SpeakerConfig()), TARGETS, routing)
    assert set(scope_of(model).owners["default"]) == {"", "voice"}
    caches = [DynamicCache(), DynamicCache()]
    first, then = texts(), texts(seed=2)[:, :1]
    model(first, first.flip(0), *caches)
    routes = {part: last_route(model, part=part) for part in ("", "voice")}
    continued = model(then, then.flip(0), *caches)
    if routing == "token":
        whole = torch.cat([first, then], dim=1)
        torch.testing.assert_close(continued, model(whole, whole.flip(0))[:, -1:], **EXACT)
    else:
        assert all(torch.equal(last_route(model, part=part), route) for part, route in routes.items())


@pytest.mark.each_value
@pytest.mark.parametrize("routing", ["sample", "token"])
@pytest.mark.parametrize("name", ["altclip", "chinese-clip", "vision-text-dual-encoder", "clipseg"])
def test_other_models_of_two_towers(name, routing):
    found = FAMILIES[name]
    model = routed(found.build(), list(found.targets), routing)
    assert len(scope_of(model).owners["default"]) > 1
    assert_rows_stand_alone(model, inputs_of(name, 3), rows=0)
    inputs = inputs_of(name, 3)
    route_of(model, inputs)
    before = {part: last_route(model, part=part) for part in scope_of(model).owners["default"]}
    route_of(model, {**inputs, "pixel_values": inputs["pixel_values"] + 1})
    changed = {part for part, gates in before.items() if not torch.equal(last_route(model, part=part), gates)}
    assert changed
    assert all("vision" in part or "visual" in part for part in changed if name != "clipseg")


@pytest.mark.parametrize("targets", [["q_proj"], ["linear_1", "lm_head"]], ids=["as they were", "adapted themselves"])
def test_a_projector_is_a_part_of_its_own_and_the_head_one_of_the_text(targets):
    model = routed(FAMILIES["llava"].build(), targets, "batch").base_model.model
    anatomy = Anatomy(model)
    assert anatomy.part_of("model.multi_modal_projector.linear_1") == "model.multi_modal_projector"
    assert anatomy.part_of("lm_head") == ""


@pytest.mark.parametrize(("name", "is_packed"), [("llava", False), ("llava-pixtral", True)])
def test_a_projector_sees_rows_as_the_tower_before_it_makes_them(name, is_packed):
    model = routed(FAMILIES[name].build(), ["linear_1"], "batch")
    assert [(layer.tucka_layout is Layout.PACKED) for layer in scope_of(model).layers] == [is_packed]
