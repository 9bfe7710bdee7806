"""Experiments and records of runs, as the quality benchmark reads and writes them."""

from dataclasses import replace

from benchmarks.quality.experiments import Experiment


def experiment(**changes):
    return replace(Experiment("some", "Some", learning_rates=(1e-2, 1e-1)), **changes)


def record(rate, seed, validation, test=0.5, name="some", **more):
    own = experiment(name=name)
    return {
        "task": "sentences",
        "title": "Sentences",
        "scale": "quick",
        "experiment": name,
        "key": own.key,
        "learning_rate": rate,
        "seed": seed,
        "validation": {"a": validation},
        "test": {"a": test},
        "parameters": 10,
        "seconds": 1.0,
        "peak_memory_bytes": 2**20,
        "sizes": {"epochs": 1, "batch_size": 8, "test": 8},
        "versions": {"torch": "2"},
        "device": "cpu",
        "commit": "abc",
    } | more
