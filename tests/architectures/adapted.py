"""An architecture and its base model, and an adapter on it: what all checks start from."""

import contextlib
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from architectures.outputs import Inputs, Values, call, gaps, run, same, worst
from tucka.peft import TuckAConfig

LORA = "lora"
BATCH, LENGTH = 3, 7
# Sums of float32 in another order; a wrong route moves outputs by tenths.
NEAR = 2e-3
# What kernels round that are called in another way.
ROUNDED = 1e-5


class WrongError(Exception):
    """A result is not what it must be."""


class NothingToCheckError(Exception):
    """The check does not apply, or the base model fails or changes by itself."""


class Subject:
    """One architecture, its base model and what is known of that."""

    def __init__(self, family: Any, targets: Any = None) -> None:
        self.family = family
        self.targets = targets or [*family.targets]
        self.base = family.build()
        self.plain: Inputs = family.inputs(BATCH, LENGTH)
        self.padded: Inputs = family.inputs(BATCH, LENGTH, padding=True, seed=1)
        # Whether kernels round otherwise where LoRA is put on, or where the adapter calls a layer that is else fused.
        self.rounds = getattr(family, "rounds", False)
        self.hides = False  # whether LoRA does not show in the outputs
        self.moved: set[str] = set()  # the layers that LoRA trains
        self._known: dict[str, Any] = {}

    def copy(self) -> nn.Module:
        """Another model like the base."""
        return deepcopy(self.base)

    def of_base(self, key: str, measure: Callable[[nn.Module], Any]) -> Any:
        """Measure something on the base model, once; where the base raises, there is nothing to check."""
        if key not in self._known:
            try:
                self._known[key] = measure(self.base)
            except Exception as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, Exception):
            raise NothingToCheckError(f"the base raises {type(found).__name__}") from found
        return found

    def adapt(self, method: str | None, base: nn.Module) -> nn.Module:
        """Put a new adapter on a model, in evaluation mode."""
        torch.manual_seed(100)
        if method == LORA:
            config: Any = LoraConfig(r=2, target_modules=self.targets)
        else:
            options = {"r": 2, "k": 3, "t": 2, "p": 2, **getattr(self.family, "options", {})}
            config = TuckAConfig(routing=method, target_modules=self.targets, **options)
        return get_peft_model(base, config).eval()


class Adapted:
    """One architecture with an adapter, through its life."""

    def __init__(self, subject: Subject, method: str | None) -> None:
        self.subject = subject
        self.family = subject.family
        self.method = method
        self.model = subject.adapt(method, subject.copy())
        self.routing = None if method == LORA else self.model.peft_config["default"].routing

    @property
    def is_lora(self) -> bool:
        return self.method == LORA

    def needs_rows(self) -> None:
        """Leave out batch routing, in which outputs depend on what else is in the batch by definition."""
        if self.routing == "batch":
            raise NothingToCheckError("one route for the batch")

    def needs_padding(self) -> None:
        if not self.family.pads:
            raise NothingToCheckError("has no masks")

    def needs_generation(self) -> None:
        if not self.family.generates:
            raise NothingToCheckError("does not generate")

    def check_equal(self, values: Values, wanted: Values, inputs: Inputs) -> None:
        """Raise unless two results are equal bit for bit, or nearly where kernels round by where tensors are."""
        if same(values, wanted):
            return
        subject = self.subject
        if self.is_lora:
            subject.rounds = True
        copies = subject.of_base("copy", lambda model: same(run(deepcopy(model), inputs), run(model, inputs)))
        far, name = worst(gaps(values, wanted))
        if values.keys() != wanted.keys() or not (subject.rounds or not copies) or far > ROUNDED:
            raise WrongError(f"{name or 'the output'} differs by {far:.2g}")

    def check_within_base(self, key: str, model: nn.Module, measure: Callable[[nn.Module], dict[str, float]]) -> None:
        """Raise where outputs move that do not move in the base."""
        by_base = self.subject.of_base(key, measure)
        steady = [name for name, value in by_base.items() if value < NEAR]
        if not steady:
            raise NothingToCheckError("the base moves too")
        by_adapted = measure(model)
        moved = {name: by_adapted[name] for name in steady if name in by_adapted}
        over = {name: value for name, value in moved.items() if value > max(NEAR, 20 * by_base[name])}
        far, name = worst(over)
        if over:
            raise WrongError(f"{name or 'the output'} moves by {far:.2g}, the base's by {by_base[name]:.1g}")


def layer_of(name: str) -> str:
    """Take the name of an adapter's tensor off, and leave that of the layer."""
    return name.split(".tucka_")[0].split(".lora_")[0]


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Switch training on, but leave statistics of batches as they are."""
    model.train()
    for module in model.modules():
        if "BatchNorm" in type(module).__name__:
            module.eval()
    try:
        yield
    finally:
        model.eval()


def loss_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """Weigh all outputs with random numbers."""
    draws = torch.Generator().manual_seed(5)
    total = torch.zeros(())
    for value in call(model, inputs).values():
        weights = torch.randn(value.shape, generator=draws)
        if value.requires_grad:
            kept = value.isfinite() & (value.abs() < 1e4)
            total = total + (value.float()[kept] * weights[kept]).sum() / value.numel() ** 0.5
    return total


def gradients_of(model: nn.Module, inputs: Inputs) -> Values:
    """Return the gradients of what trains."""
    model.zero_grad()
    with training(model):
        loss_of(model, inputs).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def checkpointing_of(model: Any) -> Callable[[bool], None]:
    """Find out how a model of transformers, diffusers or timm is told to recompute its forward."""
    if getattr(model, "supports_gradient_checkpointing", False):
        how = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
        on, off = partial(model.gradient_checkpointing_enable, **how), model.gradient_checkpointing_disable
    elif getattr(model, "_supports_gradient_checkpointing", False):
        on, off = model.enable_gradient_checkpointing, model.disable_gradient_checkpointing
    elif hasattr(model, "set_grad_checkpointing"):
        try:
            model.set_grad_checkpointing(True)
            model.set_grad_checkpointing(False)
        except AssertionError as error:
            raise NothingToCheckError("the base has no gradient checkpointing") from error
        return model.set_grad_checkpointing
    else:
        raise NothingToCheckError("the base has no gradient checkpointing")
    return lambda is_on: on() if is_on else off()
