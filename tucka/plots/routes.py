"""Figures about routing: how evenly groups are used, what they serve, where the features and centroids lie."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from tucka.arrays import Array, backend_of, detach, host_values
from tucka.checks import check_choice, check_shapes
from tucka.core.balance import load_entropy
from tucka.core.routing import affinity_logits
from tucka.errors import ConfigError, ShapeError, expected
from tucka.plots.style import axes_or_new, colour, ink, is_dark, marker, muted, number_on, open_frame
from tucka.spec import CENTERED, Affinity

__all__ = ["group_by_label", "load_bars", "routing_map"]

Projection = Literal["pca", "umap"]
_Matrix = np.ndarray[Any, Any]
_MOST_BARS = 60


def load_bars(load: Any, *, steps: Sequence[float] | None = None, ax: Axes | None = None) -> Axes:
    """Draw how often each expert group was chosen: at one time, or over time as in the paper's Figure 4.

    Parameters
    ----------
    load : Module, or sequence of float, of sequences of float, or of mappings
        A model with a TuckA adapter, for its counts as they are now; a count for each group, shape (k,), as
        `tucka.peft.expert_load` returns them; such counts for each of several times, shape (times, k); or a Trainer's
        ``state.log_history`` with the entries of `tucka.peft.RouterCallback`.
    steps : sequence of float, optional
        The times, in training steps; if None, those of the log, or 1, 2, 3, ...
    ax : Axes, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        At one time, a bar for each group's share, with a line at the even share. Over time, a stacked bar for each
        time, with lines where even shares would end; more than 60 times are averaged over neighbours.

    Raises
    ------
    ShapeError
        If `load` is neither a vector nor a table, or `steps` has another length.
    ConfigError
        If a count is negative or not finite, or all counts of one time are zero; if `steps` do not increase; or if a
        log does not have the entries of exactly one adapter.

    Examples
    --------
    >>> [float(bar.get_height()) for bar in load_bars([30, 10]).patches]
    [0.75, 0.25]
    >>> len(load_bars([[30, 10], [20, 20], [25, 15]]).patches)
    6
    """
    if hasattr(load, "named_modules"):  # a model; its packages are there then
        load = importlib.import_module("tucka.peft").expert_load(load)
    rows = list(load)
    if rows and isinstance(rows[0], Mapping):
        rows, steps = _rows_of_log(rows, steps)
    counts = _counts(rows)
    if counts.ndim == 1:
        return _one_load(counts, ax)
    times = np.arange(1.0, len(counts) + 1) if steps is None else np.asarray(list(steps), dtype=np.float64)
    if times.shape != (len(counts),):
        raise ShapeError(expected("steps", f"{len(counts)} numbers", f"shape {times.shape}", where="load_bars"))
    if not np.all(np.diff(times) > 0):
        raise ConfigError(expected("steps", "increasing numbers", times.tolist(), where="load_bars"))
    return _loads_over_time(counts, times, ax)


def _counts(rows: list[Any]) -> _Matrix:
    """Make an array (k,) or (times, k) of what the caller gave."""
    rule = "counts (k) or (times, k)"
    try:
        counts = np.asarray([host_values(row) if hasattr(row, "shape") else row for row in rows], dtype=np.float64)
    except ValueError as error:
        raise ShapeError(expected("load", rule, "rows that differ in length", where="load_bars")) from error
    if counts.ndim not in (1, 2) or counts.size == 0:
        raise ShapeError(expected("load", rule, f"shape {counts.shape}", where="load_bars"))
    return counts


def _rows_of_log(log: list[Any], steps: Sequence[float] | None) -> tuple[list[list[float]], Sequence[float]]:
    """Take the groups' shares out of a Trainer's log."""
    shares = [key for entry in log for key in entry if key.rpartition("/")[2].startswith("share_")]
    prefixes = list(dict.fromkeys(key.rpartition("_")[0] for key in shares))
    if len(prefixes) != 1:
        rule = "a log with the shares of one adapter, as RouterCallback writes it"
        raise ConfigError(expected("load", rule, f"entries of {prefixes or 'none'}", where="load_bars"))
    entries = [entry for entry in log if f"{prefixes[0]}_0" in entry]
    groups = range(sum(key.startswith(f"{prefixes[0]}_") for key in entries[0]))
    rows = [[float(entry[f"{prefixes[0]}_{group}"]) for group in groups] for entry in entries]
    times = [float(entry.get("step", place)) for place, entry in enumerate(entries, start=1)]
    return rows, times if steps is None else steps


def _one_load(counts: _Matrix, ax: Axes | None) -> Axes:
    entropy = load_entropy(counts)
    ax = axes_or_new(ax)
    shares = (counts / counts.sum()).tolist()
    even, room = 1 / len(shares), 0.14 * max(shares)
    ax.bar([str(group) for group in range(len(shares))], shares, color=colour(0, ax), width=0.7)
    for group, share in enumerate(shares):
        # Above the line of the even share where it would cross the number.
        place = (group, even if even - room < share < even else share)
        text = f"{share:.0%}"
        ax.annotate(text, place, (0, 2), textcoords="offset points", ha="center", va="bottom", color=ink(ax))
    ax.axhline(even, color=muted(ax), linestyle="--", linewidth=1, label="even share", zorder=0.5)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set(xlabel="expert group", ylabel="share of the routings", title=f"Expert load (entropy {entropy:.2f})")
    # Above the bars' labels. With many bars, matplotlib's search for the best place is slow.
    ax.legend(frameon=False, loc="upper right")
    ax.margins(y=0.28)
    open_frame(ax)
    return ax


def _loads_over_time(counts: _Matrix, times: _Matrix, ax: Axes | None) -> Axes:
    entropies = [load_entropy(row) for row in counts]  # raises before anything is drawn
    shares = counts / counts.sum(axis=1, keepdims=True)
    parts = np.array_split(np.arange(len(times)), min(len(times), _MOST_BARS))
    shares = np.stack([shares[part].mean(axis=0) for part in parts])
    times = np.array([times[part].mean() for part in parts])
    groups = shares.shape[1]
    ax = axes_or_new(ax, width=6.2)
    width = 0.86 * float(np.diff(times).min()) if len(times) > 1 else 0.86
    bottom = np.zeros(len(times))
    hatches = ("", "///") if groups > 8 else ("",)  # colours repeat after eight
    for group in range(groups):
        style: dict[str, Any] = {
            "color": colour(group, ax),
            "hatch": hatches[group // 8 % len(hatches)],
            "linewidth": 0,
        }
        ax.bar(times, shares[:, group], width, bottom, label=str(group), **style)
        bottom += shares[:, group]
    for even in range(1, groups):
        ax.axhline(even / groups, color="black", linestyle=(0, (4, 3)), linewidth=0.8, alpha=0.75)
    ax.set(xlim=(times[0] - 0.7 * width, times[-1] + 0.7 * width), ylim=(0, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    title = f"Expert load (entropy {entropies[0]:.2f} at first, {entropies[-1]:.2f} at last)"
    ax.set(xlabel="training step", ylabel="share of the routings", title=title)
    handles, labels = ax.get_legend_handles_labels()
    # The first group is at the bottom, as in the bars.
    ax.legend(handles[::-1], labels[::-1], title="group", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    open_frame(ax)
    return ax


def group_by_label(load_table: Mapping[str, Sequence[float]], *, ax: Axes | None = None) -> Axes:
    """Draw which expert group serves which kind of input, as a heat map.

    Parameters
    ----------
    load_table : mapping of str to sequence of float
        For each label (a domain, a language, a class) the count of each group, all of one length k.
    ax : Axes, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        With a row for each label and a column for each group; a cell is the group's share in its row.

    Raises
    ------
    ShapeError
        If there is no row, or if rows differ in length.
    ConfigError
        If it is no mapping, if a count is negative or not finite, or if a row holds only zeros.

    Examples
    --------
    >>> axes = group_by_label({"news": [3, 1], "tweets": [0, 4]})
    >>> axes.images[0].get_array().tolist()
    [[0.75, 0.25], [0.0, 1.0]]
    """
    if not hasattr(load_table, "items"):
        rule = "a mapping of labels to counts"
        cure = "Give {'news': counts, ...}, such as expert_load(model) after each kind"
        raise ConfigError(expected("load_table", rule, type(load_table).__name__, where="group_by_label", cure=cure))
    rows = {label: [float(count) for count in load] for label, load in load_table.items()}
    if len({len(row) for row in rows.values()}) != 1:
        lengths = {label: len(row) for label, row in rows.items()}
        raise ShapeError(expected("load_table", "rows of one length", lengths, where="group_by_label"))
    for row in rows.values():
        load_entropy(row)  # raises where a count is wrong
    ax = axes_or_new(ax, height=1.4 + 0.45 * max(3, len(rows)))
    shares = np.array([np.divide(row, sum(row)) for row in rows.values()])
    most = float(shares.max())
    # These maps are ordered by lightness alone, which any colour vision reads.
    shades = colormaps["cividis" if is_dark(ax) else "Blues"]
    ax.imshow(shares, cmap=shades, vmin=0, vmax=most, aspect="auto")
    for (row_index, group), share in np.ndenumerate(shares):
        number = number_on(shades(share / most))
        ax.text(group, row_index, f"{share:.0%}", ha="center", va="center", color=number)
    ax.set_xticks(range(shares.shape[1]), [str(group) for group in range(shares.shape[1])])
    ax.set_yticks(range(len(rows)), list(rows))
    # Minor ticks lie on the borders of the cells; their grid separates the cells in the colour of the ground.
    ax.set_xticks(np.arange(0.5, shares.shape[1] - 1), minor=True)
    ax.set_yticks(np.arange(0.5, len(rows) - 1), minor=True)
    ax.grid(visible=False, which="major")
    ax.grid(which="minor", color=ax.get_facecolor(), linewidth=2)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="expert group", title="Which group serves what")
    return ax


def routing_map(
    features: Any,
    centroids: Any,
    *,
    center: Array | None = None,
    affinity: Affinity | None = None,
    labels: Sequence[str] | None = None,
    projection: Projection = "pca",
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw features and centroids in two dimensions, each feature in the colour of its group: the paper's Figure 3.

    The figure shows what the router compares: the features without the centre, and for ``"directional"`` scaled to
    length one. Centroids are scaled to the size of the features where the affinity ignores their length.

    Parameters
    ----------
    features : array, shape (n, d), or iterable of mapping or Tensor
        Routing features of samples, at least three; see `tucka.routing_feature`. With a model, batches of its inputs.
    centroids : array, shape (k, t, d), Router or Module
        Of the router; or the router itself, which has the centre and the affinity too; or a model with a TuckA adapter,
        which is run over the batches.
    center : array, shape (d,), optional
        Of the router, for the affinities that have one.
    affinity : {"directional", "centered", "dot", "group_norm"}, optional
        Of the router; ``"directional"`` if None.
    labels : sequence of str, optional
        The kind of each feature (its domain, its class), which its marker shows.
    projection : {"pca", "umap"}
        ``"umap"`` needs the package umap-learn.
    seed : int
        Of UMAP.
    ax : Axes, optional
        Where to draw; a new figure if None.

    Returns
    -------
    Axes
        With a point for each feature, and the number of its group at each centroid.

    Raises
    ------
    ShapeError
        If shapes do not fit, if there are fewer than three features, or not as many labels as features.
    ConfigError
        If an option is unknown, if a centre is given to an affinity without one, or if not one router sees the batches.
    RouteError
        If the model's active adapter has no router.
    ArrayError
        If the arrays differ in backend or dtype.
    ImportError
        If the package for ``"umap"`` is missing.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> features, centroids = rng.normal(size=(50, 4)), rng.normal(size=(3, 2, 4))
    >>> axes = routing_map(features, centroids, labels=["news", "tweets"] * 25)
    >>> [text.get_text() for text in axes.texts]
    ['0', '0', '1', '1', '2', '2']
    """
    where = "routing_map"
    check_choice("projection", projection, get_args(Projection), where=where)
    if hasattr(centroids, "named_modules") and not hasattr(centroids, "centroids"):  # a model; its packages are there
        inspection = importlib.import_module("tucka.peft.routes.inspection")
        features, centroids = inspection.seen_by_router(centroids, features, where=where)
    elif hasattr(features, "named_modules"):
        rule, cure = "batches of a model's inputs", "Give the model after them: routing_map(batches, model)"
        raise ConfigError(expected("features", rule, type(features).__name__, where=where, cure=cure))
    router = centroids if hasattr(centroids, "centroids") else None
    if router is not None:
        centroids, affinity = detach(router.centroids), affinity or router.spec.affinity
        center = router.center if center is None and router.spec.has_center else center
    affinity = affinity or "directional"
    arrays = {"features": features, "centroids": centroids, **({} if center is None else {"center": center})}
    backend_of(**arrays)
    axes = {"features": "n d", "centroids": "k t d", "center": "d"}
    check_shapes(where=where, **{name: (array, axes[name]) for name, array in arrays.items()})
    if features.shape[0] < 3:
        raise ShapeError(expected("features", "at least three rows", features.shape[0], where=where))
    kinds = [""] * features.shape[0] if labels is None else [str(label) for label in labels]
    if len(kinds) != features.shape[0]:
        raise ShapeError(expected("labels", f"{features.shape[0]} labels", len(kinds), where=where))
    logits = host_values(affinity_logits(features, centroids, affinity=affinity, center=center))
    chosen = logits.max(axis=2).argmax(axis=1)
    points, ends = _compared(host_values(features), host_values(centroids), center, affinity)
    flat = _project(points, ends, projection, seed)
    return _draw_map(flat[: len(points)], flat[len(points) :], chosen, kinds, logits.shape[1:], projection, ax)


