"""Export as an ordinary LoRA adapter, loaded by plain PEFT in a process that never imports tucka."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from support.bases import EXPORTABLE, make_base, run
from support.upstream import transformers_takes_peft
from tucka.errors import ConfigError, RouteError
from tucka.peft import TuckAConfig, export_lora, pin_route

GATES = [[0.7, 0.2], [0.0, 0.0]]
# Variants that need a file of their own: heads and biases that go along.
VARIANTS = {
    **{kind: (kind, {}) for kind in EXPORTABLE},
    "bert-head": ("bert", {"modules_to_save": ["classifier"], "bias": "tucka_only", "task_type": "SEQ_CLS"}),
    "bert-biases": ("bert", {"bias": "all", "exclude_modules": ["pooler.dense"]}),
    "gpt2-blocks": ("gpt2", {"layers_to_transform": [1], "layers_pattern": "h"}),
}

LOADER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from peft import PeftModel
from support.bases import make_base, run
root = sys.argv[2]
for name, kind in torch.load(f"{root}/kinds.pt").items():
    base, _, inputs = make_base(kind)
    model = PeftModel.from_pretrained(base, f"{root}/{name}").eval()
    outputs = [run(model, inputs)]
    if name != "conv3d":  # PEFT does not merge LoRA on three-dimensional convolutions
        outputs.append(run(model.merge_and_unload(), inputs))
    torch.save(outputs, f"{root}/{name}/outputs.pt")
assert not [module for module in sys.modules if module.split(".")[0] == "tucka"]
"""


def adapted(kind, **options):
    base, targets, inputs = make_base(kind)
    config = {"r": 2, "target_modules": targets, "init_weights": False, "alpha": 0.3, "pinned_gates": GATES}
    return get_peft_model(base, TuckAConfig(**{**config, **options})).eval(), inputs


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Export all variants here and load all of them in one other process."""
    root, expected = tmp_path_factory.mktemp("exported"), {}
    for name, (kind, options) in VARIANTS.items():
        model, inputs = adapted(kind, **options)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.requires_grad and "tucka_" not in key:
                    parameter += 0.1
        expected[name] = run(model, inputs).detach()
        export_lora(model, root / name)
    torch.save({name: kind for name, (kind, _) in VARIANTS.items()}, root / "kinds.pt")
    tests = str(Path(__file__).parents[2])
    result = subprocess.run([sys.executable, "-c", LOADER, tests, str(root)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return root, expected


@pytest.mark.parametrize("name", VARIANTS)
def test_plain_peft_gives_the_same_outputs_without_tucka(exported, name):
    root, expected = exported
    for output in torch.load(root / name / "outputs.pt"):
        scale = max(1.0, float(expected[name].abs().max()))
        torch.testing.assert_close(output, expected[name], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_folder_is_a_lora_adapter_without_a_trace_of_tucka(exported, name):
    root, _ = exported
    text = (root / name / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["peft_type"] == "LORA"
    assert config["fan_in_fan_out"] == name.startswith("gpt2")
    assert "tucka" not in text.lower()
    keys = load_file(root / name / "adapter_model.safetensors")
    assert all(key.startswith("base_model.model.") and "tucka" not in key for key in keys)
    assert sum("lora_A" in key for key in keys) == sum("lora_B" in key for key in keys) > 0


def test_given_gates_stand_in_for_a_pin(tmp_path):
    model, inputs = adapted("bert", pinned_gates=None)
    export_lora(model, tmp_path, gates=GATES)
    pin_route(model, gates=GATES)
    base, _, _ = make_base("bert")
    lora = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(run(lora, inputs), run(model, inputs), rtol=0, atol=1e-5)


def test_one_of_several_adapters_is_exported_also_while_merged(tmp_path):
    model, inputs = adapted("bert")
    other = TuckAConfig(r=3, k=1, t=1, p=2, target_modules=["query"], init_weights=False, pinned_gates=[[0.6]])
    model.add_adapter("other", other)
    model.set_adapter("other")
    output = run(model, inputs)
    model.merge_adapter(["default", "other"])
    lora = export_lora(model, tmp_path, adapter_name="other")
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (3, 3, {"query"})
    loaded = PeftModel.from_pretrained(make_base("bert")[0], tmp_path).eval()
    torch.testing.assert_close(run(loaded, inputs), output, rtol=0, atol=1e-5)


@transformers_takes_peft
def test_a_model_with_an_injected_adapter_exports_under_pefts_keys(tmp_path):
    base, targets, inputs = make_base("bert")
    base.add_adapter(TuckAConfig(r=2, target_modules=targets, init_weights=False, pinned_gates=GATES))
    export_lora(base, tmp_path)
    assert all(key.startswith("base_model.model.bert.") for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(make_base("bert")[0], tmp_path).eval()
    torch.testing.assert_close(run(loaded, inputs), run(base.eval(), inputs), rtol=0, atol=1e-5)


class Quantized(nn.Module):
    """A linear layer that keeps its weight in codes, as quantised layers do."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max().item() / 127
        self.codes = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = nn.Parameter(linear.bias.detach())

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) * self.scale).t() + self.bias


