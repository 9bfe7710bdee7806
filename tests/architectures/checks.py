"""What is checked on each architecture, beside LoRA. Each check says in a few words what it found."""

import contextlib
import tempfile
from collections.abc import Callable
from copy import deepcopy

import torch
from peft import PeftModel
from torch import nn

from architectures import generating
from architectures.adapted import (
    BATCH,
    LENGTH,
    NEAR,
    ROUNDED,
    Adapted,
    NothingToCheckError,
    Subject,
    WrongError,
    checkpointing_of,
    gradients_of,
    layer_of,
    loss_of,
    training,
)
from architectures.outputs import (
    Inputs,
    gaps,
    in_bf16,
    inputs_of,
    of_tokens,
    outputs_of,
    run,
    with_other_padding,
    worst,
)
from architectures.selection import COMPILED
from tucka.backends.torch import Router
from tucka.errors import TuckaError
from tucka.peft import export_lora, pin_route

WORKS, NOTHING, REFUSED, WRONG, RAISES = "works", "-", "refused", "wrong", "raises"
HIDDEN = "the tiny base hides what LoRA does, too"
# As many samples as tokens, one sample, as many tokens as other inputs have.
SIZES = ((4, 4), (1, 7), (2, 16), (1, 8))


def starts(adapted: Adapted) -> None:
    """The adapted model starts equal to its base, bit for bit."""
    for inputs in (adapted.subject.plain, adapted.subject.padded):
        adapted.check_equal(run(adapted.model, inputs), run(adapted.subject.base, inputs), inputs)


def trains(adapted: Adapted) -> None:
    """Three steps change every tensor of the adapter, in all layers that LoRA trains."""
    model = adapted.model
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    inputs = adapted.family.inputs(4, 8, seed=2)
    with training(model):
        optimizer = torch.optim.Adam(trained.values(), lr=0.005)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model, inputs).backward()
            optimizer.step()
    still = [name for name, p in trained.items() if torch.equal(p, before[name])]
    if adapted.is_lora:
        adapted.subject.moved = {layer_of(name) for name in before} - {layer_of(name) for name in still}
        if len(still) == len(before):
            raise WrongError("no tensor changes")
        return
    still = [name for name in still if layer_of(name) in adapted.subject.moved]
    if still:
        raise WrongError(f"{len(still)} of {len(before)} tensors do not change: {', '.join(still[:3])}")


def shows(adapted: Adapted) -> None:
    """The adapter changes what the model returns, and its groups differ: without that no check would see a route."""
    subject = adapted.subject
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in adapted.model.named_parameters():
            if ".cores" in name or ".lora_B." in name:
                parameter.mul_(1 + 0.5 * torch.randn_like(parameter))
    far = worst(gaps(run(adapted.model, subject.plain), run(subject.base, subject.plain)))[0]
    if far < 1e-4 and (adapted.is_lora or subject.hides):
        subject.hides = True
        raise NothingToCheckError(HIDDEN)
    if not 1e-4 <= far < float("inf"):
        raise WrongError(f"the adapter moves the outputs by {far:.2g}")


def saves(adapted: Adapted) -> None:
    """A saved and loaded adapter gives the same outputs."""
    inputs = adapted.subject.plain
    with tempfile.TemporaryDirectory() as folder:
        adapted.model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(adapted.subject.copy(), folder).eval()
    adapted.check_equal(run(loaded, inputs), run(adapted.model, inputs), inputs)


def disables(adapted: Adapted) -> None:
    """Switched off, the model is its base."""
    inputs = adapted.subject.plain
    with adapted.model.disable_adapter():
        adapted.check_equal(run(adapted.model, inputs), run(adapted.subject.base, inputs), inputs)


def keeps_rows(adapted: Adapted) -> None:
    """A sample's outputs do not depend on the others in its batch, whatever the sizes."""
    adapted.needs_rows()
    _compare_rows(adapted, "rows", adapted.subject.plain, BATCH)
    for batch, length in SIZES:
        _compare_rows(adapted, f"rows {batch} {length}", adapted.family.inputs(batch, length, seed=6), batch)


