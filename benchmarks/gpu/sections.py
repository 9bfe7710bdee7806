"""The sections of the measurement on a GPU; each returns what it measured, as plain values.

With ``tiny`` set, each runs in seconds at tiny sizes, and on a CPU: so that its code is tested where no GPU is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks import decoding
from benchmarks.counts import host_reads
from benchmarks.decoders import adapted, base_of
from benchmarks.gpu.memory import table_2
from benchmarks.regimes import REGIMES, Regime, inputs_of, work
from benchmarks.turns import Turns, Work

__all__ = ["SECTIONS", "Missing", "Options"]

ROOT = Path(__file__).parents[2]
ROUTED = ("tucka batch", "tucka sample", "tucka token", "tucka pinned")
NEEDS_CUDA = "needs a CUDA device"
LAYERS = 4  # of each model: their times add up, and more of them would only take longer


class Missing(Exception):  # noqa: N818 - an outcome, not a fault
    """The section cannot run here; the message says what it needs."""


@dataclass(frozen=True)
class Options:
    """Where and for how long a section runs."""

    device: str
    tiny: bool
    seconds: float
    folder: Path  # for files beside the result

    def needs_cuda(self) -> None:
        """Raise where nothing runs on a CUDA device."""
        if self.device != "cuda":
            raise Missing(NEEDS_CUDA)

    def base(self, sizes: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """Make a decoder with random weights."""
        torch.manual_seed(0)
        with torch.device(self.device):
            base = base_of("decoder", "tiny" if self.tiny else sizes, 1 if self.tiny else LAYERS)
        return base.requires_grad_(False).to(dtype)


def tests(options: Options) -> dict[str, Any]:
    """Run the tests that are marked for CUDA."""
    options.needs_cuda()
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return {"passed": done.returncode == 0, "output": done.stdout.strip().splitlines()[-20:]}


def decoder(sizes: str, dtype: str) -> Callable[[Options], dict[str, Any]]:
    """Return the section that fills the table of `benchmarks.decoding` at some sizes."""

    def section(options: Options) -> dict[str, Any]:
        deadline = time.monotonic() + 0.7 * options.seconds
        given = ["--sizes", "tiny" if options.tiny else sizes, "--layers", str(1 if options.tiny else LAYERS)]
        given += ["--device", options.device, "--dtype", dtype, "--repeats", "1" if options.tiny else "15"]
        given += ["--rows", "batch", "--regimes", "forward-1x32"] if options.tiny else []
        return decoding.measure(decoding.arguments(given), None, deadline)

    return section


def step(options: Options) -> dict[str, Any]:
    """Divide training steps by the frozen one, r = 32 on query and value, as the paper's Llama-2-7B."""
    base = options.base("llama-7b")
    regime = Regime("training step", "decoder", "train", 1 if options.tiny else 4, 8 if options.tiny else 512, 3)
    methods = ("frozen", "PEFT LoRA", "PEFT HRA, accelerated", *ROUTED[:3])
    models = {name: adapted(base, name, 32, ["q_proj", "v_proj"]).train() for name in methods}
    works = {"step": {name: work(regime, base, model) for name, model in models.items()}}
    turns = Turns({}, None)
    until = time.monotonic() + options.seconds / 2
    turns.measure(works, 1 if options.tiny else 20, 10, base="frozen", deadline=until)
    peak = {}
    if options.device == "cuda":
        for name, one in works["step"].items():
            torch.cuda.reset_peak_memory_stats()
            one.run()
            one.clear()
            peak[name] = torch.cuda.max_memory_allocated()
    return {"times": turns.times["step"], "peak": peak, "shape": [regime.samples, regime.tokens]}


def memory(options: Options) -> dict[str, Any]:
    """Take the memory of a training step of ViT-base with the adapters of the paper's Table 2."""
    return table_2(options.device, tiny=options.tiny)


def reads(options: Options) -> dict[str, Any]:
    """Count what each kind of step reads back to the host beyond the base; on CUDA also what waits for the device."""
    base, found = options.base("llama-1b"), {}
    for method in ("frozen", "PEFT LoRA", *ROUTED):
        model = adapted(base, method, 8)
        for name in ("forward-1x32", "train-1x32", "generate-1"):
            regime = replace(REGIMES[name], new=4)
            one = work(regime, base, model.train(regime.kind == "train"))
            one.run()
            one.clear()
            counts = [host_reads(one.run)]
            one.clear()
            if options.device == "cuda":
                counts.append(_waits(one.run))
                one.clear()
            found.setdefault(name, {})[method] = counts
    return found