def _compared(features: _Matrix, centroids: _Matrix, center: Array | None, affinity: str) -> tuple[_Matrix, _Matrix]:
    """Return features (n, d) and centroids (k·t, d) as the affinity compares them, all of one size."""
    points = features if center is None else features - host_values(center)
    ends = centroids.reshape(-1, centroids.shape[-1])
    if affinity in CENTERED or affinity == "group_norm":
        lengths = np.linalg.norm(points, axis=1, keepdims=True)
        points = points / np.where(lengths == 0, 1, lengths) if affinity != "centered" else points
        size = float(np.median(np.linalg.norm(points, axis=1)))
        norms = np.linalg.norm(ends, axis=1, keepdims=True)
        ends = ends / np.where(norms == 0, 1, norms) * size
    return points, ends


def _project(points: _Matrix, ends: _Matrix, projection: str, seed: int) -> _Matrix:
    """Project features and centroids into the plane together, (n + k·t, 2)."""
    if projection == "pca":
        middle = points.mean(axis=0)
        rows = np.linalg.svd(points - middle, full_matrices=False)[2][:2]
        flat = (np.concatenate([points, ends]) - middle) @ rows.T
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
    if importlib.util.find_spec("umap") is None:
        rule, cure = "the package umap-learn", "Run: pip install umap-learn; or use projection='pca'"
        raise ImportError(expected("projection", rule, "none", where="routing_map", cure=cure))
    reducer = importlib.import_module("umap").UMAP(n_components=2, random_state=seed, metric="cosine", n_jobs=1)
    return np.asarray(reducer.fit_transform(np.concatenate([points, ends])))


