"""What the committed results of the benchmarks say, for tests of the sentences that quote them."""

import json
import math
import re
from functools import cache
from pathlib import Path
from statistics import fmean

from benchmarks import growth_report, report
from benchmarks.quality import capacity as capacity_report
from benchmarks.quality import report as quality_report
from benchmarks.quality import studies_report, windows
from benchmarks.quality.experiments import read_all
from benchmarks.quality.run import read_results, score
from benchmarks.routing import study_report

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def in_words(number):
    return NUMBERS[round(number)]


@cache
def records():
    """Every finished training of the comparison of methods."""
    return read_results(RESULTS / "quality")


@cache
def quality():
    """The rows of the tables of methods and of the studies, by task and by the name of the experiment's file."""
    found = {}
    studies = [read_all(None, folder) for folder in sorted(studies_report.STUDIES.iterdir())]
    for record in records():
        found.setdefault(record["task"], []).append(record)
    return {
        task: {
            row.experiment.name: row
            for each in (*studies, read_all(None))
            for row in quality_report.rows(made, each)[0]
        }
        for task, made in found.items()
    }


@cache
def study(name, task):
    """The rows of one study; names are unique within it."""
    made = [record for record in records() if record["task"] == task]
    return {
        row.experiment.name: row for row in quality_report.rows(made, read_all(None, studies_report.STUDIES / name))[0]
    }


def capacity(task):
    """The rows of a task where capacity decides."""
    return study("capacity", task)


def at_rate(task, name, rate):
    """The test accuracy of the first seed at a learning rate, where capacity decides."""
    wanted = task, name, capacity(task)[name].experiment.key, rate, 0
    (found,) = (
        score(record, "test")
        for record in records()
        if tuple(record[each] for each in ("task", "experiment", "key", "learning_rate", "seed")) == wanted
    )
    return found


def gap(task, name):
    """Points by which an adapter is below LoRA with as many parameters."""
    made = capacity(task)
    return -100 * capacity_report.against(made[name], capacity_report.curve(list(made.values())))[0]


def gaps(name):
    return [gap(task, name) for task in capacity_report.TASKS]


def ahead_of(task, name, other):
    """Points by which the mean of one adapter is above that of another."""
    return 100 * (capacity(task)[name].mean - capacity(task)[other].mean)


def ablation(task, change):
    """Points that a change of the defaults gains."""
    made = study("ablation", task)
    return 100 * made[change].against(made[studies_report.DEFAULTS])[0]


@cache
def on_texts(name):
    """A method's line of the table of both tasks: accuracy, and the difference to LoRA with its error, in points."""
    texts = {task: list(quality()[task].values()) for task in quality_report.TEXTS}
    label = quality()["reviews"][name].experiment.label
    for line in quality_report.overall(texts).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == label:
            change = [float(part) for part in cells[3].split(" ± ")] if cells[3] else [0.0, 0.0]
            return float(cells[2].rstrip("%")), *change
    raise LookupError(f"{label} is not in the table of both tasks")


def ahead(name):
    _, change, error = on_texts(name)
    return f"{change:.2f} ± {error:.2f}"


def against_lora(task, name):
    """Points above LoRA of rank 8, and their error."""
    change, error = quality()[task][name].against(quality()[task]["lora_r8"])
    return 100 * change, math.nan if error is None else 100 * error


def below(task, name, sign=-1):
    change, error = against_lora(task, name)
    return f"{sign * change:.2f} ± {error:.2f}"


def share(task, name):
    return quality()[task][name].parameters / quality()[task]["lora_r8"].parameters


def accuracy(task, name):
    return 100 * quality()[task][name].mean


def rate_of(task, name):
    return quality()[task][name].runs[0]["learning_rate"]


def steps_of(task, name):
    return max(entry["step"] for entry in quality()[task][name].runs[0]["log"] if "step" in entry)


def sizes_of(task):
    return quality()[task]["lora_r8"].runs[0]["sizes"]


def seconds(task, name):
    return fmean(record["seconds"] for record in quality()[task][name].runs)


def experts_of_ranks_from_two(task):
    made = quality()[task].items()
    names = [name for name, _ in made if re.match(r"(lora_r[48]|tucka)", name) and "authors" not in name]
    return [accuracy(task, name) for name in names]


@cache
def window(task, name):
    (experiment,) = read_all([name])
    made = [record for record in records() if (record["task"], record["scale"]) == (task, "quick")]
    return windows.windows(made, [experiment])[0]


def windows_of_both():
    """The windows within three points of LoRA and of TuckA's default, on the three tasks of learning rates."""
    tasks = ("causal", "reviews", "sentences")
    return [window(task, name).ends(0.03) for name in ("lora_r8", "tucka_r8") for task in tasks]


def both(task, within):
    return [window(task, name).ends(within) for name in ("lora_r8", "tucka_r8")]


def near_lora(task, within):
    """Where LoRA and TuckA's default are at most so much below the accuracy that LoRA has at its best."""
    peer = window(task, "lora_r8")
    return [window(task, name).reaching(peer.means[peer.best] - within) for name in ("lora_r8", "tucka_r8")]


def over_lora(task, rate):
    """By how much TuckA is above LoRA at one rate."""
    return window(task, "tucka_r8").means[rate] - window(task, "lora_r8").means[rate]


@cache
def movement():
    runs = json.loads((RESULTS / "quality/movement.json").read_text())["runs"]
    return {(run["method"], run["learning_rate"]): run for run in runs}


