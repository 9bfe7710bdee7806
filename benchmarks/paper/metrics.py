"""GLUE's metrics, from scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def _accuracy_f1(labels: Any, predictions: Any) -> float:
    """Return the mean of accuracy and F1, which Table 1 reports for MRPC and QQP."""
    return float((accuracy_score(labels, predictions) + f1_score(labels, predictions)) / 2)


METRICS: dict[str, Callable[[Any, Any], float]] = {
    "accuracy": accuracy_score,
    "accuracy_f1": _accuracy_f1,
    "matthews": matthews_corrcoef,
}


def metric_of_logits(name: str) -> Callable[[Any], dict[str, float]]:
    """Make the Trainer's function for a metric of `METRICS`."""

    def compute(prediction: Any) -> dict[str, float]:
        logits, labels = prediction
        return {name: float(METRICS[name](labels, logits.argmax(-1)))}

    return compute
