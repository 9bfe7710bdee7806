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
from peft import get_peft_model

from support.adapting import adapt
from support.tiny_models import make, text
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import TuckAConfig, initialize_router
from tucka.peft.adapters import layers_of

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


class _Library:
    """A stand-in for DeepSpeed: what is gathered, and what the optimiser's copies take over."""

    def __init__(self, monkeypatch):
        self.gathered, self.taken = [], []
        zero = types.SimpleNamespace(GatheredParameters=self.gather)
        utils = types.SimpleNamespace(safe_set_full_fp32_param=self.take, safe_set_local_fp32_param=self.take)
        monkeypatch.setitem(sys.modules, "deepspeed", types.SimpleNamespace(zero=zero, utils=utils))
        monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)

    @contextmanager
    def gather(self, parameters, modifier_rank):
        self.gathered.append((list(parameters), modifier_rank))
        yield

    def take(self, parameter, value):
        self.taken.append((parameter, value.clone()))


def test_a_router_that_deepspeed_has_cut_is_gathered_to_be_initialised(monkeypatch):
    """ZeRO-3 keeps a parameter's numbers apart from it, under its mark, and trains a copy of each piece."""
    library = _Library(monkeypatch)
    model = adapt("llama", routing="sample")
    router = scope_of(model).router("default")
    router.centroids.ds_id, router.centroids._z3_optimizer = 0, object()
    router.centroids.ds_tensor = torch.arange(3.0)
    initialize_router(model, [text(batch=6)], progress=False)
    ((parameters, source),) = library.gathered
    assert parameters[0] is router.centroids
    assert source == 0
    ((parameter, piece),) = library.taken
    assert parameter is router.centroids
    assert torch.equal(piece, torch.arange(3.0))
    assert bool(router.is_initialized)


def test_the_copy_that_deepspeed_trains_starts_from_data_too(monkeypatch):
    """ZeRO-1 and ZeRO-2 train a copy of each parameter, which overwrites the parameter at the first step."""
    library = _Library(monkeypatch)
    model = adapt("llama", routing="sample")
    router = scope_of(model).router("default")
    before = router.centroids.detach().clone()
    router.centroids._hp_mapping = None
    initialize_router(model, [text(batch=6)], progress=False)
    assert not library.gathered
    ((parameter, value),) = library.taken
    assert parameter is router.centroids
    assert torch.equal(value, router.centroids)
    assert not torch.equal(value, before)


def test_cores_start_by_the_gain_of_weights_that_deepspeed_has_cut(monkeypatch):
    """Under ``zero.Init`` a weight is empty until it is gathered."""
    _Library(monkeypatch)
    plain = make("llama")
    weights = {name: value for name, value in plain.named_parameters() if name.endswith("q_proj.weight")}
    whole = {id(value): value.data for value in weights.values()}
    for value in weights.values():
        value.ds_id, value.ds_shape, value.data = 0, value.shape, torch.empty(0)

    @contextmanager
    def gather(parameters, modifier_rank):
        assert modifier_rank is None
        for parameter in parameters:
            parameter.data = whole[id(parameter)]
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    sys.modules["deepspeed"].zero.GatheredParameters = gather
    cores = []
    for model in (make("llama"), plain):
        torch.manual_seed(0)
        adapted = get_peft_model(model, TuckAConfig(r=4, target_modules=["q_proj"]))
        cores.append([layer.experts("default").cores for _, layer in layers_of(adapted)])
    for expected, found in zip(*cores, strict=True):
        assert torch.equal(found, expected)


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
