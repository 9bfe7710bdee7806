"""The Trainer's callback: it starts and balances the router, logs how it does, and warns when it has collapsed."""

import warnings

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from support.adapting import adapt
from support.tiny_models import text
from tucka import reference
from tucka.backends.torch.routing.scope import scope_of
from tucka.core.balance import CollapseAlarm
from tucka.errors import ConfigError
from tucka.peft import (
    RouterCallback,
    initialize_router,
)
from tucka.peft.routes.callback import _gate_entropy, _Watch

pytestmark = [
    # What the installed transformers, accelerate and torch say to each other.
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use_cpu.*:FutureWarning"),
]

BATCHES = [text(batch=16, seed=seed) for seed in range(4)]


def router_of(model):
    return scope_of(model).router("default")


def trained(model, folder, *callbacks, steps=6, **options):
    rows = [{"input_ids": row, "attention_mask": torch.ones(6, dtype=torch.long), "labels": n % 2} for n, row in
            enumerate(text(batch=24, seed=7)["input_ids"])]  # fmt: skip
    args = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=steps, logging_steps=2, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, **{"learning_rate": 1e-2, **options},
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks))
    trainer.train()
    return trainer


class Loads(TrainerCallback):
    """The bias after each step, which the callback before this one has moved."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(router_of(kwargs["model"]).choice_bias.clone())


def test_the_callback_moves_the_bias_after_each_step_by_the_load_of_training_alone(tmp_path):
    model, loads, routed = adapt("bert", routing="sample", balance_rate=0.5), Loads(), []
    initialize_router(model, BATCHES[:1], progress=False)
    scope_of(model).observers["default"] = lambda router, x, mask, gates: routed.append(
        (model.training, gates.detach())
    )
    # An evaluation after every step routes too, and must not count.
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 24}
    trained(model, tmp_path, RouterCallback(progress=False), loads, steps=3, **evaluated)
    steps = [gates.any(dim=-1).sum(dim=0).numpy() for training, gates in routed if training]
    assert len(steps) == len(loads.seen) == 3 < len(routed)
    bias = np.zeros(3)
    for load, moved in zip(steps, loads.seen, strict=True):
        bias = reference.moved_bias(bias, load, 0.5)
        np.testing.assert_allclose(moved.numpy(), bias)


def test_logs_of_an_evaluation_leave_the_trainings_figures_to_the_next_log(tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 24}
    trainer = trained(adapt("bert", routing="sample"), tmp_path, RouterCallback(progress=False), steps=2, **evaluated)
    kinds = [("eval_loss" in entry, "tucka/share_0" in entry) for entry in trainer.state.log_history[:3]]
    assert sorted(kinds) == [(False, True), (True, False), (True, False)]


def test_the_log_tells_gate_entropy_and_centroid_drift(tmp_path):
    model = adapt("bert", routing="sample")
    trainer = trained(model, tmp_path, RouterCallback(progress=False))
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(0 < entry["tucka/gate_entropy"] <= 1 for entry in entries)
    drifts = [entry["tucka/centroid_drift"] for entry in entries]
    assert 0 < drifts[0] < drifts[-1]
    still = trained(adapt("bert", routing="sample"), tmp_path, RouterCallback(progress=False), learning_rate=0.0)
    assert all(entry.get("tucka/centroid_drift", 0) == 0 for entry in still.state.log_history)


def collapsed(**options):
    """A model whose router sends everything to one group."""
    model = adapt("bert", routing="sample", affinity="dot", **options)
    router = router_of(model)
    with torch.no_grad():
        router.centroids.zero_()
        router.is_initialized.fill_(True)  # the callback leaves it as it is
    return model


def test_a_collapse_is_told_once_with_what_to_do(tmp_path):
    callback = RouterCallback(progress=False, collapse_window=2)
    with pytest.warns(UserWarning, match=r"load entropy.*100%") as caught:
        trained(collapsed(), tmp_path, callback, learning_rate=0.0)
    told = [str(each.message) for each in caught if "load entropy" in str(each.message)]
    assert len(told) == 1
    assert "router of 'default'" in told[0]
    assert all(cure in told[0] for cure in ("initialize_router", "balance_rate", "directional"))


def test_a_short_training_is_looked_at_when_it_ends(tmp_path):
    with pytest.warns(UserWarning, match="load entropy"):
        trained(collapsed(), tmp_path, RouterCallback(progress=False), learning_rate=0.0, steps=12)


def test_a_balanced_training_is_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*load entropy.*")
        trained(adapt("bert", routing="sample"), tmp_path, RouterCallback(progress=False, collapse_window=3))


@pytest.mark.parametrize("options", [{"collapse_window": 0}, {"collapse_below": 0.0}, {"max_batches": -1}])
def test_the_callbacks_options_have_rules(options):
    with pytest.raises(ConfigError):
        RouterCallback(**options)


# What is measured


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_even_gates_have_the_gate_entropy_one(experts):
    gates = torch.zeros(4, 3, experts)
    gates[:, 1] = 1 / experts
    torch.testing.assert_close(_gate_entropy(gates), torch.tensor(1.0))
    gates[:, 1] = 0
    gates[:, 1, 0] = 1
    torch.testing.assert_close(_gate_entropy(gates), torch.tensor(0.0))


@pytest.mark.parametrize(("before", "after", "load"), [([5, 3], [6, 5], [1, 2]), ([5, 3], [1, 0], [1, 0])])
def test_counts_that_were_reset_during_a_step_are_of_this_step(before, after, load):
    watch = _Watch(torch.ones(2), CollapseAlarm("router", window=8))
    watch.begin(torch.tensor(before))
    assert watch.end(torch.tensor(after), None).tolist() == load
