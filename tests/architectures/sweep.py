"""Run the checks on architectures and write what they found: ``PYTHONPATH=tests python -m architectures.sweep``."""

import argparse
import json
import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers

from architectures.adapted import LORA, Subject
from architectures.checks import CHECKS, HIDDEN, NOTHING, RAISES, REFUSED, WORKS, check
from architectures.expected import refusal_of
from architectures.selection import ABSENT, ALL, CHOSEN, LIBRARIES, NOT_RUN
from benchmarks.architectures import RESULTS, write_table
from benchmarks.provenance import provenance

METHODS = (LORA, "batch", "sample", "token")


def findings(name: str) -> dict[str, Any]:
    """Say what was found on one architecture."""
    family = ALL[name]
    subject = Subject(family)
    found: dict[str, Any] = {"kind": family.kind, "targets": [*family.targets]}
    found.update({method: check(subject, method) for method in METHODS})
    found["default"] = _default(subject)
    if family.kind != "plain torch":
        found["all-linear"] = _first(check(Subject(family, "all-linear"), None, only="start"))
    return found


def _default(subject: Subject) -> str:
    """Name the routing that is chosen where none is given, and check that a forward starts as one with that."""
    try:
        routing = subject.adapt(None, subject.copy()).peft_config["default"].routing
    except (ValueError, NotImplementedError) as error:  # the second is transformers' own, where PEFT asks
        return f"{REFUSED if isinstance(error, ValueError) else RAISES}: {type(error).__name__}"
    return routing if _first(check(subject, None, only="start")).startswith(WORKS) else f"{routing}, which fails"


def _first(found: dict[str, str]) -> str:
    return next((text for text in found.values() if text != WORKS), WORKS)


def unexpected(name: str, found: dict[str, Any]) -> list[str]:
    """List what neither works nor is refused for a reason that is known, and what is refused no more."""
    listed = []
    for method in METHODS[1:]:
        for each in CHECKS.keys() | found[method].keys():
            outcome, entry = found[method].get(each, NOTHING), refusal_of(name, method, each)
            wanted = None if entry is None else f"{REFUSED}: {entry.error}: "
            if wanted is None and not _passes(outcome, found[LORA].get(each, "")):
                listed.append(f"{method}, {each}: {outcome}")
            elif wanted is not None and not outcome.startswith(wanted):
                listed.append(f"{method}, {each}: expected {wanted}, got {outcome}")
    return sorted(listed)


def _passes(outcome: str, of_lora: str) -> bool:
    if outcome.startswith(RAISES):  # the base's own error, or PEFT's
        return of_lora.startswith(outcome[: outcome.index(":", len(RAISES) + 1)])
    return outcome.startswith((WORKS, NOTHING))


def compact(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """Leave out what works and what does not apply, and add the reasons of what is refused."""
    why = {}
    found["hidden"] = found[LORA].get("effect", "").endswith(HIDDEN)
    for method in METHODS:
        kept = {each: text for each, text in found[method].items() if not text.startswith((WORKS, NOTHING))}
        found[method] = {each: text[:300] for each, text in kept.items()}
        for each in kept:
            entry = refusal_of(name, method, each)
            if entry is not None:
                why[f"{method}, {each}"] = entry.reason
    return {**found, "why": why}


def main(arguments: Iterable[str] | None = None) -> None:
    """Run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="the architectures; the chosen ones if none, `all` for all")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    asked = [name for name in options.names if name in NOT_RUN]
    if asked:
        parser.error(f"names: expected architectures of installed libraries, got {asked[0]} (of {NOT_RUN[asked[0]]})")
    names = [*ALL] if options.names == ["all"] else options.names or [name for name in CHOSEN if name in ALL]
    with ProcessPoolExecutor(options.processes, initializer=quiet) as pool:
        found = {}
        for name, each in zip(names, pool.map(findings, names), strict=True):
            found[name] = each
            print(f"{len(found)} of {len(names)}: {name}", *unexpected(name, each), sep="\n  ", flush=True)
    report = {
        **provenance(["torch", "transformers", "peft", *(LIBRARIES.keys() - set(ABSENT))]),
        "not run": ABSENT,
        "checks": [*CHECKS],
        "families": {name: compact(name, each) for name, each in found.items()},
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    write_table(options.out)


def quiet() -> None:
    """Prepare a process: one thread, no warnings of old architectures, no downloads."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["DIFFUSERS_VERBOSITY"] = "error"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
