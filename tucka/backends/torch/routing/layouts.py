"""How the rows of a layer's input belong to samples and tokens: known by the classes around the layer, or declared."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from torch import Tensor, nn

from tucka.backends.torch.routing.inputs import Inputs

__all__ = ["OF_OTHERS", "OF_OTHER_TOKENS", "Layout", "View", "layout_of", "view_of"]


class Layout(StrEnum):
    """What the first axes of a layer's input are."""

    SAMPLES_FIRST = "samples first"  # (B, ...), or (B·S, d)
    TOKENS_FIRST = "tokens first"  # (S, B, d)
    GROUPS_OF_SAMPLES = "groups of samples"  # (B·n, ...): frames or pieces, one sample after the other
    REORDERED = "reordered"  # (B·n, ...) or (B, ...): the same, but its tokens come in an order of their own: windows
    NO_SAMPLE = "no sample"  # tables of positions: the input depends on no sample
    AS_THE_PARENT_SAYS = (
        "as the parent says"  # of a sample if the parent was called with this very tensor, else of none
    )
    CACHED_TOKENS = "cached tokens"  # (B, 1, L, d): all tokens that the cache holds, earlier calls' among them
    OTHER_TOKENS = "other tokens"  # (B, T, d): of another sequence, which the layer's attention looks at
    OTHER_TOKENS_FIRST = "other tokens first"  # (T, B, d)
    OTHER_GROUPS = "groups of other tokens"  # (B·n, T, d)
    PACKED = "packed"  # (1, N, d): the tokens of all samples, one sample after the other
    PIECES = "pieces"  # (B, c, d): some tokens of each sample in each of several calls
    DISPATCHED = "dispatched"  # the tokens that a mixture sends to one of its experts
    UNKNOWN = "unknown"


class View(NamedTuple):
    """How to see the rows of an input as (B, ...)."""

    swap: bool = False  # exchange the first two axes
    lead: tuple[int, ...] | None = None  # leading axes to reshape to


