"""The method's place in PEFT's enum and tables: a new Python or PEFT must fail here and nowhere else."""

import copy
import importlib
import pickle
import subprocess
import sys

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

from tucka.peft import TuckAConfig, TuckAModel
from tucka.peft.registration import add_peft_type, register


def test_the_member_behaves_as_all_others():
    member = PeftType.TUCKA
    assert isinstance(member, PeftType)
    assert isinstance(member, str)
    assert (member.name, member.value) == ("TUCKA", "TUCKA")
    assert member == "TUCKA"
    assert hash(member) == hash("TUCKA")
    assert repr(member) == "<PeftType.TUCKA: 'TUCKA'>"
    assert f"{member}" == str(member)
    assert str(member).endswith("TUCKA")


def test_it_is_found_by_name_value_iteration_and_membership():
    member = PeftType.TUCKA
    assert PeftType["TUCKA"] is member
    assert PeftType("TUCKA") is member
    assert list(PeftType)[-1] is member
    assert next(reversed(PeftType)) is member
    assert len(PeftType) == len(list(PeftType)) == len(PeftType.__members__)
    assert member in PeftType
    assert PeftType.__members__["TUCKA"] is member
    assert "TUCKA" in dir(PeftType)
    if sys.version_info >= (3, 12):
        assert "TUCKA" in PeftType


def test_copies_and_pickles_are_the_member_itself():
    member = PeftType.TUCKA
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.copy(member) is member
    assert copy.deepcopy(member) is member


def test_others_are_as_they_were_and_the_enum_stays_closed():
    assert PeftType("LORA") is PeftType.LORA
    assert PeftType.LORA != PeftType.TUCKA
    with pytest.raises(ValueError, match="NOTHING"):
        PeftType("NOTHING")
    with pytest.raises((TypeError, AttributeError)):
        PeftType.TUCKA = "other"


def test_registering_again_changes_nothing():
    members = list(PeftType)
    assert add_peft_type("TUCKA") is PeftType.TUCKA
    register(TuckAConfig, TuckAModel)
    importlib.reload(importlib.import_module("tucka.peft.registration"))
    assert list(PeftType) == members


def test_a_member_that_peft_has_itself_is_used():
    assert add_peft_type("LORA") is PeftType.LORA


def test_pefts_tables_know_the_method():
    member = PeftType.TUCKA
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is TuckAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["TUCKA"] is TuckAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "tucka_"
    assert peft.get_peft_config({"peft_type": "TUCKA", "r": 3}) == TuckAConfig(r=3)


def test_importing_tucka_alone_leaves_peft_alone():
    code = "import sys, tucka; assert not {'peft', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
