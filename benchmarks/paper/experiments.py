"""The paper's experiments as data: one file for each table, and one that says how TuckA's rows are run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from tucka.core.counts.paper_tables import PaperCell, paper_counts
from tucka.errors import ConfigError, expected

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "experiments"
T = TypeVar("T")
TABLES = ("table1", "table2", "table3")


@dataclass(frozen=True)
class Model:
    """A pretrained model of the hub, and which of its layers are adapted.

    Parameters
    ----------
    name : str
        Of the hub, or a folder.
    targets : sequence of str
        Endings of the adapted layers' names.
    layers : str, optional
        A name in `tucka.core.counts.paper_tables.MODEL_LAYERS`: the adapted layers have to be those. None: not checked.
    head : sequence of str
        Modules that are trained whole.
    dtype : str
        Of the frozen weights.
    """

    name: str
    targets: Sequence[str]
    layers: str | None = None
    head: Sequence[str] = ()
    dtype: str = "float32"


@dataclass(frozen=True)
class Training:
    """How every row of a table is trained.

    Parameters
    ----------
    epochs, batch_size : int
        Passes over the data, and examples in a batch of one device.
    learning_rate, weight_decay : float
        Of AdamW.
    schedule : str
        Of the learning rate, after the warm-up.
    warmup : float
        Steps of the warm-up; below 1, their share of all steps.
    accumulation : int
        Batches to a step.
    evaluate_every, save_every : int, optional
        Steps between evaluations, and between checkpoints where a folder for them is given.
    max_steps : int
        Ends the training early; never if -1.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    schedule: str
    warmup: float
    accumulation: int = 1
    evaluate_every: int | None = None
    save_every: int | None = None
    max_steps: int = -1


@dataclass(frozen=True)
class Task:
    """One training set with its evaluation.

    Parameters
    ----------
    name : str
        Its key in the file.
    metric : str
        Chooses the best evaluation.
    training : Training
        The table's, with the task's own changes.
    data : mapping
        Arguments of the data's class in the module of the table's kind.
    """

    name: str
    metric: str
    training: Training
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Variant:
    """How a row of TuckA is run.

    Parameters
    ----------
    name : str
        Its key in the file.
    title : str
        For people.
    config : mapping
        Options of `TuckAConfig`, sizes and scale apart.
    pads_to_max_length : bool
        Whether every text is padded to the full length.
    """

    name: str
    title: str
    config: Mapping[str, Any]
    pads_to_max_length: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Parameters
    ----------
    name : str
        Its key in the file.
    method : str
        A name that `tucka.count_parameters` knows.
    sizes : mapping
        That function's sizes.
    paper : sequence of float
        The paper's figures, in the order of the table's columns.
    options : mapping
        Further options of PEFT's configuration.
    """

    name: str
    method: str
    sizes: Mapping[str, int]
    paper: Sequence[float]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The method with its sizes, without those that the paper's tables leave out."""
        names = {"lora": "LoRA", "dora": "DoRA", "vera": "VeRA", "hra": "HRA", "tucka": "TuckA"}
        shown = {"block_size": "b"}
        sizes = [f"{shown.get(name, name)}={size}" for name, size in self.sizes.items() if name not in "tp"]
        return f"{names.get(self.method, self.method.upper())} {' '.join(sizes)}"


@dataclass(frozen=True)
class Column:
    """A column of figures.

    Parameters
    ----------
    title : str
        The paper's.
    measure : str
        A metric, in per cent; ``"average"`` of all metrics of the table; or ``"peak_memory"``, in MB.
    task : str, optional
        Whose results it shows.
    """

    title: str
    measure: str
    task: str | None = None

    @property
    def is_metric(self) -> bool:
        """Whether it shows a metric of a task."""
        return self.measure not in ("average", "peak_memory")


@dataclass(frozen=True)
class Experiment:
    """A table of the paper.

    Parameters
    ----------
    name : str
        The file's.
    table : int
        The paper's number.
    kind : str
        The module that loads data and model: ``"text"``, ``"images"`` or ``"mathematics"``.
    model : Model
        The pretrained one.
    perturbation : float
        a of Eq. (10).
    alpha : mapping of str to float
        α by variant; a variant that is not named takes `TuckAConfig`'s.
    tasks, rows : mapping
        By name.
    columns : sequence of Column
        In the paper's order.
    """

    name: str
    table: int
    kind: str
    model: Model
    perturbation: float
    alpha: Mapping[str, float]
    tasks: Mapping[str, Task]
    rows: Mapping[str, Row]
    columns: Sequence[Column]

    def count(self, row: Row) -> PaperCell:
        """Return the row's cell of the column "# Par.", which `tucka.core.counts.paper_tables` holds."""
        cells = (cell for cell in paper_counts() if (cell.table, cell.method) == (self.table, row.method))
        wanted = dict(row.sizes)
        return next(cell for cell in cells if {name: cell.sizes[name] for name in wanted} == wanted)


def _made(cls: type[T], entries: Mapping[str, Any], where: str) -> T:
    """Make one of the classes above, and say in one line which entry does not belong."""
    known = {item.name for item in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(entries) - known)
    if unknown:
        raise ConfigError(expected("entry", f"one of {', '.join(sorted(known))}", unknown[0], where=where))
    try:
        return cls(**entries)
    except TypeError as error:
        raise ConfigError(expected("entries", "all that are needed", error, where=where)) from error


def read_variants(folder: Path = FOLDER) -> dict[str, Variant]:
    """Read how rows of TuckA are run, by name."""
    entries = tomllib.loads((folder / "variants.toml").read_text("utf-8"))
    return {name: _made(Variant, {"name": name, **values}, f"variants.{name}") for name, values in entries.items()}


def read_experiment(name: str, folder: Path = FOLDER) -> Experiment:
    """Read a table's file.

    Parameters
    ----------
    name : str
        One of `TABLES`.
    folder : Path
        Where the file ``NAME.toml`` is.

    Raises
    ------
    ConfigError
        If there is no such file, it holds an entry of no meaning, lacks one, or a row has not a figure for each column.
    """
    path = folder / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(sorted(other.stem for other in folder.glob("table*.toml")))
        raise ConfigError(expected("experiment", f"one of {known}", name, where=str(folder)))
    entries = tomllib.loads(path.read_text("utf-8"))
    training, data, tucka = entries.pop("training"), entries.pop("data"), entries.pop("tucka")
    tasks = {
        task: Task(
            name=task,
            metric=own["metric"],
            training=_made(Training, training | own.get("training", {}), f"{name}: tasks.{task}"),
            data=data | own.get("data", {}),
        )
        for task, own in entries.pop("tasks").items()
    }
    columns = [
        _made(Column, {"title": title, **values}, f"{name}: columns.{title}")
        for title, values in entries.pop("columns").items()
    ]
    rows = {
        row: _made(Row, {"name": row, **values}, f"{name}: rows.{row}") for row, values in entries.pop("rows").items()
    }
    for row in rows.values():
        if len(row.paper) != len(columns):
            raise ConfigError(expected(f"rows.{row.name}.paper", f"{len(columns)} figures", len(row.paper), where=name))
    model = _made(Model, entries.pop("model"), f"{name}: model")
    return _made(
        Experiment,
        {"name": name, "model": model, "tasks": tasks, "rows": rows, "columns": columns, **tucka, **entries},
        name,
    )
