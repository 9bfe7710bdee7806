"""Times of several methods in several regimes, taken in turns, and kept in a file from which a run goes on."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["Turns", "Work"]

LEAST = 3  # rounds of a slow method
CLOCKS = ("wall", "processor")


@dataclass(frozen=True)
class Work:
    """What one method does in one regime."""

    run: Callable[[], None]
    clear: Callable[[], None]  # what belongs to no step, and is not timed
    calls: int  # in one turn; with several, one more is run first

    def turn(self) -> list[float]:
        """Return the wall and the processor seconds of one call, the median of the turn's."""
        if self.calls > 1:
            self._timed()
        taken = [self._timed() for _ in range(self.calls)]
        return [statistics.median(column) for column in zip(*taken, strict=True)]

    def _timed(self) -> tuple[float, float]:
        _wait()
        wall, processor = time.perf_counter(), time.process_time()
        self.run()
        _wait()
        taken = time.perf_counter() - wall, time.process_time() - processor
        self.clear()
        return taken


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Turns:
    """The times so far: of each regime and method, by the number of the round."""

    about: dict[str, Any]  # what was measured, on what; other times do not belong here
    path: Path | None  # where they are kept between the rounds
    times: dict[str, dict[str, dict[str, list[float]]]]

    @classmethod
    def begun(cls, about: dict[str, Any], path: Path | None) -> Turns:
        """Go on with the times of a file, or begin where there is none or it is about something else."""
        if path is not None and path.exists():
            kept = json.loads(path.read_text("utf-8"))
            if kept["about"] == about:
                print(f"{path}: going on with the times that are there")
                return cls(about, path, kept["times"])
            print(f"{path}: other code, options or machine; beginning again")
        return cls(about, path, {})

    def measure(self, works: Mapping[str, Mapping[str, Work]], repeats: int, budget: float) -> None:
        """Time every method of every regime once in each round; one that used up its seconds sits rounds out."""
        for number in range(repeats):
            began = time.monotonic()
            for regime, methods in works.items():
                # Each round has an order of its own, so that no method always runs after the same one.
                for method in random.Random(number).sample(list(methods), len(methods)):
                    known = self.times.setdefault(regime, {}).setdefault(method, {})
                    spent = sum(pair[0] for pair in known.values()) * methods[method].calls
                    if str(number) not in known and (spent < budget or len(known) < LEAST):
                        known[str(number)] = methods[method].turn()
            self._keep()
            left = (time.monotonic() - began) * (repeats - number - 1)
            print(f"round {number + 1} of {repeats}; at most {_minutes(left)} left", flush=True)

    def _keep(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({"about": self.about, "times": self.times}), "utf-8")

    def forget(self) -> None:
        """Remove the file: the run is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
