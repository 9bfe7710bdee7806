"""Models and calls that PEFT would let through, and that tucka refuses or takes another way."""

import contextlib
import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch import nn

from support.adapting import adapt, config_for
from support.refusals import refused
from support.routed import family
from support.tiny_models import WIDTH, text
from tucka.backends.torch import HouseholderAdapter
from tucka.errors import CheckpointError, ConfigError, RouteError, TuckaError
from tucka.peft import TuckAConfig, export_lora, last_route, load_official_checkpoint, pin_route
from tucka.peft.routes.observation import has_inputs

GATES = [[1.0, 0.0], [0.0, 0.0]]


def pinned(base, targets=("0",), **options):
    config = TuckAConfig(r=2, k=2, t=2, pinned_gates=GATES, init_weights=False, target_modules=list(targets), **options)
    return get_peft_model(base, config)


def test_the_only_route_that_there_is_is_pinned():
    config = TuckAConfig(r=2, k=1, t=1, p=1, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    assert model.peft_config["default"].pinned_gates == [[1.0]]
    assert config.pinned_gates is None
    model.merge_and_unload()


def test_an_adapter_has_to_be_named_where_two_are_active():
    model = adapt("plain", routing="sample")
    model.add_adapter("other", config_for("plain", routing="sample"))
    model.base_model.set_adapter(["default", "other"])
    with refused(ConfigError, "adapter_name", "default | other"):
        last_route(model)


def test_batches_of_which_none_goes_to_a_group_pin_nothing():
    model, batch = adapt("bert", routing="batch"), text(batch=2)
    model(**batch)
    other = 1 - int(last_route(model)[1].sum() > 0)
    with refused(ConfigError, "batches", f"goes to group {other}"):
        pin_route(model, batches=[batch], group=other)
    with refused(ConfigError, "batches", "a routing decision"):
        pin_route(model, batches=[])


def test_a_layer_that_standardises_its_weight_is_not_merged():
    class StdConv2d(nn.Conv2d):
        pass

    model = pinned(nn.Sequential(StdConv2d(4, 4, 3)), routing="sample")
    with refused(TuckaError, "merge", "StdConv2d | beside the base"):
        model.merge_adapter()


def test_a_weight_that_two_layers_share_is_not_merged():
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    base[1].weight = base[0].weight
    with refused(TuckaError, "merge", "another layer shares | untie"):
        pinned(base).merge_adapter()
    assert torch.equal(base[1].weight, base[0].base_layer.weight)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)

    def forward(self, x):
        return self.block(x)


def test_no_lora_is_written_that_would_compute_something_else(tmp_path):
    with refused(ConfigError, "model", "calls in evaluation | TransformerEncoderLayer"):
        export_lora(pinned(Encoder(), ["linear1"]), tmp_path / "folder")
    circular = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    with refused(ConfigError, "model", "zero padding | circular"):
        export_lora(pinned(circular, routing="sample"), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_names_that_peft_takes_for_a_mixtures_experts_are_refused():
    with refused(ConfigError, "target_modules", "'w1' | Use 'experts'"):
        family("mixtral", targets=["q_proj", "w1"])


def test_a_layer_that_is_linear_by_its_sizes_alone_is_refused():
    class Llama4Router(nn.Linear):
        pass

    with refused(ConfigError, "target_modules", "Llama4Router | x W + b"):
        get_peft_model(nn.Sequential(Llama4Router(4, 4)), TuckAConfig(r=2, target_modules=["0"]))


def test_a_checkpoint_that_holds_no_tensors_is_refused(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "adapter_model.bin")
    model = adapt("bert", affinity="group_norm", factor_norm="frobenius", gate_norm=False)
    with refused(CheckpointError, "source", "state dict | list"):
        load_official_checkpoint(model, tmp_path / "adapter_model.bin", allow_pickle=True)


def test_loaders_that_give_no_inputs_of_the_model_are_known():
    model, batch = adapt("bert"), text(batch=2)
    assert has_inputs([batch], model)
    assert has_inputs([torch.ones(2, WIDTH)], model)
    assert not has_inputs(None, model)
    assert not has_inputs([[batch]], model)
    assert has_inputs([{"x": 1}], adapt("plain"))
    assert not has_inputs([{"x": 1, "query": 1}], adapt("plain"))
    assert not has_inputs([], model)


def test_reflections_start_where_there_is_memory_and_say_their_sizes():
    with torch.device("meta"):
        adapter = HouseholderAdapter(nn.Linear(4, 4), rank=2)
    assert adapter.vectors.is_meta
    assert "in_features=4, rank=2" in repr(adapter)


def test_a_scale_that_is_set_anew_unmerges_and_the_same_one_changes_nothing():
    model = pinned(nn.Sequential(nn.Linear(4, 4)))
    layer = model.base_model.model[0]
    model.merge_adapter()
    layer.set_scale("default", 1.0)
    assert layer.merged
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer.set_scale("default", 2.0)
    assert not layer.merged


def test_rows_without_a_known_adapter_are_those_of_the_base():
    model, batch = adapt("bert", routing="sample", init_weights=False), text(batch=2)
    with torch.no_grad():
        named = model(**batch, adapter_names=["__base__", "__base__"]).logits
        with model.disable_adapter():
            torch.testing.assert_close(named, model(**batch).logits)


def test_adapters_named_for_rows_need_layers_whose_rows_are_samples():
    model = adapt("plain", model=TimeFirst(), routing="sample", target_modules=["linear1"], samples_first=False)
    with refused(RouteError, "adapter_names", "rows are samples | exclude_modules"):
        model(torch.ones(3, 2, 8), adapter_names=["default"] * 3)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16)

    def forward(self, x):
        return self.block(x)


def interrupting(_name):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("module", "raised", "code"),
    [(SimpleNamespace, SystemExit, 130), (None, ModuleNotFoundError, None)],
)
def test_the_command_says_that_it_was_interrupted_and_hides_no_error(module, raised, code, monkeypatch, capsys):
    import tucka.__main__ as program

    if module is not None:
        module = ModuleType("tucka.cli")
        module.__getattr__ = interrupting
    monkeypatch.setitem(sys.modules, "tucka.cli", module)
    with contextlib.suppress(AttributeError):
        monkeypatch.delattr("tucka.cli", raising=False)
    with pytest.raises(raised) as caught:
        program.main()
    assert getattr(caught.value, "code", None) == code
    assert (code is None) or capsys.readouterr().err == "tucka: interrupted\n"
