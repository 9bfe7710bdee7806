"""Train and evaluate one method on one problem."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from benchmarks.quality.experiments import Experiment
from benchmarks.quality.problem import Item, Problem, Sizes
from examples.sentence_classifier import LengthBatches
from tucka import load_entropy
from tucka.peft import RouterCallback, TuckAConfig, accelerate_hra, expert_load

_EVALUATION_BATCH = 100


class Unsupported(Exception):  # noqa: N818 - an outcome, not a fault
    """The method cannot adapt this model; the message is its own."""


class _Curve(TrainerCallback):
    """Takes the accuracy on the validation part a number of times while training, and at its end."""

    def __init__(self, problem: Problem, evaluations: int) -> None:
        self._problem = problem
        self._evaluations = evaluations
        self.points: list[tuple[int, float]] = []

    def on_step_end(self, _args: object, state: TrainerState, _control: object, **kwargs: Any) -> None:
        every = max(1, state.max_steps // self._evaluations)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            model = kwargs["model"].eval()
            found = accuracy(model, self._problem.validation, self._problem)
            self.points.append((state.global_step, fmean(found.values())))
            model.train()


class _Trainer(Trainer):
    """The Trainer of transformers, fed with batches of similar length where items have one."""

    def get_train_dataloader(self) -> DataLoader[Item]:
        if "input_ids" not in self.train_dataset[0]:
            return super().get_train_dataloader()
        batches = LengthBatches([len(item["input_ids"]) for item in self.train_dataset], self.args.train_batch_size)
        return DataLoader(self.train_dataset, batch_sampler=batches, collate_fn=self.data_collator)


def adapt(model: nn.Module, experiment: Experiment, problem: Problem, seed: int) -> nn.Module:
    """Freeze a model but for its head, and put the experiment's adapters into it."""
    if experiment.kind == "features":
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # frozen features need no regularisation
        for name in problem.head:
            model.get_submodule(name).requires_grad_(True)
        return model
    torch.manual_seed(seed)  # adapters start at random
    settings: dict[str, Any] = {"target_modules": list(problem.targets), **experiment.config}
    if problem.head:
        settings["modules_to_save"] = list(problem.head)
    if experiment.adapter == "TuckAConfig":
        config: peft.PeftConfig = TuckAConfig(router_seed=seed, **settings)
    else:
        config = getattr(peft, experiment.adapter)(**settings)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns about versions of transformers
            adapted = peft.get_peft_model(model, config)
    except (ValueError, NotImplementedError) as error:
        if not any(word in str(error) for word in ("support", "compatible")):  # PEFT has no error class for this
            raise
        raise Unsupported(str(error).splitlines()[0]) from error
    if experiment.adapter == "HRAConfig":
        accelerate_hra(adapted)  # the same numbers in less time
    return adapted


def trainable(model: nn.Module, head: Sequence[str]) -> tuple[int, int]:
    """Count the trainable parameters of the adapters and of the head."""
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        counts[_in_head(name, head)] += parameter.numel() if parameter.requires_grad else 0
    return counts[0], counts[1]


def _in_head(name: str, head: Sequence[str]) -> bool:
    return any(f".{module}." in f".{name}" for module in head)