def moved(method, rate):
    return movement()[method, rate]["seen"][-1]["median"]


def times_loras(method):
    return sorted(moved(method, rate) / moved("LoRA r=8", rate) for rate in (1e-3, 4e-3))


def gains(model):
    rows = re.findall(
        rf"^\| {model} \|[^|]*\| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|$", (RESULTS / "quality/gains.md").read_text(), re.M
    )
    return min(float(least) for least, _ in rows), max(float(most) for _, most in rows)


@cache
def tasks():
    return [json.loads(line) for line in (RESULTS / "routing-tasks.jsonl").read_text().splitlines()]


def task_table(title, row):
    """A line of a table of several tasks, by the names of its columns; the first number of each cell."""
    part = (RESULTS / "routing-tasks.md").read_text().split(f"**{title}**")[1].split("\n\n")[1]
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines())
    (cells,) = (line for line in lines if line[0] == row)
    return {
        name: float(cell.split()[0].replace(",", ""))
        for name, cell in zip(head, cells, strict=True)
        if re.match(r"[-+\d]", cell)
    }


OPPOSITE, FOUR = "Two opposite policies, one head for both", "Four tasks, a head for each"
LATER = 'The task "five stars" is added later'
APART, ALIKE = "TuckA r=8, a group for each task", "TuckA r=8, a group for each task, cores that start alike"


@cache
def pays():
    """The lines of the comparison with one group: k, routing, batches, the mean difference and its interval."""
    lines = (RESULTS / "routing-pays.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\| \d", line)]
    with_groups = [row for row in cells if row[7]]
    return [
        (int(row[0]), row[1], row[2], *(float(part.rstrip("%")) for part in row[7].split(" ± "))) for row in with_groups
    ]


@cache
def starts():
    lines = (RESULTS / "routing-balance-start-ranges.md").read_text().splitlines()[2:]
    cells = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: [tuple(map(float, cell.split(" to "))) for cell in row[1:]] for row in cells}


@cache
def trainings_of_starts():
    return [json.loads(line) for line in (RESULTS / "routing-starts.jsonl").read_text().splitlines()]


def most_used(start, routing):
    """The mean share of the most used group after training, by the router's start."""
    loads = [
        row["after"]["load"]
        for row in trainings_of_starts()
        if (row["router_init"], row["routing"]) == (start, routing)
    ]
    return fmean(max(load) / sum(load) for load in loads)


def least_used(start):
    """The share of the least used group after training, in any seed and with any routing."""
    return min(row["after"]["least_share"] for row in trainings_of_starts() if row["router_init"] == start)


def trained_start(start, routing):
    """The mean entropy after training and half its interval, by the router's start."""
    rows = [row for row in trainings_of_starts() if (row["router_init"], row["routing"]) == (start, routing)]
    values = [row["after"]["entropy"] for row in rows]
    return fmean(values), study_report.interval(values)


def overlap(one, other):
    return abs(one[0] - other[0]) < one[1] + other[1]


def bits(k, batches):
    text = (RESULTS / "routing-pays.md").read_text()
    return float(re.search(rf"^\| {k} \| batch \| {batches} \|.* ([\d.]+) \|$", text, re.M)[1])


@cache
def curves():
    text = (RESULTS / "quality/curves-glosses.md").read_text()
    rows = re.findall(r"^\| (HRA|TuckA[^|]*) \|[^|]*\| ([\d.]+) \| ([\d.]+)% \| ([\d.]+)% \|$", text, re.M)
    return {name.split(",")[0]: tuple(map(float, numbers)) for name, *numbers in rows}


@cache
def ranks():
    return study("ranks", "sounds")


def growth(axis, value, method="tucka batch", kind="forward"):
    return growth_report.overhead(
        json.loads((RESULTS / "growth-cpu.json").read_text()), f"{axis}={value}", kind, method
    )


DEMO = json.loads((RESULTS / "demo-cpu.json").read_text())
BY_METHOD = {row["method"].split(",")[0]: row for row in DEMO["methods"]}


def within_noise(*names):
    return all(abs(change) <= 2 * error for _, change, error in map(on_texts, names))


def noise(task):
    return 100 * quality()[task]["lora_r8"].spread


def best_of(task, name):
    return window(task, name).means[window(task, name).best]


def seeds_of(task):
    return len(next(iter(window(task, "tucka_r8").scores.values())))


def seconds_of_the_search(name):
    """The time of one seed at all learning rates, on all tasks that ran it."""
    return sum(
        record["seconds"]
        for record in records()
        if record["experiment"] == name and record["seed"] == 0 and "seconds" in record
    )


def domains_with_a_group():
    """How many domains have more than half of their sentences in one group, of how many, for batches of one domain."""
    rows = [json.loads(line) for line in (RESULTS / "routing-pays.jsonl").read_text().splitlines()]
    (table,) = (
        row["after"]["table"] for row in rows if (row["k"], row["batches"], row["seed"]) == (4, "one domain", 0)
    )
    return sum(max(load) > sum(load) / 2 for load in table), len(table)


def overheads(name, kind="training"):
    return report._ratios(json.loads((RESULTS / f"{name}.json").read_text())["methods"], kind, "processor")


def kept(method):
    methods = json.loads((RESULTS / "stack-cpu-float32.json").read_text())["methods"]
    return methods[method]["kept_bytes"] - methods["frozen"]["kept_bytes"]
