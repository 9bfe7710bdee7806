"""What is checked on each architecture. Each check says in a few words what it found."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cached_property
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from architectures.families import Family
from architectures.outputs import Values, call, gap, gaps, inputs_of, outputs_of, row_of, run, same
from tucka.errors import TuckaError
from tucka.peft import TuckAConfig, export_lora, pin_route

WORKS, NONE = "works", "-"
BATCH, LENGTH = 3, 7
# Sums of float32 in another order; a wrong route moves outputs by tenths.
NEAR = 2e-3


class WrongError(Exception):
    """A result is not what it must be."""


class NothingToCheckError(Exception):
    """The base model cannot do it, or does not do it reliably itself."""


class Subject:
    """One family, its base model and what that returns."""

    def __init__(self, family: Family, targets: Any = None) -> None:
        self.family = family
        self.targets = targets or [*family.targets]
        self._base = family.build()
        self.plain = family.inputs(BATCH, LENGTH)
        self.padded = family.inputs(BATCH, LENGTH, padding=True, seed=1)
        self.moved: set[str] = set()  # the layers that LoRA trains
        self.known: dict[Any, Any] = {}

    def base(self) -> nn.Module:
        return deepcopy(self._base)

    def of_base(self, key: str, measure: Callable[[nn.Module], Any]) -> Any:
        """Measure something on the base model, once; an error of the base means that there is nothing to check."""
        if key not in self.known:
            try:
                self.known[key] = measure(self._base)
            except Exception as error:
                self.known[key] = error
        found = self.known[key]
        if isinstance(found, Exception):
            raise NothingToCheckError(f"base: {type(found).__name__}: {found}") from found
        return found


class Adapted:
    """One family with an adapter, through its life."""

    def __init__(self, subject: Subject, method: str | None) -> None:
        self.subject = subject
        self.family = subject.family
        self.method = method
        self.is_lora = method == "lora"
        self.model = self._adapt(subject.base())
        self.routing = None if self.is_lora else self.model.peft_config["default"].routing

    def _adapt(self, base: nn.Module) -> nn.Module:
        torch.manual_seed(100)
        if self.is_lora:
            config: Any = LoraConfig(r=2, target_modules=self.subject.targets)
        else:
            config = TuckAConfig(r=2, k=3, t=2, p=2, routing=self.method, target_modules=self.subject.targets)
        return get_peft_model(base, config).eval()

    # checks, in this order

    def starts_equal(self) -> None:
        """The adapted model starts equal to its base, bit for bit."""
        for name in ("plain", "padded"):
            inputs = getattr(self.subject, name)
            wanted = run(self.subject._base, inputs)
            values = run(self.model, inputs)
            # Some kernels round by where in memory the weights are: a copy of the base differs as much.
            copies = self.subject.of_base(f"copy {name}", lambda model, x=inputs: run(deepcopy(model), x))
            far = worst(gaps(values, wanted))
            if not same(values, wanted) and (same(copies, wanted) or far[0] > 1e-5):
                raise WrongError(f"start differs by {far}")

    def trains(self) -> None:
        """Three steps change every trainable tensor, where LoRA's change too."""
        before = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        with training(self.model):
            optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], lr=0.02)
            for _ in range(3):
                optimizer.zero_grad()
                loss_of(self.model, self.family.inputs(4, 8, seed=2)).backward()
                optimizer.step()
        still = [name for name, p in self.model.named_parameters() if name in before and torch.equal(p, before[name])]
        if self.is_lora:
            self.subject.moved = {layer_of(name) for name in before if name not in still}
            if not self.subject.moved:
                raise NothingToCheckError("LoRA does not train either")
        still = [name for name in still if layer_of(name) in self.subject.moved]
        if still:
            raise WrongError(f"{len(still)} of {len(before)} tensors do not train: {', '.join(still[:3])}")

    def shake(self) -> None:
        """Make the adapter large enough to see."""
        torch.manual_seed(7)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad and ("lora_B" in name or ".tucka_experts." in name):
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        values = run(self.model, self.subject.plain)
        if worst(gaps(values, run(self.subject._base, self.subject.plain)))[0] < 1e-3:
            raise WrongError("the adapter does nothing")

    def saves(self) -> None:
        """A saved and loaded adapter gives the same outputs."""
        wanted = run(self.model, self.subject.plain)
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            loaded = PeftModel.from_pretrained(self.subject.base(), folder).eval()
        if not same(run(loaded, self.subject.plain), wanted):
            raise WrongError(f"loaded differs by {worst(gaps(run(loaded, self.subject.plain), wanted))}")

    def disables(self) -> None:
        """Switched off, the model is its base."""
        wanted = run(self.subject._base, self.subject.plain)
        with self.model.disable_adapter():
            values = run(self.model, self.subject.plain)
        far = worst(gaps(values, wanted))
        if not same(values, wanted) and (same(self.subject.known["copy plain"], wanted) or far[0] > 1e-5):
            raise WrongError(f"the disabled model differs from its base by {far}")

    def row_alone(self) -> None:
        """A sample's outputs do not depend on the others in its batch."""
        if self.routing == "batch":
            raise NothingToCheckError("a route for the batch")
        self._compare_rows(self.subject.plain, "rows", BATCH)

    def other_sizes(self) -> None:
        """Whatever the sizes: as many samples as tokens, one sample, as many tokens as other inputs have."""
        if self.routing == "batch":
            raise NothingToCheckError("a route for the batch")
        for batch, length in ((4, 4), (1, 7), (2, 16)):
            self._compare_rows(self.family.inputs(batch, length, seed=6), f"rows {batch} {length}", batch)

    def padding(self) -> None:
        """A sample's outputs do not depend on its padding."""
        if self.routing == "batch":
            raise NothingToCheckError("a route for the batch")
        if not self.family.pads:
            raise NothingToCheckError("no padding")
        self._compare_rows(self.subject.padded, "padding", BATCH)

    def padding_values(self) -> None:
        """What stands in the padding does not matter, in batch routing neither."""
        if not self.family.pads:
            raise NothingToCheckError("no padding")

        def measure(model: nn.Module) -> dict[str, float]:
            other = other_padding(self.subject.padded)
            wanted = run(model, self.subject.padded)
            found = run(model, other)
            return gaps(real(found, other), real(wanted, other))

        self._within_base("padding values", measure)

    def _compare_rows(self, inputs: dict[str, Any], key: str, batch: int) -> None:
        def measure(model: nn.Module) -> dict[str, float]:
            together = run(model, inputs)
            found: dict[str, float] = {}
            for row in range(batch):
                own = run(model, inputs_of(inputs, row, batch))
                for name, value in gaps(outputs_of(together, row, batch, inputs, own), own).items():
                    found[name] = max(found.get(name, 0.0), value)
            return found

        self._within_base(key, measure)

    def _within_base(self, key: str, measure: Callable[[nn.Module], dict[str, float]]) -> None:
        """Raise where outputs move that do not move in the base."""
        by_base = self.subject.of_base(key, measure)
        by_adapted = measure(self.model)
        steady = [name for name, value in by_base.items() if value < NEAR]
        if not steady:
            raise NothingToCheckError(f"base: moves by {min(by_base.values(), default=0):.2g} itself")
        moved = {name: by_adapted[name] for name in steady if name in by_adapted}
        over = {name: value for name, value in moved.items() if value > max(NEAR, 20 * by_base[name])}
        far, name = worst(over)
        if over:
            raise WrongError(f"{name or 'the output'} moves by {far:.2g}, the base's by {by_base[name]:.1g}")

    def checkpoints(self) -> None:
        """Recomputed forwards give the same gradients."""
        model = self.model.get_base_model()
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise NothingToCheckError("base: no gradient checkpointing")
        wanted = gradients_of(self.model, self.subject.plain)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        try:
            found = gradients_of(self.model, self.subject.plain)
        finally:
            model.gradient_checkpointing_disable()
        far = worst({name: gap(value, wanted[name]) for name, value in found.items() if name in wanted})
        if found.keys() != wanted.keys() or far[0] > NEAR:
            raise WrongError(f"gradients differ by {far}, {len(found)} of {len(wanted)}")

    def generates(self) -> None:
        """With and without a cache the same logits."""
        self._compare_generations("cache", [{}, {"use_cache": False}], self.family.prompts(2, 5, seed=3))

    def beams(self) -> None:
        """Beam search finds the same scores with and without a cache."""
        prompts = self.family.prompts(2, 5, seed=3)
        self._compare_generations("beams", [{}, {"use_cache": False}], prompts, num_beams=2)

    def assisted(self) -> None:
        """Looking up candidates in the prompt gives the same text."""
        prompts = self.family.prompts(1, 6, seed=4)
        repeated = {"input_ids": torch.cat([prompts["input_ids"]] * 2, 1)} if set(prompts) == {"input_ids"} else prompts
        self._compare_generations("assisted", [{}, {"prompt_lookup_num_tokens": 2}], repeated)

    def generates_padded(self) -> None:
        """A padded prompt generates what it generates alone."""
        if self.routing == "batch":
            raise NothingToCheckError("a route for the batch")
        prompts = self.family.prompts(BATCH, 6, padding=True, seed=3)

        def measure(model: nn.Module) -> dict[str, float]:
            together = generation(model, self.family, prompts)
            found = {}
            for row in range(BATCH):
                alone = generation(model, self.family, inputs_of(prompts, row, BATCH))
                found[str(row)] = max(
                    (gap(row_of(a, row, BATCH), b) for a, b in zip(together, alone, strict=False)), default=0.0
                )
            return found

        self._within_base_generation("padded prompts", measure)

    def _compare_generations(self, key: str, ways: list[dict[str, Any]], prompts: Any, **options: Any) -> None:
        def measure(model: nn.Module) -> dict[str, float]:
            first, second = (generation(model, self.family, prompts, **options, **way) for way in ways)
            return {str(step): gap(a, b) for step, (a, b) in enumerate(zip(first, second, strict=False))}

        self._within_base_generation(key, measure)

    def _within_base_generation(self, key: str, measure: Callable[[nn.Module], dict[str, float]]) -> None:
        if not self.family.generates:
            raise NothingToCheckError("does not generate")
        by_base = self.subject.of_base(key, measure)
        if worst(by_base)[0] > NEAR:
            raise NothingToCheckError(f"base: moves by {worst(by_base)[0]:.2g} itself")
        by_adapted = measure(self.model.get_base_model())
        far, step = worst(by_adapted)
        if far > max(NEAR, 20 * worst(by_base)[0]):
            raise WrongError(f"logits {step} differ by {far:.2g}, the base's by {worst(by_base)[0]:.1g}")

    def pins_and_merges(self) -> None:
        """Pinned, merged and unmerged outputs are equal."""
        if not self.is_lora:
            pin_route(self.model, group=1)
        wanted = run(self.model, self.subject.plain)
        self.model.merge_adapter()
        merged = run(self.model, self.subject.plain)
        self.model.unmerge_adapter()
        far = max(worst(gaps(merged, wanted)), worst(gaps(run(self.model, self.subject.plain), wanted)))
        if far[0] > NEAR:
            raise WrongError(f"merged differs by {far}")

    def exports(self) -> None:
        """Plain LoRA serves what was pinned."""
        if self.is_lora:
            raise NothingToCheckError("is LoRA")
        wanted = run(self.model, self.subject.plain)
        with tempfile.TemporaryDirectory() as folder:
            export_lora(self.model, folder)
            served = PeftModel.from_pretrained(self.subject.base(), folder).eval()
        far = worst(gaps(run(served, self.subject.plain), wanted))
        if far[0] > NEAR:
            raise WrongError(f"exported differs by {far}")

    def computes_in_bf16(self) -> None:
        """In bfloat16 it runs, trains and starts equal."""
        inputs = {
            name: value.bfloat16() if torch.is_floating_point(value) else value
            for name, value in self.subject.plain.items()
        }
        wanted = self.subject.of_base("bf16", lambda model: run(deepcopy(model).bfloat16(), inputs))
        self.subject.of_base("bf16 gradients", lambda model: loss_of(deepcopy(model).bfloat16(), inputs).backward())
        low = self._adapt(self.subject.base().bfloat16())
        if not same(run(low, inputs), wanted):
            raise WrongError("start differs from the base")
        found = gradients_of(low, inputs)
        if not found or not all(value.isfinite().all() for value in found.values()):
            raise WrongError(f"gradients not finite: {[n for n, v in found.items() if not v.isfinite().all()][:2]}")


