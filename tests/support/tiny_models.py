"""Tiny models of the kinds that people adapt, made on the spot, with inputs that fit. Imports no tucka."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 50
WIDTH = 16
_SMALL = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Kind:
    """A kind of model: how to make one, which layers to adapt, what to call it with."""

    build: Callable[..., nn.Module]
    targets: list[str] | str
    inputs: Callable[..., dict[str, torch.Tensor]]
    task_type: str | None = None


def bert_config(**changes):
    return BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=32, initializer_range=0.2, **{**_SMALL, **_NO_DROPOUT, **changes}
    )


def bert(**changes):
    return BertForSequenceClassification(bert_config(**changes))


def vit(**changes):
    return ViTForImageClassification(
        ViTConfig(image_size=8, patch_size=4, initializer_range=0.2, **{**_SMALL, **_NO_DROPOUT, **changes})
    )


def llama(**changes):
    options = {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **changes}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.3, **{**_SMALL, **options}))


def opt(**changes):
    sizes = {"hidden_size": WIDTH, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {"dropout": 0.0, "word_embed_proj_dim": WIDTH, "max_position_embeddings": 32, "pad_token_id": 0}
    return OPTForCausalLM(
        OPTConfig(vocab_size=VOCABULARY, init_std=0.3, eos_token_id=None, **{**sizes, **options, **changes})
    )


def gpt2(**changes):
    sizes = {"n_positions": 32, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "eos_token_id": None, "pad_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, bos_token_id=1, **{**sizes, **options, **changes}))


def t5(**changes):
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    options = {"decoder_start_token_id": 0, "eos_token_id": None, "initializer_factor": 2.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **{**sizes, **options, **changes}))


def clip(text_width=WIDTH, vision_width=24):
    text = {**_SMALL, "hidden_size": text_width, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {**_SMALL, "hidden_size": vision_width, "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


class PlainModel(nn.Module):
    """Two linear layers and a head, on vectors or on anything with axes before the last."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def tokens(batch=3, length=6, seed=1):
    """Token numbers above those with a meaning of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, length), generator=generator)


def text(batch=3, length=6, seed=1):
    ids = tokens(batch, length, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def labelled(batch=3, length=6, seed=1):
    inputs = text(batch, length, seed)
    return {**inputs, "labels": inputs["input_ids"]}


def classified(batch=3, length=6, seed=1):
    return {**text(batch, length, seed), "labels": torch.arange(batch) % 2}


def images(batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(batch, 3, 8, 8, generator=generator), "labels": torch.arange(batch) % 2}


def pairs(batch=3, seed=1):
    picture = images(batch, seed)["pixel_values"]
    return {**text(batch, seed=seed), "pixel_values": picture, "return_loss": True}


def vectors(batch=3, seed=1):
    return {"x": torch.randn(batch, WIDTH, generator=torch.Generator().manual_seed(seed))}


# transformers 5 names the layers of ViT as those of other models.
IS_NEW = int(transformers.__version__.partition(".")[0]) >= 5
VISION_TOWER = r".*vision_model.*(q_proj|v_proj|fc1)"
KINDS = {
    "bert": Kind(bert, ["query", "dense"], classified, "SEQ_CLS"),
    "vit": Kind(vit, ["q_proj", "v_proj", "fc1"] if IS_NEW else ["query", "value", "intermediate.dense"], images),
    "llama": Kind(llama, ["q_proj", "v_proj", "down_proj"], labelled, "CAUSAL_LM"),
    "opt": Kind(opt, ["k_proj", "v_proj", "q_proj", "fc2"], labelled, "CAUSAL_LM"),
    "gpt2": Kind(gpt2, ["c_attn", "c_fc"], labelled, "CAUSAL_LM"),
    "t5": Kind(t5, ["q", "v", "wo"], labelled, "SEQ_2_SEQ_LM"),
    "clip": Kind(clip, VISION_TOWER, pairs),
    "plain": Kind(PlainModel, ["first", "second"], vectors),
}


def make(kind, *, dtype=torch.float32, seed=0, **changes):
    """A model of a kind in evaluation mode, the same for the same seed."""
    torch.manual_seed(seed)
    return KINDS[kind].build(**changes).to(dtype).eval()


def inputs_for(kind, *, dtype=torch.float32, **changes):
    """Its inputs."""
    return {
        key: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in KINDS[kind].inputs(**changes).items()
    }


def output_of(model, inputs):
    """The output of a call as one tensor."""
    output = model(**inputs)
    if isinstance(output, torch.Tensor):
        return output
    return output.logits_per_text if hasattr(output, "logits_per_text") else output.logits


def loss_of(model, inputs):
    """A number to train on."""
    output = model(**inputs)
    return output.square().mean() if isinstance(output, torch.Tensor) else output.loss
