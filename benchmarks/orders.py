"""Time the two orders in which rows with gates of their own are multiplied: ``python -m benchmarks.orders``.

It writes ``benchmarks/results/orders-<device>.json`` and its table. `tucka.spec.mixes_each_row` chooses by the numbers
that an order writes; the table shows what the choice costs against the faster order.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measures import kept_by
from benchmarks.provenance import provenance, short
from benchmarks.turns import Turns, Work
from tucka.backends.torch.mixing import spread_times, times_mixed
from tucka.spec import mixes_each_row

RESULTS = Path(__file__).parent / "results"
ORDERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"spread": spread_times, "mixed": times_mixed}
KINDS = ("inference", "training")
SIZES = [(rank, slices) for rank in (4, 8, 16, 32) for slices in (rank // 2, rank, 2 * rank, 8 * rank)]
SIZES += [(8, 128), (32, 128), (64, 128)]  # k = 64, p = 2


def works(order: str, rank: int, slices: int, tokens: int, device: str) -> dict[str, Work]:
    """Say what an order does in inference and in training."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, rank), (tokens, slices), (slices, rank, rank))
    parts = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    gradient = torch.ones(tokens, rank, device=device)

    def infer() -> None:
        with torch.inference_mode():
            ORDERS[order](*parts)

    def train() -> None:
        ORDERS[order](*parts).backward(gradient)

    def clear() -> None:
        for part in parts:
            part.grad = None

    return {"inference": Work(infer, clear, calls=5), "training": Work(train, clear, calls=5)}


def kept(order: str, rank: int, slices: int) -> int:
    """Count the numbers that an order keeps for the backward of one token, its inputs not counted."""
    parts = [torch.randn(shape, requires_grad=True) for shape in ((1, rank), (1, slices), (slices, rank, rank))]
    return kept_by(partial(ORDERS[order], *parts), owned=parts)[0] // 4


def table(report: dict[str, Any]) -> str:
    """Write the median times of both orders, and which is taken."""
    head = ["r", "k·p", "kept for each token: spread", "mixed", "inference, µs: spread", "mixed"]
    head += ["training, µs: spread", "mixed", "taken"]
    lines = ["| " + " | ".join(head) + " |", "|---:" * (len(head) - 1) + "|---|"]
    clock = 0 if report["about"]["options"]["device"] != "cpu" else 1
    for size, kinds in report["times"].items():
        rank, slices = map(int, size.split("x"))
        cells = [str(rank), str(slices), *(str(report["kept"][size][order]) for order in ORDERS)]
        for kind in KINDS:
            for order in ORDERS:
                seconds = statistics.median(pair[clock] for pair in kinds[f"{order}, {kind}"].values())
                cells.append(f"{1e6 * seconds:.0f}")
        taken = "mixed" if mixes_each_row(rank, slices) else "spread"
        lines.append(f"| {' | '.join(cells)} | {taken} |")
    about = report["about"]
    where = f"{about['options']['tokens']} tokens, float32; {about['device']}, {about['options']['threads']} thread(s)"
    clock_name = "processor" if clock else "wall"
    lines += ["", f"{where}, {clock_name} time, medians; torch {about['versions']['torch']}; {short(about['commit'])}."]
    return "\n".join(lines) + "\n"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(given)
    torch.set_num_threads(options.threads)
    output = options.output or RESULTS / f"orders-{options.device}.json"
    chosen = {name: value for name, value in vars(options).items() if name not in {"output", "repeats"}}
    turns = Turns({**provenance(("torch",)), "options": chosen}, output)
    if turns.repeats < options.repeats:
        measured = {
            f"{rank}x{slices}": {
                f"{order}, {kind}": work
                for order in ORDERS
                for kind, work in works(order, rank, slices, options.tokens, options.device).items()
            }
            for rank, slices in SIZES
        }
        turns.measure(measured, options.repeats, budget=60)
    sizes = {f"{rank}x{slices}": {order: kept(order, rank, slices) for order in ORDERS} for rank, slices in SIZES}
    report = turns.report(kept=sizes)
    output.with_suffix(".md").write_text(table(report), "utf-8")
    print(table(report))


if __name__ == "__main__":
    main()
