"""AOTInductor: a routed model becomes a library, and computes the same for other groups and shapes."""

import shutil

import pytest
import torch

from clients.small import classifier, padded
from tucka.peft import last_route


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("routing", ["batch", "sample", "token", "pinned"])
def test_a_compiled_library_computes_the_same(tmp_path, routing):
    logits = classifier(routing)
    size = {0: torch.export.Dim("rows", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=128)}
    with torch.no_grad():
        program = torch.export.export(logits, padded(0, 3, 9), dynamic_shapes=(size, size))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    library, groups = torch._inductor.aoti_load_package(path), set()
    for seed, (rows, tokens) in enumerate([(3, 9)] * 8 + [(5, 13), (2, 6), (7, 20)]):
        given = padded(seed, rows, tokens)
        with torch.no_grad():
            expected = logits(*given)
        groups |= set(last_route(logits.model).reshape(-1, 3, 2).sum(-1).argmax(-1).tolist())
        torch.testing.assert_close(library(*given), expected, rtol=1e-5, atol=1e-6)
    assert len(groups) == (1 if routing == "pinned" else 3)
