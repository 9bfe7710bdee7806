"""Run the paper's experiments: the tables' rows on the tables' tasks.

    python -m benchmarks.paper.run table1 --tasks cola --rows lora-r8 tucka-r2-k4 --seeds 0 1 2

needs the hub's models and data, and a GPU to finish in reasonable time. ``--smoke`` trains a few steps of the same
configuration on tiny local stand-ins instead, anywhere, and keeps no result. A run that has a result is not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
from accelerate import PartialState

from benchmarks.paper.experiments import TABLES, Experiment, read_experiment, read_variants
from benchmarks.paper.results import RESULTS, path_of, record, write
from benchmarks.paper.standins import stand_in
from benchmarks.paper.training import Run, perform
from tucka.errors import ConfigError, expected


def chosen(name: str, known: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """Return the wanted names, all of which must be known, or all that there are."""
    for value in wanted or ():
        if value not in known:
            raise ConfigError(expected(name, f"some of {', '.join(known)}", value))
    return list(wanted or known)


def planned(experiment: Experiment, options: argparse.Namespace) -> Iterator[Run]:
    """Yield the runs that the options ask for."""
    variants = read_variants()
    tasks = chosen("--tasks", list(experiment.tasks), options.tasks)
    rows = chosen("--rows", list(experiment.rows), options.rows)
    hows = [variants[name] for name in chosen("--variants", list(variants), options.variants)]
    for seed in options.seeds:
        for task in (experiment.tasks[name] for name in tasks):
            rate = task.training.learning_rate if options.learning_rate is None else options.learning_rate
            for row in (experiment.rows[name] for name in rows):
                for variant in hows if row.method == "tucka" else [None]:
                    yield Run(experiment, task, row, variant, seed, rate)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=TABLES)
    parser.add_argument("--tasks", nargs="+", help="all of the table if left out")
    parser.add_argument("--rows", nargs="+", help="all of the table if left out")
    parser.add_argument("--variants", nargs="+", help="how rows of TuckA are run; all ways if left out")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--learning-rate", type=float, help="instead of the table's")
    parser.add_argument("--checkpoints", type=Path, help="where unfinished long runs are kept, to go on from")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="a few steps on tiny stand-ins; prints, keeps nothing")
    return parser.parse_args(argv)


def smoke(experiment: Experiment, options: argparse.Namespace) -> None:
    """Run stand-ins of an experiment and print each result but its log."""
    with tempfile.TemporaryDirectory(prefix="tucka-") as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"  # leave nothing of stand-ins behind
        for run in planned(stand_in(experiment, Path(folder)), options):
            result = record(run, perform(run), smoke=True)
            del result["log"]
            PartialState().print(json.dumps(result), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments(argv)
    experiment = read_experiment(options.experiment)
    if options.smoke:
        smoke(experiment, options)
        return
    for run in planned(experiment, options):
        path = path_of(run, options.results)
        if path.exists():
            continue
        checkpoints = options.checkpoints and options.checkpoints / experiment.name / run.name
        outcome = perform(run, checkpoints)
        if PartialState().is_main_process:
            write(record(run, outcome, smoke=False), path)
            print(path, flush=True)
        PartialState().wait_for_everyone()


if __name__ == "__main__":
    main()
