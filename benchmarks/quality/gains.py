"""How much the outputs of the adapted layers change for a small change of their inputs, in the models of the tasks.

    python -m benchmarks.quality.gains

Writes ``gains.md`` beside the results of the tasks.
"""

from __future__ import annotations

from statistics import median

import peft
from torch import nn

from benchmarks.provenance import commit
from benchmarks.quality.run import RESULTS
from benchmarks.quality.tasks import TASKS
from tucka.backends.torch.base_layers import step_gain
from tucka.peft import TuckAConfig
from tucka.peft.layer import TuckALayer
from tucka.peft.merging import readable_weight

MODELS = {"MiniLM": "sentences", "EfficientNet-lite0": "images", "SmolLM2-135M": "causal"}


def gains(model: nn.Module) -> dict[str, list[float]]:
    """Measure the adapted layers of a model, by the last two parts of their names that are no numbers."""
    found: dict[str, list[float]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, TuckALayer):
            gain = step_gain(layer.get_base_layer(), readable_weight(layer))
            kind = [part for part in name.removeprefix("base_model.model.").split(".") if not part.isdigit()]
            if gain is not None:
                found.setdefault(".".join(kind[-2:]), []).append(gain)
    return found


def table(measured: dict[str, dict[str, list[float]]]) -> str:
    """Write one row for each kind of layer of each model."""
    lines = ["| model | layers | gain, least | median | most |", "|---|---|---:|---:|---:|"]
    for model, kinds in measured.items():
        for kind, values in kinds.items():
            texts = [f"{value:.1f}" for value in (min(values), median(values), max(values))]
            lines.append(f"| {model} | {len(values)} × `{kind}` | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the tasks' models and write the table."""
    measured = {}
    for model, task in MODELS.items():
        task_ = TASKS[task]()
        problem = task_.load(task_.quick)
        config = TuckAConfig(target_modules=list(problem.targets), k=1)
        measured[model] = gains(peft.get_peft_model(problem.model(0), config))
    said = f"Made by `python -m benchmarks.quality.gains` at commit {commit()}."
    (RESULTS / "gains.md").write_text(f"# Gains\n\n{table(measured)}\n\n{said}\n", "utf-8")


if __name__ == "__main__":
    main()
