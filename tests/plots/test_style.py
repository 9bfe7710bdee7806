"""What all figures have in common."""

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.style import context

from support.subprocesses import output_of
from tucka.plots import group_by_label, load_bars, parameter_scaling, routing_map, tradeoff
from tucka.plots.style import axes_or_new, colour, marker, number_on

POINTS = [("LoRA", 295_682, 0.86), ("TuckA", 166_778, 0.85)]
LOADS = {"news": [30, 10, 0], "tweets": [5, 5, 10]}
TIMES = [[30, 10], [20, 20], [5, 15]]
DRAWINGS = [(tradeoff, POINTS), (load_bars, [3, 1, 2]), (group_by_label, LOADS)]


@pytest.mark.parametrize(("draw", "data"), DRAWINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_figure_is_drawn_in_the_axes_given(draw, data, ax):
    assert draw(data, ax=ax) is ax
    assert ax.has_data()


@pytest.mark.parametrize(("draw", "data"), DRAWINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_without_axes_a_figure_is_made_that_can_be_written(draw, data, tmp_path):
    axes = draw(data)
    axes.figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_series_and_text_stand_out_from_the_ground(style):
    with context(style):
        axes = [
            load_bars(TIMES),
            tradeoff(POINTS),
            parameter_scaling(),
            group_by_label(LOADS),
            routing_map(*features_and_centroids()),
        ]
        for ax in axes:
            ground = ax.figure.get_facecolor()
            drawn = [line.get_color() for line in ax.lines if ax is not axes[0]]
            drawn += [bar.get_facecolor() for bar in ax.patches]
            assert all(contrast(shade, ground) >= 3 for shade in drawn), ax.get_title()
            assert all(contrast(text.get_color(), ground) >= 4.5 for text in (ax.title, ax.xaxis.label))


@pytest.mark.parametrize("style", ["default", "dark_background"])
def test_eight_colours_stand_out_and_sixty_four_series_differ(style):
    with context(style):
        ax = axes_or_new(None)
        ground = ax.get_facecolor()
        assert all(contrast(colour(index, ax), ground) >= 3 for index in range(8))
        assert len({(colour(index, ax), marker(index)) for index in range(64)}) == 64


def test_a_number_can_be_read_on_any_colour():
    for name in ("Blues", "cividis"):
        for shade in colormaps[name](np.linspace(0, 1, 50)):
            assert contrast(number_on(shade), shade) >= 4.5


def contrast(one, other):
    """The contrast of WCAG 2, from 1 to 21."""
    parts = [np.array(to_rgb(shade)) for shade in (one, other)]
    linear = [np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4) for part in parts]
    less, more = sorted(c @ [0.2126, 0.7152, 0.0722] for c in linear)
    return (more + 0.05) / (less + 0.05)


def features_and_centroids():
    rng = np.random.default_rng(0)
    return rng.normal(size=(60, 5)) + 3, rng.normal(size=(3, 2, 5))


PYPLOT = """
import sys, tucka.plots
tucka.plots.load_bars([1, 2])
print('matplotlib.pyplot' in sys.modules)
"""


def test_drawing_leaves_pyplot_alone():
    assert output_of(PYPLOT) == "False\n"