# Of layers that see another sequence than the one that is routed.
OF_OTHERS = {
    Layout.SAMPLES_FIRST: Layout.OTHER_TOKENS,
    Layout.TOKENS_FIRST: Layout.OTHER_TOKENS_FIRST,
    Layout.GROUPS_OF_SAMPLES: Layout.OTHER_GROUPS,
    Layout.REORDERED: Layout.OTHER_GROUPS,
}
# Of layers whose tokens are not those of other layers, one by one.
OF_OTHER_TOKENS = (*OF_OTHERS.values(), Layout.REORDERED)
_IN_GROUPS = (Layout.GROUPS_OF_SAMPLES, Layout.REORDERED, Layout.OTHER_GROUPS)
_LONG = ("query", "key", "value", "query_global", "key_global", "value_global")
# By the class of a module around the layer: names on the way to its layers (all layers if empty), and their layout.
_KNOWN: dict[str, tuple[tuple[str, ...], Layout]] = {
    "LongformerSelfAttention": (_LONG, Layout.TOKENS_FIRST),
    "LEDEncoderSelfAttention": (_LONG, Layout.TOKENS_FIRST),
    "XLNetFeedForward": ((), Layout.TOKENS_FIRST),
    "FSMTEncoder": ((), Layout.TOKENS_FIRST),
    "FSMTDecoder": (("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), Layout.TOKENS_FIRST),
    "Mask2FormerMaskedAttentionDecoderLayer": (("fc1", "fc2"), Layout.TOKENS_FIRST),
    "BridgeTowerResidualAttention": ((), Layout.TOKENS_FIRST),
    "SwinAttention": ((), Layout.REORDERED),
    "Swinv2Attention": ((), Layout.REORDERED),
    "Swin2SRAttention": ((), Layout.REORDERED),
    "DonutSwinAttention": ((), Layout.REORDERED),
    "MaskFormerSwinAttention": ((), Layout.REORDERED),
    "ClapAudioAttention": ((), Layout.REORDERED),
    "Florence2VisionWindowAttention": ((), Layout.REORDERED),
    "SamVisionAttention": ((), Layout.REORDERED),
    "SamVisionSdpaAttention": ((), Layout.REORDERED),
    "SamHQVisionAttention": ((), Layout.REORDERED),
    "SamHQVisionSdpaAttention": ((), Layout.REORDERED),
    "Sam2MultiScaleAttention": ((), Layout.REORDERED),
    "Sam3ViTRoPEAttention": ((), Layout.REORDERED),
    "VitDetAttention": ((), Layout.REORDERED),
    "GotOcr2VisionAttention": ((), Layout.REORDERED),
    "DeepseekOcr2SamVisionAttention": ((), Layout.REORDERED),
    "DeepseekOcr2SamVisionSdpaAttention": ((), Layout.REORDERED),
    "MllamaTextCrossAttention": (("k_proj", "v_proj"), Layout.GROUPS_OF_SAMPLES),
    "MobileViTTransformerLayer": ((), Layout.GROUPS_OF_SAMPLES),
    "MobileViTV2TransformerLayer": ((), Layout.GROUPS_OF_SAMPLES),
    "PatchTSTEncoderLayer": ((), Layout.GROUPS_OF_SAMPLES),
    "TimesformerLayer": ((), Layout.REORDERED),
    "TimesformerPatchEmbeddings": ((), Layout.GROUPS_OF_SAMPLES),
    "AutoformerModel": ((), Layout.UNKNOWN),  # the base itself mixes samples
    "PixtralTransformer": ((), Layout.PACKED),
    "Mistral3MultiModalProjector": ((), Layout.UNKNOWN),
    "XCLIPPromptGenerator": ((), Layout.UNKNOWN),
    "BrosBboxEmbeddings": ((), Layout.UNKNOWN),
    # of timm
    "WindowAttention": ((), Layout.REORDERED),
    "WindowMultiHeadAttention": ((), Layout.REORDERED),
    "WindowAttentionGlobal": ((), Layout.REORDERED),
    "LocalWindowAttention": ((), Layout.REORDERED),
    "LocallyGroupedAttn": ((), Layout.REORDERED),
    "SHMA": ((), Layout.REORDERED),
    "PartitionAttentionCl": (("attn",), Layout.REORDERED),
    "PartitionAttention2d": (("attn",), Layout.REORDERED),
    "ParallelPartitionAttention": (("attn_block", "attn_grid"), Layout.REORDERED),
    "TinyVitBlock": (("attn",), Layout.REORDERED),
    "VisionTransformerSAM": (("attn",), Layout.REORDERED),
    "HieraDet": (("attn",), Layout.REORDERED),
    "MobileVitBlock": (("transformer",), Layout.GROUPS_OF_SAMPLES),
    "TNT": (("pixel_embed", "attn_in", "mlp_in"), Layout.GROUPS_OF_SAMPLES),
    "RelPosMlp": ((), Layout.NO_SAMPLE),
    "PositionalEncodingFourier": ((), Layout.NO_SAMPLE),
    # whose features are tokens: their rows are channels
    "MixerBlock": (("mlp_tokens",), Layout.REORDERED),
    "ResBlock": (("linear_tokens",), Layout.REORDERED),
    "SpatialGatingUnit": (("proj",), Layout.REORDERED),
    "PatchMixerBlock": ((), Layout.REORDERED),
    "PatchTSMixerChannelFeatureMixerBlock": ((), Layout.REORDERED),
    # of diffusers
    "UNet3DConditionModel": ((), Layout.REORDERED),
    "UNetMotionModel": ((), Layout.REORDERED),
    "UNetSpatioTemporalConditionModel": ((), Layout.REORDERED),
    "TemporalDecoder": ((), Layout.REORDERED),
    "LatteTransformer3DModel": ((), Layout.REORDERED),
    "HunyuanDiT2DModel": (("text_embedder",), Layout.REORDERED),
    "MochiTransformer3DModel": (("patch_embed",), Layout.GROUPS_OF_SAMPLES),
    "CogVideoXPatchEmbed": ((), Layout.GROUPS_OF_SAMPLES),
    "MochiAttentionPool": ((), Layout.OTHER_TOKENS),
    "ErnieImageSharedAdaLNBlock": (("mlp",), Layout.TOKENS_FIRST),
    "ErnieImageTransformer2DModel": (("final_linear",), Layout.TOKENS_FIRST),
}
_POSITIONS = (
    "linear_pos",
    "relative_k_proj",
    "pos_proj",
    "pos_q_proj",
    "pos_key_proj",
    "pos_query_proj",
    "continuous_position_bias_mlp",
    "cpb_mlp",
    "meta_mlp",
    "prompt_trans",
)
# Of attention to another sequence: the projections of that, by their own names and those of the modules around them.
_KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "k", "v", "kv", "kv_proj", "c_attn", "k_lin",
                    "v_lin", "to_k", "to_v")  # fmt: skip
_CROSSING = ("crossattention", "cross_attn", "cross_attention", "encoder_attn", "encdecattention", "encoder_attention",
             "attn2")  # fmt: skip
# Of multi-head latent attention: the projection of the latents that the cache holds, old ones and new ones alike.
_LATENTS = ("kv_b_proj",)
# What gets the outputs of a tower as they are, packed ones too.
_AFTER_A_TOWER = ("LlavaMultiModalProjector",)
# Parts of LXMERT that see the image, or the image and the text in turn.
_OTHER_STREAMS = ("r_layers", "visual_attention", "visn_self_att", "visn_inter", "visn_output", "visn_fc")
# Parts of diffusers' transformers that see the text beside the image.
_OF_TEXT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "norm1_context", "context_embedder",
            "context_refiner", "caption_projection", "text_embedder", "text_proj", "txt_in", "txt_mlp",
            "caption_proj", "cross_attention_proj", "encoder_hid_proj")  # fmt: skip


