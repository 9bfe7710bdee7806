"""Adapter files with every kind of damage: one clear error each, and the model as it was before."""

import copy
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import _SIZE, save_file

from support.adapter_files import (
    CONFIG,
    LOADERS,
    WEIGHTS,
    Witness,
    base,
    load_or_refuse,
    loaders,
    trained,
    write,
)
from tucka.errors import CheckpointError

# Fuzzing: 620 cases in all.


@settings(max_examples=160)
@given(data=st.data())
def test_flipped_bytes(saved, damaged, data):
    content = bytearray((saved[0] / WEIGHTS).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    # Half of them where names, shapes and offsets are.
    ends = st.integers(0, header - 1) | st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(ends, min_size=1, max_size=4)):
        content[place] ^= data.draw(st.integers(1, 255))
    write(damaged, bytes(content), (saved[0] / CONFIG).read_bytes())
    load_or_refuse(damaged, data.draw(loaders))


@settings(max_examples=80)
@given(data=st.data())
def test_cut_or_lengthened_files(saved, damaged, data):
    content = (saved[0] / WEIGHTS).read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    longer = content + data.draw(st.binary(min_size=1, max_size=9))
    write(damaged, data.draw(st.sampled_from([content[:length], longer])), (saved[0] / CONFIG).read_bytes())
    assert load_or_refuse(damaged, data.draw(loaders)) is None


keys = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=100)
@given(data=st.data())
def test_renamed_missing_and_added_tensors(saved, damaged, data):
    _, tensors, _ = saved
    changed = dict(tensors)
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3, unique=True)):
        value = changed.pop(key)
        fate = data.draw(st.sampled_from(["drop", "rename", "swap suffix", "double"]))
        if fate == "rename":
            changed[data.draw(keys)] = value
        elif fate == "swap suffix":
            changed[key.rpartition(".")[0] + "." + data.draw(keys)] = value
        elif fate == "double":
            changed[key], changed[data.draw(keys)] = value, value.clone()
    save_file(changed, damaged / WEIGHTS)
    write(damaged, config=(saved[0] / CONFIG).read_bytes())
    if changed.keys() != tensors.keys():
        assert load_or_refuse(damaged, data.draw(loaders)) is None


@settings(max_examples=100)
@given(data=st.data())
def test_changed_shapes_kinds_and_numbers(saved, damaged, data):
    _, tensors, _ = saved
    key = data.draw(st.sampled_from([key for key, value in tensors.items() if value.ndim]))
    value = tensors[key]
    changes = {
        "shape": lambda: torch.ones(data.draw(st.lists(st.integers(0, 3), max_size=4)), dtype=value.dtype),
        "flat": lambda: value.flatten(),
        "more": lambda: torch.cat([value, value]),
        "whole numbers": lambda: value.long(),
        "complex": lambda: value.to(torch.complex64),
        "nan": lambda: value.clone().view(-1).index_fill_(0, torch.tensor([0]), float("nan")).reshape(value.shape),
        "infinity": lambda: torch.full_like(value, float("-inf")),
        "half": lambda: value.half(),
    }
    if torch.complex64 not in _SIZE:  # of an old version, which has no such numbers
        del changes["complex"]
    kind = data.draw(st.sampled_from(sorted(changes)))
    changed = changes[kind]()
    save_file({**tensors, key: changed}, damaged / WEIGHTS)
    write(damaged, config=(saved[0] / CONFIG).read_bytes())
    fits = changed.shape == value.shape and kind in ("shape", "flat", "half")
    assert (load_or_refuse(damaged, data.draw(loaders)) is not None) == fits


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@pytest.mark.filterwarnings("ignore:(Unexpected keyword arg|config. expected entries):UserWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@settings(max_examples=120)
@given(data=st.data())
def test_changed_configurations(saved, damaged, data):
    _, _, entries = saved
    changed = copy.deepcopy(entries)
    for key in data.draw(st.lists(st.sampled_from(sorted(entries)), min_size=1, max_size=2, unique=True)):
        if data.draw(st.booleans()):
            changed[key] = data.draw(json_values)
        else:
            changed[key + data.draw(st.text(max_size=2))] = changed.pop(key)
    write(damaged, (saved[0] / WEIGHTS).read_bytes(), json.dumps(changed).encode())
    # Which method a configuration is for, PEFT looks up itself.
    load_or_refuse(damaged, data.draw(loaders) if changed.get("peft_type") == "TUCKA" else "tucka")


@pytest.mark.filterwarnings("ignore:(Unexpected keyword arg|config. expected entries):UserWarning")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning")
@settings(max_examples=60)
@given(data=st.data())
def test_configuration_files_with_flipped_bytes(saved, damaged, data):
    content = bytearray((saved[0] / CONFIG).read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    write(damaged, (saved[0] / WEIGHTS).read_bytes(), bytes(content))
    loader = data.draw(loaders)  # PEFT reads the JSON first and raises Python's errors of it
    load_or_refuse(damaged, loader, errors=CheckpointError if loader == "tucka" else Exception)


# Single cases, and PEFT's own way of loading.

CONFIGS = {
    "format 2": ({"tucka_format": 2}, "Update tucka"),
    "no format": ({"tucka_format": None}, "tucka_format"),
    "another method": ({"peft_type": "LORA"}, "TUCKA"),
    "sizes": ({"r": 1}, "shape"),
    "no sizes": ({"r": -1}, "at least 1"),
    "targets": ({"target_modules": ["elsewhere"]}, "target_modules"),
    "fewer targets": ({"target_modules": ["first"]}, "second"),
    "no head": ({"modules_to_save": None}, "head"),
    "another head": ({"modules_to_save": ["head", "first"]}, "expected"),
    "gates": ({"pinned_gates": [[1]]}, "pinned_gates"),
    "more groups than memory": ({"k": 10**13}, "shape"),
    "no number of torch's": ({"r": 10**30}, "shape"),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("loader", LOADERS)
def test_configurations_that_do_not_fit(saved, damaged, loader, name):
    changes, match = CONFIGS[name]
    if name == "another method" and loader != "tucka":
        pytest.skip("PEFT then loads with the other method")
    write(damaged, (saved[0] / WEIGHTS).read_bytes(), json.dumps({**saved[2], **changes}).encode())
    witness = Witness(trained() if "more" in loader else base())
    with pytest.raises(CheckpointError, match=match):
        LOADERS[loader](witness.model, damaged)
    witness.assert_unchanged()


@pytest.mark.parametrize("loader", ["tucka", "peft"])
def test_unknown_entries_are_left_out_with_a_warning(saved, damaged, loader):
    write(damaged, (saved[0] / WEIGHTS).read_bytes(), json.dumps({**saved[2], "extra": 1}).encode())
    with pytest.warns(UserWarning, match="extra") as caught:
        assert load_or_refuse(damaged, loader) is not None
    assert len([w for w in caught if "extra" in str(w.message)]) == 1
