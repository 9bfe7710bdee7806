"""Checks of generation: the same logits with a cache and without, in a padded batch and alone, by beams, assisted."""

from typing import Any

import torch
from torch import Tensor, nn

from architectures.adapted import BATCH, Adapted, NothingToCheckError
from architectures.outputs import Inputs, gap, inputs_of, row_of

_PLACE_OF_AN_IMAGE = 3
_ONE_TOKEN_AT_A_TIME = ("prophetnet",)


def with_cache(adapted: Adapted) -> None:
    """With and without a cache the same logits."""
    adapted.needs_generation()
    _compare(adapted, "cache", {"use_cache": False}, adapted.family.prompts(2, 5, seed=3))


def by_beams(adapted: Adapted) -> None:
    """Beam search finds the same scores with and without a cache."""
    adapted.needs_generation()
    _compare(adapted, "beams", {"use_cache": False}, adapted.family.prompts(2, 5, seed=3), num_beams=2)


def assisted(adapted: Adapted) -> None:
    """Candidates looked up in the prompt do not change the text."""
    adapted.needs_generation()
    if adapted.family.name in _ONE_TOKEN_AT_A_TIME:
        raise NothingToCheckError("the base takes one token at a time")
    prompts = adapted.family.prompts(1, 6, seed=4)
    if set(prompts) == {"input_ids"}:
        prompts = {"input_ids": torch.cat([prompts["input_ids"]] * 2, dim=1)}
    _compare(adapted, "assisted", {"prompt_lookup_num_tokens": 2}, prompts)


def padded(adapted: Adapted) -> None:
    """A padded prompt generates what it generates alone."""
    adapted.needs_generation()
    adapted.needs_rows()
    prompts = adapted.family.prompts(BATCH, 6, padding=True, seed=3)

    def measure(model: nn.Module) -> dict[str, float]:
        together = _generated(model, prompts)
        found = {}
        for row in range(BATCH):
            alone = _generated(model, inputs_of(prompts, row, BATCH))
            pairs = zip(together, alone, strict=False)
            found[f"row {row}"] = max((gap(row_of(both, row, BATCH), own) for both, own in pairs), default=0.0)
        return {"the logits": max(found.values())}

    adapted.check_within_base("padded prompts", adapted.model.get_base_model(), measure)


def _compare(adapted: Adapted, key: str, other: dict[str, Any], prompts: Inputs, **options: Any) -> None:
    def measure(model: nn.Module) -> dict[str, float]:
        pairs = zip(_generated(model, prompts, **options), _generated(model, prompts, **options, **other), strict=False)
        return {"the logits": max((gap(first, second) for first, second in pairs), default=0.0)}

    adapted.check_within_base(key, adapted.model.get_base_model(), measure)


def _generated(model: Any, prompts: Inputs, **options: Any) -> list[Tensor]:
    """Generate four tokens; return the logits of each step, or the scores of the beams."""
    torch.manual_seed(0)
    ids = prompts.get("input_ids")
    if ids is not None and (ids == _PLACE_OF_AN_IMAGE).any():
        options["suppress_tokens"] = [_PLACE_OF_AN_IMAGE]
    options |= {"output_scores": True} if "num_beams" in options else {"output_logits": True}
    made = model.generate(**prompts, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, **options)
    return [made.sequences_scores] if "num_beams" in options else [*made.logits]
