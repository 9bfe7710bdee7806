"""What keeps a router even: ways to start it, the bias on the choice, and the warning when it has collapsed."""

import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

import tucka
from support.adapting import adapt, snapshot, train
from support.tiny_models import inputs_for, loss_of, make, output_of, text
from tucka import reference
from tucka.backends.torch import Router
from tucka.backends.torch.routing.scope import scope_of
from tucka.core.centroids import kaiming_centroids
from tucka.errors import ConfigError, RouteError, ShapeError
from tucka.peft import (
    RouterCallback,
    TuckAConfig,
    balance_router,
    expert_load,
    initialize_router,
    last_route,
    pin_route,
)
from tucka.peft.routes.observation import RowSample
from tucka.spec import TuckerSpec

pytestmark = [
    # What the installed transformers, accelerate and torch say to each other.
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use_cpu.*:FutureWarning"),
]

BATCHES = [text(batch=16, seed=seed) for seed in range(4)]


def router_of(model):
    return scope_of(model).router("default")


# --- temperature and starts


@pytest.mark.parametrize("temperature", [0.25, 8.0])
def test_the_routers_gates_are_those_of_the_reference_at_its_temperature(temperature):
    model = adapt("plain", routing="sample", temperature=temperature, dtype=torch.float64, affinity="dot")
    inputs = inputs_for("plain", dtype=torch.float64)
    output_of(model, inputs)
    centroids = router_of(model).centroids.detach().numpy()
    for row, gates in zip(inputs["x"].numpy(), last_route(model).numpy(), strict=True):
        logits = reference.affinity_logits(row, centroids, "dot", temperature=temperature)
        np.testing.assert_allclose(gates, reference.select_gates(logits), atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"balance_rate": -1.0},
        {"router_init": "random"},
        {"router_init": "balanced", "affinity": "dot"},
    ],
)
def test_router_options_outside_their_rule_are_refused(options):
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}: expected"):
        TuckAConfig(**options)


@pytest.mark.parametrize("affinity", ["directional", "dot"])
@pytest.mark.parametrize("way", ["dai", "kaiming"])
def test_each_way_to_start_a_router_is_the_cores(way, affinity):
    model = adapt("plain", routing="sample", router_init=way, affinity=affinity, router_seed=4)
    rows = torch.randn(6, 10, 16) + 3
    initialize_router(model, rows, scale=0.5 if way == "dai" else None, progress=False)
    features = rows.reshape(-1, 16)
    center = features.mean(dim=0) if affinity == "directional" else torch.zeros(16)
    if way == "kaiming":
        expected = torch.from_numpy(kaiming_centroids((3, 2, 16), seed=4)).float()
    else:
        options = {"groups": 3, "experts_per_group": 2, "scale": 0.5, "seed": 4}
        expected = tucka.data_aware_centroids(features - center, **options)
    torch.testing.assert_close(router_of(model).centroids.detach(), expected)
    torch.testing.assert_close(router_of(model).center, center)


def test_a_scale_needs_the_start_that_has_one():
    with pytest.raises(ConfigError, match="scale: expected None with router_init='kaiming'"):
        initialize_router(adapt("bert", router_init="kaiming"), BATCHES, scale=1.0, progress=False)


@pytest.mark.parametrize("batches", [1, 2])
def test_fewer_batches_than_experts_suffice(batches):
    model = adapt("llama", routing="batch", k=8)
    initialize_router(model, [text(batch=2, seed=seed) for seed in range(batches)], progress=False)
    assert torch.isfinite(router_of(model).centroids).all()
    assert router_of(model).centroids.flatten(1).norm(dim=1).min() > 0


def test_batches_of_alike_samples_are_split_evenly_too():
    # Samples vary most along one axis and batches along another, as batches sorted by length do.
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 1, 16, generator=generator) * torch.tensor([1.0, 3.0] + 14 * [0.01])
    rows = shared + torch.randn(400, 8, 16, generator=generator) * torch.tensor([9.0] + 15 * [0.01])
    model = adapt("plain", routing="batch", k=4, t=1, gate_norm=False)
    initialize_router(model, rows[:40], max_batches=40, progress=False)
    with torch.no_grad():
        for batch in rows[40:]:
            model(batch)
    assert tucka.load_entropy(expert_load(model)) > 0.9


def test_a_sample_of_rows_is_bounded_uniform_and_the_same_for_a_seed():
    stream = [torch.arange(start, start + 10.0)[:, None] for start in range(0, 1000, 10)]

    def sample(limit, seed):
        kept = RowSample(limit, 1, seed=seed)
        for rows in stream:
            kept.add(rows)
            assert len(kept.gather()) <= limit
        return kept.gather().flatten()

    first = sample(100, 0)
    assert torch.equal(first, sample(100, 0))
    assert not torch.equal(first, sample(100, 1))
    assert len(first.unique()) == 100
    # The mean of 100 of 0..999 without replacement: 499.5 within five standard errors.
    assert abs(float(first.mean()) - 499.5) < 5 * 288.7 / 10
    assert torch.equal(sample(1000, 0), torch.arange(1000.0))


