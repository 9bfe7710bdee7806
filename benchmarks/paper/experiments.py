"""The paper's experiments as data: one file for each table, and one that says how TuckA's rows are run."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from tucka.core.counts.paper_tables import PaperCell, paper_counts
from tucka.errors import ConfigError, expected

FOLDER = Path(__file__).parent / "experiments"
T = TypeVar("T")
TABLES = ("table1", "table2", "table3")


@dataclass(frozen=True)
class Model:
    """A pretrained model of the hub, and which of its layers are adapted."""

    name: str  # of the hub, or a folder
    targets: Sequence[str]  # endings of the adapted layers' names
    # A name in `tucka.core.counts.paper_tables.MODEL_LAYERS`: the adapted layers must be those. None: not checked.
    layers: str | None = None
    head: Sequence[str] = ()  # modules that are trained whole
    dtype: str = "float32"  # of the frozen weights


@dataclass(frozen=True)
class Training:
    """How every row of a table is trained, with AdamW."""

    epochs: int
    batch_size: int  # of one device
    learning_rate: float
    weight_decay: float
    schedule: str  # of the learning rate, after the warm-up
    warmup: float  # steps of the warm-up; below 1, their share of all steps
    accumulation: int = 1  # batches in a step
    evaluate_every: int | None = None  # steps between evaluations
    save_every: int | None = None  # steps between checkpoints, where a folder for them is given
    max_steps: int = -1  # steps; -1: no limit


@dataclass(frozen=True)
class Task:
    """One training set with its evaluation."""

    name: str  # its key in the file
    metric: str  # chooses the best evaluation
    training: Training  # the table's, with the task's own changes
    data: Mapping[str, Any]  # arguments of the data's class in the module of the table's kind


@dataclass(frozen=True)
class Variant:
    """How a row of TuckA is run."""

    name: str  # its key in the file
    title: str
    config: Mapping[str, Any]  # options of `TuckAConfig`, sizes and scale apart
    pads_to_max_length: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table."""

    name: str  # its key in the file
    method: str  # a name that `tucka.count_parameters` knows
    sizes: Mapping[str, int]  # of `tucka.count_parameters`
    paper: Sequence[float]  # the paper's figures, in the order of the table's columns
    options: Mapping[str, Any] = field(default_factory=dict)  # further options of PEFT's configuration

    @property
    def title(self) -> str:
        """The method with its sizes, without those that the paper's tables leave out."""
        names = {"lora": "LoRA", "dora": "DoRA", "vera": "VeRA", "hra": "HRA", "tucka": "TuckA"}
        shown = {"block_size": "b"}
        sizes = [f"{shown.get(name, name)}={size}" for name, size in self.sizes.items() if name not in "tp"]
        return f"{names.get(self.method, self.method.upper())} {' '.join(sizes)}"


@dataclass(frozen=True)
class Column:
    """A column of figures."""

    title: str
    measure: str  # a metric, in per cent; "average" of all metrics of the table; "peak_memory", in MB
    task: str | None = None  # whose results it shows

    @property
    def is_metric(self) -> bool:
        """Whether it shows a metric of a task."""
        return self.measure not in ("average", "peak_memory")


@dataclass(frozen=True)
class Experiment:
    """A table of the paper."""

    name: str  # of the file
    table: int  # the paper's number
    kind: str  # the module that loads data and model: "text", "images" or "mathematics"
    model: Model
    perturbation: float  # a of Eq. (10)
    alpha: Mapping[str, float]  # α by variant; a variant that is not named takes `TuckAConfig`'s
    tasks: Mapping[str, Task]
    rows: Mapping[str, Row]
    columns: Sequence[Column]  # in the paper's order

    def count(self, row: Row) -> PaperCell:
        """Return the row's cell of the column "# Par.", which `tucka.core.counts.paper_tables` holds."""
        cells = (cell for cell in paper_counts() if (cell.table, cell.method) == (self.table, row.method))
        wanted = dict(row.sizes)
        return next(cell for cell in cells if {name: cell.sizes[name] for name in wanted} == wanted)


def _made(cls: type[T], entries: Mapping[str, Any], where: str) -> T:
    """Make one of the classes above from entries of a file."""
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
    """Read the file of a table, one of `TABLES`."""
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
