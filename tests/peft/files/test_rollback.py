"""A model is put back as it was when an adapter cannot be added."""

import pytest
from peft import inject_adapter_in_model
from torch import nn

from support.adapter_files import Witness, base, trained
from tucka.peft import TuckAConfig
from tucka.peft.files.rollback import unchanged_on_error


def change_and_stop(model):
    with unchanged_on_error(model):
        model.eval()
        model.extra = 1
        del model.scale
        model.second = nn.Identity()
        model.first.register_forward_hook(lambda *_: None)
        model.first.weight.requires_grad_(False)
        raise KeyboardInterrupt


def test_the_guard_puts_everything_back():
    model = base()
    handle = model.first.register_forward_hook(lambda *_: None)
    expected = dict(vars(model))
    with pytest.raises(KeyboardInterrupt):
        change_and_stop(model)
    assert vars(model).keys() == expected.keys()
    assert model.training
    assert model.first.weight.requires_grad
    assert isinstance(model.second, nn.Linear)
    assert len(model.first._forward_hooks) == 1
    handle.remove()  # still refers to the layer's own table
    assert not model.first._forward_hooks


class Frozen(dict):
    """A configuration as diffusers keeps it."""

    def update(self, *_values, **_named):
        raise TypeError

    clear = update


def replace_and_stop(model):
    with unchanged_on_error(model):
        model.config = Frozen()
        model.names.append("second")
        raise KeyboardInterrupt


def test_containers_that_cannot_be_written_to_are_left_alone():
    model = base()
    model.config = frozen = Frozen(size=3)
    model.names = ["first"]
    with pytest.raises(KeyboardInterrupt):
        replace_and_stop(model)
    assert model.config is frozen
    assert model.names == ["first"]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_an_adapter_that_cannot_be_added_leaves_no_trace(saved):
    """Also where PEFT finds out late: the second adapter's head is a layer that the first one adapts."""
    for model, add in (
        (trained(), lambda model, config: model.add_adapter("new", config)),
        (trained().base_model.model, lambda model, config: inject_adapter_in_model(config, model, "new")),
    ):
        witness = Witness(model)
        with pytest.raises(TypeError, match="cannot be applied"):
            add(model, TuckAConfig(r=2, target_modules=["first", "second"], modules_to_save=["first"]))
        witness.assert_unchanged()
        assert "new" not in getattr(model, "peft_config", {})
