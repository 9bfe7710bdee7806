"""Figures about routing show the numbers that they are given."""

import numpy as np
import pytest

from tucka.errors import ConfigError, ShapeError
from tucka.plots import group_by_label, load_bars, routing_map

LOADS = {"news": [30, 10, 0], "tweets": [5, 5, 10]}
TIMES = [[30, 10], [20, 20], [5, 15]]


def test_load_bars_draws_shares_and_the_even_share(ax):
    load_bars([6, 2, 0, 0], ax=ax)
    assert [bar.get_height() for bar in ax.patches] == [0.75, 0.25, 0, 0]
    assert ax.lines[0].get_ydata()[0] == 0.25
    assert [text.get_text() for text in ax.texts] == ["75%", "25%", "0%", "0%"]


def test_the_line_of_the_even_share_crosses_no_number(ax):
    ax.figure.set_size_inches(3, 2.4)
    load_bars([24, 22, 30, 24], ax=ax)
    ax.figure.draw_without_rendering()
    even = ax.transData.transform((0, 0.25))[1]
    for text in ax.texts:
        box = text.get_window_extent()
        assert not box.y0 < even < box.y1, text.get_text()


def test_load_bars_over_time_stacks_the_shares(ax):
    load_bars(TIMES, ax=ax, steps=[10, 20, 30])
    heights = np.array([bar.get_height() for bar in ax.patches]).reshape(2, 3).T
    np.testing.assert_allclose(heights, [[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]])
    np.testing.assert_allclose([bar.get_y() for bar in ax.patches][3:], [0.75, 0.5, 0.25])
    np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in ax.patches][:3], [10, 20, 30])


def test_load_bars_reads_a_trainers_log(ax):
    log = [{"step": 5, "loss": 1.0, "tucka/share_0": 0.25, "tucka/share_1": 0.75}, {"step": 6, "eval_loss": 1.0}]
    log.append({"step": 10, "loss": 1.0, "tucka/share_0": 0.5, "tucka/share_1": 0.5})
    load_bars(log, ax=ax)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [0.25, 0.5, 0.75, 0.5])
    np.testing.assert_allclose(ax.patches[1].get_x() + ax.patches[1].get_width() / 2, 10)


def test_load_bars_puts_many_times_together(ax):
    load_bars([[n % 7 + 1, 3] for n in range(600)], ax=ax)
    assert len(ax.patches) == 2 * 60


@pytest.mark.parametrize("load", [[], [[1, 2], [1]], [[[1]]], np.zeros((0, 2))])
def test_load_bars_refuses_what_is_no_table(load):
    with pytest.raises(ShapeError, match=r"load: .*counts.*\(times, k\)"):
        load_bars(load)


def test_load_bars_says_what_it_misses_in_a_log():
    with pytest.raises(ConfigError, match=r"load: .*RouterCallback.*none"):
        load_bars([{"loss": 1.0}])
    with pytest.raises(ShapeError, match=r"steps: .*3 numbers"):
        load_bars(TIMES, steps=[1, 2])
    with pytest.raises(ConfigError, match=r"steps: .*increasing"):
        load_bars(TIMES, steps=[1, 5, 5])


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
    with pytest.raises(ShapeError, match=r"labels: .*60"):
        routing_map(features, centroids, labels=["a"])
    with pytest.raises(ShapeError, match="centroids: "):
        routing_map(features, centroids[..., :3])
    with pytest.raises(ShapeError, match=r"features: .*three"):
        routing_map(features[:2], centroids)
    with pytest.raises(ConfigError, match=r"projection: .*'pca', 'umap'"):
        routing_map(features, centroids, projection="tsne")


def test_routing_map_says_how_to_get_umap(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"projection: .*pip install umap-learn"):
        routing_map(*points(), projection="umap")


def test_group_by_label_draws_the_shares_of_each_row(ax):
    group_by_label(LOADS, ax=ax)
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.75, 0.25, 0.0], [0.25, 0.25, 0.5]])
    assert [text.get_text() for text in ax.texts] == ["75%", "25%", "0%", "25%", "25%", "50%"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["news", "tweets"]


@pytest.mark.parametrize("table", [{}, {"a": [1, 2], "b": [1]}])
def test_group_by_label_refuses_rows_of_unequal_length(table):
    with pytest.raises(ShapeError, match=r"load_table: .*one length"):
        group_by_label(table)


@pytest.mark.parametrize("load", [[0, 0], [-1, 2], [float("nan"), 1]])
def test_a_load_without_a_sense_is_refused(load):
    for draw, data in ((load_bars, load), (group_by_label, {"a": [1, 1], "b": load})):
        with pytest.raises(ConfigError, match=r"load: .*(counts|finite)"):
            draw(data)


# What users have: models and routers.


def adapted_model():
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from tucka.peft import TuckAConfig

    torch.manual_seed(0)
    config = TuckAConfig(r=2, k=3, routing="sample", target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config).eval()
    model(torch.randn(12, 4))
    return model


def test_a_models_load_is_drawn():
    from tucka.peft import expert_load

    model = adapted_model()
    heights = [float(bar.get_height()) for bar in load_bars(model).patches]
    np.testing.assert_allclose(heights, (expert_load(model) / 12).tolist())


def test_a_router_is_drawn_as_its_arrays():
    from tucka.backends.torch.routing.scope import scope_of

    router = scope_of(adapted_model()).router("default")
    features = router.centroids.detach().new_ones(5, 4).cumsum(0).sin()
    drawn = routing_map(features, router)
    parts = {"center": router.center, "affinity": router.spec.affinity}
    again = routing_map(features, router.centroids.detach(), **parts)
    for mine, other in zip(drawn.collections, again.collections, strict=True):
        np.testing.assert_array_equal(mine.get_offsets(), other.get_offsets())
    assert [text.get_text() for text in drawn.texts] == ["0", "0", "1", "1", "2", "2"]


@pytest.mark.parametrize("routing", ["sample", "batch", "token"])
def test_a_model_is_drawn_with_batches_of_its_inputs(routing):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from tucka.peft import TuckAConfig, expert_load, initialize_router

    torch.manual_seed(0)
    config = TuckAConfig(r=2, k=3, routing=routing, target_modules=["0"])
    model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
    batches = list(torch.randn(6, 5, 7, 4))
    initialize_router(model, batches, progress=False)
    drawn = routing_map(batches, model)
    assert (
        sum(len(part.get_offsets()) for part in drawn.collections[:1])
        == {"sample": 30, "batch": 6, "token": 210}[routing]
    )
    assert model.training
    assert int(expert_load(model).sum()) == 0  # looking leaves the counts as they were


def test_a_model_without_a_router_cannot_be_drawn():
    from tucka.errors import RouteError
    from tucka.peft import pin_route

    model = adapted_model()
    pin_route(model, group=0)
    with pytest.raises(RouteError, match=r"model: expected a model whose active adapter is routed.*routing_map"):
        routing_map([], model)
