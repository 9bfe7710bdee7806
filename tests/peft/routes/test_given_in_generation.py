"""A route that the caller gives, in generation: one for each prompt, whatever generation makes of its rows."""

import pytest
import torch
from transformers import GenerationConfig

from support.adapting import visible
from support.refusals import refused
from support.tiny_models import text
from tucka.errors import RouteError
from tucka.peft import given_route

kinds = pytest.mark.parametrize("kind", ["llama", "t5"])
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sequences": {"do_sample": True, "num_return_sequences": 2},
    "both": {"num_beams": 4, "num_return_sequences": 2},
    "configuration": {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=4, eos_token_id=None)},
}


def generate(model, inputs, **options):
    torch.manual_seed(3)
    config = {} if "generation_config" in options else {"max_new_tokens": 4, "do_sample": False}
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return model.generate(**prompt, **{**config, **options})


@pytest.mark.each_value
@kinds
@pytest.mark.parametrize("way", WAYS)
def test_each_prompt_has_its_group_alone_and_in_a_batch(kind, way):
    model, inputs = visible(kind), text(batch=3)
    with given_route(model, groups=[2, 0, 1]):
        together = generate(model, inputs, **WAYS[way])
    if "do_sample" in WAYS[way]:  # which draws other numbers for other rows
        return
    times = len(together) // 3
    for row, group in enumerate([2, 0, 1]):
        with given_route(model, groups=[group]):
            alone = generate(model, {name: value[row : row + 1] for name, value in inputs.items()}, **WAYS[way])
        assert torch.equal(together[row * times : row * times + times], alone)


@pytest.mark.each_value
@kinds
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("prompts", "groups"), [(4, [0, 1]), (6, [0, 1, 2]), (2, [0, 1, 2, 2]), (2, [0])])
def test_another_number_of_groups_than_of_prompts_is_refused(kind, way, prompts, groups):
    model = visible(kind)
    words = f"as many samples as given_route was told of, {len(groups)}"
    with given_route(model, groups=groups), refused(RouteError, "route", words):
        generate(model, text(batch=prompts), **WAYS[way])


@kinds
def test_one_group_serves_any_number_of_prompts(kind):
    model, inputs = visible(kind), text(batch=3)
    with given_route(model, groups=1):
        made = generate(model, inputs, num_beams=2)
    with given_route(model, groups=[1, 1, 1]):
        assert torch.equal(generate(model, inputs, num_beams=2), made)