# --- the bias on the choice


def test_the_bias_moves_as_the_reference_and_shows_in_the_choice_alone():
    torch.manual_seed(0)
    spec = TuckerSpec(groups=3, routing="sample", balance_rate=0.25)
    router, plain = Router(spec, 6), Router(TuckerSpec(groups=3, routing="sample"), 6)
    hidden = torch.randn(40, 6)
    bias = np.zeros(3)
    for _ in range(6):
        gates = router(hidden)
        load = gates.any(dim=-1).sum(dim=0)
        bias = reference.moved_bias(bias, load.numpy(), 0.25)
        router.update_bias(load)
        np.testing.assert_allclose(router.choice_bias.numpy(), bias)
    desired = [
        reference.select_gates(logits.numpy(), True, bias) for logits in plain.logits(plain.feature(hidden)).detach()
    ]
    np.testing.assert_allclose(router(hidden).detach().numpy(), np.array(desired), atol=1e-6)


def test_the_bias_balances_a_router_that_had_collapsed():
    router = Router(TuckerSpec(groups=4, routing="sample", affinity="dot", balance_rate=0.05), 8)
    hidden = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 3

    def load():
        return router(hidden).any(dim=-1).sum(dim=0)

    before = tucka.load_entropy(load())
    for _ in range(200):
        router.update_bias(load())
    assert before < 0.7
    assert tucka.load_entropy(load()) > 0.98


def test_a_forward_leaves_the_bias_alone_and_without_a_rate_there_is_none():
    model = adapt("bert", balance_rate=0.1).train()
    before = snapshot(model)
    loss_of(model, inputs_for("bert")).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any("choice_bias" in name for name in before)
    assert not any("choice_bias" in name for name in adapt("bert").state_dict())


def test_the_bias_is_saved_and_loaded(tmp_path):
    model = adapt("bert", routing="sample", balance_rate=0.5, temperature=2.0)
    balance_router(model, torch.tensor([5, 0, 1]))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make("bert"), tmp_path).eval()
    assert router_of(loaded).choice_bias.tolist() == [-0.5, 0.5, 0.5]
    assert router_of(loaded).spec.temperature == 2.0
    inputs = inputs_for("bert")
    torch.testing.assert_close(output_of(loaded, inputs), output_of(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_stays_wide_in_a_half_precision_model(dtype):
    router = Router(TuckerSpec(groups=2, balance_rate=1e-3), 4)
    router.update_bias(torch.tensor([9, 1]))
    router.to(dtype)
    for _ in range(999):
        router.update_bias(torch.tensor([9, 1]))
    assert router.center.dtype == dtype
    torch.testing.assert_close(router.choice_bias, torch.tensor([-1.0, 1.0]), atol=1e-4, rtol=0)
    assert router.double().choice_bias.dtype == torch.float64


def test_a_new_start_sets_the_bias_back():
    model = adapt("bert", balance_rate=0.5)
    balance_router(model, [5, 0, 1])
    initialize_router(model, BATCHES[:1], progress=False)
    assert router_of(model).choice_bias.tolist() == [0, 0, 0]


def test_balancing_refuses_what_does_not_fit():
    model = adapt("bert", balance_rate=0.5)
    with pytest.raises(ShapeError, match=r"load: expected axes \(k\) with k = 3"):
        balance_router(model, torch.ones(2))
    pin_route(model, group=0)
    with pytest.raises(RouteError, match="pinned"):
        balance_router(model, torch.ones(3))


def test_a_router_with_a_bias_compiles_whole():
    router = Router(TuckerSpec(groups=3, routing="sample", balance_rate=0.5), 6)
    compiled = torch.compile(router, fullgraph=True, backend="eager")
    hidden = torch.randn(4, 6)
    for load in ([1, 0, 0], [0, 9, 0]):
        torch.testing.assert_close(compiled(hidden), router(hidden))
        router.update_bias(torch.tensor(load))
    torch.testing.assert_close(compiled(hidden), router(hidden))


# --- in the Trainer


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
    scope_of(model).observers["default"] = lambda x, mask, gates: routed.append((model.training, gates.detach()))
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
    with pytest.warns(UserWarning, match="load entropy of at least 0.5, got 0.00: 100% of the routings") as caught:
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


def test_training_without_the_trainer_balances_too():
    model = adapt("bert", routing="sample", balance_rate=0.5)
    train(model, inputs_for("bert"), steps=1)
    load = expert_load(model, reset=True)
    balance_router(model, load)
    expected = reference.moved_bias(np.zeros(3), load.numpy(), 0.5)
    np.testing.assert_allclose(router_of(model).choice_bias.numpy(), expected)
