"""Questions with worked answers for a causal language model: MetaMathQA, tested on GSM8K and MATH."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import load_dataset
from math_verify import parse, verify
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

from benchmarks.paper.experiments import Model, Task
from benchmarks.paper.problem import Metrics, Problem

_IGNORED = -100
_MARK = "The answer is:"  # ends every worked answer of MetaMathQA


@dataclass(frozen=True)
class Data:
    """A set of questions and answers, with the columns ``instruction``, ``output`` and ``type``."""

    path: str  # of the hub
    folder: str  # in its test split, output is the bare result, and type the set that the question is from
    train_rows: int  # so many, the first ones, are trained on
    max_length: int  # tokens of a question with its answer; the rest is cut
    max_new_tokens: int  # of a generated answer
    generation_batch: int  # questions that are answered at a time
    prompt: str  # with {instruction} in it


def prompted(instruction: str, prompt: str) -> str:
    """Put a question into its prompt, unless it already has one."""
    prompt = prompt.strip()
    start = prompt.partition("{instruction}")[0]
    return instruction if instruction.startswith(start) else prompt.replace("{instruction}", instruction)


def tokenized(question: str, answer: str, tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    """Tokenise a question with its answer; only the answer's tokens are learned."""
    whole = tokenizer(f"{question}{answer}\n{tokenizer.eos_token}", truncation=True, max_length=max_length)["input_ids"]
    asked = len(tokenizer(question, truncation=True, max_length=max_length)["input_ids"])
    return {
        "input_ids": whole,
        "attention_mask": [1] * len(whole),
        "labels": [_IGNORED] * min(asked, len(whole)) + whole[asked:],
    }


def is_right(result: str, response: str) -> bool:
    """Compare what stands behind the last ``The answer is:`` of a response with the right result."""
    _, mark, said = response.rpartition(_MARK)
    lines = said.strip().splitlines()
    if not mark or not lines:
        return False
    said = lines[0].strip().rstrip(".").strip("$ ")
    return bool(verify(parse(f"${result}$"), parse(f"${said}$")))


def answers(model: nn.Module, tokenizer: Any, questions: Sequence[str], data: Data) -> list[str]:
    """Generate answers, with the most likely token at each place."""
    found: list[str] = []
    tokenizer.padding_side = "left"
    device = next(model.parameters()).device
    for start in range(0, len(questions), data.generation_batch):
        batch = tokenizer(list(questions[start : start + data.generation_batch]), return_tensors="pt", padding=True)
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            tokens = model.generate(
                **inputs, do_sample=False, max_new_tokens=data.max_new_tokens, pad_token_id=tokenizer.pad_token_id
            )
        asked = inputs["input_ids"].shape[1]
        found += tokenizer.batch_decode(tokens[:, asked:], skip_special_tokens=True)
    return found


def scorer(test: Any, tokenizer: Any, data: Data) -> Callable[[nn.Module], Metrics]:
    """Make the function that tests a model: the share of right answers in each set; processes share the questions."""
    rows = [(row["type"].lower(), prompted(row["instruction"], data.prompt), str(row["output"])) for row in test]

    def score(model: nn.Module) -> Metrics:
        model.eval()
        right: list[tuple[str, bool]] = []
        with PartialState().split_between_processes(rows) as mine:
            responses = answers(model, tokenizer, [question for _, question, _ in mine], data)
            for (kind, _, result), response in zip(mine, responses, strict=True):
                right.append((kind, is_right(result, response)))
        hits: dict[str, list[bool]] = {}
        for kind, hit in gather_object(right):
            hits.setdefault(kind, []).append(hit)
        return {kind: sum(values) / len(values) for kind, values in hits.items()}

    return score


def problem(model: Model, task: Task, *, pads_to_max_length: bool) -> Problem:
    """Load a task and the model for it; batches are padded to their longest text, as in the authors' script."""
    del pads_to_max_length
    data = Data(**task.data)
    splits = load_dataset(data.path, data_dir=data.folder)
    tokenizer = AutoTokenizer.from_pretrained(model.name)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def encode(row: dict[str, str]) -> dict[str, list[int]]:
        return tokenized(prompted(row["instruction"], data.prompt), row["output"], tokenizer, data.max_length)

    source = splits["train"]
    source = source.select(range(min(data.train_rows, len(source))))
    train = source.map(encode, remove_columns=source.column_names)
    base = AutoModelForCausalLM.from_pretrained(model.name, dtype=getattr(torch, model.dtype))
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=_IGNORED)
    return Problem(base, train, collator, score=scorer(splits["test"], tokenizer, data))
