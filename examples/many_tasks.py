"""Train one adapter on several tasks at once, and see which group of experts serves which task.

Run it: python examples/many_tasks.py
It takes seconds on a CPU, because the model is tiny and its data is made up. Replace `load_model` and `load_task`.
"""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from tucka import load_entropy
from tucka.peft import TuckAConfig, expert_load, initialize_router

TASKS = ("news", "reviews", "mail")
WORDS, LENGTH = 30, 12  # each task has words of its own


def load_model() -> nn.Module:
    """Make the base model; yours is AutoModelForSequenceClassification.from_pretrained("...", num_labels=2)."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=WORDS * len(TASKS), num_labels=2))


def load_task(place: int, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Make texts (N, S) and labels (N,) of one task; in the task "mail" the labels are the other way round."""
    generator = torch.Generator().manual_seed(100 * place + seed)
    labels = torch.arange(count) % 2
    is_own = torch.rand(count, LENGTH, generator=generator) < 0.8
    texts = torch.randint(0, WORDS // 2, (count, LENGTH), generator=generator)
    texts += WORDS * place + WORDS // 2 * (is_own == labels[:, None].bool())
    return texts, labels if TASKS[place] != "mail" else 1 - labels


def train(model: nn.Module, texts: Tensor, labels: Tensor, steps: int) -> None:
    """Train on batches that mix the tasks."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        rows = torch.randint(0, len(texts), (32,))
        model(input_ids=texts[rows], labels=labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(steps: int = 150) -> dict[str, tuple[float, list[int]]]:
    """Train, and return for each task its accuracy and how often each group was chosen for it."""
    torch.manual_seed(0)
    parts = [load_task(place, 200, seed=1) for place in range(len(TASKS))]
    texts, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    # One decision for each text, so that tasks do not disturb each other in a batch.
    config = TuckAConfig(
        r=8, k=len(TASKS), routing="sample", target_modules=["query", "value", "dense"], task_type="SEQ_CLS"
    )
    model = get_peft_model(load_model(), config)
    order = torch.randperm(len(texts))
    initialize_router(model, ({"input_ids": texts[rows]} for rows in order.split(50)), progress=False)
    train(model, texts, labels, steps)

    model.eval()
    found: dict[str, tuple[float, list[int]]] = {}
    for place, name in enumerate(TASKS):
        texts, labels = load_task(place, 200, seed=2)
        expert_load(model, reset=True)
        with torch.no_grad():
            right = model(input_ids=texts).logits.argmax(-1) == labels
        found[name] = (right.double().mean().item(), expert_load(model).tolist())
        accuracy, load = found[name]
        print(f"{name:8} accuracy {accuracy:.2f}, choices of each group {load}, entropy {load_entropy(load):.2f}")
    return found


if __name__ == "__main__":
    main()