CHECKS = {
    "start": Adapted.starts_equal,
    "training": Adapted.trains,
    "shows": Adapted.shake,
    "files": Adapted.saves,
    "disabled": Adapted.disables,
    "rows": Adapted.row_alone,
    "sizes": Adapted.other_sizes,
    "padding": Adapted.padding,
    "padding values": Adapted.padding_values,
    "checkpointing": Adapted.checkpoints,
    "cache": Adapted.generates,
    "padded prompts": Adapted.generates_padded,
    "beams": Adapted.beams,
    "assisted": Adapted.assisted,
    "merging": Adapted.pins_and_merges,
    "export": Adapted.exports,
    "bf16": Adapted.computes_in_bf16,
}


def check_family(subject: Subject, method: str | None) -> dict[str, str]:
    """Say what each check of a family and a method found."""
    found: dict[str, str] = {}
    try:
        adapted = Adapted(subject, method)
    except Exception as error:
        return {"adding": verdict(error)}
    for name, check in CHECKS.items():
        try:
            check(adapted)
            found[name] = WORKS
        except Exception as error:
            found[name] = verdict(error)
            if found[name].startswith("refused") and name == "start":
                found["sizes"] = refused_alike(adapted, error)
            if name in ("start", "shows") and not found[name].startswith(("wrong", NONE)):
                break  # no forward works
    return found


