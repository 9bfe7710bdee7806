"""The demo's sizes, learning rates and results, as plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["HEAD_ONLY", "LORA", "MAJORITY", "TUCKA", "Outcome", "Plan"]

MAJORITY, HEAD_ONLY, LORA, TUCKA = "larger class", "head only", "LoRA", "TuckA"


@dataclass(frozen=True)
class Plan:
    """What one run of the demo does.

    Parameters
    ----------
    seed : int
        Of the head, the adapters, the order of the batches and dropout; the split does not depend on it.
    train_per_domain : int, optional
        Training sentences of each domain; all there are if None.
    test_per_domain : int
        Test sentences of each domain.
    epochs : int
        Passes over the training sentences, for every method.
    batch_size : int
        Sentences in a training batch.
    max_length : int
        Tokens of a sentence; the rest is cut.
    rank : int
        Of LoRA and of TuckA.
    groups : int
        Expert groups of TuckA (k), of two experts each.
    """

    seed: int = 0
    train_per_domain: int | None = 400
    test_per_domain: int = 500
    epochs: int = 2
    batch_size: int = 32
    max_length: int = 64
    rank: int = 8
    groups: int = 4

    @property
    def learning_rates(self) -> dict[str, float]:
        """The one recommended learning rate of each method.

        Returns
        -------
        dict of str to float
            By the method's name.
        """
        return {HEAD_ONLY: 1e-2, LORA: 3e-3, TUCKA: 2e-3}


@dataclass(frozen=True)
class Outcome:
    """What one method cost and reached.

    Parameters
    ----------
    method : str
        Its name.
    sizes : str
        The adapter's, for people.
    accuracy : dict of str to float
        By domain, on its test sentences.
    adapter_parameters : int
        Trained in the encoder.
    head_parameters : int
        Trained in the head.
    seconds : float
        Of training.
    learning_rate : float, optional
        The one it was trained with; None if it was not trained.
    load : dict of str to list of float
        For a routed method, how often each group was chosen: in training, and for the test sentences of each domain.
    log : list of dict
        What the Trainer logged.
    """

    method: str
    sizes: str
    accuracy: dict[str, float]
    adapter_parameters: int = 0
    head_parameters: int = 0
    seconds: float = 0.0
    learning_rate: float | None = None
    load: dict[str, list[float]] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The method with its sizes.

        Returns
        -------
        str
            Such as ``"LoRA r=8"``.
        """
        return f"{self.method} {self.sizes}".strip()

    @property
    def mean(self) -> float:
        """The mean accuracy of the domains.

        Returns
        -------
        float
            Between 0 and 1.
        """
        return sum(self.accuracy.values()) / len(self.accuracy)

    def error(self, tested: int) -> float:
        """Return the standard error of the mean accuracy that comes from the choice of test sentences.

        Parameters
        ----------
        tested : int
            Test sentences of each domain.

        Returns
        -------
        float
            A share, like the accuracy.

        Examples
        --------
        >>> round(Outcome("some", "", {"news": 0.9}).error(900), 3)
        0.01
        """
        variances = sum(value * (1 - value) / tested for value in self.accuracy.values())
        return math.sqrt(variances) / len(self.accuracy)
