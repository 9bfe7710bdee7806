"""A small adapter, its files, and a witness that a model is as it was before a file was loaded into it."""

import torch
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from tucka.errors import CheckpointError
from tucka.peft import TuckAConfig, load_adapter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
X = torch.linspace(-1, 1, 12).reshape(3, 4)


class Net(nn.Module):
    """Two adapted layers and a head that is saved whole."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 2)
        self.scale = torch.ones(1)  # an attribute that is neither parameter nor buffer

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x))))) * self.scale


def base():
    torch.manual_seed(0)
    return Net()


OPTIONS = {"r": 2, "k": 2, "t": 2, "p": 1, "target_modules": ["first", "second"], "modules_to_save": ["head"]}


def trained(**options):
    model = get_peft_model(base(), TuckAConfig(**{**OPTIONS, "init_weights": False, **options}))
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1.0)
    return model.eval()


class Witness:
    """What a model is before a file is loaded into it, and the assertion that it still is."""

    def __init__(self, model):
        self.model = model
        self.state = {key: value.clone() for key, value in model.state_dict().items()}
        self.modules = list(model.named_modules())
        self.flags = [(parameter, parameter.requires_grad, parameter.clone()) for parameter in model.parameters()]
        self.attributes = [sorted(vars(module)) for _, module in self.modules]
        self.modes = [module.training for _, module in self.modules]
        self.output = self.call()

    def call(self):
        return self.model(X)

    def assert_unchanged(self):
        model = self.model
        assert list(model.state_dict()) == list(self.state)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in self.state.items())
        now = list(model.named_modules())
        assert [name for name, _ in now] == [name for name, _ in self.modules]
        assert all(module is known for (_, module), (_, known) in zip(now, self.modules, strict=True))
        assert [sorted(vars(module)) for _, module in now] == self.attributes
        assert [module.training for _, module in now] == self.modes
        for parameter, (known, flag, value) in zip(model.parameters(), self.flags, strict=True):
            assert parameter is known
            assert parameter.requires_grad == flag
            assert torch.equal(parameter, value)
        hooks = [
            module._forward_hooks | module._forward_pre_hooks for _, module in now if not hasattr(module, "peft_config")
        ]
        assert isinstance(model, PeftModel) or not any(hooks)
        assert torch.equal(self.call(), self.output)


def write(folder, weights=None, config=None):
    for name, content in ((WEIGHTS, weights), (CONFIG, config)):
        if content is not None:
            (folder / name).write_bytes(content)


LOADERS = {
    "tucka": load_adapter,
    "peft": PeftModel.from_pretrained,
    "peft, one more": lambda model, folder: model.load_adapter(folder, "new") and model,
}
loaders = st.sampled_from(sorted(LOADERS))


def load_or_refuse(folder, loader="tucka", errors=CheckpointError):
    """Load into a fresh model; on an error, assert that it is a clear one and nothing changed."""
    more = loader == "peft, one more"
    witness = Witness(trained() if more else base())
    try:
        model = LOADERS[loader](witness.model, folder)
    except errors as caught:
        error = caught
    else:
        return assert_loaded(model, load_file(folder / WEIGHTS), "new" if more else "default")
    witness.assert_unchanged()
    assert list(getattr(witness.model, "peft_config", {})) == ["default"] * more
    assert "expected" in str(error) or not isinstance(error, CheckpointError)
    return None


def assert_loaded(model, tensors, name="default"):
    """Assert that all of a file is in the model."""
    loaded = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], value.to(loaded[key].dtype)) for key, value in tensors.items())
    return model


# What is wrong with the tensors of a file, and a word that the error has.
FAULTS = {
    "a factor is missing": (lambda key, value: None if "second.tucka_experts.basis" in key else value, "second"),
    "the router is missing": (lambda key, value: None if "centroids" in key else value, "centroids"),
    "its centre is missing": (lambda key, value: None if "center" in key else value, "center"),
    "the head is missing": (lambda key, value: None if "head" in key else value, "head"),
    "a part of the head is missing": (lambda key, value: None if "head.bias" in key else value, "head"),
    "another shape": (lambda key, value: value[..., :1].contiguous() if "basis" in key else value, "shape"),
    "NaN": (lambda key, value: value * float("nan") if "cores" in key else value, "finite"),
    "whole numbers": (lambda key, value: value.long() if "cores" in key else value, "float32"),
    "a tensor too many": ("base_model.model.third.tucka_experts.basis", "third"),
    "weights of the base": ("base_model.model.first.base_layer.weight", "first"),
    "biases of the base": ("base_model.model.first.base_layer.bias", "first"),
}


def faulty(tensors, fault):
    """The tensors of a file with something wrong."""
    change = FAULTS[fault][0]
    if isinstance(change, str):
        return {**tensors, change: torch.zeros(4) if change.endswith("bias") else torch.zeros(4, 4)}
    changed = {key: change(key, value) for key, value in tensors.items()}
    return {key: value for key, value in changed.items() if value is not None}
