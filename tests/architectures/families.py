"""Tiny random models of many transformers architectures, with inputs. No tests in it, and no tucka.

Every row of ``FAMILIES`` is one architecture. ``build()`` makes the model: width 32, two layers, four heads, sixty
tokens, weights large enough to see, nothing random in a forward. ``inputs(batch, length)`` makes its inputs;
``padding=True`` pads all samples but the first and adds the masks; ``seed`` gives other values of the same shapes.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig

ALL_LINEAR = "all-linear"

# --- configurations ---------------------------------------------------------------------------------------------------

# What the configurations call the same sizes.
_SIZES = {
    name: size
    for size, names in {
        2: """num_hidden_layers num_layers n_layer n_layers layers encoder_layers decoder_layers num_encoder_layers
              num_decoder_layers encoder_num_hidden_layers decoder_num_hidden_layers speech_encoder_layers
              num_key_value_heads depth num_self_attends_per_block resampler_depth""",
        4: """num_attention_heads num_heads n_head n_heads attention_heads encoder_attention_heads
              decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads
              encoder_num_attention_heads decoder_num_attention_heads speech_encoder_attention_heads
              num_self_attention_heads num_cross_attention_heads resampler_n_heads""",
        8: "head_dim d_head d_kv resampler_head_dim patch_size num_mel_bins feature_projection_input_dim",
        16: "classifier_proj_size output_channels codevector_dim proj_codevector_dim",
        32: """hidden_size d_model n_embd emb_dim dim embed_dim embedding_size word_embed_proj_dim projection_dim
               pooler_hidden_size pooler_output_size decoder_hidden_size encoder_hidden_size attention_hidden_size
               output_hidden_size projection_size image_text_hidden_size patch_embed_hidden_size lru_width d_latents
               out_hidden_size image_size""",
        48: """intermediate_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner n_inner hidden_dim dff mlp_dim
               ffn_hidden_size decoder_intermediate_size moe_intermediate_size shared_expert_intermediate_size
               speech_encoder_intermediate_size""",
        60: "vocab_size",
        64: "max_position_embeddings n_positions",
    }.items()
    for name in names.split()
}
# The padding token is 0, an image's placeholder 3; the other tokens of inputs are from 4 to 59.
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_PLACEHOLDER = dict.fromkeys(("image_token_index", "image_token_id", "audio_token_index", "audio_token_id"), 3)
# Weights that show, after the start that the architecture gives them.
_VISIBLE = {
    **dict.fromkeys(("initializer_range", "initializer_std", "init_std", "init_range", "embed_init_std"), 0.25),
    **dict.fromkeys(("layer_scale_init_value", "layerscale_value"), 1.0),
}
# Parts of the names of what is random in training.
_RANDOM = ("drop", "mask_time_prob", "mask_feature_prob", "jitter", "apply_spec_augment")


@dataclass(frozen=True)
class Part:
    """The configuration of a part of a model, to be made."""

    name: str
    changes: dict[str, Any]


def part(name: str, **changes: Any) -> Part:
    return Part(name, changes)


def sized(kind: type[PretrainedConfig], changes: dict[str, Any]) -> PretrainedConfig:
    """A tiny configuration; ``changes`` are the architecture's own, for its parts a ``part`` or a dict."""
    known = signature(kind).parameters
    values = {key: value for key, value in {**_SIZES, **_SPECIAL, **_PLACEHOLDER}.items() if key in known} | changes
    for key, value in values.items():
        if isinstance(value, Part):
            values[key] = sized(getattr(transformers, f"{value.name}Config"), value.changes)
            if kind is transformers.VisionTextDualEncoderConfig:  # which takes dicts alone in transformers 5.18
                values[key] = values[key].to_dict()
    for key, sub in kind.sub_configs.items():
        if sub is not AutoConfig and key in known and not isinstance(values.get(key), PretrainedConfig):
            values[key] = sized(sub, values.get(key) or {})
    config = kind(**values)
    for key, value in vars(config).copy().items():
        if isinstance(value, float | bool | list | tuple) and key not in changes and any(x in key for x in _RANDOM):
            setattr(config, key, [0.0] * len(value) if isinstance(value, list | tuple) else type(value)(0))
        elif value is not None and key not in changes and key in _VISIBLE:
            setattr(config, key, _VISIBLE[key])
    return config


# --- inputs -----------------------------------------------------------------------------------------------------------


