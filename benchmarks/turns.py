"""Times of several methods in several regimes, taken in turns, and kept in a file from which a run goes on."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

__all__ = ["CLOCKS", "OVER", "Turns", "Work", "warning", "write_again", "write_beside", "write_report"]

LEAST = 3  # rounds of a method that takes long
ENOUGH = 8  # rounds whose medians can be cited
SLOW = 2.0  # seconds of a call that is made once in a turn
CLOCKS = ("wall", "processor")
OVER = len(CLOCKS)  # where in a turn the overheads begin

# Of each regime and method, by the number of the round: the seconds of a call by both clocks, and by how much they
# exceed those of the base.
Times = dict[str, dict[str, dict[str, list[float]]]]


@dataclass(frozen=True)
class Work:
    """What one method does in one regime."""

    run: Callable[[], None]
    clear: Callable[[], None]  # what belongs to no step, and is not timed
    calls: int  # in one turn; with several, one more is run first, unless it is slow

    def timed(self) -> tuple[float, float]:
        """Run once, and return the seconds of both clocks."""
        _wait()
        wall, processor = time.perf_counter(), time.process_time()
        self.run()
        _wait()
        taken = time.perf_counter() - wall, time.process_time() - processor
        self.clear()
        return taken

    def turn(self, base: Work | None = None, *, base_first: bool = True) -> list[float]:
        """Return the medians of both clocks, and of how much they exceed the base's, which runs in between."""
        # The load of a shared machine changes in seconds. A call of the base is next to each call that is compared with
        # it, so most of the load cancels.
        pairs = [self._pair(base, base_first=base_first)]
        if self.calls_after(pairs[0][0][0]):
            pairs = [self._pair(base, base_first=base_first) for _ in range(self.calls)]
        own = [statistics.median(taken[clock] for taken, _ in pairs) for clock in range(len(CLOCKS))]
        over = [
            statistics.median(taken[clock] - other[clock] for taken, other in pairs) for clock in range(len(CLOCKS))
        ]
        return [float(f"{seconds:.6g}") for seconds in (*own, *over)]

    def calls_after(self, first: float) -> int:
        """Tell how many calls follow the first one, which took some seconds; if any do, the first does not count."""
        return self.calls if self.calls > 1 and first < SLOW else 0

    def _pair(self, base: Work | None, *, base_first: bool) -> tuple[tuple[float, float], tuple[float, float]]:
        if base is None:
            return self.timed(), (0.0, 0.0)
        if base_first:
            other = base.timed()
            return self.timed(), other
        return self.timed(), base.timed()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Turns:
    """Times in the making; `about` says of what, and on what. Times about something else do not belong here."""

    def __init__(self, about: dict[str, Any], output: Path | None) -> None:
        self.about = about
        self.times: Times = {}
        self.repeats = 0  # of a complete run that was found
        self.too_large: list[str] = []
        self._output = output
        self._partial = output and output.with_suffix(".partial")
        for path in (self._output, self._partial):
            if path is not None and path.exists():
                kept = json.loads(path.read_text("utf-8"))
                if kept["about"] == about:
                    self.times, self.repeats = kept["times"], kept.get("repeats", 0)
                    print(f"{path}: going on with its times")
                else:
                    print(f"{path}: of other code, options or machines; beginning anew")

    def measure(
        self,
        works: Mapping[str, Mapping[str, Work]],
        repeats: int,
        budget: float,
        *,
        base: str | None = None,
        deadline: float | None = None,
    ) -> None:
        """Time every method of every regime once in each round, beside the one that is the base, and keep the times."""
        # A method that used up its budget of seconds sits rounds out. No round begins that would not end by the
        # deadline, a time of `time.monotonic`. What does not fit a device's memory is left out.
        fitting = self._warm_up(works, repeats, budget, base)
        for number in range(repeats):
            began = time.monotonic()
            for regime, methods in fitting.items():
                # Each round has an order of its own, so that no method always runs after the same one.
                for method in random.Random(number).sample(list(methods), len(methods)):
                    known = self.times.setdefault(regime, {}).setdefault(method, {})
                    spent = sum(turn[0] * (1 + methods[method].calls_after(turn[0])) for turn in known.values())
                    if str(number) not in known and (spent < budget or len(known) < LEAST):
                        beside = methods[base] if base is not None else None
                        known[str(number)] = methods[method].turn(beside, base_first=number % 2 == 0)
                if self._partial is not None:
                    write_report(self._partial, {"about": self.about, "times": self.times})
            self.repeats = number + 1
            took = time.monotonic() - began
            left = took * (repeats - self.repeats)
            print(f"round {self.repeats} of {repeats}; at most {_duration(left)} left", flush=True)
            if deadline is not None and time.monotonic() + took > deadline:
                return

    def _warm_up(
        self, works: Mapping[str, Mapping[str, Work]], repeats: int, budget: float, base: str | None
    ) -> dict[str, dict[str, Work]]:
        """Run everything once, and say how long the measurement takes; return what fits the device's memory."""
        seconds, fitting = 0.0, {}
        for regime, methods in works.items():
            beside = methods[base].timed()[0] if base is not None else 0.0
            fitting[regime] = dict(methods)
            for method, one in methods.items():
                try:
                    took = one.timed()[0]
                except torch.OutOfMemoryError:
                    one.clear()
                    torch.cuda.empty_cache()
                    del fitting[regime][method]
                    self.too_large.append(f"{regime}: {method}")
                    continue
                calls = 1 + one.calls_after(took)
                seconds += min(repeats, max(LEAST, budget / (took * calls))) * (took + beside) * calls
        print(f"{repeats} rounds take about {_duration(seconds)}", flush=True)
        return fitting

    def report(self, **more: Any) -> dict[str, Any]:
        """Return what was measured; write it, and remove what is kept of an unfinished run."""
        load = round(os.getloadavg()[0], 1)  # the mean of the last minute
        report = {"about": self.about, "repeats": self.repeats, "load_average": load, **more}
        report |= {"too_large": self.too_large, "times": self.times}
        if self._output is not None and self._partial is not None:
            write_report(self._output, report)
            self._partial.unlink(missing_ok=True)
        return report


def warning(report: dict[str, Any]) -> str:
    """Warn of a short run, before its tables; empty for one that is long enough."""
    rounds = report["repeats"]
    return f"**A run of {rounds} rounds, to see that it works: its times say little.**\n\n" if rounds < ENOUGH else ""


def write_beside(path: Path, text: Callable[[Any], str], figure: Callable[[Any, Path], None]) -> None:
    """Write the tables and the figure of a result file beside it."""
    report = json.loads(path.read_text("utf-8"))
    path.with_suffix(".md").write_text(text(report), "utf-8")
    figure(report, path.with_suffix(".svg"))


def write_again(about: str, write: Callable[[Path], None]) -> None:
    """Run as a program: write the tables and figures of the result files that are named, and print the tables."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("results", type=Path, nargs="+")
    for path in parser.parse_args().results:
        write(path)
        print(path.with_suffix(".md").read_text("utf-8"))


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report with one line for each of its entries."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}" for name, value in report.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds > 120 else f"{seconds:.0f} seconds"
