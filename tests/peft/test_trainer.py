"""The Trainer of transformers: checkpoints, resuming, the best model, accumulation, the router's callback."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from support.adapting import adapt, config_for, snapshot
from support.tiny_models import make, text
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import RouterCallback, expert_load, initialize_router

pytestmark = [
    # What the installed transformers, accelerate and torch say to each other.
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use_cpu.*:FutureWarning"),
]


def rows(count=24):
    batch = text(batch=count, seed=7)
    return [
        {"input_ids": batch["input_ids"][i], "attention_mask": batch["attention_mask"][i], "labels": i % 2}
        for i in range(count)
    ]


def trainer_for(model, folder, *, callbacks=None, **options):
    given = {
        "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 2, "report_to": [],
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3, "dataloader_num_workers": 0,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**given, **options})
    return Trainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(8), callbacks=callbacks)


def adapter_state(model):
    return {name: value for name, value in snapshot(model).items() if "tucka_" in name or "modules_to_save" in name}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def dropping(**options):
    """A model with dropout, so that the order of random numbers matters."""
    return adapt("bert", model=make("bert", hidden_dropout_prob=0.2), **options)


@pytest.mark.parametrize("routing", [pytest.param("batch", marks=pytest.mark.slow), "token"])
def test_a_resumed_training_continues_bit_by_bit(routing, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 3}
    through = dropping(routing=routing)
    trainer_for(through, tmp_path / "a", callbacks=[RouterCallback(progress=False)], **saving).train()
    resumed = dropping(routing=routing, seed=5)
    resumed.load_state_dict({**resumed.state_dict(), **base_state(through)})
    again = trainer_for(resumed, tmp_path / "b", callbacks=[RouterCallback(progress=False)], **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert_same(adapter_state(resumed), adapter_state(through))


def base_state(model):
    return {name: value for name, value in model.state_dict().items() if "tucka_" not in name}


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    model = adapt("bert")
    trainer = trainer_for(
        model, tmp_path, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, learning_rate=0.3, callbacks=[RouterCallback(progress=False)],
    )  # fmt: skip
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    assert trainer.state.best_metric == best
    assert trainer.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


@pytest.mark.heavy
def test_accumulating_is_training_on_whole_batches_for_sample_routing(tmp_path):
    states = []
    for size, steps in ((4, 1), (2, 2)):
        model = adapt("llama", routing="sample", dtype=torch.float64)
        initialize_router(model, [text(batch=8)], progress=False)  # else from the first batch, which differs
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = trainer_for(model, tmp_path, **sizes)
        trainer.train_dataset = [{**row, "labels": row["input_ids"]} for row in rows()]
        trainer.train()
        states.append(adapter_state(model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_checkpointing_gradients_changes_nothing(tmp_path):
    states = []
    for options in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}):
        model = adapt("bert", dtype=torch.float64)
        trainer_for(model, tmp_path, max_steps=3, **options).train()
        states.append(adapter_state(model))
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-9, atol=1e-9)


def test_the_callback_is_initialising_by_hand_and_changes_nothing_else(tmp_path):
    by_hand, by_callback = dropping(), dropping()
    trainer = trainer_for(by_hand, tmp_path)
    initialize_router(by_hand, trainer_for(dropping(), tmp_path).get_train_dataloader(), progress=False)
    state = {name: value for name, value in adapter_state(by_hand).items() if "router" in name}
    trainer.train()
    callback = RouterCallback(progress=False)
    other = trainer_for(by_callback, tmp_path, callbacks=[callback, Copy(state, by_callback)])
    other.train()
    assert_same(adapter_state(by_callback), adapter_state(by_hand))


class Copy(TrainerCallback):
    """Gives the model the router of another one, which saw the data in another order."""

    def __init__(self, state, model):
        self.state, self.model = state, model

    def on_train_begin(self, args, state, control, **kwargs):
        assert bool(scope_of(self.model).router("default").is_initialized)
        self.model.load_state_dict({**self.model.state_dict(), **self.state})


def test_a_router_is_not_initialised_twice(tmp_path):
    model = adapt("bert")
    initialize_router(model, [text(batch=8)], progress=False)
    before = scope_of(model).router("default").centroids.clone()
    trainer_for(model, tmp_path, learning_rate=0.0, callbacks=[RouterCallback(progress=False)]).train()
    assert torch.equal(scope_of(model).router("default").centroids, before)


class Reporter(TrainerCallback):
    """What a reporting integration sees of the logs."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("installed", [True, False])
def test_load_and_entropy_reach_history_and_reporters(installed, tmp_path):
    model, reporter, callback = adapt("bert", routing="sample"), Reporter(), RouterCallback(progress=False)
    trainer = trainer_for(model, tmp_path, callbacks=[reporter, callback])
    if installed:
        callback.install(trainer)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert 0 <= entry["tucka/load_entropy"] <= 1
        assert sum(entry[f"tucka/share_{i}"] for i in range(3)) == pytest.approx(1)
    assert int(expert_load(model).sum()) == 6 * 4
    assert all(("tucka/load_entropy" in logs) == installed for logs in reporter.logs if "loss" in logs)


def test_with_several_adapters_the_metrics_carry_their_names(tmp_path):
    model = adapt("bert")
    model.add_adapter("other", config_for("bert", modules_to_save=None))
    callback = RouterCallback(progress=False)
    trainer = trainer_for(model, tmp_path, max_steps=2, callbacks=[callback])
    scope_of(model).load["other"][""] = torch.tensor([1, 0, 1])
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert "tucka/default/load_entropy" in entry
    assert not bool(scope_of(model).router("other").is_initialized)
