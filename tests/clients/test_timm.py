"""timm: a vision transformer and a convolutional network, adapted, trained, saved and merged."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from tucka.peft import TuckAConfig, pin_route

timm = pytest.importorskip("timm")

MODELS = {
    "vit_tiny_patch16_224": {"target_modules": ["qkv", "fc1", "fc2"], "modules_to_save": ["head"]},
    "resnet10t": {"target_modules": ["conv1", "conv2"], "exclude_modules": r"conv1(\..*)?", "modules_to_save": ["fc"]},
}


def build(name):
    torch.manual_seed(0)
    more = {"img_size": 32, "depth": 2} if "vit" in name else {}
    return timm.create_model(name, pretrained=False, num_classes=4, **more).eval()


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_is_trained_saved_loaded_and_merged(tmp_path, name):
    x, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 4
    with torch.no_grad():
        expected = build(name)(x)
    model = get_peft_model(build(name), TuckAConfig(r=2, k=3, routing="sample", **MODELS[name])).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    optimizer = torch.optim.Adam((value for value in model.parameters() if value.requires_grad), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = PeftModel.from_pretrained(build(name), tmp_path).eval()
        assert torch.equal(loaded(x), model(x))
        one_by_one = torch.cat([model(row[None]) for row in x])
        torch.testing.assert_close(one_by_one, model(x), rtol=1e-3, atol=1e-4)
        pin_route(model, batches=[x])
        pinned = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), pinned, rtol=1e-3, atol=1e-3)
