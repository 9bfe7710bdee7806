"""Train one adapter on several tasks: the caller says which group of experts an input uses. Then add one more task.

Run it: python examples/many_tasks.py
It takes seconds on a CPU, because the model is tiny and its data is made up. Replace `load_model` and `load_task`.
"""

from __future__ import annotations

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from tucka.peft import TuckAConfig, add_group, given_route

WORDS, LENGTH = 32, 12
# Questions about the same words, so no router could tell from a text which group it needs.
TASKS = {
    "large": lambda words: words >= WORDS // 2,
    "odd": lambda words: words % 2 == 1,
    "small": lambda words: words < WORDS // 2,
}


def load_model() -> nn.Module:
    """Make the base model; yours is AutoModelForSequenceClassification.from_pretrained("...", num_labels=2)."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(**sizes, vocab_size=WORDS, num_labels=2))


def load_task(name: str, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Make texts (N, S), most of whose words give the answers (N,) to the question of one task."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.arange(WORDS)
    yes, no = words[TASKS[name](words)], words[~TASKS[name](words)]
    labels = torch.arange(count) % 2
    says_yes = (torch.rand(count, LENGTH, generator=generator) < 0.8) == labels[:, None].bool()
    drawn = torch.randint(0, WORDS // 2, (count, LENGTH), generator=generator)
    return torch.where(says_yes, yes[drawn], no[drawn]), labels


def train(model: nn.Module, tasks: list[str], parameters: list[nn.Parameter], *, rate: float, steps: int) -> None:
    """Train some parameters on batches that mix the tasks."""
    data = {name: load_task(name, 400, seed=1) for name in tasks}
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        rows = torch.randint(0, 400, (len(tasks), 16))
        texts = torch.cat([data[name][0][row] for name, row in zip(tasks, rows, strict=True)])
        labels = torch.cat([data[name][1][row] for name, row in zip(tasks, rows, strict=True)])
        groups = [name for name in tasks for _ in range(16)]  # one for each text
        with given_route(model, groups=groups):
            model(input_ids=texts, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, name: str) -> float:
    """Return the share of right answers in one task."""
    texts, labels = load_task(name, 400, seed=2)
    model.eval()
    with given_route(model, groups=name):  # one group for all
        right = model(input_ids=texts).logits.argmax(dim=-1) == labels
    return right.double().mean().item()


def main(steps: int = 100) -> tuple[dict[str, float], dict[str, float]]:
    """Train on all tasks but the last, then add it; return the accuracies before and after."""
    torch.manual_seed(0)
    *first, last = TASKS
    config = TuckAConfig(
        r=8,
        k=len(first),
        routing="given",  # no router: each call is made under `given_route`
        group_names=first,
        target_modules=["query", "value", "dense"],
        task_type="SEQ_CLS",
    )
    model = get_peft_model(load_model(), config)
    model.print_trainable_parameters()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    train(model, first, trained, rate=5e-3, steps=steps)
    before = {name: accuracy(model, name) for name in first}

    # The new group has a core of zeros in each layer. It trains alone, so the other tasks keep their answers; a core
    # has few numbers and needs a large learning rate.
    add_group(model, name=last)
    cores = [parameter for name, parameter in model.named_parameters() if name.endswith("cores")]
    train(model, [last], cores, rate=0.3, steps=steps)
    after = {name: accuracy(model, name) for name in TASKS}
    for when, found in (("before", before), ("after", after)):
        print(f"{when:6}", ", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    return before, after


if __name__ == "__main__":
    main()