def _waits(run: Callable[[], None]) -> int:
    """Count the calls that wait for the device, by torch's own warnings of them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def graphs(options: Options) -> dict[str, Any]:
    """Capture a forward as a CUDA graph; time it beside the eager one, and compare what both give for another input."""
    options.needs_cuda()
    base, found = options.base("llama-1b"), {}
    for method in ("frozen", "PEFT LoRA", *ROUTED):
        model = adapted(base, method, 8).eval()
        inputs = inputs_of(REGIMES["forward-1x32"], base)
        with torch.no_grad():
            graph, output = _captured(lambda model=model, inputs=inputs: model(**inputs).logits)
            inputs["input_ids"].copy_(inputs["input_ids"].flip(1))
            graph.replay()
            expected = model(**inputs).logits
            times = [_seconds(run) for run in (lambda model=model, inputs=inputs: model(**inputs), graph.replay)]
        found[method] = {"eager": times[0], "graph": times[1], "difference": _difference(output, expected)}
    return found


def _captured(run: Callable[[], torch.Tensor]) -> tuple[Any, torch.Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph, output


def compiled(options: Options) -> dict[str, Any]:
    """Time compiled forwards beside eager ones, and count the graph breaks."""
    base, found = options.base("llama-1b"), {}
    backend, count = ("eager", 1) if options.tiny else ("inductor", 20)
    methods = ("frozen", "tucka batch") if options.tiny else ("frozen", "PEFT LoRA", *ROUTED[2::-1])
    until = time.monotonic() + options.seconds - 20  # about as long as one method takes
    for method in methods:
        if time.monotonic() > until:
            found[method] = {"not run": "no time was left"}
            continue
        torch._dynamo.reset()
        counters.clear()
        model = adapted(base, method, 8).eval()
        inputs = inputs_of(REGIMES["forward-1x32"], base)
        fast = torch.compile(model, backend=backend)
        with torch.no_grad():
            difference = _difference(fast(**inputs).logits, model(**inputs).logits)
            breaks = sum(counters["graph_break"].values())
            times = [_seconds(lambda one=one, inputs=inputs: one(**inputs), count) for one in (model, fast)]
        found[method] = {"eager": times[0], "compiled": times[1], "difference": difference, "breaks": breaks}
    torch._dynamo.reset()
    return found


def _difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, as a part of the largest expected number."""
    largest = expected.float().abs().max()
    return float((actual.float() - expected.float()).abs().max() / largest)


def _seconds(run: Callable[[], Any], count: int = 20) -> float:
    """Return the median wall seconds of a call."""
    return Work(run, lambda: None, count).turn()[0]


def quality(options: Options) -> dict[str, Any]:
    """Train LoRA, HRA and TuckA on the real tasks at their full size, as many as the time allows."""
    options.needs_cuda()
    names = ["lora_r8", "tucka", "hra_r8", "tucka_r2"]
    tasks = ["sentences", "reviews", "causal", "images"]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.quality.run", "--full", "--experiments", *names]
    command += ["--tasks", *tasks, "--jobs", "4", "--results", str(options.folder)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=options.seconds - 5
        )
        output = (done.stdout + done.stderr).splitlines()
    except subprocess.TimeoutExpired:
        output = ["stopped at the end of its time; what was finished is kept"]
    finished = sum(len(path.read_text("utf-8").splitlines()) for path in options.folder.glob("*.jsonl"))
    if not finished:
        raise Missing(output[-1] if output else "no run was finished")
    return {"finished": finished, "output": output[-20:]}


# In this order, each with the most seconds that it may take; quality has what is left.
SECTIONS: dict[str, tuple[Callable[[Options], dict[str, Any]], float]] = {
    "tests": (tests, 60),
    "decoder llama-1b bfloat16": (decoder("llama-1b", "bfloat16"), 50),
    "step": (step, 30),
    "memory": (memory, 40),
    "reads": (reads, 30),
    "graphs": (graphs, 30),
    "decoder llama-7b bfloat16": (decoder("llama-7b", "bfloat16"), 50),
    "decoder llama-1b float32": (decoder("llama-1b", "float32"), 40),
    "decoder llama-7b float32": (decoder("llama-7b", "float32"), 50),
    "compiled": (compiled, 100),
    "quality": (quality, 300),
}


def one(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one section; what it needs and does not find here is an outcome, and so is an error of its own."""
    if options.device == "cuda" and not torch.cuda.is_available():
        return {"not run": NEEDS_CUDA}
    section, _ = SECTIONS[name]
    began = time.monotonic()
    try:
        found = section(Options(options.device, options.tiny, options.seconds, options.folder))
    except Missing as reason:
        return {"not run": str(reason)}
    except Exception as error:  # the other sections still run
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"seconds": round(time.monotonic() - began, 1), "found": found}
