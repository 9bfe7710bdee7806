"""ONNX: a routed model is exported, and onnxruntime computes the same for other groups and shapes."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from tucka.peft import TuckAConfig, initialize_router, last_route, pin_route

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Logits(torch.nn.Module):
    """Two tensors in, one out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def model(routing):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    base = BertForSequenceClassification(BertConfig(vocab_size=261, attn_implementation="eager", **sizes)).eval()
    options = {"routing": "sample" if routing == "pinned" else routing, "target_modules": ["query", "value"]}
    adapted = get_peft_model(base, TuckAConfig(r=8, k=3, init_weights=False, **options)).eval()
    if routing == "pinned":
        pin_route(adapted, group=1)
    else:  # so that all groups are used
        batches = [dict(zip(("input_ids", "attention_mask"), batch(seed, 8, 9), strict=True)) for seed in range(8)]
        initialize_router(adapted, batches, progress=False)
    return Logits(adapted).eval().requires_grad_(False)


def batch(seed, rows, tokens):
    ids = torch.randint(5, 261, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return ids, mask


@pytest.mark.parametrize("routing", ["batch", "sample", "token", "pinned"])
def test_onnxruntime_computes_the_same(tmp_path, routing):
    logits, path = model(routing), tmp_path / "model.onnx"
    names, size = ["input_ids", "attention_mask"], {0: "rows", 1: "tokens"}
    torch.onnx.export(
        logits, batch(0, 3, 9), path, dynamo=True, input_names=names, dynamic_shapes=(size, size), verbose=False
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    groups = set()
    for seed, (rows, tokens) in enumerate([(3, 9)] * 8 + [(5, 13), (2, 6), (7, 20)]):
        given = batch(seed, rows, tokens)
        with torch.no_grad():
            expected = logits(*given)
        found = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})[0]
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-6)
        groups |= set(last_route(logits.model).reshape(-1, 3, 2).sum(-1).argmax(-1).tolist())
    assert len(groups) == (1 if routing == "pinned" else 3)
