"""Tiny random models of timm, with images. The library is imported when a model is made."""

import importlib
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from architectures.families import Draws, Inputs, MakeInputs, images, mask_of
from architectures.made import Made


def _patches(draws: Draws, batch: int, length: int, padding: bool) -> Inputs:
    """Patches of 192 values with their places, and which of them are patches and no padding."""
    made = {
        "x": draws.normal(batch, length, 192),
        "patch_coord": torch.stack([torch.arange(length) // 4, torch.arange(length) % 4], dim=1).repeat(batch, 1, 1),
    }
    mask = mask_of(batch, length) if padding else torch.ones(batch, length)
    return {**made, "patch_valid": mask == 1}


def _head_of_features(model: Any, x: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    return model.forward_head(model.forward_features(x, **inputs))


def _in_one_mapping(model: Any, x: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    return model({"patches": x, **inputs})


_SMALL, _LARGE = images(name="x"), images(64, name="x")


def _row(
    name: str,
    model: str,
    targets: str,
    inputs: MakeInputs = _SMALL,
    by_methods: Callable[..., torch.Tensor] = _head_of_features,
    **changes: Any,
) -> Made:
    """A model by its name, or by its class where the name fixes its sizes."""

    def make() -> nn.Module:
        models = importlib.import_module("timm").models
        values = {key: _named(models, value) for key, value in changes.items()}
        return _named(models, model)(num_classes=5, **values)

    return Made(f"timm-{name}", "timm", "timm", make, tuple(targets.split()), inputs, by_methods=by_methods)


def _named(models: Any, value: Any) -> Any:
    return operator.attrgetter(value)(models) if isinstance(value, str) else value


_ATTENTION, _BLOCKS = "qkv attn.proj fc1 fc2", "qkv attn.proj mlp.fc1 mlp.fc2"
_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_STAGES = {"img_size": 32, "patch_size": 2, "depths": (1, 2), "num_heads": (2, 4), "embed_dim": 16, "window_size": 4}
_FOUR = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}
_MIXER = {"img_size": 64, "embed_dim": 32, "num_blocks": 2}

TIMM = {
    row.name: row
    for row in (
        # one sequence of patches
        _row("vit", "vit_tiny_patch16_224", _ATTENTION, **_VIT),
        _row("vit-pooled", "vit_base_patch16_siglip_224", f"{_ATTENTION} attn_pool.q attn_pool.kv", **_VIT),
        _row("vit-relpos", "vit_relpos_small_patch16_224", f"{_ATTENTION} rel_pos.mlp.fc1", **_VIT),
        _row("naflexvit", "naflexvit_base_patch16_gap", _ATTENTION, _patches, _in_one_mapping, patch_size=8,
             embed_dim=32, depth=2, num_heads=4),
        _row("deit", "deit_tiny_distilled_patch16_224", _ATTENTION, **_VIT),
        _row("beit", "beit_base_patch16_224", "attn.proj fc1 fc2", **_VIT),
        _row("beit-qkv", "beit_base_patch16_224", "qkv", **_VIT),
        _row("eva", "eva02_tiny_patch14_224", "q_proj k_proj v_proj attn.proj fc1 fc2", qkv_fused=False, **_VIT),
        _row("cait", "cait_xxs24_224", "qkv q k v attn.proj fc1 fc2", **_VIT),
        _row("xcit", "xcit_nano_12_p8_224", _ATTENTION, **_VIT),
        _row("convit", "convit_tiny", "qk v pos_proj attn.proj fc1 fc2", **_VIT),
        _row("hiera", "hiera_tiny_224", _ATTENTION, _LARGE, img_size=64, embed_dim=16, num_heads=1, stages=(1, 1, 1),
             patch_stride=(4, 4), q_pool=2, mask_unit_size=(4, 4)),
        # windows, and pieces of patches
        _row("swin", "swin_tiny_patch4_window7_224", _ATTENTION, **_STAGES),
        _row("swin-v2", "swinv2_tiny_window8_256", "attn.proj fc1 fc2 cpb_mlp.0", **_STAGES),
        _row("swin-v2-qkv", "swinv2_tiny_window8_256", "qkv", **_STAGES),
        _row("swin-v2-cr", "swinv2_cr_tiny_224", f"{_ATTENTION} meta_mlp.fc1", **_STAGES),
        _row("sam", "samvit_base_patch16", _ATTENTION, _LARGE, **{**_VIT, "img_size": 64}, window_size=3,
             global_attn_indexes=(1,)),
        _row("sam2-hiera", "sam2_hiera_tiny", _ATTENTION, _LARGE, embed_dim=16, num_heads=1,
             stages=(1, 1, 2, 1), window_spec=(4, 4, 2, 2), global_att_blocks=(3,)),
        _row("maxvit", "maxvit_rmlp_pico_rw_256", f"{_BLOCKS} rel_pos.mlp.fc1", _LARGE, img_size=64,
             embed_dim=(16, 32), depths=(1, 1), stem_width=8, block_type=("M", "M"), transformer_dim_head=8),
        _row("davit", "davit_tiny", _ATTENTION, _LARGE, depths=(1, 1), embed_dims=(16, 32), num_heads=(2, 4),
             window_size=4),
        _row("gcvit", "gcvit.GlobalContextVit", _BLOCKS, _LARGE, img_size=64, depths=(1, 1), num_heads=(2, 4),
             embed_dim=16, window_ratio=(16, 16)),
        _row("twins", "twins_svt_small", f"{_ATTENTION} q kv", _LARGE, img_size=64, depths=(2, 1), embed_dims=(16, 32),
             num_heads=(2, 4), mlp_ratios=(2, 2), sr_ratios=(2, 1), wss=(4, 4)),
        _row("nest", "nest.Nest", _ATTENTION, _LARGE, img_size=64, embed_dims=(16, 32), depths=(1, 1), num_heads=(2, 4),
             num_levels=2),
        _row("tiny-vit", "tiny_vit_5m_224", _ATTENTION, _LARGE, embed_dims=(16, 32, 32, 32), depths=(1, 1, 1, 1),
             num_heads=(2, 2, 4, 4), window_sizes=(4, 4, 2, 2)),
        _row("mobilevit", "mobilevit_xxs", _ATTENTION, _LARGE),
        _row("tnt", "tnt_s_patch16_224", "qk v attn_out.proj attn_in.proj fc1 fc2", img_size=32, patch_size=16,
             embed_dim=32, inner_dim=16, depth=2, num_heads_outer=4),
        # convolutions, and layers that mix patches
        _row("convnext", "convnext_atto", "fc1 fc2", _LARGE, **_FOUR),
        _row("convnext-linear", "convnext_tiny", "fc1 fc2", _LARGE, **_FOUR),
        _row("resnet", "test_resnet", "conv2 layer2.0.conv1"),
        _row("efficientnet", "test_efficientnet", "conv_pw conv_pwl"),
        _row("efficientvit", "efficientvit_m0", "qkvs.0.conv pw1.conv", _LARGE, img_size=64),
        _row("mixer", "mlp_mixer.MlpMixer", "mlp_channels.fc1 mlp_channels.fc2", _LARGE, **_MIXER),
        _row("mixer-tokens", "mlp_mixer.MlpMixer", "fc1 fc2", _LARGE, **_MIXER),
        _row("gmlp", "mlp_mixer.MlpMixer", "fc1 fc2 gate.proj", _LARGE, **_MIXER, mlp_ratio=2.0,
             mlp_layer="mlp_mixer.GatedMlp", block_layer="mlp_mixer.SpatialGatingBlock"),
        _row("resmlp", "mlp_mixer.MlpMixer", "linear_tokens fc1 fc2", _LARGE, **_MIXER, mlp_ratio=2.0,
             block_layer="mlp_mixer.ResBlock", norm_layer="mlp_mixer.Affine"),
    )
}  # fmt: skip
