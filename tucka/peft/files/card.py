"""The model card beside an adapter's files: what it is, and that loading it needs tucka."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open

from tucka._version import __version__

__all__ = ["write_card"]

_BEGIN, _END = "<!-- tucka: begin -->", "<!-- tucka: end -->"
# The title of what PEFT writes where there is no card: a form that nobody has filled in.
_FORM = "# Model Card for Model ID"
_ROUTING = {
    "batch": "one route for a batch",
    "sample": "one route for each sample",
    "token": "one route for each token",
    "given": "the caller gives the route of each sample (`tucka.peft.given_route`)",
}
_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def write_card(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write or renew the card of a folder with an adapter's tensors; a card that someone has written stays."""
    if not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        return
    path = folder / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard.from_template(ModelCardData())
    text = _text(folder, entries)
    if _BEGIN in card.text and _END in card.text:
        before, rest = card.text.split(_BEGIN, 1)
        card.text = before + text + rest.split(_END, 1)[1]
    elif _FORM in card.text:
        card.text = text + "\n"
    else:
        return
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.tags or ()), "tucka"})
    if entries["base_model_name_or_path"]:
        card.data["base_model"] = entries["base_model_name_or_path"]
    card.save(path)


def _text(folder: Path, entries: Mapping[str, Any]) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(folder, entries).items())
    return f"""{_BEGIN}
# A TuckA adapter

The weights of a [TuckA](https://arxiv.org/abs/2511.06859) adapter: groups of Tucker-structured experts that adapt the
inputs of some layers of a frozen base model. The Python package `tucka` made it, which adds this method to PEFT.

## How to load it

```console
$ pip install "tucka[peft]"
```

```python
{_snippet(entries)}
```

Without the first line PEFT does not know the method, and raises `KeyError: 'TUCKA'`.

## What it is

| | |
|---|---|
{rows}
{_END}"""


def _snippet(entries: Mapping[str, Any]) -> str:
    base, kind = entries["base_model_name_or_path"], _CLASSES.get(str(entries["task_type"] or ""))
    lines = ["import tucka.peft  # makes the method known to PEFT", "from peft import PeftModel"]
    made = "base = ...  # the model that the adapter was trained on"
    if base and kind:
        lines.append(f"from transformers import {kind}")
        made = f'base = {kind}.from_pretrained("{base}")'
    return "\n".join([*lines, "", made, 'model = PeftModel.from_pretrained(base, "path or name of this repository")'])


def _rows(folder: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    targets = entries["target_modules"]
    listed = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
    routing = _ROUTING.get(entries["routing"], "chosen by the model")
    rows = {
        "base model": entries["base_model_name_or_path"] or "not recorded",
        "layers": _code(listed),
        "rank r, groups k, experts of a group t, rank of their mode p": ", ".join(str(entries[key]) for key in "rktp"),
        "other ranks": _listed(entries["rank_pattern"]),
        "scale α": entries["alpha"],
        "other scales": _listed(entries["alpha_pattern"]),
        "routing": routing if entries["pinned_gates"] is None else "pinned: one fixed route, no router runs",
        "modules saved whole": ", ".join(entries["modules_to_save"] or ()) or "none",
        "numbers in the file": _count(folder / SAFETENSORS_WEIGHTS_NAME),
        "versions": f"tucka {__version__}, PEFT {entries['peft_version']}",
    }
    return {name: value for name, value in rows.items() if value is not None}


def _listed(pattern: Mapping[str, Any] | None) -> str | None:
    return ", ".join(f"{value} in {_code(name)}" for name, value in (pattern or {}).items()) or None


def _code(text: str) -> str:
    """Set names or a regular expression in a cell of a table, which ends at a bar."""
    escaped = text.replace("|", r"\|")
    return f"`{escaped}`"


def _count(path: Path) -> str | None:
    """Count the numbers of a file by its header."""
    if not path.is_file():
        return None
    with safe_open(path, framework="numpy") as tensors:
        return f"{sum(math.prod(tensors.get_slice(key).get_shape()) for key in tensors.keys()):,}"  # noqa: SIM118