def _groups(model: nn.Module, experiment: Experiment, problem: Problem, rate: float, head_rate: float) -> list[Any]:
    """Give the head its own learning rate, the same for every method, and parts of the adapter theirs."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = next((factor for part, factor in experiment.parts.items() if part in name), 1.0)
            # Where only the head is trained, its learning rate is the one that is searched.
            is_head = _in_head(name, problem.head) and experiment.kind != "features"
            own = head_rate if is_head else rate * factor
            groups.setdefault(own, []).append(parameter)
    return [{"params": parameters, "lr": own} for own, parameters in groups.items()]


def train(
    model: nn.Module,
    experiment: Experiment,
    problem: Problem,
    sizes: Sizes,
    *,
    learning_rate: float,
    head_rate: float,
    seed: int,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train what is trainable, with AdamW and a schedule that warms up and falls linearly; return the log."""
    observers = list(callbacks)
    if experiment.adapter == "TuckAConfig":
        observers.append(RouterCallback(max_batches=16, progress=False))
    steps = sizes.epochs * -(-len(problem.train) // sizes.batch_size)
    groups = _groups(model, experiment, problem, learning_rate, head_rate)
    set_seed(seed)
    with tempfile.TemporaryDirectory(prefix="tucka-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=sizes.batch_size,
            num_train_epochs=sizes.epochs,
            warmup_steps=max(1, steps // 16),
            weight_decay=0.0,
            seed=seed,
            logging_steps=max(1, steps // 20),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        trainer = _Trainer(
            model=model,
            args=arguments,
            train_dataset=problem.train,
            data_collator=problem.collator,
            callbacks=observers,
            optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    log: list[dict[str, float]] = trainer.state.log_history
    return log


@torch.no_grad()
def predict(model: nn.Module, items: Sequence[Item], problem: Problem) -> Tensor:
    """Compute the logits of items, in their order."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(item.get("input_ids", ())) for item in items])
    places, logits = [], []
    for chunk in lengths.argsort(stable=True).split(_EVALUATION_BATCH):
        batch = problem.collator([items[place] for place in chunk.tolist()])
        inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        places.append(chunk)
        logits.append(model(**inputs).logits.float().cpu())
    return torch.cat(logits)[torch.cat(places).argsort()]


def accuracy(model: nn.Module, parts: Mapping[str, Sequence[Item]], problem: Problem) -> dict[str, float]:
    """Return the share of right answers of each part."""
    found = {}
    for part, items in parts.items():
        right = predict(model, items, problem).argmax(-1) == torch.tensor([item["labels"] for item in items])
        found[part] = float(right.double().mean())
    return found


def run_adapter(
    experiment: Experiment, problem: Problem, sizes: Sizes, *, learning_rate: float, head_rate: float, seed: int
) -> dict[str, Any]:
    """Train a fresh model and evaluate it; return what there is to tell."""
    model = adapt(problem.model(seed), experiment, problem, seed)
    curve = _Curve(problem, experiment.evaluations)
    adapter, head = trainable(model, problem.head)
    result: dict[str, Any] = {"parameters": adapter, "head_parameters": head, "log": []}
    routed = experiment.adapter == "TuckAConfig"
    started = time.perf_counter()
    if adapter + head:
        result["log"] = train(
            model,
            experiment,
            problem,
            sizes,
            learning_rate=learning_rate,
            head_rate=head_rate,
            seed=seed,
            callbacks=[curve] if experiment.evaluations else [],
        )
        result["curve"] = curve.points
    result["seconds"] = time.perf_counter() - started
    if routed:
        result["training_load"] = expert_load(model, reset=True).tolist()
    result["validation"] = accuracy(model.eval(), problem.validation, problem)
    if routed:
        expert_load(model, reset=True)
    result["test"] = accuracy(model, problem.test, problem)
    if routed:
        load = expert_load(model, reset=True)
        result["test_load"] = load.tolist()
        result["load_entropy"] = float(load_entropy(load)) if len(load) > 1 else None
    return result


def run_words(problem: Problem) -> dict[str, Any]:
    """Logistic regression on TF-IDF, fitted on the training texts: what no pretrained model is needed for."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    if "text" not in problem.train[0]:
        raise Unsupported("there are no words")
    started = time.perf_counter()
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10.0))
    pipeline.fit([item["text"] for item in problem.train], [item["labels"] for item in problem.train])

    def score(parts: Mapping[str, Sequence[Item]]) -> dict[str, float]:
        return {
            part: float(pipeline.score([item["text"] for item in items], [item["labels"] for item in items]))
            for part, items in parts.items()
        }

    seconds = time.perf_counter() - started
    return {
        "parameters": 0,
        "head_parameters": int(pipeline[-1].coef_.size),
        "seconds": seconds,
        "validation": score(problem.validation),
        "test": score(problem.test),
        "log": [],
    }