def ignores_padding(adapted: Adapted) -> None:
    """A sample's outputs depend neither on how much padding it has nor on what stands there."""
    adapted.needs_padding()
    inputs = adapted.subject.padded
    other = with_other_padding(inputs)

    def measure(model: nn.Module) -> dict[str, float]:
        return gaps(of_tokens(run(model, other), inputs), of_tokens(run(model, inputs), inputs))

    adapted.check_within_base("what stands in padding", adapted.model, measure)
    if adapted.routing != "batch":
        _compare_rows(adapted, "padding", inputs, BATCH)


def _compare_rows(adapted: Adapted, key: str, inputs: Inputs, batch: int) -> None:
    def measure(model: nn.Module) -> dict[str, float]:
        together = run(model, inputs)
        found: dict[str, float] = {}
        for row in range(batch):
            own = run(model, inputs_of(inputs, row, batch))
            for name, value in gaps(outputs_of(together, row, batch, inputs, own), own).items():
                found[name] = max(found.get(name, 0.0), value)
        return found

    adapted.check_within_base(key, adapted.model, measure)


def checkpoints(adapted: Adapted) -> None:
    """Recomputed forwards give the same gradients (non-reentrant)."""
    model, inputs = adapted.model.get_base_model(), adapted.subject.plain
    switch = checkpointing_of(model)
    for _ in range(8):  # routers start from their first batches: not between the two that are compared
        if any(isinstance(module, Router) and module.waits for module in model.modules()):
            gradients_of(adapted.model, inputs)
    wanted = gradients_of(adapted.model, inputs)
    switch(True)
    try:
        found = gradients_of(adapted.model, inputs)
    finally:
        switch(False)
    size = max((float(value.abs().max()) for value in wanted.values()), default=0.0)
    far, name = worst({name: float((found[name] - wanted[name]).abs().max()) for name in found.keys() & wanted.keys()})
    if found.keys() != wanted.keys() or far > NEAR * size:
        raise WrongError(f"the gradient of {name} differs by {far:.2g} of {size:.2g}")


def calls_methods(adapted: Adapted) -> None:
    """Methods that are called instead of the forward give what the forward gives."""
    by_methods = getattr(adapted.family, "by_methods", None)
    if by_methods is None:
        raise NothingToCheckError("is called by its forward")
    inputs = adapted.subject.plain
    with torch.no_grad():
        found = {"": by_methods(adapted.model, **inputs)}
    adapted.check_equal(found, dict(zip(found, run(adapted.model, inputs).values(), strict=True)), inputs)


def merges(adapted: Adapted) -> None:
    """Pinned, merged and unmerged outputs are equal."""
    inputs = adapted.subject.plain
    if not adapted.is_lora:
        pin_route(adapted.model, group=1)
    wanted = run(adapted.model, inputs)
    adapted.model.merge_adapter()
    merged = run(adapted.model, inputs)
    adapted.model.unmerge_adapter()
    far, name = max(worst(gaps(merged, wanted)), worst(gaps(run(adapted.model, inputs), wanted)))
    if far > NEAR:
        raise WrongError(f"{name or 'the output'} differs by {far:.2g}")


def exports(adapted: Adapted) -> None:
    """Plain LoRA serves what was pinned."""
    if adapted.is_lora:
        raise NothingToCheckError("is LoRA")
    wanted = run(adapted.model, adapted.subject.plain)
    with tempfile.TemporaryDirectory() as folder:
        export_lora(adapted.model, folder)
        served = PeftModel.from_pretrained(adapted.subject.copy(), folder).eval()
    far, name = worst(gaps(run(served, adapted.subject.plain), wanted))
    if far > NEAR:
        raise WrongError(f"{name or 'the output'} differs by {far:.2g}")