def _draw_map(
    points: _Matrix,
    ends: _Matrix,
    chosen: _Matrix,
    kinds: list[str],
    shape: tuple[int, ...],
    projection: str,
    ax: Axes | None,
) -> Axes:
    groups, experts = shape
    ax = axes_or_new(ax, width=5.6, height=4.4)
    size = float(np.clip(12000 / len(points), 7, 40))
    names = list(dict.fromkeys(kinds))
    for place, name in enumerate(names):
        here = np.array([kind == name for kind in kinds])
        shades = [colour(group, ax) for group in chosen[here]]
        ax.scatter(points[here, 0], points[here, 1], s=size, c=shades, marker=marker(place), alpha=0.7, linewidths=0)
    edge = "white" if is_dark(ax) else "black"
    for row, (x, y) in enumerate(ends):
        group = row // experts
        ax.scatter(x, y, s=190, color=colour(group, ax), marker="o", edgecolors=edge, linewidths=1.4, zorder=3)
        number = number_on(colour(group, ax))
        ax.text(x, y, str(group), ha="center", va="center", color=number, fontsize=9, fontweight="bold", zorder=4)
    if labels_shown := [name for name in names if name]:
        handles = [
            ax.scatter([], [], s=28, marker=marker(names.index(name)), color=muted(ax), label=name)
            for name in labels_shown
        ]
        ax.legend(handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    entropy = load_entropy(np.bincount(chosen, minlength=groups).tolist())
    axis = "principal axis" if projection == "pca" else "UMAP axis"
    ax.set(
        xlabel=f"first {axis}", ylabel=f"second {axis}", title=f"Features and centroids (load entropy {entropy:.2f})"
    )
    ax.set_xticks([])
    ax.set_yticks([])
    ax.margins(0.06)
    open_frame(ax)
    return ax
