"""Train one row of a table on one task and evaluate it, with the Trainer of transformers."""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PrinterCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from benchmarks.paper import images, mathematics, text
from benchmarks.paper.adapted_model import adapted, parameter_counts, peft_config
from benchmarks.paper.experiments import Experiment, Row, Task, Training, Variant
from benchmarks.paper.problem import Problem
from tucka.peft import RouterCallback, expert_load

KINDS = {"text": text.problem, "images": images.problem, "mathematics": mathematics.problem}


@dataclass(frozen=True)
class Run:
    """One training: what is trained on what, and how."""

    experiment: Experiment
    task: Task
    row: Row
    variant: Variant | None  # None: the row is not one of TuckA
    seed: int  # of the head, the adapter, the order of the batches, and dropout
    learning_rate: float  # the table's, unless another one is asked for

    @property
    def name(self) -> str:
        """The name of the run, which no other run of the table has."""
        variant = f"-{self.variant.name}" if self.variant else ""
        rate = "" if self.learning_rate == self.task.training.learning_rate else f"-lr{self.learning_rate:g}"
        return f"{self.task.name}/{self.row.name}{variant}{rate}-seed{self.seed}"


def perform(run: Run, checkpoints: Path | None = None) -> dict[str, Any]:
    """Do a run and return its outcome; with a folder for checkpoints, go on from the last one there."""
    # Metrics are between 0 and 1. "best" is the best of all evaluations on the tested data, as the paper's scripts
    # report, and "final" the last one. "expert_load" counts the batches of the training and of evaluations during it.
    experiment, variant = run.experiment, run.variant
    set_seed(run.seed)
    pads = variant is not None and variant.pads_to_max_length
    with PartialState().main_process_first():  # it downloads and tokenises, the others read its caches
        problem = KINDS[experiment.kind](experiment.model, run.task, pads_to_max_length=pads)
    config = peft_config(experiment, run.row, variant, run.seed)
    model = adapted(problem.model, config, experiment.model.layers)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory(prefix="tucka-") as scratch:
        trainer = _trainer(run, problem, model, checkpoints or Path(scratch), saves=checkpoints is not None)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if _holds_any(checkpoints) else None)
        seconds = time.perf_counter() - started
        peak = _peak_memory()
        load = [int(count) for count in expert_load(model)] if variant else None
        final = trainer.evaluate() if problem.test is not None else {}
        history = [entry for entry in trainer.state.log_history if f"eval_{run.task.metric}" in entry]
    metrics = _metrics(run.task.metric, history, final)
    if problem.score is not None:
        metrics |= {name: {"best": value, "final": value} for name, value in problem.score(model).items()}
    return {
        "metrics": metrics,
        "parameters": parameter_counts(model),
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "expert_load": load,
        "log": trainer.state.log_history,
    }


def _holds_any(checkpoints: Path | None) -> bool:
    return checkpoints is not None and checkpoints.is_dir()


def _trainer(run: Run, problem: Problem, model: Any, folder: Path, *, saves: bool) -> Trainer:
    training, callbacks = run.task.training, []
    if run.variant:
        # Eq. (10) takes the mean of one small batch; other ways to start need more data, and have no a.
        start = {"max_batches": 1, "scale": run.experiment.perturbation}
        is_paper = run.variant.config.get("router_init") == "dai"
        callbacks.append(RouterCallback(**(start if is_paper else {}), progress=False))
    arguments = _arguments(run, training, evaluates=problem.test is not None, saves=saves, folder=folder)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=problem.train,
        eval_dataset=problem.test,
        data_collator=problem.collator,
        compute_metrics=problem.metrics,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(run: Run, training: Training, *, evaluates: bool, saves: bool, folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.accumulation,
        "learning_rate": run.learning_rate,
        "weight_decay": training.weight_decay,
        "lr_scheduler_type": training.schedule,
        "warmup_steps": training.warmup,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": training.evaluate_every,
        "save_strategy": "steps" if saves and training.save_every else "no",
        "save_steps": training.save_every or 500,
        "save_total_limit": 1,
        "logging_steps": 20,
        "seed": run.seed,
        "bf16": run.experiment.model.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
        "report_to": "none",
        "disable_tqdm": True,
    }


def _metrics(name: str, history: list[dict[str, float]], final: dict[str, float]) -> dict[str, dict[str, float]]:
    key = f"eval_{name}"
    if key not in final:
        return {}
    return {name: {"best": max([final[key], *(entry[key] for entry in history)]), "final": final[key]}}


def _peak_memory() -> int:
    """Return the most bytes taken: of the device, or of the whole process on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
