"""Figures about size show the numbers that they are given."""

import numpy as np
import pytest

from tucka.core.counts import count_parameters
from tucka.errors import ConfigError
from tucka.plots import TradeoffPoint, parameter_scaling, tradeoff

POINTS = [TradeoffPoint("head", 770, 0.79, 0.01), ("LoRA", 295_682, 0.86), ("TuckA", 166_778, 0.85)]


def test_tradeoff_puts_each_method_at_its_size_and_accuracy(ax):
    tradeoff(POINTS, ax=ax)
    drawn = {line.get_label().split(":")[0]: line for line in ax.lines if ":" in line.get_label()}
    for name, parameters, accuracy, *_ in POINTS:
        np.testing.assert_array_equal(drawn[name].get_xydata(), [[parameters, accuracy]])
    assert ax.get_xscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "head: 79.0%, 770",
        "LoRA: 86.0%, 296k",
        "TuckA: 85.0%, 167k",
    ]


def test_tradeoff_draws_an_error_bar_of_the_length_given(ax):
    tradeoff(POINTS[:1], ax=ax)
    (bar,) = ax.containers
    (segment,) = bar.lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 1], [0.78, 0.80])


def test_tradeoff_tells_methods_apart_by_marker_and_colour(ax):
    tradeoff(POINTS, ax=ax)
    points = [line for line in ax.lines if ":" in line.get_label()]
    assert len({line.get_marker() for line in points}) == len({line.get_color() for line in points}) == len(POINTS)


@pytest.mark.parametrize("points", [[], [("none", 0, 0.5)]])
def test_tradeoff_refuses_points_that_a_logarithm_cannot_show(points):
    with pytest.raises(ConfigError, match=r"points: .*parameters"):
        tradeoff(points)


def test_parameter_scaling_draws_the_counts(ax):
    parameter_scaling(layer=(768, 768), r=4, p=2, experts=8, ax=ax)
    lora, groups, one_group = (line.get_xydata() for line in ax.lines)
    layer = [(768, 768)]
    for experts, size in lora:
        assert size == experts * 2 * 768 * 4
    for experts, size in groups:
        assert size == count_parameters("tucka", layer, r=4, p=2, t=2, k=int(experts) // 2, pinned=True)
    np.testing.assert_array_equal(np.diff(one_group[:, 1]), 2 * 2)  # two experts more cost 2·p numbers


@pytest.mark.parametrize("experts", [0, 3, 2.5])
def test_parameter_scaling_wants_an_even_number_of_experts(experts):
    with pytest.raises(ConfigError, match=r"experts: "):
        parameter_scaling(experts=experts)
