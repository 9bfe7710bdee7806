"""Run experiments on tasks, each run in a process of its own, and keep every finished one.

    python -m benchmarks.quality.run --tasks sentences --seeds 0 1 2 --jobs 2

    python -m benchmarks.quality.run --tasks reviews --experiments lora_r8 tucka_r8 --rates 1e-3 4e-3 --seeds 0 1 2

The first seed tries every learning rate of an experiment; the others run with the one that did best on the validation
part. With ``--rates``, every seed runs with every one of these. A run that is already in the results is not run again,
so an interrupted command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.quality.experiments import FOLDER, Experiment, read_all

RESULTS = Path(__file__).parents[1] / "results" / "quality"
PACKAGES = ("numpy", "peft", "torch", "transformers", "tucka")


@dataclass(frozen=True)
class Run:
    """One training: what is trained on what, with which learning rate and seed."""

    task: str
    scale: str
    experiment: Experiment
    learning_rate: float
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies a run among the finished ones."""
        return (self.task, self.scale, self.experiment.name, self.experiment.key, self.learning_rate, self.seed)


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("task", "scale", "experiment", "key", "learning_rate", "seed"))


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read all finished runs; a line that an interruption cut off counts as not run."""
    records = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def append(folder: Path, record: dict[str, Any]) -> None:
    """Add one finished run to its task's file, in one write."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['task']}.jsonl"
    cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(record) + "\n")


def score(record: dict[str, Any], part: str) -> float:
    """Return the mean accuracy over a task's parts."""
    return fmean(record[part].values())


def best_rate(records: Sequence[dict[str, Any]]) -> float:
    """Choose the learning rate by the validation part; of equal ones, the smaller."""
    return max(records, key=lambda record: (score(record, "validation"), -record["learning_rate"]))["learning_rate"]


def perform(run: Run, threads: int) -> dict[str, Any]:
    """Do one run; called in a fresh process."""
    import torch

    from benchmarks.quality.tasks import TASKS
    from benchmarks.quality.training import Unsupported, run_adapter, run_words

    torch.set_num_threads(threads)
    task = TASKS[run.task]()
    sizes = getattr(task, run.scale)
    problem = task.load(sizes)
    on_cuda = torch.cuda.is_available()
    record: dict[str, Any] = {
        "task": run.task,
        "title": task.title,
        "scale": run.scale,
        "experiment": run.experiment.name,
        "key": run.experiment.key,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "sizes": asdict(sizes),
        "threads": threads,
        **provenance(PACKAGES),
    }
    try:
        if run.experiment.kind == "words":
            record |= run_words(problem)
        else:
            record |= run_adapter(
                run.experiment,
                problem,
                sizes,
                learning_rate=run.learning_rate,
                head_rate=task.head_rate,
                seed=run.seed,
            )
    except Unsupported as reason:
        record["unsupported"] = str(reason)
    peak = torch.cuda.max_memory_allocated() if on_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return record | {"peak_memory_bytes": peak}


class Plan:
    """Which runs remain, given those that are finished."""

    def __init__(
        self,
        tasks: Sequence[str],
        scale: str,
        experiments: Sequence[Experiment],
        seeds: Sequence[int],
        rates: Sequence[float] = (),
    ) -> None:
        self._cells = [(task, experiment) for task in tasks for experiment in experiments]
        self._scale = scale
        self._seeds = seeds
        self._rates = rates  # with which every seed runs, instead of the experiment's

    def runs(self, records: Sequence[dict[str, Any]]) -> Iterator[Run]:
        """Yield the runs that can start now; the later seeds of an experiment wait for its search."""
        finished = {key_of(record): record for record in records}
        if self._rates:
            cells = [(seed, *cell, rate) for seed in self._seeds for cell in self._cells for rate in self._rates]
            grid = (Run(task, self._scale, experiment, rate, seed) for seed, task, experiment, rate in cells)
            yield from (run for run in grid if run.key not in finished)
            return
        for task, experiment in self._cells:
            search = [Run(task, self._scale, experiment, rate, self._seeds[0]) for rate in experiment.learning_rates]
            yield from (run for run in search if run.key not in finished)
            found = [finished[run.key] for run in search if run.key in finished]
            if len(found) < len(search) or any("unsupported" in record for record in found):
                continue
            later = [
                Run(task, self._scale, experiment, best_rate(found), seed)
                for seed in self._seeds[1:]
                if experiment.kind != "words"
            ]
            yield from (run for run in later if run.key not in finished)


def execute(plan: Plan, folder: Path, *, jobs: int, threads: int) -> int:
    """Do all that remains, several runs at a time; return how many failed."""
    from tqdm import tqdm

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["benchmarks.quality.training"])
    running: dict[Future[dict[str, Any]], Run] = {}
    failed: set[tuple[Any, ...]] = set()
    with ProcessPoolExecutor(jobs, mp_context=server, max_tasks_per_child=1) as pool, tqdm(unit="run") as bar:
        while True:
            busy = failed | {run.key for run in running.values()}
            ready = [run for run in plan.runs(read_results(folder)) if run.key not in busy]
            bar.total = bar.n + len(running) + len(ready)
            for run in ready[: jobs - len(running)]:
                running[pool.submit(perform, run, threads)] = run
            if not running:
                return len(failed)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                bar.update()
                if (error := future.exception()) is None:
                    append(folder, future.result())
                    tqdm.write(_line(run, future.result()))
                else:
                    failed.add(run.key)
                    tqdm.write(f"{run.task} {run.experiment.label}: {type(error).__name__}: {error}")


def _line(run: Run, record: dict[str, Any]) -> str:
    start = f"{run.task} {run.experiment.label} lr={run.learning_rate:g} seed={run.seed}"
    if "unsupported" in record:
        return f"{start}: not supported: {record['unsupported']}"
    found, chosen_on = score(record, "test"), score(record, "validation")
    return f"{start}: {found:.4f} (validation {chosen_on:.4f}), {record['seconds']:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["sentences", "reviews", "images", "causal"])
    parser.add_argument("--experiments", nargs="+", help="names of files; all of the folder if left out")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the experiments' files are")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="learning rates that every seed runs with")
    parser.add_argument("--full", action="store_true", help="the sizes for a machine with a GPU")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--results", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(chosen.threads))
    plan = Plan(
        chosen.tasks,
        "full" if chosen.full else "quick",
        read_all(chosen.experiments, chosen.folder),
        chosen.seeds,
        chosen.rates,
    )
    return execute(plan, chosen.results, jobs=chosen.jobs, threads=chosen.threads)


if __name__ == "__main__":
    raise SystemExit(main())
