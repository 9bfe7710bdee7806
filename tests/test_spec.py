"""Sizes and options as plain values: what is refused, in whose words, and what is stored."""

import copy
import dataclasses
import inspect
import json
import pickle

import numpy as np
import pytest

import tucka
from support.refusals import refused
from tucka.checks import check_keywords, refuse_unknown_keywords
from tucka.spec import LETTERS, TuckerSpec, check_spec


@pytest.mark.parametrize(
    ("changes", "name", "words"),
    [
        ({"rank": 0}, "rank", "at least 1 | 0 | TuckerSpec"),
        ({"rank": 2.0}, "rank", "whole number | 2.0"),
        ({"groups": True}, "groups", "whole number | True"),
        ({"experts_per_group": None}, "experts_per_group", "whole number | None"),
        ({"expert_rank": "2"}, "expert_rank", "whole number | '2'"),
        ({"alpha": float("nan")}, "alpha", "finite | nan"),
        ({"alpha": 10**400}, "alpha", "finite"),
        ({"alpha": True}, "alpha", "finite | True"),
        ({"alpha": np.True_}, "alpha", "finite | True"),
        ({"routing": "layer"}, "routing", "'batch' | 'token' | 'layer'"),
        ({"affinity": "cosine"}, "affinity", "'dot' | 'cosine'"),
        ({"temperature": 0}, "temperature", "positive | 0"),
        ({"balance_rate": -0.1}, "balance_rate", "negative | -0.1"),
        ({"router_init": "uniform"}, "router_init", "'balanced' | 'uniform'"),
        ({"router_init": "balanced", "affinity": "dot"}, "router_init", "'dai' | 'dot' | directional"),
        ({"gate_norm": "softmax"}, "gate_norm", "True | 'softmax'"),
        ({"factor_norm": "spectral"}, "factor_norm", "'frobenius' | 'spectral'"),
    ],
)
def test_a_value_outside_its_rule_is_refused(changes, name, words):
    with refused(tucka.ConfigError, name, words):
        TuckerSpec(**changes)


@pytest.mark.parametrize(
    ("word", "right"),
    [
        *((letter, name) for name, letter in LETTERS.items()),
        ("lora_alpha", "alpha"),
        ("granularity", "routing"),
        ("kind", "affinity"),
        ("normalize", "gate_norm"),
        ("rnk", "rank"),
    ],
)
def test_a_wrong_keyword_names_the_right_one(word, right):
    with refused(tucka.ConfigError, word, f"TuckerSpec | is {right}"):
        TuckerSpec(**{word: 1})


def test_a_keyword_without_a_likeness_names_all_that_there_are():
    with refused(tucka.ConfigError, "zzz", "Use one of rank, groups"):
        TuckerSpec(zzz=1)
    with refused(TypeError, "zzz"):  # as Python's own
        TuckerSpec(zzz=1)


def test_another_word_counts_only_where_the_right_one_is_known():
    with refused(tucka.ConfigError, "rank", "of full | unexpected"):
        check_keywords("full", ["rank"], [], also_called=LETTERS)


def test_a_decorated_class_keeps_its_signature_and_its_own_errors():
    @refuse_unknown_keywords({"size": "width"})
    class Box:
        def __init__(self, width, *, height=1):
            self.area = width * height

    assert list(inspect.signature(Box).parameters) == ["width", "height"]
    assert Box(2, height=3).area == 6
    with refused(tucka.ConfigError, "size", "Box | is width"):
        Box(size=2)
    with pytest.raises(TypeError, match="width"):
        Box(height=2)


def test_the_words_of_a_message_are_the_callers():
    values = dataclasses.asdict(TuckerSpec())
    with refused(tucka.ConfigError, "r", "at least 1 | 0 | TuckAConfig"):
        check_spec({**values, "rank": 0}, words=LETTERS, where="TuckAConfig")
    assert check_spec(values, words=LETTERS, where="TuckAConfig") == values


def test_numbers_of_numpy_are_stored_as_pythons():
    given = {
        "rank": np.int64(4),
        "groups": np.uint8(3),
        "alpha": np.float32(0.5),
        "temperature": np.float16(2),
        "balance_rate": np.int32(0),
        "routing": np.str_("token"),
        "gate_norm": np.True_,
    }
    spec = TuckerSpec(**given)
    assert json.loads(json.dumps(dataclasses.asdict(spec))) == dataclasses.asdict(spec)
    assert {type(value) for value in dataclasses.astuple(spec)} == {int, float, str, bool, type(None)}
    assert spec == TuckerSpec(rank=4, groups=3, alpha=0.5, temperature=2, routing="token")


@pytest.mark.parametrize(
    "how", [copy.copy, copy.deepcopy, dataclasses.replace, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_copy_is_equal(how):
    spec = TuckerSpec(rank=3, affinity="dot")
    assert how(spec) == spec


def test_what_starts_a_router_follows_from_the_affinity():
    started = {affinity: TuckerSpec(affinity=affinity).initialization for affinity in ("dot", "directional")}
    assert started == {"dot": "dai", "directional": "balanced"}
    assert TuckerSpec(router_init="kaiming").initialization == "kaiming"
