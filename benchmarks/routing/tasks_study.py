"""Train one encoder on several tasks with one adapter or with several, and add a task later.

python -m benchmarks.routing.tasks_study run four --seeds 3       # four tasks, a head for each
python -m benchmarks.routing.tasks_study run opposite --seeds 3   # two opposite policies, one head for both
python -m benchmarks.routing.tasks_study run later --seeds 3      # three of the four tasks first, then the last
python -m benchmarks.routing.tasks_study report

``run`` appends a line to ``benchmarks/results/routing-tasks.jsonl`` for each finished training and skips those that are
there, so it can be stopped and called again. Each method's learning rate is the one that is best on validation texts
with the first seed. ``report`` makes the tables from that file alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch

from benchmarks.provenance import provenance
from benchmarks.quality.problem import Sizes
from benchmarks.routing.tasks import (
    FOUR,
    METHODS,
    OPPOSITE,
    SIZES,
    Learner,
    accuracy,
    parameters_of,
    start_router,
    texts_of,
    train,
)
from benchmarks.routing.tasks_report import Row, best_rate, write_report
from tucka.peft import add_group

RESULTS = Path(__file__).parents[1] / "results" / "routing-tasks.jsonl"
HEAD_RATE = 3e-3  # of the heads beside an adapter, the same for every method
RATES, HEAD_RATES, CORE_RATES = (3e-3, 6e-3), (3e-3, 1e-2), (0.03, 0.1, 0.3)

SETS = {
    "four": (FOUR, tuple(METHODS)),
    "opposite": (OPPOSITE, ("lora_r8", "loras_r8", "tucka_one", "tucka_given", "tucka_given_apart")),
}
# How a trained method takes one more task, with the rates to try: "head" trains its head alone, "adapter" the old
# adapter too, "core" a core that `add_group` adds, "mean core" the same from the mean of the others.
LATER = {
    "lora_r8": {"head": HEAD_RATES, "adapter": RATES},
    "tucka_given": {"core": CORE_RATES, "mean core": CORE_RATES},
}
LATER_TASKS = ("five stars",)


def rates_of(method: str) -> tuple[float, ...]:
    return HEAD_RATES if METHODS[method].kind == "head" else RATES


def fit(method: str, tasks: Sequence[str], rate: float, seed: int, sizes: Sizes) -> Learner:
    """Train a method on tasks from the start."""
    learner = Learner(METHODS[method], tasks, seed)
    if METHODS[method].config.get("routing") == "sample":
        start_router(learner, tasks, sizes)
    head_rate = rate if METHODS[method].kind == "head" else HEAD_RATE
    groups = [{"params": learner.adapters(), "lr": rate}, {"params": list(learner.heads.parameters()), "lr": head_rate}]
    train(learner, tasks, [group for group in groups if group["params"]], sizes=sizes, seed=seed)
    return learner


def together(method: str, tasks: Sequence[str], rate: float, seed: int, sizes: Sizes = SIZES) -> Row:
    """Train a method on all tasks, in one model or in one for each task."""
    found: Row = {"parameters": 0, "test": {}, "validation": {}}
    for own in [[task] for task in tasks] if METHODS[method].is_apart else [list(tasks)]:
        learner = fit(method, own, rate, seed, sizes)
        found["parameters"] += parameters_of(learner)
        for part in ("validation", "test"):
            found[part] |= {task: accuracy(learner, task, getattr(texts_of(task, sizes), part)) for task in own}
    return found


def added(method: str, last: str, rate: float, seed: int, sizes: Sizes = SIZES) -> Row:
    """Train a method on the other tasks, then on the last one alone, and look at all of them again."""
    first = [task for task in FOUR if task != last]
    learner = fit(method, first, rate, seed, sizes)
    found: Row = {"before": {task: accuracy(learner, task, texts_of(task, sizes).test) for task in first}, "ways": {}}
    for way, rates in LATER[method].items():
        tries = []
        for second in rates:
            later = copy.deepcopy(learner)
            later.add_head(last)
            parts = parts_to_train(later, last, way)
            own = [{"params": parts, "lr": second}] if parts else []
            head = {"params": list(later.heads[last].parameters()), "lr": HEAD_RATE if parts else second}
            train(later, [last], [head, *own], sizes=sizes, seed=seed)
            tries.append((accuracy(later, last, texts_of(last, sizes).validation), second, later))
        _, second, later = max(tries, key=lambda one: one[:2])
        trained = sum(part.numel() // (len(part) if "core" in way else 1) for part in parts_of(later, way))
        after = {task: accuracy(later, task, texts_of(task, sizes).test) for task in FOUR}
        found["ways"][way] = {"rate": second, "parameters": trained, "after": after}
    return found


def parts_to_train(later: Learner, last: str, way: str) -> list[torch.nn.Parameter]:
    """Add what the last task needs beside its head, and freeze all that does not train."""
    if "core" in way:
        add_group(later.encoder, name=last)
    parts = parts_of(later, way)
    if way == "mean core":
        with torch.no_grad():
            for cores in parts:
                cores[-1] = cores[:-1].mean(dim=0)
    later.encoder.requires_grad_(False)
    for part in parts:
        part.requires_grad_(True)
    return parts


def parts_of(later: Learner, way: str) -> list[torch.nn.Parameter]:
    if "core" in way:
        # The other groups' cores are part of these parameters. Their gradients are zero, so they stay.
        return [parameter for name, parameter in later.encoder.named_parameters() if name.endswith("cores")]
    return [] if way == "head" else later.adapters()


Job = tuple[str, str, float, int]  # the set or "later: TASK", method, rate and seed


def key_of(job: Job) -> str:
    return json.dumps(job)


def jobs(name: str, seeds: int, rows: Sequence[Row], only: Sequence[str] | None) -> Iterator[Job]:
    """Yield the trainings of a set in order, those whose rate is known; `rows` grows as they are done."""
    chosen = LATER if name == "later" else SETS[name][1]
    methods = [method for method in chosen if only is None or method in only]
    for seed in range(seeds):
        for method in methods:
            if name == "later":
                rate = best_rate(rows, "four", method)
                yield from ((f"later: {task}", method, rate, seed) for task in LATER_TASKS)
            elif seed == 0:
                yield from ((name, method, rate, 0) for rate in rates_of(method))
            else:
                yield name, method, best_rate(rows, name, method), seed


def run(name: str, *, seeds: int, only: Sequence[str] | None = None, path: Path = RESULTS) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    done = {row["key"] for row in rows}
    for job in jobs(name, seeds, rows, only):
        if key_of(job) in done:
            continue
        started = time.process_time()
        part, method, rate, seed = job
        if name == "later":
            found = added(method, part.removeprefix("later: "), rate, seed)
            said = {way: round(fmean(values["after"].values()), 4) for way, values in found["ways"].items()}
        else:
            found = together(method, SETS[name][0], rate, seed)
            said = round(fmean(found["test"].values()), 4)
        named = {"key": key_of(job), "set": part, "method": method, "rate": rate, "seed": seed}
        seconds = round(time.process_time() - started, 1)
        more = {"sizes": vars(SIZES), "seconds": seconds, **provenance(("torch", "transformers", "peft"))}
        rows.append(named | found | more)
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(*job, said, f"{seconds} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    running = actions.add_parser("run")
    running.add_argument("set", choices=[*SETS, "later"])
    running.add_argument("--seeds", type=int, default=3)
    running.add_argument("--only", nargs="+", choices=list(METHODS), metavar="METHOD")
    actions.add_parser("report")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.action == "run":
        run(options.set, seeds=options.seeds, only=options.only)
    else:
        print(write_report(RESULTS))


if __name__ == "__main__":
    main()