class Draws:
    """Random values."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def ids(self, *shape: int, low: int = 4, high: int = 60) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)


Inputs = dict[str, Any]
MakeInputs = Callable[[Draws, int, int, bool], Inputs]  # draws, batch, length, padding


def mask_of(batch: int, length: int, *, left: bool = False) -> torch.Tensor:
    """A mask whose first row is full and whose next ones lack 1, 2, 3, 1, ... tokens."""
    lacking = [0, *(1 + row % 3 for row in range(batch - 1))]
    mask = torch.stack([(torch.arange(length) < length - lack).long() for lack in lacking])
    return mask.flip(1) if left else mask


def text(
    prefix: str = "",
    *,
    left: bool = False,
    longer: int = 0,
    high: int = 60,
    name: str = "input_ids",
    mask: str = "attention_mask",
) -> MakeInputs:
    """Tokens, ``longer`` by some, padded on the right or on the left or (without the name of a mask) nowhere."""

    def make(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
        ids = draws.ids(batch, length + longer, high=high)
        if not (padding and mask):
            return {prefix + name: ids}
        tokens = mask_of(batch, length + longer, left=left)
        return {prefix + name: ids * tokens, prefix + mask: tokens}

    return make


def together(*makers: MakeInputs) -> MakeInputs:
    """All the inputs of several functions."""

    def make(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
        return {key: value for maker in makers for key, value in maker(draws, batch, length, padding).items()}

    return make


def each(**values: Any) -> MakeInputs:
    """The same values for each sample."""
    return lambda draws, batch, length, padding: {key: torch.tensor([x] * batch) for key, x in values.items()}


def ones(**shapes: tuple[int | str, ...]) -> MakeInputs:
    """Ones of shape (batch, *shape), where "length" is the length."""
    return lambda draws, batch, length, padding: {
        key: torch.ones(_sizes(shape, batch, length), dtype=torch.long) for key, shape in shapes.items()
    }


def normal(name: str, *shape: int | str, mask: str = "", per_mask: int = 1) -> MakeInputs:
    """Normal values of shape (batch, *shape), where "4length" is four times the length, with a mask of ``per_mask``."""

    def make(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
        masks = {mask: mask_of(batch, length).repeat_interleave(per_mask, 1)} if mask and padding else {}
        return {name: draws.normal(*_sizes(shape, batch, length)), **masks}

    return make


def _sizes(shape: tuple[int | str, ...], batch: int, length: int) -> list[int]:
    return [batch, *(length * int(x.removesuffix("length") or 1) if isinstance(x, str) else x for x in shape)]


def images(size: int = 32, *more: int, name: str = "pixel_values") -> MakeInputs:
    """Pixels; ``more`` are axes between the batch and the channels: frames, tiles."""
    return normal(name, *more, 3, size, size)


def waves(name: str = "input_values", *, base: int = 6, per_token: int = 4) -> MakeInputs:
    """Sound of which the model's convolutions make ``length`` frames; its mask counts samples of sound."""

    def make(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
        values = draws.normal(batch, base + per_token * length)
        if not padding:
            return {name: values}
        mask = mask_of(batch, length).repeat_interleave(per_token, 1)
        mask = torch.cat([torch.ones(batch, base, dtype=torch.long), mask], 1)
        return {name: values * mask, "attention_mask": mask}

    return make


def prompt(tokens: int, *, types: str = "", left: bool = True) -> MakeInputs:
    """Four tokens, the places of an image's or a sound's ``tokens``, and the text; always with a mask."""

    def make(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
        ids = torch.cat([draws.ids(batch, 4), torch.full((batch, tokens), 3), draws.ids(batch, length)], 1)
        mask = mask_of(*ids.shape, left=left) if padding else torch.ones_like(ids)
        return {"input_ids": ids * mask, "attention_mask": mask, **{name: (ids == 3).long() for name in types.split()}}

    return make


def ended(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    """Texts whose last token says that they end."""
    made = text()(draws, batch, length, padding)
    ids = made["input_ids"]
    return {**made, "input_ids": ids.scatter(1, (ids != 0).sum(1, keepdim=True) - 1, 2)}


def choices(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    """Two choices a sample."""
    return {key: value.reshape(batch, 2, length) for key, value in text()(draws, 2 * batch, length, padding).items()}


def entities(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    """Two entities a sample, each on two tokens."""
    places = torch.tensor([[0, 1], [2, 3]]).repeat(batch, 1, 1)
    mask = torch.ones(batch, 2, dtype=torch.long)
    return {"entity_ids": draws.ids(batch, 2, high=10), "entity_attention_mask": mask, "entity_position_ids": places}


def boxes(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    """A box for each token: left, top, right, bottom."""
    return {"bbox": draws.ids(batch, length, 4, low=0, high=9) + torch.tensor([0, 0, 10, 10])}


def paths(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    """Where each token is in a page: four tags and their numbers."""
    return {name: draws.ids(batch, length, 4) for name in ("xpath_tags_seq", "xpath_subs_seq")}


def cells(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    """The types of a table's tokens: segment, column, row, and four more."""
    types = torch.zeros(batch, length, 7, dtype=torch.long)
    types[..., 0], types[..., 1], types[..., 2] = 1, torch.arange(length) % 2, torch.arange(length) // 2
    return {"token_type_ids": types}


def queries(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    """Two texts for each image, one below the other."""
    return text()(draws, 2 * batch, length, padding)


def noise(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    """What a masked autoencoder sorts its patches by."""
    return {"noise": draws.uniform(batch, 16)}


def placed_patches(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    """Patches of 12 values, each after its row and its column."""
    made = normal("flattened_patches", "length", 14, mask="attention_mask")(draws, batch, length, padding)
    made["flattened_patches"][..., 0], made["flattened_patches"][..., 1] = 1, 1 + torch.arange(length)
    return made


def patches(rows: int, columns: int) -> MakeInputs:
    """The patches of all images below each other, and the images' grids."""
    return together(
        lambda draws, batch, length, padding: {"pixel_values": draws.normal(batch * 16, rows * columns)},
        each(image_grid_thw=[1, 4, 4]),
    )


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """One architecture: its tiny model, its inputs, and the layers that a user would adapt (or ``ALL_LINEAR``)."""

    name: str
    kind: str
    model: str
    targets: tuple[str, ...]
    make_inputs: MakeInputs
    generates: bool
    changes: dict[str, Any]

    def config(self) -> PretrainedConfig:
        return sized(getattr(transformers, self.model).config_class, deepcopy(self.changes))  # configurations keep them

    def build(self, seed: int = 0) -> torch.nn.Module:
        """The model, in evaluation mode."""
        config = self.config()
        torch.manual_seed(seed)
        model = getattr(transformers, self.model)(config).eval()
        for name, parameter in model.named_parameters():
            if not (name.endswith("bias") or parameter.any()):  # a gate that starts at zero: it is to show
                torch.nn.init.normal_(parameter, std=0.1)
        if self.generates:
            model.generation_config.update(
                eos_token_id=None, forced_eos_token_id=None, pad_token_id=0, bos_token_id=1, decoder_start_token_id=1
            )
        return model

    def inputs(self, batch: int, length: int, *, padding: bool = False, seed: int = 0) -> Inputs:
        return self.make_inputs(Draws(seed), batch, length, padding)

    def prompts(self, batch: int, length: int, *, padding: bool = False, seed: int = 0) -> Inputs:
        """The inputs of ``generate``: all but the decoder's."""
        made = self.inputs(batch, length, padding=padding, seed=seed)
        return {key: value for key, value in made.items() if not key.startswith("decoder_")}

    @property
    def pads(self) -> bool:
        """Whether there are inputs with padding."""
        plain, padded = (self.inputs(2, 7, padding=padding) for padding in (False, True))
        return plain.keys() != padded.keys() or any(not torch.equal(plain[key], padded[key]) for key in plain)


def _rows(kind: str, usual_inputs: MakeInputs, *, generates: bool) -> Callable[..., Family]:
    def row(
        name: str,
        model: str,
        targets: str,
        inputs: MakeInputs = usual_inputs,
        generates: bool = generates,
        **changes: Any,
    ) -> Family:
        return Family(name, kind, model, tuple(targets.split()), inputs, generates, changes)

    return row


_encoder = _rows("encoder", text(), generates=False)
_causal = _rows("causal", text(left=True), generates=True)
_seq2seq = _rows("encoder-decoder", together(text(), text("decoder_", longer=2)), generates=True)
_vision = _rows("vision", images(), generates=False)
_audio = _rows("audio", waves(), generates=False)
_multimodal = _rows("multimodal", together(text(), images()), generates=False)

# fmt: off

_DEBERTA = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
_DEBERTA_3 = {**_DEBERTA, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
              "position_biased_input": False}

ENCODERS = [
    _encoder("bert", "BertForSequenceClassification", "query key value"),
    _encoder("bert-multiple-choice", "BertForMultipleChoice", "query value", choices),
    _encoder("roberta", "RobertaForSequenceClassification", "query value"),
    _encoder("xlm-roberta", "XLMRobertaForTokenClassification", "query value"),
    _encoder("xlm-roberta-xl", "XLMRobertaXLForSequenceClassification", "query value"),
    _encoder("roberta-prelayernorm", "RobertaPreLayerNormForSequenceClassification", "query value"),
    _encoder("camembert", "CamembertForMaskedLM", "query value"),
    _encoder("data2vec-text", "Data2VecTextForSequenceClassification", "query value"),
    _encoder("xmod", "XmodForSequenceClassification", "query value", default_language="en_XX"),
    _encoder("albert", "AlbertForSequenceClassification", "query value", embedding_size=16),
    _encoder("electra", "ElectraForSequenceClassification", "query value", embedding_size=16),
    _encoder("distilbert", "DistilBertForSequenceClassification", "q_lin v_lin"),
    _encoder("deberta", "DebertaForSequenceClassification", "in_proj pos_proj pos_q_proj", **_DEBERTA),
    _encoder("deberta-v2", "DebertaV2ForSequenceClassification", "query_proj value_proj", **_DEBERTA),
    _encoder("deberta-v2-xlarge", "DebertaV2ForSequenceClassification", "query_proj key_proj value_proj",
             **_DEBERTA_3, conv_kernel_size=3, conv_act="gelu"),  # with a convolution beside the first layer
    _encoder("deberta-v3", "DebertaV2ForSequenceClassification", "query_proj key_proj value_proj", **_DEBERTA_3),
    _encoder("xlm", "XLMForSequenceClassification", "q_lin v_lin"),
    _encoder("flaubert", "FlaubertForSequenceClassification", "q_lin v_lin"),
    _encoder("xlnet", "XLNetForSequenceClassification", "layer_1 layer_2"),
    _encoder("mpnet", "MPNetForSequenceClassification", "attn.q attn.v"),
    _encoder("longformer", "LongformerForSequenceClassification", "query value query_global", attention_window=4),
    _encoder("big-bird", "BigBirdForSequenceClassification", "query value", attention_type="original_full"),
    _encoder("big-bird-sparse", "BigBirdForSequenceClassification", "query value", text(longer=25),
             block_size=2, num_random_blocks=1),
    _encoder("funnel", "FunnelForTokenClassification", "q_head k_head v_head", block_sizes=[1, 1]),
    _encoder("nystromformer", "NystromformerForSequenceClassification", "query value",
             num_landmarks=2, segment_means_seq_len=2, conv_kernel_size=3),
    _encoder("modernbert", "ModernBertForSequenceClassification", "Wqkv Wo",
             local_attention=4, cls_token_id=1, sep_token_id=2),
    _encoder("nomic-bert", "NomicBertForSequenceClassification", "q_proj v_proj"),
    _encoder("eurobert", "EuroBertForSequenceClassification", "q_proj v_proj", mask_token_id=3),
    _encoder("jina-v3", "JinaEmbeddingsV3ForSequenceClassification", "q_proj v_proj"),
    _encoder("gte", "GteForSequenceClassification", "q_proj v_proj"),
    _encoder("convbert", "ConvBertForSequenceClassification", "query value", conv_kernel_size=3),
    _encoder("mobilebert", "MobileBertForSequenceClassification", "query value",
             embedding_size=16, intra_bottleneck_size=16, num_feedforward_networks=2),
    _encoder("squeezebert", "SqueezeBertForSequenceClassification", "query value", q_groups=1, v_groups=1),
    _encoder("fnet", "FNetForSequenceClassification", "dense", text(mask="")),
    _encoder("canine", "CanineForSequenceClassification", "query value", text(longer=9),
             local_transformer_stride=4, downsampling_rate=4, num_hash_buckets=64),
    _encoder("ibert", "IBertForSequenceClassification", "classifier.dense"),  # its other layers are not torch's
    _encoder("roformer", "RoFormerForSequenceClassification", "query value"),
    _encoder("splinter", "SplinterForQuestionAnswering", "query value", question_token_id=3),
    _encoder("yoso", "YosoForSequenceClassification", "query value"),
    _encoder("mra", "MraForSequenceClassification", "query value"),
    _encoder("rembert", "RemBertForSequenceClassification", "query value", input_embedding_size=16),
    _encoder("roc-bert", "RoCBertForSequenceClassification", "query value",
             pronunciation_vocab_size=60, pronunciation_embed_dim=8, shape_vocab_size=60, shape_embed_dim=8),
    _encoder("megatron-bert", "MegatronBertForSequenceClassification", "query value"),
    _encoder("ernie", "ErnieForSequenceClassification", "query value"),
    _encoder("esm", "EsmForSequenceClassification", "query value", mask_token_id=3, position_embedding_type="rotary"),
    _encoder("dpr", "DPRQuestionEncoder", "query value", projection_dim=16),
    _encoder("reformer", "ReformerForSequenceClassification", "query_key value query key", axial_pos_embds=False,
             attn_layers=["local", "lsh"], attention_head_size=8, feed_forward_size=48, local_attn_chunk_length=4,
             lsh_attn_chunk_length=4, num_buckets=2, hash_seed=0),
    _encoder("perceiver", "PerceiverForSequenceClassification", "query value", text(name="inputs"), num_latents=6),
    _encoder("luke", "LukeForSequenceClassification", "query value w2e_query", together(text(), entities),
             entity_vocab_size=10, entity_emb_size=16),
    _encoder("layoutlm", "LayoutLMForSequenceClassification", "query value", together(text(), boxes)),
    _encoder("layoutlmv3", "LayoutLMv3ForTokenClassification", "query value",
             together(text(), boxes, images()), coordinate_size=4, shape_size=8, input_size=32),
    _encoder("lilt", "LiltForSequenceClassification", "query value", together(text(), boxes), hidden_size=48),
    _encoder("bros", "BrosForTokenClassification", "query value",
             together(text(), normal("bbox", "length", 8)), hidden_size=64),
    _encoder("markuplm", "MarkupLMForSequenceClassification", "query value", together(text(), paths),
             max_depth=4, xpath_unit_hidden_size=8),
    _encoder("tapas", "TapasForSequenceClassification", "query value", together(text(), cells)),
]

_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL_MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED_MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2}
_DELTA = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_key_head_dim": 8,
          "linear_num_value_heads": 4, "linear_value_head_dim": 8}
_LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
           "num_key_value_heads": 4, "head_dim": 4}
_DEEPSEEK = {**_LATENT, **_ROUTED_MIXTURE, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
_MAMBA = {"state_size": 8, "time_step_rank": 4}
_MAMBA_1 = {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
_PER_LAYER = {"vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8,
              "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
_PLAIN_CAUSALS = """
    llama:Llama mistral:Mistral ministral:Ministral qwen2:Qwen2 qwen3:Qwen3 gemma:Gemma gemma2:Gemma2 phi:Phi olmo:Olmo
    olmo2:Olmo2 olmo3:Olmo3 stablelm:StableLm granite:Granite cohere:Cohere cohere2:Cohere2 starcoder2:Starcoder2
    nemotron:Nemotron glm:Glm glm4:Glm4 smollm3:SmolLM3 helium:Helium ernie4.5:Ernie4_5 exaone4:Exaone4
    hunyuan:HunYuanDenseV1 seed-oss:SeedOss apertus:Apertus arcee:Arcee diffllama:DiffLlama doge:Doge bitnet:BitNet
    modernbert-decoder:ModernBertDecoder gemma3-text:Gemma3 opt:OPT xglm:XGLM biogpt:BioGpt
"""

CAUSALS = [
    *(_causal(name, f"{prefix}ForCausalLM", "q_proj v_proj")
      for name, prefix in (pair.split(":") for pair in _PLAIN_CAUSALS.split())),
    _causal("llama-classifier", "LlamaForSequenceClassification", "q_proj v_proj", generates=False),
    _causal("opt-350m", "OPTForCausalLM", "q_proj v_proj", word_embed_proj_dim=16, do_layer_norm_before=False),
    _causal("gpt2", "GPT2LMHeadModel", "c_attn"),
    _causal("gpt2-classifier", "GPT2ForSequenceClassification", "c_attn", generates=False),
    _causal("gpt2-cross-attention", "GPT2LMHeadModel", "c_attn q_attn",
            together(text(left=True), normal("encoder_hidden_states", 6, 32)), add_cross_attention=True),
    _causal("openai-gpt", "OpenAIGPTLMHeadModel", "c_attn"),
    _causal("imagegpt", "ImageGPTForCausalImageModeling", "c_attn", vocab_size=61),
    _causal("gpt-bigcode", "GPTBigCodeForCausalLM", "c_attn"),
    _causal("gpt-neo", "GPTNeoForCausalLM", "q_proj v_proj", attention_types=[[["global", "local"], 1]], window_size=4),
    _causal("gptj", "GPTJForCausalLM", "q_proj v_proj", rotary_dim=4),
    _causal("gpt-neox", "GPTNeoXForCausalLM", "query_key_value"),
    _causal("ctrl", "CTRLLMHeadModel", "Wq Wv"),
    _causal("bloom", "BloomForCausalLM", "query_key_value"),
    _causal("falcon", "FalconForCausalLM", "query_key_value"),
    _causal("falcon-40b", "FalconForCausalLM", "query_key_value",
            new_decoder_architecture=True, num_kv_heads=2, multi_query=False),
    _causal("codegen", "CodeGenForCausalLM", "qkv_proj", rotary_dim=4),
    _causal("mpt", "MptForCausalLM", "Wqkv"),
    _causal("phi3", "Phi3ForCausalLM", "qkv_proj", original_max_position_embeddings=64),
    _causal("persimmon", "PersimmonForCausalLM", "query_key_value"),
    _causal("gemma3n-text", "Gemma3nForCausalLM", "q_proj v_proj", **_PER_LAYER, laurel_rank=4,
            activation_sparsity_pattern=[0.5, 0.0], intermediate_size=[48, 48]),
    _causal("gemma4-text", "Gemma4ForCausalLM", "q_proj v_proj", **_PER_LAYER),
    _causal("gemma4-text-moe", "Gemma4ForCausalLM", "q_proj v_proj", **_PER_LAYER, enable_moe_block=True,
            num_experts=4, top_k_experts=2),
    _causal("bert-generation", "BertGenerationDecoder", "query value", is_decoder=True),
    _causal("trocr-decoder", "TrOCRForCausalLM", "q_proj v_proj"),
    # mixtures of experts
    _causal("mixtral", "MixtralForCausalLM", "q_proj v_proj", **_LOCAL_MIXTURE),
    _causal("dbrx", "DbrxForCausalLM", "Wqkv", attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}),
    _causal("qwen2-moe", "Qwen2MoeForCausalLM", "q_proj v_proj", **_MIXTURE),
    _causal("qwen3-moe", "Qwen3MoeForCausalLM", "q_proj v_proj", **_MIXTURE),
    _causal("olmoe", "OlmoeForCausalLM", "q_proj v_proj", **_MIXTURE),
    _causal("phimoe", "PhimoeForCausalLM", "q_proj v_proj", **_LOCAL_MIXTURE),
    _causal("granitemoe", "GraniteMoeForCausalLM", "q_proj v_proj", **_LOCAL_MIXTURE),
    _causal("jetmoe", "JetMoeForCausalLM", "kv_proj", **_LOCAL_MIXTURE, kv_channels=8),
    _causal("glm4-moe", "Glm4MoeForCausalLM", "q_proj v_proj", **_ROUTED_MIXTURE),
    _causal("dots1", "Dots1ForCausalLM", "q_proj v_proj", **_ROUTED_MIXTURE, n_shared_experts=1,
            first_k_dense_replace=1),
    _causal("ernie4.5-moe", "Ernie4_5_MoeForCausalLM", "q_proj v_proj", moe_num_experts=4, moe_k=2,
            moe_layer_start_index=0, moe_layer_end_index=1),
    _causal("minimax-m2", "MiniMaxM2ForCausalLM", "q_proj v_proj", **_LOCAL_MIXTURE),
    _causal("llama4-text", "Llama4ForCausalLM", "q_proj v_proj", num_local_experts=4, moe_layers=[1],
            intermediate_size_mlp=48),
    _causal("gpt-oss", "GptOssForCausalLM", "q_proj v_proj", **_LOCAL_MIXTURE),
    _causal("deepseek-v2", "DeepseekV2ForCausalLM", "q_b_proj kv_b_proj", **_DEEPSEEK),
    _causal("deepseek-v3", "DeepseekV3ForCausalLM", "q_b_proj kv_b_proj", **_DEEPSEEK),
    _causal("deepseek-v4", "DeepseekV4ForCausalLM", "q_b_proj kv_proj", **_ROUTED_MIXTURE, head_dim=16,
            num_key_value_heads=1, q_lora_rank=16, hc_mult=2, partial_rotary_factor=0.25,
            mlp_layer_types=["hash_moe", "moe"],
            layer_types=["heavily_compressed_attention", "compressed_sparse_attention"], o_groups=2, o_lora_rank=8,
            compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}, index_n_heads=4,
            index_head_dim=8, index_topk=4),
    _causal("longcat-flash", "LongcatFlashForCausalLM", "q_b_proj kv_b_proj", **_LATENT, n_routed_experts=4,
            zero_expert_num=2, moe_topk=2, expert_ffn_hidden_size=48),
    # linear attention and state spaces
    _causal("qwen3-next", "Qwen3NextForCausalLM", "q_proj v_proj in_proj_qkvz", **_MIXTURE, **_DELTA),
    _causal("qwen3.5", "Qwen3_5ForCausalLM", "q_proj v_proj in_proj_qkv", **_DELTA),
    _causal("olmo-hybrid", "OlmoHybridForCausalLM", "q_proj v_proj", **_DELTA),
    _causal("kimi-linear", "KimiLinearForCausalLM", "q_proj v_proj", **_LATENT | {"q_lora_rank": None},
            **_LOCAL_MIXTURE, layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "sparse"],
            linear_head_dim=8, linear_num_heads=4),
    _causal("minimax", "MiniMaxForCausalLM", "q_proj v_proj qkv_proj", num_local_experts=4, block_size=4,
            layer_types=["linear_attention", "full_attention"]),
    _causal("mamba", "MambaForCausalLM", "in_proj", **_MAMBA),
    _causal("falcon-mamba", "FalconMambaForCausalLM", "in_proj", **_MAMBA),
    _causal("mamba2", "Mamba2ForCausalLM", "in_proj", num_heads=8, n_groups=2, chunk_size=4, state_size=8),
    _causal("jamba", "JambaForCausalLM", "q_proj v_proj in_proj", **_MAMBA_1, num_experts=4, attn_layer_period=2,
            attn_layer_offset=1),
    _causal("bamba", "BambaForCausalLM", "q_proj v_proj in_proj", **_MAMBA_2, attn_layer_indices=[1]),
    _causal("granitemoehybrid", "GraniteMoeHybridForCausalLM", "q_proj v_proj in_proj", **_MAMBA_2, **_LOCAL_MIXTURE,
            layer_types=["mamba", "attention"], shared_intermediate_size=48),
    _causal("falcon-h1", "FalconH1ForCausalLM", "q_proj v_proj in_proj", **_MAMBA_2, mamba_d_ssm=64),
    _causal("zamba", "ZambaForCausalLM", "q_proj v_proj", **_MAMBA_1, attention_head_dim=16, attention_hidden_size=64,
            num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "hybrid"]),
    _causal("zamba2", "Zamba2ForCausalLM", "q_proj v_proj", n_mamba_heads=8, mamba_d_state=8, chunk_size=4,
            use_mamba_kernels=False, num_hidden_layers=3, layers_block_type=["mamba", "hybrid", "hybrid"]),
    _causal("nemotron-h", "NemotronHForCausalLM", "q_proj v_proj in_proj", n_routed_experts=4, n_groups=2, chunk_size=4,
            layers_block_type=["linear_attention", "moe", "full_attention"], ssm_state_size=8, mamba_num_heads=8,
            mamba_head_dim=8, use_mamba_kernels=False, moe_shared_expert_intermediate_size=48),
    _causal("recurrent-gemma", "RecurrentGemmaForCausalLM", "q_proj v_proj linear_x",
            block_types=["recurrent", "attention"], attention_window_size=8),
    _causal("rwkv", "RwkvForCausalLM", "key value receptance", context_length=64),
    _causal("xlstm", "xLSTMForCausalLM", "q k v", hidden_size=64, qk_dim_factor=1.0, num_blocks=2),
    _causal("lfm2", "Lfm2ForCausalLM", "q_proj v_proj in_proj", layer_types=["conv", "full_attention"]),
    _causal("lfm2-moe", "Lfm2MoeForCausalLM", "q_proj v_proj in_proj", **_MIXTURE, num_dense_layers=1,
            layer_types=["conv", "full_attention"]),
]

_CROSS = {"is_decoder": True, "add_cross_attention": True}
_CONVOLUTIONS = {"conv_dim": [16, 16], "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_feat_extract_layers": 2}
_SPEECH = {**_CONVOLUTIONS, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
_SERIES = {"prediction_length": 4, "context_length": 13, "num_time_features": 1, "generates": False}
_TIMES = together(normal("past_values", 20), normal("future_values", 4), normal("past_time_features", 20, 1),
                  normal("future_time_features", 4, 1), ones(past_observed_mask=(20,)))
_PATCHES = {"num_input_channels": 3, "patch_length": 4, "patch_stride": 4, "prediction_length": 4, "generates": False}

SEQ2SEQS = [
    _seq2seq("t5", "T5ForConditionalGeneration", "q v"),
    _seq2seq("t5-encoder", "T5EncoderModel", "q v", text(), generates=False),
    _seq2seq("t5-classifier", "T5ForSequenceClassification", "q v", ended, generates=False, decoder_start_token_id=0),
    _seq2seq("mt5", "MT5ForConditionalGeneration", "q v", feed_forward_proj="gated-gelu"),
    _seq2seq("umt5", "UMT5ForConditionalGeneration", "q v"),
    _seq2seq("longt5", "LongT5ForConditionalGeneration", "q v", local_radius=2),
    _seq2seq("longt5-global", "LongT5ForConditionalGeneration", "q v", local_radius=2, global_block_size=2,
             encoder_attention_type="transient-global"),
    _seq2seq("switch", "SwitchTransformersForConditionalGeneration", "q v", num_experts=4,
             num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    _seq2seq("t5gemma", "T5GemmaForConditionalGeneration", "q_proj v_proj"),
    _seq2seq("pop2piano", "Pop2PianoForConditionalGeneration", "q v", generates=False,
             inputs=together(normal("inputs_embeds", "length", 32, mask="attention_mask"), text("decoder_"))),
    _seq2seq("bart", "BartForConditionalGeneration", "q_proj v_proj"),
    _seq2seq("bart-classifier", "BartForSequenceClassification", "q_proj v_proj", ended, generates=False),
    _seq2seq("mbart", "MBartForConditionalGeneration", "q_proj v_proj"),
    _seq2seq("plbart", "PLBartForConditionalGeneration", "q_proj v_proj"),
    _seq2seq("mvp", "MvpForConditionalGeneration", "q_proj v_proj"),
    _seq2seq("mvp-prompt", "MvpForConditionalGeneration", "q_proj v_proj",
             use_prompt=True, prompt_length=3, prompt_mid_dim=16),
    _seq2seq("pegasus", "PegasusForConditionalGeneration", "q_proj v_proj"),
    _seq2seq("pegasus-x", "PegasusXForConditionalGeneration", "q_proj v_proj", num_global_tokens=2, block_size=4),
    _seq2seq("bigbird-pegasus", "BigBirdPegasusForConditionalGeneration", "query value q_proj v_proj",
             attention_type="original_full"),
    _seq2seq("led", "LEDForConditionalGeneration", "query value q_proj v_proj", attention_window=4,
             max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    _seq2seq("m2m100", "M2M100ForConditionalGeneration", "q_proj v_proj"),
    _seq2seq("nllb-moe", "NllbMoeForConditionalGeneration", "q_proj v_proj", num_experts=4, encoder_sparse_step=2,
             decoder_sparse_step=2),
    _seq2seq("marian", "MarianMTModel", "q_proj v_proj", decoder_vocab_size=60),
    _seq2seq("fsmt", "FSMTForConditionalGeneration", "q_proj v_proj", src_vocab_size=60, tgt_vocab_size=60,
             num_beams=1),
    _seq2seq("blenderbot", "BlenderbotForConditionalGeneration", "q_proj v_proj"),
    _seq2seq("blenderbot-small", "BlenderbotSmallForConditionalGeneration", "q_proj v_proj"),
    _seq2seq("prophetnet", "ProphetNetForConditionalGeneration", "query_proj value_proj"),
    _seq2seq("encoder-decoder", "EncoderDecoderModel", "query value", encoder=part("Bert"),
             decoder=part("Bert", **_CROSS)),
    _seq2seq("seamless-m4t", "SeamlessM4TForTextToText", "q_proj v_proj"),
    _seq2seq("udop", "UdopForConditionalGeneration", "q v",
             together(text(), text("decoder_"), normal("bbox", "length", 4), images())),
    # sound and images to text
    _seq2seq("whisper", "WhisperForConditionalGeneration", "q_proj v_proj",
             together(normal("input_features", 8, 28), text("decoder_")), max_source_positions=14,
             max_target_positions=32, begin_suppress_tokens=None),
    _seq2seq("speech2text", "Speech2TextForConditionalGeneration", "q_proj v_proj",
             together(normal("input_features", "4length", 8, mask="attention_mask", per_mask=4), text("decoder_")),
             max_source_positions=64, max_target_positions=32, conv_channels=16, input_feat_per_channel=8),
    _seq2seq("speecht5", "SpeechT5ForSpeechToText", "q_proj v_proj", together(waves(), text("decoder_")), **_SPEECH,
             max_text_positions=32, max_speech_positions=64),
    _seq2seq("moonshine", "MoonshineForConditionalGeneration", "q_proj v_proj",
             together(waves(base=511, per_token=384), text("decoder_"))),
    _seq2seq("seamless-m4t-speech", "SeamlessM4TForSpeechToText", "q_proj v_proj linear_q",
             together(normal("input_features", "4length", 8, mask="attention_mask", per_mask=4), text("decoder_")),
             num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, adaptor_kernel_size=4, adaptor_stride=4),
    _seq2seq("speech-encoder-decoder", "SpeechEncoderDecoderModel", "q_proj v_proj query value",
             together(waves(), text("decoder_")), encoder=part("Wav2Vec2", **_SPEECH), decoder=part("Bert", **_CROSS)),
    _seq2seq("vision-encoder-decoder", "VisionEncoderDecoderModel", "q_proj v_proj c_attn",
             together(images(), text("decoder_")), encoder=part("ViT"), decoder=part("GPT2", add_cross_attention=True)),
    _seq2seq("donut", "VisionEncoderDecoderModel", "query value q_proj v_proj", together(images(), text("decoder_")),
             encoder=part("DonutSwin", depths=[2, 2], num_heads=[2, 4], embed_dim=16, window_size=4, patch_size=2),
             decoder=part("MBart", **_CROSS)),
    _seq2seq("pix2struct", "Pix2StructForConditionalGeneration", "query value",
             together(placed_patches, text("decoder_")), vision_config={"patch_embed_hidden_size": 12, "seq_len": 64}),
    # series of numbers
    _seq2seq("time-series-transformer", "TimeSeriesTransformerForPrediction", "q_proj v_proj", _TIMES, **_SERIES),
    _seq2seq("informer", "InformerForPrediction", "q_proj v_proj", _TIMES, **_SERIES),
    _seq2seq("autoformer", "AutoformerForPrediction", "q_proj v_proj", _TIMES, **_SERIES, label_length=2,
             moving_average=3),
    _seq2seq("patchtst", "PatchTSTForPrediction", "q_proj v_proj", normal("past_values", 32, 3), **_PATCHES),
    _seq2seq("patchtsmixer", "PatchTSMixerForPrediction", "fc1 fc2", normal("past_values", 32, 3), **_PATCHES),
]

_STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16]}
_PYRAMID = {**_STAGES, "num_attention_heads": [1, 2], "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2]}
_PYRAMID_2 = {**_PYRAMID, "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}
_SWIN = {"depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 4, "patch_size": 2}
_RESNET = part("ResNet", depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], embedding_size=8,
               out_features=["stage2", "stage3", "stage4"])
_DETR = {"backbone_config": _RESNET, "num_queries": 6, "inputs": images(64)}
_SWIN_BACKBONE = part("Swin", depths=[1, 1, 1, 1], num_heads=[2, 2, 2, 2], embed_dim=8, window_size=4, patch_size=2,
                      image_size=64, out_features=["stage1", "stage2", "stage3", "stage4"])

VISIONS = [
    _vision("vit", "ViTForImageClassification", "q_proj v_proj"),
    _vision("deit", "DeiTForImageClassification", "q_proj v_proj"),
    _vision("deit-distilled", "DeiTForImageClassificationWithTeacher", "q_proj v_proj"),
    _vision("beit", "BeitForImageClassification", "q_proj v_proj", use_relative_position_bias=True),
    _vision("data2vec-vision", "Data2VecVisionForImageClassification", "query value"),
    _vision("vit-msn", "ViTMSNForImageClassification", "q_proj v_proj"),
    _vision("ijepa", "IJepaForImageClassification", "q_proj v_proj"),
    _vision("dinov2", "Dinov2ForImageClassification", "q_proj v_proj"),
    _vision("dinov2-registers", "Dinov2WithRegistersForImageClassification", "q_proj v_proj"),
    _vision("dinov3", "DINOv3ViTModel", "q_proj v_proj", pos_embed_rescale=None),
    _vision("vit-mae", "ViTMAEForPreTraining", "q_proj v_proj", together(images(), noise), decoder_num_hidden_layers=1),
    _vision("swin", "SwinForImageClassification", "q_proj v_proj", **_SWIN),
    _vision("swinv2", "Swinv2ForImageClassification", "query value", **_SWIN),
    _vision("swin2sr", "Swin2SRForImageSuperResolution", "query value", **{**_SWIN, "patch_size": 1}),
    _vision("focalnet", "FocalNetForImageClassification", "projection_in projection_out", embed_dim=16, depths=[1, 1],
            focal_levels=[2, 2], focal_windows=[3, 3], patch_size=4),
    _vision("hiera", "HieraForImageClassification", "qkv", image_size=[32, 32], embed_dim=16, depths=[1, 1],
            num_heads=[2, 4], num_query_pool=1, masked_unit_size=[2, 2], masked_unit_attention=[True, False],
            patch_size=[7, 7]),
    _vision("convnext", "ConvNextForImageClassification", "pwconv1 pwconv2", **_STAGES, num_stages=2),
    _vision("convnextv2", "ConvNextV2ForImageClassification", "pwconv1 pwconv2", **_STAGES, num_stages=2),
    _vision("resnet", "ResNetForImageClassification", "convolution", **_STAGES, embedding_size=8),
    _vision("regnet", "RegNetForImageClassification", "layer.0.convolution layer.3.convolution",
            **_STAGES, embedding_size=8, groups_width=4),
    _vision("bit", "BitForImageClassification", "conv1 conv2", depths=[1, 1], hidden_sizes=[16, 32], embedding_size=8,
            num_groups=4),
    _vision("efficientnet", "EfficientNetForImageClassification", "expand_conv project_conv", width_coefficient=0.1,
            depth_coefficient=0.5, hidden_dim=128),
    _vision("mobilenet-v2", "MobileNetV2ForImageClassification", "expand_1x1.convolution reduce_1x1.convolution",
            depth_multiplier=0.25),
    _vision("cvt", "CvtForImageClassification", "projection_query projection_value", embed_dim=[8, 8, 16],
            num_heads=[1, 2, 2], depth=[1, 2, 3]),
    _vision("pvt", "PvtForImageClassification", "query value", **{**_PYRAMID, "patch_sizes": [4, 2]},
            sequence_reduction_ratios=[2, 1], mlp_ratios=[2, 2]),
    _vision("pvt-v2", "PvtV2ForImageClassification", "query value", **_PYRAMID_2),
    _vision("segformer", "SegformerForSemanticSegmentation", "q_proj v_proj", **_PYRAMID_2),
    _vision("glpn", "GLPNForDepthEstimation", "query value", **_PYRAMID_2),
    _vision("poolformer", "PoolFormerForImageClassification", "conv1 conv2", **_PYRAMID, padding=[2, 1]),
    _vision("mobilevit", "MobileViTForImageClassification", "query value", images(64), image_size=64, patch_size=2,
            hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 8, 8, 16, 16, 32]),
    _vision("mobilevitv2", "MobileViTV2ForImageClassification", "qkv_proj.convolution",
            images(64), image_size=64, patch_size=2,
            base_attn_unit_dims=[16, 16, 16], n_attn_blocks=[1, 1, 1], width_multiplier=0.25),
    _vision("levit", "LevitForImageClassification", "linear", images(64), image_size=64, patch_size=16,
            depths=[1, 1, 1], hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], key_dim=[4, 4, 4]),
    _vision("swiftformer", "SwiftFormerForImageClassification", "to_query to_key", images(64), depths=[1, 1, 1, 1],
            embed_dims=[8, 8, 16, 16]),
    # videos
    _vision("videomae", "VideoMAEForVideoClassification", "query value", images(32, 4), num_frames=4),
    _vision("timesformer", "TimesformerForVideoClassification", "qkv", images(32, 4), num_frames=4),
    _vision("vivit", "VivitForVideoClassification", "q_proj v_proj", images(32, 4), num_frames=4,
            tubelet_size=[2, 8, 8]),
    _vision("vjepa2", "VJEPA2ForVideoClassification", "query value", images(32, 4, name="pixel_values_videos"),
            frames_per_clip=4, crop_size=32, pred_hidden_size=16, pred_num_attention_heads=2, pred_num_hidden_layers=1,
            num_pooler_layers=1),
    # boxes, masks and depths
    _vision("detr", "DetrForObjectDetection", "q_proj v_proj", **_DETR),
    _vision("table-transformer", "TableTransformerForObjectDetection", "q_proj v_proj", **_DETR),
    _vision("conditional-detr", "ConditionalDetrForObjectDetection", "q_proj v_proj", **_DETR),
    _vision("dab-detr", "DabDetrForObjectDetection", "q_proj v_proj", **_DETR),
    _vision("deformable-detr", "DeformableDetrForObjectDetection", "q_proj v_proj value_proj", **_DETR,
            num_feature_levels=3, encoder_n_points=2, decoder_n_points=2),
    _vision("rt-detr", "RTDetrForObjectDetection", "q_proj v_proj value_proj", **_DETR | {"backbone_config": part(
        "RTDetrResNet", depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 16, 16], embedding_size=8, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"])}, encoder_in_channels=[8, 16, 16], encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32], decoder_n_points=2, num_denoising=0),
    _vision("yolos", "YolosForObjectDetection", "query value", image_size=[32, 32], num_detection_tokens=6),
    _vision("mask2former", "Mask2FormerForUniversalSegmentation", "q_proj v_proj", images(64), num_queries=6,
            backbone_config=_SWIN_BACKBONE, feature_size=32, mask_feature_size=32, hidden_dim=32, dim_feedforward=48,
            encoder_feedforward_dim=48),
    _vision("maskformer", "MaskFormerForInstanceSegmentation", "q_proj v_proj", images(64), fpn_feature_size=32,
            mask_feature_size=32, backbone_config=_SWIN_BACKBONE,
            decoder_config=part("Detr", num_queries=6, backbone_config=_RESNET)),
    _vision("sam", "SamModel", "qkv q_proj v_proj", together(images(), normal("input_points", 1, 2, 2)),
            vision_config={"window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 8, "output_channels": 16},
            prompt_encoder_config={"hidden_size": 16, "mask_input_channels": 8},
            mask_decoder_config={"hidden_size": 16, "iou_head_hidden_dim": 16}),
    _vision("sam2", "Sam2Model", "qkv q_proj v_proj", together(images(64), normal("input_points", 1, 2, 2)),
            vision_config=part("Sam2Vision", backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=16,
            backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]], backbone_config=part("Sam2HieraDet", hidden_size=8,
            image_size=[64, 64], blocks_per_stage=[1, 2, 2, 1], embed_dim_per_stage=[8, 16, 32, 64],
            num_attention_heads=1, window_size_per_stage=[4, 4, 2, 2], global_attention_blocks=[4])),
            prompt_encoder_config={"hidden_size": 16, "mask_input_channels": 8, "image_size": 64, "patch_size": 16},
            mask_decoder_config={"hidden_size": 16, "iou_head_hidden_dim": 16}),
    _vision("dpt", "DPTForDepthEstimation", "query value", num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8),
    _vision("depth-anything", "DepthAnythingForDepthEstimation", "q_proj v_proj",
            patch_size=8, reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 8], reassemble_factors=[2, 1], fusion_hidden_size=8, head_hidden_size=4,
            backbone_config=part("Dinov2", out_indices=[1, 2], reshape_hidden_states=False)),
    _vision("upernet", "UperNetForSemanticSegmentation", "q_proj v_proj", images(64), backbone_config=_SWIN_BACKBONE,
            auxiliary_channels=8, auxiliary_in_channels=32, pool_scales=[1, 2]),
    _vision("vitdet", "VitDetModel", "qkv", window_block_indices=[0], window_size=3),
    _vision("vitpose", "VitPoseForPoseEstimation", "query value", num_labels=3,
            backbone_config=part("VitPoseBackbone", image_size=[32, 32], patch_size=[8, 8])),
    _vision("superpoint", "SuperPointForKeypointDetection", "conv_a", encoder_hidden_sizes=[8, 8, 8, 8]),
]

AUDIOS = [
    _audio("wav2vec2", "Wav2Vec2ForCTC", "q_proj v_proj", **_SPEECH),
    _audio("wav2vec2-classifier", "Wav2Vec2ForSequenceClassification", "q_proj v_proj", **_SPEECH,
           use_weighted_layer_sum=True),
    _audio("wav2vec2-large", "Wav2Vec2ForCTC", "q_proj v_proj", **_SPEECH, feat_extract_norm="layer",
           do_stable_layer_norm=True, adapter_attn_dim=4),
    _audio("hubert", "HubertForCTC", "q_proj v_proj", **_SPEECH),
    _audio("wavlm", "WavLMForCTC", "q_proj v_proj", **_SPEECH),
    _audio("sew", "SEWForCTC", "q_proj v_proj", waves(base=6, per_token=8), **_SPEECH),
    _audio("sew-d", "SEWDForCTC", "query_proj value_proj", waves(base=6, per_token=8), **_SPEECH, position_buckets=8),
    _audio("unispeech", "UniSpeechForCTC", "q_proj v_proj", **_SPEECH),
    _audio("unispeech-sat", "UniSpeechSatForCTC", "q_proj v_proj", **_SPEECH),
    _audio("data2vec-audio", "Data2VecAudioForCTC", "q_proj v_proj", **_SPEECH),
    _audio("wav2vec2-conformer", "Wav2Vec2ConformerForCTC", "linear_q linear_v", **_SPEECH,
           conv_depthwise_kernel_size=3),
    _audio("wav2vec2-bert", "Wav2Vec2BertForCTC", "linear_q linear_v",
           normal("input_features", "length", 8, mask="attention_mask"), conv_depthwise_kernel_size=3),
    _audio("parakeet", "ParakeetForCTC", "q_proj v_proj",
           normal("input_features", "8length", 8, mask="attention_mask", per_mask=8),
           encoder_config={"subsampling_conv_channels": 8, "conv_kernel_size": 3}),
    _audio("ast", "ASTForAudioClassification", "q_proj v_proj", normal("input_values", 32, 16), max_length=32,
           num_mel_bins=16, frequency_stride=4, time_stride=8),
    _audio("clap", "ClapModel", "query value", together(text(), normal("input_features", 1, 32, 32)),
           audio_config={"num_mel_bins": 32, "spec_size": 32, "depths": [2, 2], "num_attention_heads": [2, 4],
                         "window_size": 4, "patch_size": 2, "patch_stride": [2, 2], "patch_embeds_hidden_size": 16}),
    _audio("encodec", "EncodecModel", "block.1.conv block.3.conv",
           normal("input_values", 1, 64), num_filters=4, hidden_size=16,
           upsampling_ratios=[2, 2], codebook_size=8, codebook_dim=16, target_bandwidths=[36.0], num_lstm_layers=1),
    _audio("mimi", "MimiModel", "q_proj v_proj", normal("input_values", 1, 64), num_filters=4, upsampling_ratios=[2, 2],
           codebook_size=8, codebook_dim=16, vector_quantization_hidden_dimension=16, num_quantizers=3,
           upsample_groups=4, sampling_rate=200, frame_rate=25.0, layer_scale_initial_scale=1.0),
    _audio("vits", "VitsModel", "q_proj v_proj", noise_scale=0.0, noise_scale_duration=0.0, ffn_dim=48, flow_size=16,
           spectrogram_bins=9, upsample_initial_channel=8, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4],
           duration_predictor_filter_channels=16, posterior_encoder_num_wavenet_layers=2, resblock_kernel_sizes=[3],
           resblock_dilation_sizes=[[1]], inputs=text()),
]

_MEDIA = {"generates": True}
_CLIP, _SIGLIP, _LLAMA = part("CLIPVision"), part("SiglipVision"), part("Llama")
_IMAGE = together(prompt(16), images())  # sixteen tokens for an image
_SMALL_IMAGE = together(prompt(4), images())
_GRID = {"text_config": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
         "video_token_id": 57, "vision_start_token_id": 58, "vision_end_token_id": 59}
_OPT = part("OPT")

MULTIMODALS = [
    # two towers
    _multimodal("clip", "CLIPModel", "q_proj v_proj"),
    _multimodal("metaclip-2", "MetaClip2Model", "q_proj v_proj"),
    _multimodal("siglip", "SiglipModel", "q_proj v_proj"),
    _multimodal("siglip2", "Siglip2Model", "q_proj v_proj", together(
        text(), normal("pixel_values", 16, 192), each(spatial_shapes=[4, 4]), ones(pixel_attention_mask=(16,)))),
    _multimodal("altclip", "AltCLIPModel", "q_proj v_proj query value", text_config={"project_dim": 32}),
    _multimodal("chinese-clip", "ChineseCLIPModel", "q_proj v_proj query value"),
    _multimodal("vision-text-dual-encoder", "VisionTextDualEncoderModel", "q_proj v_proj query value",
                vision_config=_CLIP, text_config=part("Bert")),
    _multimodal("align", "AlignModel", "query value", vision_config={"width_coefficient": 0.1,
                "depth_coefficient": 0.5, "hidden_dim": 32}),
    _multimodal("clipseg", "CLIPSegForImageSegmentation", "q_proj v_proj", extract_layers=[0, 1], reduce_dim=8,
                decoder_intermediate_size=16, decoder_num_attention_heads=2),
    _multimodal("groupvit", "GroupViTModel", "q_proj v_proj", vision_config={"depths": [1, 1, 1],
                "num_group_tokens": [6, 4, 0], "num_output_groups": [6, 4, 4]}, projection_intermediate_dim=48),
    _multimodal("x-clip", "XCLIPModel", "q_proj v_proj", together(text(), images(32, 4)), prompt_num_attention_heads=4,
                vision_config={"num_frames": 4, "mit_hidden_size": 32, "mit_intermediate_size": 48,
                "mit_num_hidden_layers": 1, "mit_num_attention_heads": 4}),
    _multimodal("owlvit", "OwlViTForObjectDetection", "q_proj v_proj", together(queries, images())),
    _multimodal("owlv2", "Owlv2ForObjectDetection", "q_proj v_proj", together(queries, images())),
    _multimodal("grounding-dino", "GroundingDinoForObjectDetection", "query value value_proj",
                together(text(), images(64)), backbone_config=_SWIN_BACKBONE, text_config=part("Bert"), num_queries=6,
                num_feature_levels=4, encoder_n_points=2, decoder_n_points=2, max_text_len=64),
    _multimodal("flava", "FlavaModel", "query value"),
    # one encoder of text and images
    _multimodal("vilt", "ViltForQuestionAnswering", "query value",  # draws the order of the patches
                together(text(), images(), ones(pixel_mask=(32, 32)))),
    _multimodal("visual-bert", "VisualBertForQuestionAnswering", "query value", together(
        text(mask=""), ones(attention_mask=("length",), visual_attention_mask=(6,)), normal("visual_embeds", 6, 16)),
        visual_embedding_dim=16),
    _multimodal("lxmert", "LxmertForQuestionAnswering", "query value", together(
        text(), normal("visual_feats", 6, 16), normal("visual_pos", 6, 4)), visual_feat_dim=16, num_qa_labels=5,
        l_layers=1, x_layers=1, r_layers=1),
    _multimodal("bridgetower", "BridgeTowerForImageAndTextRetrieval", "query value",
                hidden_size=64, text_config={"hidden_size": 64}, vision_config={"hidden_size": 64}),
    # images before a decoder
    _multimodal("llava", "LlavaForConditionalGeneration", "q_proj v_proj", _IMAGE, **_MEDIA, vision_config=_CLIP,
                text_config=_LLAMA, vision_feature_layer=-1),
    _multimodal("vipllava", "VipLlavaForConditionalGeneration", "q_proj v_proj", _IMAGE, **_MEDIA, vision_config=_CLIP,
                text_config=_LLAMA, vision_feature_layers=[-2, -1]),
    _multimodal("llava-next", "LlavaNextForConditionalGeneration", "q_proj v_proj", together(
        prompt(36), images(32, 2), each(image_sizes=[32, 32])), **_MEDIA, vision_config=_CLIP, text_config=_LLAMA,
        image_grid_pinpoints=[[32, 32]], vision_feature_layer=-1),
    _multimodal("llava-next-video", "LlavaNextVideoForConditionalGeneration", "q_proj v_proj", together(
        prompt(16), images(32, 4, name="pixel_values_videos")), **_MEDIA, vision_config=_CLIP, text_config=_LLAMA,
        image_token_index=57, video_token_index=3, vision_feature_layer=-1),
    _multimodal("llava-onevision", "LlavaOnevisionForConditionalGeneration", "q_proj v_proj", together(
        prompt(36), images(32, 2), each(image_sizes=[32, 32])), **_MEDIA, vision_config=_SIGLIP,
        text_config=part("Qwen2"), image_grid_pinpoints=[[32, 32]], vision_feature_layer=-1, video_token_index=57),
    _multimodal("paligemma", "PaliGemmaForConditionalGeneration", "q_proj v_proj",
                together(prompt(16, types="token_type_ids"), images()), **_MEDIA, vision_config=_SIGLIP,
                text_config=part("Gemma")),
    _multimodal("gemma3", "Gemma3ForConditionalGeneration", "q_proj v_proj",
                together(prompt(4, types="token_type_ids"), images()), **_MEDIA, vision_config=_SIGLIP,
                mm_tokens_per_image=4, boi_token_index=57, eoi_token_index=58),
    _multimodal("llama4", "Llama4ForConditionalGeneration", "q_proj v_proj", _SMALL_IMAGE, **_MEDIA,
                vision_config={"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32,
                "intermediate_size": 128},
                text_config={"num_local_experts": 4, "moe_layers": [1], "intermediate_size_mlp": 48},
                boi_token_index=57, eoi_token_index=58),
    _multimodal("mllama", "MllamaForConditionalGeneration", "q_proj v_proj", together(
        text(left=True), images(32, 1, 2), each(aspect_ratio_ids=[1]), each(aspect_ratio_mask=[[1, 1]]),
        ones(cross_attention_mask=("length", 1, 2))), **_MEDIA, image_token_index=3,
        vision_config={"attention_heads": 4, "num_global_layers": 1, "max_num_tiles": 2, "vision_output_dim": 64,
        "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2]]},
        text_config={"cross_attention_layers": [1]}),
    _multimodal("idefics", "IdeficsForVisionText2Text", "q_proj v_proj", together(
        text(left=True), images(32, 1), ones(image_attention_mask=("length", 1))), **_MEDIA,
        alpha_initializer="ones"),
    _multimodal("idefics2", "Idefics2ForConditionalGeneration", "q_proj v_proj", together(prompt(4), images(32, 1)),
                **_MEDIA, text_config=part("Mistral"), perceiver_config={"resampler_n_latents": 4}),
    _multimodal("idefics3", "Idefics3ForConditionalGeneration", "q_proj v_proj", together(prompt(4), images(32, 1)),
                **_MEDIA, text_config=_LLAMA),
    _multimodal("smolvlm", "SmolVLMForConditionalGeneration", "q_proj v_proj", together(prompt(4), images(32, 1)),
                **_MEDIA, text_config=_LLAMA),
    _multimodal("internvl", "InternVLForConditionalGeneration", "q_proj v_proj", _SMALL_IMAGE, **_MEDIA,
                vision_config={"image_size": [32, 32], "patch_size": [8, 8]}, text_config=part("Qwen2")),
    _multimodal("aya-vision", "AyaVisionForConditionalGeneration", "q_proj v_proj", _SMALL_IMAGE, **_MEDIA,
                vision_config=_SIGLIP, text_config=part("Cohere2")),
    _multimodal("mistral3", "Mistral3ForConditionalGeneration", "q_proj v_proj", together(
        prompt(4), images(), each(image_sizes=[32, 32])), **_MEDIA, vision_config=part("PixtralVision"),
        text_config=part("Mistral")),
    _multimodal("llava-pixtral", "LlavaForConditionalGeneration", "q_proj v_proj", together(
        prompt(16), images(), each(image_sizes=[32, 32])), **_MEDIA, vision_config=part("PixtralVision"),
        text_config=part("Mistral"), vision_feature_layer=-1, vision_feature_select_strategy="full"),
    _multimodal("lfm2-vl", "Lfm2VlForConditionalGeneration", "q_proj v_proj", together(
        prompt(4), normal("pixel_values", 16, 192), each(spatial_shapes=[4, 4]), ones(pixel_attention_mask=(16,))),
        **_MEDIA, vision_config=part("Siglip2Vision"), text_config=part("Lfm2", layer_types=["conv", "full_attention"]),
        projector_hidden_size=32),
    _multimodal("aria", "AriaForConditionalGeneration", "q_proj v_proj", together(prompt(4), images()), **_MEDIA,
                vision_config=part("Idefics3Vision"), text_config={"moe_num_experts": 4, "moe_topk": 2,
                "moe_num_shared_experts": 1}, projector_patch_to_query_dict={16: 4}),
    _multimodal("fuyu", "FuyuForCausalLM", "query_key_value", together(prompt(4), normal("image_patches", 4, 192)),
                **_MEDIA, text_config=part("Persimmon")),
    _multimodal("chameleon", "ChameleonForConditionalGeneration", "q_proj v_proj", together(prompt(16), images()),
                **_MEDIA, vq_config={"base_channels": 32, "latent_channels": 32, "channel_multiplier": [1, 1, 1, 1],
                "num_res_blocks": 1, "num_embeddings": 20, "resolution": 32},
                vocabulary_map={"<image>": 3, **{f"IMGIMG{tens}{ones}Z": 4 + 10 * i + j
                for i, tens in enumerate("AB") for j, ones in enumerate("ABCDEFGHIJ")}}),
    _multimodal("janus", "JanusForConditionalGeneration", "q_proj v_proj", _IMAGE, **_MEDIA, text_config=_LLAMA,
                vision_config={"num_image_tokens": 16}, vq_config={"base_channels": 32, "channel_multiplier": [1, 1],
                "latent_channels": 32, "num_res_blocks": 1, "num_embeddings": 20, "num_patches": 4}),
    _multimodal("qwen2-vl", "Qwen2VLForConditionalGeneration", "q_proj v_proj qkv",
                together(prompt(4, types="mm_token_type_ids"), patches(8, 48)), **_MEDIA, **_GRID),
    _multimodal("qwen2.5-vl", "Qwen2_5_VLForConditionalGeneration", "q_proj v_proj qkv",
                together(prompt(4, types="mm_token_type_ids"), patches(8, 48)), **_MEDIA, **_GRID,
                vision_config={"window_size": 16, "fullatt_block_indexes": [1]}),
    _multimodal("qwen3-vl", "Qwen3VLForConditionalGeneration", "q_proj v_proj qkv",
                together(prompt(4, types="mm_token_type_ids"), patches(8, 48)), **_MEDIA, **_GRID,
                vision_config={"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    _multimodal("qwen3.5-vl", "Qwen3_5ForConditionalGeneration", "q_proj v_proj qkv",
                together(prompt(4, types="mm_token_type_ids"), patches(8, 48)), **_MEDIA,
                **_GRID | {"text_config": {**_GRID["text_config"], **_DELTA}},
                vision_config={"num_position_embeddings": 16}),
    _multimodal("qwen3-vl-moe", "Qwen3VLMoeForConditionalGeneration", "q_proj v_proj qkv",
                together(prompt(4, types="mm_token_type_ids"), patches(8, 48)), **_MEDIA,
                **_GRID | {"text_config": {**_GRID["text_config"], **_MIXTURE}},
                vision_config={"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    _multimodal("glm4v", "Glm4vForConditionalGeneration", "q_proj v_proj qkv",
                together(prompt(4, types="mm_token_type_ids"), patches(8, 48)), **_MEDIA,
                text_config=_GRID["text_config"], image_start_token_id=56, image_end_token_id=57, video_token_id=58,
                video_start_token_id=59, video_end_token_id=55),
    _multimodal("deepseek-vl", "DeepseekVLForConditionalGeneration", "q_proj v_proj", _IMAGE, **_MEDIA,
                vision_config=_SIGLIP, text_config=_LLAMA),
    # queries between the images and the text
    _multimodal("blip", "BlipForConditionalGeneration", "query value qkv", together(text(), images()), **_MEDIA),
    _multimodal("blip-retrieval", "BlipForImageTextRetrieval", "query value qkv"),
    _multimodal("blip-2", "Blip2ForConditionalGeneration", "q_proj v_proj query value qkv", _SMALL_IMAGE, **_MEDIA,
                num_query_tokens=4, text_config=_OPT, image_token_index=3),
    _multimodal("blip-2-t5", "Blip2ForConditionalGeneration", "q v query value qkv", together(
        prompt(4, left=False), images(), text("decoder_")), **_MEDIA, num_query_tokens=4,
        text_config=part("T5", decoder_start_token_id=0), image_token_index=3),
    _multimodal("instructblip", "InstructBlipForConditionalGeneration", "q_proj v_proj query value qkv", together(
        _SMALL_IMAGE, text("qformer_")), **_MEDIA, num_query_tokens=4, text_config=_OPT, image_token_index=3),
    _multimodal("git", "GitForCausalLM", "query value", together(text(), images()), **_MEDIA),
    _multimodal("kosmos-2", "Kosmos2ForConditionalGeneration", "q_proj v_proj", together(
        prompt(6, types="image_embeds_position_mask"), images()), **_MEDIA, latent_query_num=6),
    _multimodal("florence-2", "Florence2ForConditionalGeneration", "q_proj v_proj qkv", together(
        prompt(17, left=False), images(), text("decoder_")), **_MEDIA, text_config=part("Bart"),
        vision_config={"embed_dim": [8, 16], "depths": [1, 1], "num_heads": [2, 2], "num_groups": [2, 2],
        "window_size": 4, "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
        "patch_prenorm": [False, True]}),
    # sound
    _multimodal("qwen2-audio", "Qwen2AudioForConditionalGeneration", "q_proj v_proj", together(
        prompt(7), normal("input_features", 8, 28), ones(feature_attention_mask=(28,))), **_MEDIA,
        text_config=part("Qwen2"), audio_config=part("Qwen2AudioEncoder", max_source_positions=14)),
    _multimodal("voxtral", "VoxtralForConditionalGeneration", "q_proj v_proj", together(
        prompt(3), normal("input_features", 8, 24)), **_MEDIA, text_config=_LLAMA, audio_token_id=3,
        audio_config=part("VoxtralEncoder", max_source_positions=12, intermediate_size=128)),
    _multimodal("musicgen", "MusicgenForConditionalGeneration", "q v q_proj v_proj", together(
        text(), lambda draws, batch, length, padding: {"decoder_input_ids": draws.ids(4 * batch, length, high=16)}),
        **_MEDIA, text_encoder=part("T5"), decoder={"vocab_size": 16}, audio_encoder=part("Encodec", num_filters=4,
        hidden_size=16, upsampling_ratios=[2, 2], codebook_size=16, codebook_dim=16, target_bandwidths=[96.0])),
]

FAMILIES = {row.name: row for row in (*ENCODERS, *CAUSALS, *SEQ2SEQS, *VISIONS, *AUDIOS, *MULTIMODALS)}
