"""Experiments as data: one small file for each method and setting, in the folder beside this file."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = Path(__file__).parent / "experiments"
KINDS = ("features", "adapter", "words")
_KEYS = {"label", "kind", "adapter", "learning_rates", "config", "parts", "start", "evaluations"}


@dataclass(frozen=True)
class Experiment:
    """One method in one setting.

    Parameters
    ----------
    name : str
        The file's.
    label : str
        For tables.
    kind : {"features", "adapter", "words"}
        A head on frozen features, an adapter and a head, or TF-IDF with logistic regression.
    adapter : str
        The configuration class: one of PEFT's or ``TuckAConfig``.
    learning_rates : tuple of float
        The search, of the same length for every method.
    config : dict
        Arguments of the configuration class.
    parts : dict of str to float
        Factors of the learning rate for parameters by a part of their name.
    start : str
        Another start of TuckA than the library's, see `benchmarks.quality.starts`.
    evaluations : int
        How many times the validation accuracy is taken while training, for curves.
    """

    name: str
    label: str
    kind: str = "adapter"
    adapter: str = ""
    learning_rates: tuple[float, ...] = (0.0,)
    config: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    start: str = ""
    evaluations: int = 0

    @property
    def key(self) -> str:
        """A short hash of what decides a run's outcome: an edited file is another experiment."""
        decisive = [self.kind, self.adapter, self.config, self.parts]
        decisive += [self.start] if self.start else []
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def read(path: Path) -> Experiment:
    """Read one file.

    Raises
    ------
    ValueError
        If a key is not known or the kind is none of `KINDS`.
    """
    table = tomllib.loads(path.read_text())
    unknown = table.keys() - _KEYS
    if unknown or table.get("kind", "adapter") not in KINDS:
        got = sorted(unknown) or table["kind"]
        msg = f"{path.name}: expected keys of {sorted(_KEYS)} and a kind of {KINDS}, got {got}"
        raise ValueError(msg)
    return Experiment(
        name=path.stem,
        label=table["label"],
        kind=table.get("kind", "adapter"),
        adapter=table.get("adapter", ""),
        learning_rates=tuple(table.get("learning_rates", (0.0,))),
        config=table.get("config", {}),
        parts=table.get("parts", {}),
        start=table.get("start", ""),
        evaluations=table.get("evaluations", 0),
    )


def read_all(names: list[str] | None = None, folder: Path = FOLDER) -> list[Experiment]:
    """Read the named files, or all of them, in the order of their names."""
    found = {path.stem: path for path in sorted(folder.glob("**/*.toml"))}
    if missing := set(names or ()) - found.keys():
        msg = f"experiments: expected some of {sorted(found)}, got {sorted(missing)}"
        raise ValueError(msg)
    return [read(found[name]) for name in (names or found)]