def refused_alike(adapted: Adapted, wanted: Exception) -> str:
    """Tell whether a forward is refused whatever the sizes."""
    for batch, length in ((4, 4), (1, 7), (2, 16), (1, 8)):
        try:
            run(adapted.model, adapted.family.inputs(batch, length, seed=6))
        except type(wanted):
            continue
        except Exception as error:
            return verdict(error)
        return f"wrong: {batch} samples of {length} tokens are not refused"
    return WORKS


def verdict(error: Exception) -> str:
    """Put what a check found into words."""
    if isinstance(error, WrongError):
        return f"wrong: {error}"
    if isinstance(error, NothingToCheckError):
        return f"{NONE} {error}"
    text = " ".join(str(error).split())
    kind = type(error).__name__
    return f"refused: {kind}: {text}" if isinstance(error, TuckaError) else f"error: {kind}: {text[:300]}"


def worst(found: dict[str, float]) -> tuple[float, str]:
    """Find the largest difference, and where it is."""
    return max(((value, name) for name, value in found.items()), default=(0.0, ""))


def layer_of(name: str) -> str:
    """Take the name of an adapter's tensor off, and leave that of the layer."""
    return name.split(".tucka_")[0].split(".lora_")[0]


@contextlib.contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Switch training on, but leave statistics of batches as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or "BatchNorm" in type(module).__name__:
            module.eval()
    try:
        yield
    finally:
        model.eval()