def compiles(adapted: Adapted) -> None:
    """A compiled forward gives the same outputs, in one graph, which serves other samples with other routes too."""
    subject = adapted.subject
    if subject.family.name not in COMPILED:
        raise NothingToCheckError("not compiled here, which takes long")
    torch._dynamo.reset()
    compiled = torch.compile(adapted.model, backend="eager", fullgraph=True)
    with contextlib.ExitStack() as stack:
        for inputs in (subject.plain, subject.family.inputs(BATCH, LENGTH, seed=8)):
            far, name = worst(gaps(run(compiled, inputs), run(adapted.model, inputs)))
            if far > ROUNDED:
                raise WrongError(f"{name or 'the output'} differs by {far:.2g}")
            stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))


def computes_in_bf16(adapted: Adapted) -> None:
    """In bfloat16 a new adapter starts as its base and has finite gradients."""
    subject = adapted.subject
    inputs = in_bf16(subject.plain)
    wanted = subject.of_base("bf16", lambda model: run(deepcopy(model).bfloat16(), inputs))
    subject.of_base("bf16 gradients", lambda model: loss_of(deepcopy(model).bfloat16(), inputs).backward())
    low = subject.adapt(adapted.method, subject.copy().bfloat16())
    far, name = worst(gaps(run(low, inputs), wanted))
    if far > max(2e-2, worst(gaps(wanted, run(subject.base, subject.plain)))[0]):  # what the base's own rounding does
        raise WrongError(f"{name or 'the output'} differs by {far:.2g}")
    unusable = [name for name, value in gradients_of(low, inputs).items() if not value.isfinite().all()]
    if unusable:
        raise WrongError(f"gradients are not finite: {', '.join(unusable[:2])}")


CHECKS: dict[str, Callable[[Adapted], None]] = {
    "start": starts,
    "training": trains,
    "effect": shows,
    "files": saves,
    "off": disables,
    "methods": calls_methods,
    "rows": keeps_rows,
    "padding": ignores_padding,
    "checkpointing": checkpoints,
    "cache": generating.with_cache,
    "padded prompts": generating.padded,
    "beams": generating.by_beams,
    "assisted": generating.assisted,
    "compiling": compiles,
    "merging": merges,
    "export": exports,
    "bf16": computes_in_bf16,
}
# Where these fail, no other check can tell anything.
_NEEDED = ("start", "effect")


def check(subject: Subject, method: str | None, *, only: str | None = None) -> dict[str, str]:
    """Say what each check of an architecture and a method found, up to one that the others need and that fails."""
    found: dict[str, str] = {}
    try:
        adapted = Adapted(subject, method)
    except Exception as error:
        return {"adding": verdict(error)}
    for name, look in CHECKS.items():
        try:
            look(adapted)
            found[name] = WORKS
        except Exception as error:
            found[name] = verdict(error)
            if name == "start" and isinstance(error, TuckaError):
                found["start"] = refused_alike(adapted, error)
        if name == only or (name in _NEEDED and found[name].startswith((REFUSED, RAISES))):
            break
    return found


def refused_alike(adapted: Adapted, wanted: TuckaError) -> str:
    """Tell whether a forward is refused whatever the sizes."""
    padding = not _raises(adapted, adapted.subject.plain, type(wanted))
    for batch, length in SIZES:
        if not _raises(adapted, adapted.family.inputs(batch, length, padding=padding, seed=6), type(wanted)):
            return f"{WRONG}: {batch} samples of {length} tokens are not refused, others are ({verdict(wanted)})"
    return verdict(wanted)


def _raises(adapted: Adapted, inputs: Inputs, kind: type[Exception]) -> bool:
    try:
        run(adapted.model, inputs)
    except kind:
        return True
    return False


def verdict(error: Exception) -> str:
    """Put what a check found into words."""
    if isinstance(error, WrongError):
        return f"{WRONG}: {error}"
    if isinstance(error, NothingToCheckError):
        return f"{NOTHING} {error}"
    word = REFUSED if isinstance(error, TuckaError) else RAISES
    return f"{word}: {type(error).__name__}: {' '.join(str(error).split())[:400]}"


def outcomes(found: dict[str, str], words: tuple[str, ...]) -> dict[str, str]:
    """Take the checks whose outcome begins with one of some words."""
    return {name: text for name, text in found.items() if text.startswith(words)}
