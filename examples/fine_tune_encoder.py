"""Fine-tune an encoder as a classifier with PEFT and the Trainer; save the adapter and load it again.

Run it: python examples/fine_tune_encoder.py
It takes seconds on a CPU, because the model is tiny and its data is made up. Replace `load_model` and `load_data`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from tucka.peft import RouterCallback, TuckAConfig

WORDS, LENGTH = 100, 12


def load_model() -> nn.Module:
    """Make the base model; yours is AutoModelForSequenceClassification.from_pretrained("...", num_labels=2)."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=WORDS, num_labels=2))


def load_data(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Make texts whose words are mostly below 50 (label 0) or above (label 1); yours come from a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for index in range(count):
        label = index % 2
        is_own = torch.rand(LENGTH, generator=generator) < 0.8
        words = torch.randint(1, WORDS // 2, (LENGTH,), generator=generator)
        words += WORDS // 2 * (is_own == bool(label))
        items.append({"input_ids": words, "attention_mask": torch.ones_like(words), "labels": label})
    return items


@torch.no_grad()
def predict(model: nn.Module, items: list[dict[str, Any]]) -> torch.Tensor:
    """Compute the logits of all items, (N, 2)."""
    model.eval()
    return model(input_ids=torch.stack([item["input_ids"] for item in items])).logits


def accuracy(model: nn.Module, items: list[dict[str, Any]]) -> float:
    """Return the share of right answers."""
    right = predict(model, items).argmax(-1) == torch.tensor([item["labels"] for item in items])
    return right.double().mean().item()


def main(train_items: int = 400, epochs: int = 4) -> tuple[float, float]:
    """Train, save and load again; return the accuracy before and after."""
    set_seed(0)
    train, test = load_data(train_items, seed=1), load_data(200, seed=2)
    config = TuckAConfig(
        r=8,
        k=2,  # groups of experts
        routing="sample",  # each text has its own route, whatever else is in its batch
        target_modules=["query", "value", "dense"],
        task_type="SEQ_CLS",  # trains the classifier too
    )
    base = load_model()
    model = get_peft_model(base, config)
    model.print_trainable_parameters()
    before = accuracy(model, test)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=16,
            learning_rate=5e-3,
            logging_steps=25,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
        )
        # The callback starts the router from the training data, and logs how evenly its groups are used.
        Trainer(model, arguments, train_dataset=train, callbacks=[RouterCallback(progress=False)]).train()
        after = accuracy(model, test)
        print(f"accuracy: {before:.2f} before, {after:.2f} after")

        adapter = Path(folder) / "adapter"
        model.save_pretrained(adapter)
        set_seed(0)  # the same base, which here is random and not pretrained
        again = PeftModel.from_pretrained(load_model(), adapter)
    print("the loaded adapter predicts the same:", torch.equal(predict(again, test), predict(model, test)))
    return before, after


if __name__ == "__main__":
    main()
