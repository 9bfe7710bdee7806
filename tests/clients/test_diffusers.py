"""diffusers: a UNet and a transformer, through its own methods for adapters."""

import pytest
import torch
from peft import set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict

from tucka.peft import TuckAConfig, TuckALayer

diffusers = pytest.importorskip("diffusers")
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8, cross_attention_dim=16, attention_head_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def transformer():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip


def inputs(kind, batch=2):
    torch.manual_seed(3)
    given = {
        "timestep": torch.arange(batch) + 1,
        "encoder_hidden_states": torch.randn(batch, 5, 16),
    }
    first = torch.randn(batch, 4, 8, 8)
    if kind is unet:
        return {"sample": first, **given}
    return {"hidden_states": first, "pooled_projections": torch.randn(batch, 16), **given}


def config(**options):
    given = {"r": 4, "k": 3, "routing": "sample", "target_modules": LAYERS, **options}
    return TuckAConfig(**given)


def output(model, kind, **more):
    return model(**inputs(kind), return_dict=True, **more).sample


kinds = pytest.mark.parametrize("kind", [unet, transformer])


@kinds
def test_an_untrained_adapter_changes_nothing_and_a_trained_one_is_saved(kind):
    plain = kind().eval()
    with torch.no_grad():
        expected = output(plain, kind)
    model = kind().eval()
    model.add_adapter(config())
    with torch.no_grad():
        assert torch.equal(output(model, kind), expected)
    optimizer = torch.optim.Adam((value for value in model.parameters() if value.requires_grad), lr=1e-3)
    losses = []
    for _ in range(5):
        loss = output(model.train(), kind).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    other = kind().eval()
    other.add_adapter(config())
    set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    with torch.no_grad():
        assert torch.equal(output(other, kind), output(model.eval(), kind))


@kinds
@torch.no_grad()
def test_scales_weights_and_switches(kind):
    model = kind().eval()
    base = output(model, kind)
    model.add_adapter(config(init_weights=False), "first")
    first = output(model, kind)
    model.add_adapter(config(init_weights=False), "second")
    model.set_adapters(["first", "second"], [1.0, 0.0])
    torch.testing.assert_close(output(model, kind), first, rtol=0, atol=1e-5)
    model.set_adapters(["first"], [0.0])
    torch.testing.assert_close(output(model, kind), base, rtol=0, atol=1e-5)
    model.set_adapters(["first"], [1.0])
    model.disable_adapters()
    assert torch.equal(output(model, kind), base)
    model.enable_adapters()
    torch.testing.assert_close(output(model, kind), first, rtol=0, atol=1e-5)
    model.delete_adapters("second")
    assert all("second" not in layer.tucka_experts for layer in model.modules() if isinstance(layer, TuckALayer))


@torch.no_grad()
def test_the_scale_of_one_call():
    """`scale` among the arguments of attention weakens the adapters for one call."""
    model = unet().eval()
    base = output(model, unet)
    model.add_adapter(config(init_weights=False))
    full = output(model, unet)
    assert not torch.allclose(full, base, atol=1e-2)
    weak = output(model, unet, cross_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(weak, base, rtol=0, atol=1e-5)
    assert torch.equal(output(model, unet), full)
