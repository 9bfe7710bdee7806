"""TRL's trainers: what they lay out, copy and generate reaches the routes."""

import pytest
import torch

from clients.small import ROUTINGS, TEXTS, adapted, arguments, losses, reward_model, tokenizer
from tucka.backends.torch.routing.scope import scope_of
from tucka.peft import RouterCallback, initialize_router, last_route

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PAIRS = datasets.Dataset.from_dict(
    {
        "prompt": TEXTS * 4,
        "chosen": [text.upper() for text in TEXTS] * 4,
        "rejected": [text[::-1] for text in TEXTS] * 4,
    }
)


def trains(trainer, model, *, starts=True):
    """Train, and assert that the loss and the trained tensors moved and the router was started."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer.train()
    assert all(map(torch.isfinite, map(torch.tensor, losses(trainer))))
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any("tucka_experts" in name for name in changed)
    assert all("tucka_" in name or "modules_to_save" in name for name in changed)
    assert any(router.waits for router in scope_of(model).routers("default").values()) != starts
    return losses(trainer)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", [{}, {"packing": True}, {"padding_free": True, "max_length": None}], ids=str)
def test_supervised(tmp_path, routing, layout):
    if routing == "batch" and layout:
        pytest.skip("Several documents in one row are refused for batch routing")
    model = adapted(routing)
    data = datasets.Dataset.from_dict({"text": [f"{text}. {text}" for text in TEXTS] * 8})
    options = arguments(trl.SFTConfig, tmp_path, max_steps=8, **{"max_length": 64, **layout})
    trainer = trl.SFTTrainer(
        model=model, args=options, train_dataset=data, processing_class=tokenizer(), callbacks=[callback()]
    )
    found = trains(trainer, model)
    assert found[-1] < found[0] - 0.05


def callback():
    return RouterCallback(progress=False)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_preferences(tmp_path, routing):
    model = adapted(routing)
    options = arguments(trl.DPOConfig, tmp_path)
    trainer = trl.DPOTrainer(
        model=model, args=options, train_dataset=PAIRS, processing_class=tokenizer(), callbacks=[callback()]
    )
    found = trains(trainer, model)
    assert found[-1] < 0.69  # from log 2


def test_the_reference_of_a_trained_adapter_is_a_copy_of_it(tmp_path):
    model = adapted("sample", init_weights=False).eval()
    inputs = dict(tokenizer()(TEXTS, return_tensors="pt", padding=True))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    initialize_router(model, [inputs], progress=False)
    options = arguments(trl.DPOConfig, tmp_path, max_steps=1, learning_rate=0.0)
    trainer = trl.DPOTrainer(model=model, args=options, train_dataset=PAIRS, processing_class=tokenizer())
    assert set(model.peft_config) == {"default", "ref"}
    with torch.no_grad():
        policy = model.eval()(**inputs).logits
        model.set_adapter("ref")
        assert torch.equal(model(**inputs).logits, policy)
        model.set_adapter("default")
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.parametrize("routing", ["sample", "token"])
def test_policies(tmp_path, routing):
    model = adapted(routing)
    options = arguments(
        trl.GRPOConfig, tmp_path, max_steps=2, num_generations=4, max_completion_length=6, beta=0.1, temperature=1.0
    )
    data = datasets.Dataset.from_dict({"prompt": TEXTS * 4})
    trainer = trl.GRPOTrainer(
        model=model,
        args=options,
        train_dataset=data,
        processing_class=tokenizer("left"),
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text)) % 7) for text in completions],
        callbacks=[callback()],
    )
    # Its batches are no inputs of the model. These few completions are enough to start from tokens, not from samples.
    trains(trainer, model, starts=routing == "token")
    assert torch.isfinite(last_route(model)).all()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_rewards(tmp_path, routing):
    model = adapted(routing, base=reward_model(), task_type="SEQ_CLS")
    options = arguments(trl.RewardConfig, tmp_path, max_steps=6)
    trainer = trl.RewardTrainer(
        model=model, args=options, train_dataset=PAIRS, processing_class=tokenizer(), callbacks=[callback()]
    )
    found = trains(trainer, model)
    assert found[-1] < found[0]
