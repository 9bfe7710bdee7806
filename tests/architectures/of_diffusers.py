"""Tiny random models of diffusers, with noisy images, videos or sound, times and texts. Imported when one is made."""

import importlib
from typing import Any

import torch
from torch import nn

from architectures.families import Draws, Inputs, MakeInputs, normal, together
from architectures.made import Made


def _times(name: str = "timestep") -> MakeInputs:
    """A time for each sample."""
    return lambda draws, batch, length, padding: {name: draws.ids(batch, low=0).float()}


def _same(**values: Any) -> MakeInputs:
    """Values that are no tensors."""
    return lambda draws, batch, length, padding: dict(values)


def _text(mask: str = "encoder_attention_mask") -> MakeInputs:
    """A text, with a mask where it is padded."""
    return normal("encoder_hidden_states", "length", 24, mask=mask)


def _always(makers: MakeInputs, mask: str) -> MakeInputs:
    """With a mask of the text, also where nothing is padded."""

    def make(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
        return {mask: torch.ones(batch, length, dtype=torch.long), **makers(draws, batch, length, padding)}

    return make


def _places(axes: int) -> MakeInputs:
    """Where 16 patches and the tokens of a text are, the same in each sample."""

    def make(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
        image, words = torch.zeros(16, axes), torch.zeros(length, axes)
        image[:, 1], image[:, 2], words[:, -1] = torch.arange(16) // 4, torch.arange(16) % 4, torch.arange(length)
        return {"img_ids": image.repeat(batch, 1, 1), "txt_ids": words.repeat(batch, 1, 1)}

    return make


def _for_frames(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    """A text for each of three frames, as the pipelines of videos repeat it."""
    return {"encoder_hidden_states": draws.normal(batch, length, 24).repeat_interleave(3, dim=0)}


def _labels(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    return {"class_labels": draws.ids(batch, low=0, high=5)}


def _sizes(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    """The pooled text and the sizes of the image, which SDXL takes."""
    return {"added_cond_kwargs": {"text_embeds": draws.normal(batch, 24), "time_ids": draws.uniform(batch, 6)}}


def _row(name: str, model: str, targets: str, *inputs: MakeInputs, by_methods: Any = None, **config: Any) -> Made:
    def make() -> nn.Module:
        return getattr(importlib.import_module("diffusers"), model)(**config)

    names = tuple(targets.split())
    return Made(f"diffusers-{name}", "diffusers", "diffusers", make, names, together(*inputs), by_methods=by_methods)


def _decoded(model: Any, sample: torch.Tensor) -> torch.Tensor:
    """What an autoencoder's forward does, in the two calls of a pipeline."""
    encoded = model.encode(sample)
    codes = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return model.decode(codes).sample


_ATTENTION = "to_q to_k to_v to_out.0"
_JOINT = f"{_ATTENTION} add_q_proj add_k_proj add_v_proj to_add_out"
_FEED = "ff.net.0.proj ff.net.2"
_NOISE = normal("sample", 4, 8, 8)
_IMAGE = normal("sample", 3, 16, 16)
_LATENTS = normal("hidden_states", 4, 8, 8)
_PATCHES = normal("hidden_states", 16, 8)
_VIDEO = normal("hidden_states", 4, 3, 8, 8)
_WORDS = normal("encoder_hidden_states", "length", 24)
_POOLED = normal("pooled_projections", 24)
_UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
_DIT = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "num_attention_heads": 4, "attention_head_dim": 8}  # fmt: skip
_FLUX = {"patch_size": 1, "in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 24}  # fmt: skip
_CODER = {"block_out_channels": (16, 32), "latent_channels": 4, "norm_num_groups": 8, "sample_size": 16,
          "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}  # fmt: skip

DIFFUSERS = {
    row.name: row
    for row in (
        # convolutions with attention between them
        _row("unet-2d", "UNet2DModel", _ATTENTION, _NOISE, _times(), sample_size=8, in_channels=4, out_channels=4,
             block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
             down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        _row("unet", "UNet2DConditionModel", _ATTENTION, _NOISE, _times(), _text(), **_UNET),
        _row("unet-convolutions", "UNet2DConditionModel", f"conv1 conv2 time_emb_proj {_FEED}", _NOISE, _times(),
             _text(), **_UNET),
        _row("unet-xl", "UNet2DConditionModel", f"{_ATTENTION} {_FEED} proj_in proj_out", _NOISE, _times(), _text(),
             _sizes, **_UNET, use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
             projection_class_embeddings_input_dim=72),
        _row("controlnet", "ControlNetModel", _ATTENTION, _NOISE, _times(), _WORDS,
             normal("controlnet_cond", 3, 16, 16), **{key: _UNET[key] for key in _UNET.keys() - {"sample_size",
             "up_block_types"}}, conditioning_embedding_out_channels=(8, 16)),
        _row("unet-3d", "UNet3DConditionModel", _ATTENTION, normal("sample", 4, 3, 8, 8), _times(),
             _WORDS, **{**_UNET, "down_block_types": ("CrossAttnDownBlock3D",
             "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}),
        _row("unet-motion", "UNetMotionModel", _ATTENTION, normal("sample", 4, 3, 8, 8), _times(), _for_frames,
             sample_size=8, block_out_channels=(16, 32),
             layers_per_block=1, norm_num_groups=8, cross_attention_dim=24, num_attention_heads=4,
             motion_num_attention_heads=4, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
             up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion")),
        _row("unet-spatio-temporal", "UNetSpatioTemporalConditionModel", _ATTENTION, normal("sample", 3, 8, 8, 8),
             _times(), normal("encoder_hidden_states", 1, 24), normal("added_time_ids", 3), sample_size=8,
             block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24, num_attention_heads=(4, 4),
             addition_time_embed_dim=8, projection_class_embeddings_input_dim=24, num_frames=3,
             down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
             up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")),
        # transformers of images
        _row("dit", "DiTTransformer2DModel", f"{_ATTENTION} {_FEED}", _LATENTS, _times(), _labels, **_DIT,
             num_embeds_ada_norm=60),
        _row("pixart", "PixArtTransformer2DModel", f"{_ATTENTION} {_FEED}", _LATENTS, _times(), _text(),
             _same(added_cond_kwargs={"resolution": None, "aspect_ratio": None}), **_DIT, cross_attention_dim=32,
             caption_channels=24),
        _row("sd3", "SD3Transformer2DModel", f"{_JOINT} {_FEED} ff_context.net.0.proj ff_context.net.2", _LATENTS,
             _times(), _WORDS, _POOLED, **_DIT, joint_attention_dim=24,
             caption_projection_dim=32, pooled_projection_dim=24, pos_embed_max_size=8, dual_attention_layers=(0,)),
        _row("flux", "FluxTransformer2DModel", f"{_JOINT} {_FEED} ff_context.net.2 proj_mlp proj_out", _PATCHES,
             _times(), _WORDS, _POOLED, _places(3), **_FLUX,
             pooled_projection_dim=24, axes_dims_rope=(4, 4, 8)),
        _row("flux-modulation", "FluxTransformer2DModel", "norm1.linear norm1_context.linear norm.linear x_embedder "
             "context_embedder", _PATCHES, _times(), _WORDS, _POOLED, _places(3),
             **_FLUX, pooled_projection_dim=24, axes_dims_rope=(4, 4, 8)),
        _row("flux-2", "Flux2Transformer2DModel", f"{_JOINT} to_qkv_mlp_proj linear_in linear_out",
             _PATCHES, _times(), _WORDS, _places(4), _times("guidance"),
             **_FLUX, timestep_guidance_channels=8, axes_dims_rope=(4, 4, 4, 4)),
        _row("chroma", "ChromaTransformer2DModel", _JOINT, _PATCHES, _times(),
             _WORDS, _places(3), **_FLUX, axes_dims_rope=(4, 4, 8),
             approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1),
        _row("auraflow", "AuraFlowTransformer2DModel", f"{_JOINT} linear_1 linear_2 out_projection", _LATENTS,
             _times(), _WORDS, sample_size=8, in_channels=4, num_mmdit_layers=1,
             num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=24,
             caption_projection_dim=32, pos_embed_max_size=16),
        _row("sana", "SanaTransformer2DModel", _ATTENTION, _LATENTS, _times(), _text(), in_channels=4, out_channels=4,
             num_attention_heads=4, attention_head_dim=8, num_layers=2, num_cross_attention_heads=4,
             cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=24, sample_size=8),
        _row("hunyuan-dit", "HunyuanDiT2DModel", _ATTENTION, _LATENTS, _times(),
             normal("encoder_hidden_states", 6, 24), normal("encoder_hidden_states_t5", 5, 24),
             lambda draws, batch, length, padding: {"text_embedding_mask": torch.ones(batch, 6, dtype=torch.long),
             "text_embedding_mask_t5": torch.ones(batch, 5, dtype=torch.long)},
             normal("image_meta_size", 6), lambda draws, batch, length, padding: {"style": draws.ids(batch, low=0,
             high=1)}, sample_size=8, patch_size=2, in_channels=4, num_layers=2, num_attention_heads=4,
             attention_head_dim=8, hidden_size=32, cross_attention_dim=24, cross_attention_dim_t5=24,
             pooled_projection_dim=16, text_len=6, text_len_t5=5),
        _row("qwen-image", "QwenImageTransformer2DModel", f"{_JOINT} img_mlp.net.2 txt_mlp.net.2 img_mod.1 txt_in "
             "img_in", _PATCHES, _times(), _always(_text(mask="encoder_hidden_states_mask"),
             "encoder_hidden_states_mask"), _same(img_shapes=[(1, 4, 4)]), patch_size=2, in_channels=8, out_channels=2,
             num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
             axes_dims_rope=(4, 4, 8)),
        _row("cogview-4", "CogView4Transformer2DModel", f"{_ATTENTION} {_FEED}", _LATENTS, _times(),
             _WORDS, *(normal(name, 2) for name in ("original_size",
             "target_size", "crop_coords")), patch_size=2, in_channels=4, out_channels=4, num_layers=2,
             attention_head_dim=16, num_attention_heads=2, text_embed_dim=24, time_embed_dim=8, condition_dim=4,
             pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8)),
        _row("lumina-2", "Lumina2Transformer2DModel", f"{_ATTENTION} feed_forward.linear_1", _LATENTS, _times(),
             _always(_text(), "encoder_attention_mask"), sample_size=8, patch_size=2, in_channels=4, hidden_size=24,
             num_layers=1, num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=2,
             axes_dim_rope=(4, 2, 2), axes_lens=(64, 16, 16), cap_feat_dim=24),
        _row("ernie-image", "ErnieImageTransformer2DModel", f"{_ATTENTION} gate_proj linear_fc2", _LATENTS, _times(),
             normal("text_bth", "length", 24), lambda draws, batch, length, padding: {"text_lens":
             torch.full((batch,), length)}, hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32,
             in_channels=4, out_channels=4, patch_size=1, text_in_dim=24, rope_axes_dim=(4, 4, 8)),
        _row("prior", "PriorTransformer", f"{_ATTENTION} {_FEED}", normal("hidden_states", 24), _times(),
             normal("proj_embedding", 24), normal("encoder_hidden_states", 7, 24), num_attention_heads=4,
             attention_head_dim=8, num_layers=2, embedding_dim=24, num_embeddings=7, additional_embeddings=4),
        # transformers of videos and sound
        _row("cogvideox", "CogVideoXTransformer3DModel", f"{_ATTENTION} {_FEED}", normal("hidden_states", 3, 4, 8, 8),
             _times(), normal("encoder_hidden_states", 7, 24), num_attention_heads=4, attention_head_dim=8,
             in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=24, num_layers=2, sample_width=8,
             sample_height=8, sample_frames=9, max_text_seq_length=7),
        _row("wan", "WanTransformer3DModel", f"{_ATTENTION} ffn.net.0.proj ffn.net.2", _VIDEO, _times(),
             _WORDS, num_attention_heads=2, attention_head_dim=12,
             in_channels=4, out_channels=4, text_dim=24, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32),
        _row("ltx", "LTXVideoTransformer3DModel", f"{_ATTENTION} {_FEED}", normal("hidden_states", 48, 8), _times(),
             _always(_text(), "encoder_attention_mask"), _same(num_frames=3, height=4, width=4), in_channels=8,
             out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32, num_layers=2,
             caption_channels=24),
        _row("hunyuan-video", "HunyuanVideoTransformer3DModel", f"{_JOINT} {_FEED} proj_mlp", _VIDEO, _times(),
             _always(_text(), "encoder_attention_mask"), _POOLED, _times("guidance"), in_channels=4, out_channels=4,
             num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1, num_refiner_layers=1,
             text_embed_dim=24, pooled_projection_dim=24, rope_axes_dim=(4, 4, 8)),
        _row("mochi", "MochiTransformer3DModel", _JOINT, _VIDEO, _times(), _always(_text(), "encoder_attention_mask"),
             num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16, in_channels=4,
             text_embed_dim=24, time_embed_dim=8, max_sequence_length=16),
        _row("latte", "LatteTransformer3DModel", f"{_ATTENTION} {_FEED}", _VIDEO, _times(),
             _WORDS, **_DIT,
             cross_attention_dim=32, caption_channels=24, num_embeds_ada_norm=60, norm_type="ada_norm_single",
             norm_elementwise_affine=False, video_length=3),
        _row("stable-audio", "StableAudioDiTModel", f"{_ATTENTION} {_FEED}", normal("hidden_states", 4, 9), _times(),
             _WORDS, normal("global_hidden_states", 1, 24), sample_size=9,
             in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
             num_key_value_attention_heads=2, cross_attention_dim=16, time_proj_dim=8, global_states_input_dim=24,
             cross_attention_input_dim=24),
        # autoencoders
        _row("autoencoder", "AutoencoderKL", _ATTENTION, _IMAGE, by_methods=_decoded, **_CODER),
        _row("autoencoder-convolutions", "AutoencoderKL", "conv1 conv2 quant_conv post_quant_conv",
             _IMAGE, by_methods=_decoded, **_CODER),
        _row("vq", "VQModel", _ATTENTION, _IMAGE, by_methods=_decoded, **_CODER),
    )
}  # fmt: skip
