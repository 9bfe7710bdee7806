"""The figures show the numbers they are given, in the Axes they are given."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.style import context

from tucka.core.counts import count_parameters
from tucka.errors import ConfigError, ShapeError
from tucka.plots import TradeoffPoint, expert_load, group_by_label, parameter_scaling, routing_map, tradeoff

POINTS = [TradeoffPoint("head", 770, 0.79, 0.01), ("LoRA", 295_682, 0.86), ("TuckA", 166_778, 0.85)]
LOADS = {"news": [30, 10, 0], "tweets": [5, 5, 10]}
DRAWINGS = [(tradeoff, POINTS), (expert_load, [3, 1, 2]), (group_by_label, LOADS)]


@pytest.fixture
def ax():
    figure = Figure()
    FigureCanvasAgg(figure)
    return figure.add_subplot()


@pytest.mark.parametrize(("draw", "data"), DRAWINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_figure_is_drawn_in_the_axes_given(draw, data, ax):
    assert draw(data, ax) is ax
    assert ax.has_data()


@pytest.mark.parametrize(("draw", "data"), DRAWINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_without_axes_a_figure_is_made_that_can_be_written(draw, data, tmp_path):
    axes = draw(data)
    axes.figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_tradeoff_puts_each_method_at_its_size_and_accuracy(ax):
    tradeoff(POINTS, ax)
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
    tradeoff(POINTS[:1], ax)
    (bar,) = ax.containers
    (segment,) = bar.lines[2][0].get_segments()
    np.testing.assert_allclose(segment[:, 1], [0.78, 0.80])


def test_tradeoff_tells_methods_apart_by_marker_and_colour(ax):
    tradeoff(POINTS, ax)
    points = [line for line in ax.lines if ":" in line.get_label()]
    assert len({line.get_marker() for line in points}) == len({line.get_color() for line in points}) == len(POINTS)


@pytest.mark.parametrize("points", [[], [("none", 0, 0.5)]])
def test_tradeoff_refuses_points_that_a_logarithm_cannot_show(points):
    with pytest.raises(ConfigError, match="points: expected at least one, each with parameters"):
        tradeoff(points)


def test_expert_load_draws_shares_and_the_even_share(ax):
    expert_load([6, 2, 0, 0], ax)
    assert [bar.get_height() for bar in ax.patches] == [0.75, 0.25, 0, 0]
    assert ax.lines[0].get_ydata()[0] == 0.25
    assert [text.get_text() for text in ax.texts] == ["75%", "25%", "0%", "0%"]


TIMES = [[30, 10], [20, 20], [5, 15]]


def test_expert_load_over_time_stacks_the_shares(ax):
    expert_load(TIMES, ax, steps=[10, 20, 30])
    heights = np.array([bar.get_height() for bar in ax.patches]).reshape(2, 3).T
    np.testing.assert_allclose(heights, [[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]])
    np.testing.assert_allclose([bar.get_y() for bar in ax.patches][3:], [0.75, 0.5, 0.25])
    np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in ax.patches][:3], [10, 20, 30])


def test_expert_load_reads_a_trainers_log(ax):
    log = [{"step": 5, "loss": 1.0, "tucka/share_0": 0.25, "tucka/share_1": 0.75}, {"step": 6, "eval_loss": 1.0}]
    log.append({"step": 10, "loss": 1.0, "tucka/share_0": 0.5, "tucka/share_1": 0.5})
    expert_load(log, ax)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [0.25, 0.5, 0.75, 0.5])
    np.testing.assert_allclose(ax.patches[1].get_x() + ax.patches[1].get_width() / 2, 10)


def test_expert_load_puts_many_times_together(ax):
    expert_load([[n % 7 + 1, 3] for n in range(600)], ax)
    assert len(ax.patches) == 2 * 60


@pytest.mark.parametrize("load", [[], [[1, 2], [1]], [[[1]]], np.zeros((0, 2))])
def test_expert_load_refuses_what_is_no_table(load):
    with pytest.raises(ShapeError, match="load: expected counts"):
        expert_load(load)


def test_expert_load_says_what_it_misses_in_a_log():
    with pytest.raises(ConfigError, match="as RouterCallback writes it, got entries of none"):
        expert_load([{"loss": 1.0}])
    with pytest.raises(ShapeError, match="steps: expected 3 numbers"):
        expert_load(TIMES, steps=[1, 2])
    with pytest.raises(ConfigError, match="steps: expected increasing numbers"):
        expert_load(TIMES, steps=[1, 5, 5])


def points(count=60, width=5):
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, width)) + 3, rng.normal(size=(3, 2, width))


def test_routing_map_puts_each_feature_at_its_principal_coordinates(ax):
    features, centroids = points()
    routing_map(features, centroids, affinity="dot", ax=ax)
    drawn = np.concatenate([np.asarray(each.get_offsets()) for each in ax.collections[:1]])
    centred = features - features.mean(axis=0)
    # The two leading coordinates keep the largest part of the variance that any plane keeps.
    kept = (drawn**2).sum()
    assert kept == pytest.approx((np.linalg.svd(centred)[1][:2] ** 2).sum())
    assert [text.get_text() for text in ax.texts] == list("001122")


def test_routing_map_colours_by_group_and_marks_by_label(ax):
    features, centroids = points()
    center = features.mean(axis=0)
    routing_map(features, centroids, center=center, labels=["a", "b", "c"] * 20, ax=ax)
    chosen = np.einsum("nd,ktd->nkt", features - center, centroids).max(axis=2).argmax(axis=1)
    colours = [tuple(shade[:3]) for shade in ax.collections[0].get_facecolors()]
    groups = dict(zip(chosen[::3], colours, strict=True))
    assert [groups[group] for group in chosen[::3]] == colours
    assert len(set(groups.values())) == len(groups) > 1
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "c"]


def test_routing_map_refuses_what_does_not_fit():
    features, centroids = points()
    with pytest.raises(ShapeError, match="labels: expected 60 labels"):
        routing_map(features, centroids, labels=["a"])
    with pytest.raises(ShapeError, match="centroids"):
        routing_map(features, centroids[..., :3])
    with pytest.raises(ShapeError, match="at least three rows"):
        routing_map(features[:2], centroids)
    with pytest.raises(ConfigError, match="projection: expected one of 'pca', 'umap'"):
        routing_map(features, centroids, projection="tsne")


def test_routing_map_says_how_to_get_umap(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install umap-learn"):
        routing_map(*points(), projection="umap")


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_series_and_text_stand_out_from_the_ground(style):
    def lightness(colour):
        return np.dot(to_rgb(colour), [0.2126, 0.7152, 0.0722])

    with context(style):
        axes = [
            expert_load(TIMES),
            tradeoff(POINTS),
            parameter_scaling(),
            group_by_label(LOADS),
            routing_map(*points()),
        ]
        for ax in axes:
            ground = lightness(ax.figure.get_facecolor())
            drawn = [line.get_color() for line in ax.lines if line.get_xdata() is not None and ax is not axes[0]]
            drawn += [bar.get_facecolor() for bar in ax.patches]
            drawn += [ax.title.get_color(), ax.xaxis.label.get_color()]
            assert all(abs(lightness(shade) - ground) > 0.2 for shade in drawn), ax.get_title()


def test_group_by_label_draws_the_shares_of_each_row(ax):
    group_by_label(LOADS, ax)
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.75, 0.25, 0.0], [0.25, 0.25, 0.5]])
    assert [text.get_text() for text in ax.texts] == ["75%", "25%", "0%", "25%", "25%", "50%"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["news", "tweets"]


@pytest.mark.parametrize("table", [{}, {"a": [1, 2], "b": [1]}])
def test_group_by_label_refuses_rows_of_unequal_length(table):
    with pytest.raises(ShapeError, match="load_table: expected rows of one length"):
        group_by_label(table)


@pytest.mark.parametrize("load", [[0, 0], [-1, 2], [float("nan"), 1]])
def test_a_load_without_a_sense_is_refused(load):
    for draw, data in ((expert_load, load), (group_by_label, {"a": [1, 1], "b": load})):
        with pytest.raises(ConfigError, match="load: expected finite counts"):
            draw(data)


def test_drawing_leaves_pyplot_alone():
    code = "import sys, tucka.plots as p; p.expert_load([1, 2]); assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_parameter_scaling_draws_the_counts(ax):
    parameter_scaling((768, 768), r=4, p=2, experts=8, ax=ax)
    lora, groups, one_group = (line.get_xydata() for line in ax.lines)
    layer = [(768, 768)]
    for experts, size in lora:
        assert size == experts * 2 * 768 * 4
    for experts, size in groups:
        assert size == count_parameters("tucka", layer, r=4, p=2, t=2, k=int(experts) // 2, pinned=True)
    np.testing.assert_array_equal(np.diff(one_group[:, 1]), 2 * 2)  # two experts more cost 2·p numbers


@pytest.mark.parametrize("experts", [0, 3, 2.5])
def test_parameter_scaling_wants_an_even_number_of_experts(experts):
    with pytest.raises(ConfigError, match="experts: expected"):
        parameter_scaling(experts=experts)
