"""Experiments as data: one small file for each method and setting, in the folder beside this file."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "experiments"
KINDS = ("features", "adapter", "words")
# What `TuckAConfig` did by default when the first results were made: their keys are hashes without it.
_FIRST = {"routing": "batch", "factor_norm": None}
_KEYS = {"label", "kind", "adapter", "learning_rates", "config", "parts", "evaluations"}


@dataclass(frozen=True)
class Experiment:
    """One method in one setting."""

    name: str  # of the file
    label: str  # for tables
    kind: str = "adapter"  # "features": a head on frozen features; "words": TF-IDF with logistic regression
    adapter: str = ""  # the configuration class: one of PEFT's, or TuckAConfig
    learning_rates: tuple[float, ...] = (0.0,)  # those that are tried; as many for every method
    config: dict[str, Any] = field(default_factory=dict)  # arguments of the configuration class
    # Factors of the learning rate of parameters, by a part of their name.
    parts: dict[str, float] = field(default_factory=dict)
    evaluations: int = 0  # how many times the validation accuracy is taken while training, for curves

    @property
    def key(self) -> str:
        """A short hash of all that changes the outcome of a run, so that an edited file is another experiment."""
        config = dict(self.config)
        if self.adapter == "TuckAConfig":
            config = {"routing": None, "factor_norm": "rotation", **config}
            config = {name: value for name, value in config.items() if name not in _FIRST or value != _FIRST[name]}
        decisive = [self.kind, self.adapter, config, self.parts]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


def read(path: Path) -> Experiment:
    """Read one file."""
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
        # TOML has no null, so the text "none" stands for it.
        config={name: None if value == "none" else value for name, value in table.get("config", {}).items()},
        parts=table.get("parts", {}),
        evaluations=table.get("evaluations", 0),
    )


def read_all(names: list[str] | None = None, folder: Path = FOLDER) -> list[Experiment]:
    """Read the named files, or all of them, in the order of their names."""
    found = {path.stem: path for path in sorted(folder.glob("**/*.toml"))}
    if missing := set(names or ()) - found.keys():
        msg = f"experiments: expected some of {sorted(found)}, got {sorted(missing)}"
        raise ValueError(msg)
    return [read(found[name]) for name in (names or found)]