def layout_of(root: nn.Module, path: str, *, samples_first: bool | None = None) -> Layout:
    """Say how the rows of one layer's input belong to samples; `samples_first` is what a user declares of a model."""
    names = path.split(".")
    around = [(root, "")]
    for end in range(1, len(names)):
        around.append((root.get_submodule(".".join(names[:end])), names[end - 1]))
    if any(name == "experts" and _is_list_of_experts(module) for module, name in around):
        return Layout.DISPATCHED
    if set(names) & set(_POSITIONS):
        return Layout.NO_SAMPLE
    if names[-1] in _LATENTS:
        return Layout.CACHED_TOKENS
    if any(_cuts_into_pieces(module, names[end:]) for end, (module, _) in enumerate(around)):
        return Layout.PIECES
    found = _known_layout([module for module, _ in around], names)
    if any(type(module).__name__ in _AFTER_A_TOWER for module, _ in around) and _has_packed_tower(root):
        found = Layout.PACKED
    if found is None and samples_first is not None:
        found = Layout.SAMPLES_FIRST if samples_first else Layout.TOKENS_FIRST
    if found is None:
        found = Layout.UNKNOWN if _mixes_layouts(root) else Layout.SAMPLES_FIRST
    return OF_OTHERS.get(found, found) if _sees_others(names) else found


def _known_layout(around: list[nn.Module], names: list[str]) -> Layout | None:
    """Find a layout by the classes of the modules around a layer, the innermost first."""
    for depth, module in reversed(list(enumerate(around))):
        kind = type(module).__name__
        if kind == "DisentangledSelfAttention":
            return Layout.AS_THE_PARENT_SAYS
        inside, layout = _KNOWN.get(kind, ((), None))
        if layout is not None and (not inside or not set(inside).isdisjoint(names[depth:])):
            return layout
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            return Layout.SAMPLES_FIRST if module.self_attn.batch_first else Layout.TOKENS_FIRST
    return None


def _sees_others(names: list[str]) -> bool:
    """Tell by the parts of its name whether a layer sees another sequence than the one that is routed."""
    crosses = names[-1] in _KEYS_AND_VALUES and any(mark in name.lower() for name in names[:-1] for mark in _CROSSING)
    return crosses or not set(names).isdisjoint((*_OTHER_STREAMS, *_OF_TEXT))


def _has_packed_tower(root: nn.Module) -> bool:
    return any(_KNOWN.get(type(module).__name__, ((), None))[1] is Layout.PACKED for module in root.modules())


def _cuts_into_pieces(module: nn.Module, inside: list[str]) -> bool:
    """Tell whether a module calls a layer inside on some tokens at a time."""
    size = getattr(module, "chunk_size_feed_forward", 0)
    feeds = isinstance(size, int) and size > 0 and not any("attention" in name or name == "attn" for name in inside)
    return feeds or (type(module).__name__ == "CanineAttention" and bool(getattr(module, "local", False)))


def _is_list_of_experts(module: nn.Module) -> bool:
    """Tell whether a mixture keeps its experts as modules, each of which gets the tokens that are sent to it."""
    children = [type(child) for child in module.children()]
    return isinstance(module, (nn.ModuleList, nn.ModuleDict)) or (len(children) > 1 and len(set(children)) == 1)


def _mixes_layouts(root: nn.Module) -> bool:
    """Tell whether parts of a model of unknown classes have tokens first, so that its other layers are in doubt."""
    if hasattr(root, "main_input_name"):
        return False
    return any(
        getattr(module, "batch_first", True) is False
        for module in root.modules()
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase))
    )


def view_of(x: Tensor, inputs: Inputs, layout: Layout) -> View | None:
    """Say how to see an input (..., d) as (B, ...); None where its rows cannot be those of the call's samples."""
    rows, tokens = inputs.rows, inputs.tokens
    if layout in (Layout.UNKNOWN, Layout.DISPATCHED) or rows is None or x.ndim < 2:
        return None
    if layout is Layout.PACKED:
        return View() if x.ndim == 3 and x.shape[0] == 1 else None
    if layout in (Layout.TOKENS_FIRST, Layout.OTHER_TOKENS_FIRST):
        return _tokens_first(x, inputs)
    if layout is Layout.CACHED_TOKENS and x.ndim == 4 and x.shape[:2] == (rows, 1):
        return View(lead=(rows, x.shape[2]))
    if x.shape[0] == rows:
        return View()
    if x.ndim == 2 and tokens is not None and x.shape[0] == rows * tokens:
        return View(lead=(rows, tokens))
    if layout in _IN_GROUPS and x.shape[0] % rows == 0:
        return View(lead=(rows, x.shape[0] // rows, *x.shape[1:-1]))
    return None


def _tokens_first(x: Tensor, inputs: Inputs) -> View | None:
    if x.ndim < 3:
        return None
    if x.shape[1] == inputs.rows:
        return View(swap=True)
    if (x.shape[1], x.shape[0]) == (inputs.tokens, inputs.rows):  # the call's own inputs have their tokens first too
        inputs.rows, inputs.tokens = inputs.tokens, inputs.rows
        return View(swap=True)
    return None