def loss_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Weigh all outputs with random numbers."""
    draws = torch.Generator().manual_seed(5)
    total = torch.zeros(())
    for value in call(model, inputs).values():
        if value.requires_grad:
            weights = torch.randn(value.shape, generator=draws)
            kept = value.float()[value.isfinite() & (value.abs() < 1e4)]
            total = total + (kept * weights[value.isfinite() & (value.abs() < 1e4)]).sum() / value.numel() ** 0.5
    return total


def gradients_of(model: nn.Module, inputs: dict[str, Any]) -> Values:
    """Return the gradients of what trains."""
    model.zero_grad()
    with training(model):
        loss_of(model, inputs).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def other_padding(inputs: dict[str, Any]) -> dict[str, Any]:
    """Put other values where a mask says that there is padding."""
    other = dict(inputs)
    for mask_name, mask in inputs.items():
        if not mask_name.endswith("attention_mask") or mask.ndim != 2:
            continue
        prefix = mask_name.removesuffix("attention_mask")
        for name in inputs:
            value = other[name]
            fits = value.ndim > 1 and value.shape[:2] == mask.shape and name != mask_name
            if fits and name.startswith("decoder_") == prefix.startswith("decoder_") and "mask" not in name:
                fill = 17 if not value.is_floating_point() else 2.5
                if value.is_floating_point() or value.max() >= 17:
                    kept = mask.reshape(*mask.shape, *[1] * (value.ndim - 2)) != 0
                    other[name] = torch.where(kept, value, torch.full_like(value, fill))
    return other


def real(values: Values, inputs: dict[str, Any]) -> Values:
    """Leave out the outputs of padding, as far as shapes tell."""
    found = {}
    for name, value in values.items():
        for mask_name, mask in inputs.items():
            if mask_name.endswith("attention_mask") and mask.ndim == 2 and value.shape[:2] == mask.shape:
                value = value[mask != 0]
                break
        found[name] = value
    return found


def generation(model: nn.Module, family: Family, prompts: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    """Generate a few tokens; return their logits, or of beams their scores."""
    torch.manual_seed(0)
    score = {"output_scores": True} if options.get("num_beams") else {"output_logits": True}
    made = model.generate(**prompts, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, **score, **options)
    if options.get("num_beams"):
        return [made.sequences_scores]
    return [*made.logits] if not options.get("prompt_lookup_num_tokens") else [*made.logits]
