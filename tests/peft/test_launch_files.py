"""The documented files for Accelerate and DeepSpeed are what these accept; what an engine has cut is gathered."""

import json
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.deepspeed import HfDeepSpeedConfig

from support.adapting import adapt
from support.tiny_models import text
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import initialize_router

FILES = Path(__file__).parents[2] / "docs" / "how-to" / "launch"


@pytest.mark.parametrize("name", sorted(path.name for path in FILES.glob("*.yaml")))
def test_accelerate_accepts_its_files(name):
    config = load_config_from_file(str(FILES / name))  # raises for keys that it does not know
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert config.distributed_type == kinds[Path(name).stem]
    assert config.num_processes == 2


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeeds_files_choose_their_stage(stage):
    entries = json.loads((FILES / f"zero{stage}.json").read_text())
    config = HfDeepSpeedConfig(entries)
    assert (config.is_zero2(), config.is_zero3()) == (stage == 2, stage == 3)
    assert load_config_from_file(str(FILES / f"zero{stage}.yaml")).deepspeed_config["zero_stage"] == stage


def test_a_router_that_deepspeed_has_cut_is_gathered_to_be_initialised(monkeypatch):
    """With a stand-in for the library: ZeRO-3 keeps a parameter's numbers apart from it, under its mark."""
    model = adapt("llama", routing="sample")
    router = scope_of(model).router("default")
    gathered = []

    @contextmanager
    def gather(parameters, modifier_rank):
        gathered.append((list(parameters), modifier_rank))
        yield

    zero = types.SimpleNamespace(GatheredParameters=gather)
    monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero))
    router.centroids.ds_id = 0
    initialize_router(model, [text(batch=6)], progress=False)
    assert len(gathered) == 1
    assert gathered[0][0][0] is router.centroids
    assert gathered[0][1] == 0
    assert bool(router.is_initialized)


def test_a_common_decision_calls_the_router_as_a_module(monkeypatch):
    """Else the hooks that gather its parameters would not run."""
    from tucka.backends.torch.routing import ranks

    monkeypatch.setattr(ranks.dist, "all_reduce", lambda tensor, group: tensor)
    model = adapt("bert", dtype=torch.float64, affinity="dot")
    router, calls = scope_of(model).router("default"), []
    router.register_forward_pre_hook(lambda module, args: calls.append(module))
    hidden, mask = torch.randn(3, 5, 16, dtype=torch.float64), torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1] * 5])
    common = ranks.gates_over_ranks(router, hidden, mask)
    assert calls == [router]
    torch.testing.assert_close(common, router(hidden, mask), rtol=0, atol=1e-12)
