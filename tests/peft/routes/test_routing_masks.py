"""Which tokens make the route: padding, prompts, and models that show neither."""

import pytest
import torch
from peft import get_peft_model
from transformers import BertForMaskedLM, BertForTokenClassification

from support.adapting import visible
from support.refusals import refused
from support.routed import family, inputs_of, logits
from support.tiny_models import bert_config, make, text
from tucka.errors import RouteError
from tucka.peft import TuckAConfig, last_route

routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["bert", "llama", "opt", "gpt2", "t5"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("routing", ["batch", "sample"])
@torch.no_grad()
def test_padding_is_masked_out_of_the_feature(kind, side, routing):
    model, inputs = visible(kind, routing), text(batch=2)
    call = {"decoder_input_ids": inputs["input_ids"]} if kind == "t5" else {}
    model(**inputs, **call)
    route = last_route(model)
    padding = torch.zeros(2, 3, dtype=torch.long)
    padded = {
        name: torch.cat([padding + (7 if name == "input_ids" else 0), value][:: 1 if side == "left" else -1], dim=1)
        for name, value in inputs.items()
    }
    if kind in ("opt", "gpt2", "bert") and side == "left":  # their positions are part of the first layer's input
        padded["position_ids"] = torch.cat([padding, torch.arange(6).expand(2, 6)], dim=1)
    model(**padded, **call)
    torch.testing.assert_close(last_route(model), route)
    padded.pop("position_ids", None)  # which would begin anew, as at a second document
    model(**{**padded, "attention_mask": None}, **call)
    assert not torch.allclose(last_route(model), route)


@torch.no_grad()
def test_embeddings_instead_of_ids_and_positional_arguments_route_alike():
    model, inputs = visible("llama"), text(batch=2)
    inputs["attention_mask"][1, 4:] = 0
    model(**inputs)
    route = last_route(model)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
    assert torch.equal(last_route(model), route)
    root = model.base_model.model
    root(inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(last_route(model), route)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_a_prompts_route_does_not_see_the_answer(kind):
    model, inputs = visible(kind, route_tokens="prompt"), text(batch=3)
    labels = inputs["input_ids"].clone()
    labels[0, :4] = labels[1, :2] = -100
    model(**inputs, labels=labels)
    route = last_route(model)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    model(input_ids=inputs["input_ids"], attention_mask=mask)
    torch.testing.assert_close(last_route(model), route)
    everything = visible(kind)
    everything(**inputs, labels=labels)
    assert not torch.allclose(last_route(everything), route)


@pytest.mark.parametrize(
    ("kind", "routing", "warns"), [("llama", "batch", 1), ("llama", "token", 0), ("bert", "batch", 0)]
)
def test_a_prompt_without_labels_in_training_warns_once(kind, routing, warns, recwarn):
    """As with label smoothing, where the Trainer computes the loss itself and takes the labels away."""
    model = visible(kind, route_tokens="prompt", routing=routing)
    for _ in range(2):
        model(**text())
        with torch.no_grad():
            model.train()(**text())
        model.eval()
    assert not [w for w in recwarn if "labels" in str(w.message)]
    for _ in range(2):
        model.train()(**text())
    assert len([w for w in recwarn if "labels: expected labels in training" in str(w.message)]) == warns


def of_class(cls):
    return lambda: cls(bert_config(num_labels=3)).eval()


@pytest.mark.parametrize(
    ("build", "labels"),
    [
        (of_class(BertForTokenClassification), torch.tensor([[-100, -100, 1, 2, 0, -100]] * 3)),
        (of_class(BertForMaskedLM), torch.tensor([[-100, -100, 5, -100, 6, -100]] * 3)),
        (lambda: make("t5"), torch.tensor([[-100, -100, 5, 6, 7, 8]] * 3)),
        (lambda: make("bert"), torch.tensor([0, 1, 1])),
    ],
)
@torch.no_grad()
def test_models_whose_labels_continue_nothing_ignore_the_prompt(build, labels):
    routes = []
    for tokens in ("prompt", "all"):
        torch.manual_seed(0)
        options = {"r": 2, "routing": "sample", "affinity": "dot", "target_modules": ["query", "q"]}
        model = get_peft_model(build(), TuckAConfig(route_tokens=tokens, **options)).eval()
        model(**text(batch=3), labels=labels)
        routes.append(last_route(model))
    assert torch.equal(*routes)


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_a_mask_of_sound_fits_no_earlier_convolution(routing):
    inputs = inputs_of("wav2vec2", batch=2)
    mask = {"attention_mask": torch.ones(inputs["input_values"].shape, dtype=torch.long)}
    model = family("wav2vec2", routing, ["conv_layers.1.conv", "q_proj"])
    logits(model, inputs)
    with refused(RouteError, "attention_mask", "tells padding from tokens | given_route"):
        logits(model, {**inputs, **mask})
    model = family("wav2vec2", routing)
    torch.testing.assert_close(logits(model, {**inputs, **mask}), logits(model, inputs), rtol=0, atol=1e-9)
