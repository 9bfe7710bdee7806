"""ONNX: a routed model is exported, and onnxruntime computes the same for other groups and shapes."""

import numpy as np
import pytest
import torch

from clients.small import classifier, padded
from tucka.peft import last_route

runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@pytest.mark.parametrize("routing", ["batch", "sample", "token", "pinned"])
def test_onnxruntime_computes_the_same(tmp_path, routing):
    logits, path = classifier(routing), tmp_path / "model.onnx"
    names, size = ["input_ids", "attention_mask"], {0: "rows", 1: "tokens"}
    torch.onnx.export(
        logits, padded(0, 3, 9), path, dynamo=True, input_names=names, dynamic_shapes=(size, size), verbose=False
    )
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    groups = set()
    for seed, (rows, tokens) in enumerate([(3, 9)] * 8 + [(5, 13), (2, 6), (7, 20)]):
        given = padded(seed, rows, tokens)
        with torch.no_grad():
            expected = logits(*given)
        found = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})[0]
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-6)
        groups |= set(last_route(logits.model).reshape(-1, 3, 2).sum(-1).argmax(-1).tolist())
    assert len(groups) == (1 if routing == "pinned" else 3)
