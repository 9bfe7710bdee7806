"""Fine-tune a pretrained sentence encoder on rated sentences with a head alone, with LoRA and with TuckA.

Run it from the root of the project: python -m examples.demo
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.data import DataError, fetch_sentences


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit code; a failure is one line on standard error."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="train on all sentences, about twelve times as long")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the results (default: demo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument("--fetch-only", action="store_true", help="only fetch the sentences")
    options = parser.parse_args(arguments)
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed: expected a whole number from 0 to 2**32 - 1, got {options.seed}")
    try:
        archive = fetch_sentences()
        print(f"Sentences: {archive}")
        if not options.fetch_only:
            _run(options, archive)
    except (DataError, OSError) as error:
        return _failed(str(error))
    except ModuleNotFoundError as error:
        return _failed(f"the package {error.name} is missing. Run: pip install 'tucka[peft,plots]'")
    except KeyboardInterrupt:
        return _failed("interrupted", code=130)
    return 0


def _run(options: argparse.Namespace, archive: Path) -> None:
    # GNU's OpenMP reads this when torch is first imported: a thread that waits then soon leaves its core to others.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from examples.demo.experiment import run_experiment
    from examples.demo.training import Plan

    options.out.mkdir(parents=True, exist_ok=True)
    plan = Plan(seed=options.seed, train_per_domain=None) if options.full else Plan(seed=options.seed)
    run_experiment(plan, archive, options.out)


def _failed(reason: str, *, code: int = 1) -> int:
    print("demo:", *reason.split(), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