def test_a_layer_that_hides_its_weight_is_called_instead(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(Quantized(nn.Linear(6, 5)))
    opened = nn.Sequential(nn.Linear(6, 5))
    opened[0].weight.data.copy_(base[0].codes * base[0].scale)
    opened[0].bias.data.copy_(base[0].bias)
    x = torch.randn(3, 6)
    model = get_peft_model(base, TuckAConfig(r=2, target_modules=["0"], init_weights=False, pinned_gates=GATES))
    export_lora(model, tmp_path)
    loaded = PeftModel.from_pretrained(opened, tmp_path)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-5)


def test_names_that_end_alike_keep_their_own_ranks(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 30, 3)
            self.inner = nn.ModuleDict({"conv": nn.Conv2d(30, 9, 1)})

        def forward(self, x):
            return self.inner["conv"](torch.tanh(self.conv(x)))

    torch.manual_seed(0)
    base = Net()
    state, x = {key: value.clone() for key, value in base.state_dict().items()}, torch.randn(2, 4, 5, 5)
    model = get_peft_model(base, TuckAConfig(r=2, target_modules=["conv"], init_weights=False, pinned_gates=GATES))
    lora = export_lora(model, tmp_path)
    assert sorted(lora.rank_pattern.values()) == sorted(lora.alpha_pattern.values()) == [2, 18]
    again = Net()
    again.load_state_dict(state)
    loaded = PeftModel.from_pretrained(again, tmp_path)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=1e-5)


def refuse(model, path, error, match, **options):
    with pytest.raises(error, match=match):
        export_lora(model, path, **options)
    assert not path.exists()


def test_nothing_is_written_where_an_adapter_cannot_be_exported(tmp_path):
    path = tmp_path / "folder"
    routed, _ = adapted("bert", pinned_gates=None)
    refuse(routed, path, RouteError, "pin_route")
    refuse(routed, path, ConfigError, r"gates: expected .*\(2, 2\)", gates=[[1.0]])
    refuse(routed, path, ConfigError, "gates: expected .*finite", gates=[[float("nan")] * 2] * 2)
    refuse(routed, path, ConfigError, "gates: expected", gates=[[1.0, 0.0], [0.0]])
    refuse(routed, path, ConfigError, "adapter_name", gates=GATES, adapter_name="unknown")
    refuse(nn.Linear(2, 2), path, RouteError, "model: expected")
    for kind in ("conv2d_dilated", "transposed"):
        refuse(adapted(kind)[0], path, ConfigError, "merge_and_unload")
    refuse(adapted("conv2d_square", r=4)[0], path, ConfigError, r"rank r·9.*merge_and_unload")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="a folder"):
        export_lora(adapted("bert")[0], file)


@pytest.mark.filterwarnings("ignore:You are trying to modify|Already found a `peft_config`:UserWarning")
def test_an_adapter_on_top_of_another_method_is_refused(tmp_path):
    base, _, _ = make_base("bert")
    outer = get_peft_model(base, LoraConfig(r=2, target_modules=["query"]))
    model = get_peft_model(
        outer.base_model.model, TuckAConfig(r=2, target_modules=["query"], pinned_gates=GATES, init_weights=False)
    )
    refuse(model, tmp_path / "folder", ConfigError, "another method")
