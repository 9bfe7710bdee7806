"""Fine-tune a causal language model with PEFT and the Trainer; generate, then fix the route and merge it for serving.

Run it: python examples/causal_model.py
It takes seconds on a CPU, because the model is tiny and its data is made up. Replace `load_model` and `load_data`.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from tucka.peft import RouterCallback, TuckAConfig, expert_load, pin_route

WORDS, LENGTH = 32, 16


def load_model() -> nn.Module:
    """Make the base model; yours is AutoModelForCausalLM.from_pretrained("...")."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=WORDS, bos_token_id=None, eos_token_id=None))


def load_data(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Make texts that count upwards from a random word; yours come from a tokenizer, with labels as here."""
    starts = torch.randint(0, WORDS, (count, 1), generator=torch.Generator().manual_seed(seed))
    texts = (starts + torch.arange(LENGTH)) % WORDS
    return [{"input_ids": text, "labels": text} for text in texts]


@torch.no_grad()
def loss_of(model: nn.Module, items: list[dict[str, Any]]) -> float:
    """Return the mean loss of all items."""
    model.eval()
    texts = torch.stack([item["input_ids"] for item in items])
    return model(input_ids=texts, labels=texts).loss.item()


def main(train_items: int = 256, epochs: int = 8) -> tuple[float, float, float]:
    """Train, generate, pin and merge; return the loss before, after, and after pinning the route."""
    set_seed(0)
    train, test = load_data(train_items, seed=1), load_data(64, seed=2)
    config = TuckAConfig(
        r=16,
        k=2,  # groups of experts
        routing="token",  # each token has its own route, which later tokens cannot change
        target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_model(), config)
    model.print_trainable_parameters()
    before = loss_of(model, test)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            logging_steps=32,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=train, callbacks=[RouterCallback(progress=False)]).train()
    after = loss_of(model, test)
    print(f"loss: {before:.2f} before, {after:.2f} after; choices of each group: {expert_load(model).tolist()}")

    prompt = torch.arange(5)[None]
    text = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    print("generated:", text[0].tolist())

    # With one route for all inputs the adapter is a matrix, which can be merged. Routed experts lose some of their fit.
    pin_route(model, batches=[{"input_ids": torch.stack([item["input_ids"] for item in train])}])
    pinned = loss_of(model, test)
    merged = model.merge_and_unload()
    print(f"loss with one route for all: {pinned:.2f}, merged: {loss_of(merged, test):.2f}")
    return before, after, pinned


if __name__ == "__main__":
    main()
