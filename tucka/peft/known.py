"""What a layer takes from earlier tokens of a generation and from other layers of its call, and leaves to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tucka.backends.torch.base_layers import is_convolution, layer_dtype
from tucka.backends.torch.laid_out import LaidOut
from tucka.backends.torch.mixing import has_own_gates
from tucka.backends.torch.modules import ExpertParts
from tucka.backends.torch.routing.layouts import Layout
from tucka.backends.torch.steps import Step, Steps
from tucka.backends.torch.thin import FEW, compute_dtype
from tucka.backends.torch.together import Group, Opened, is_free
from tucka.peft.remembered import Remembered

if TYPE_CHECKING:
    from tucka.peft.layer import TuckALayer

__all__ = ["adapted_as_before", "laid_out", "note", "shared_core"]


def adapted_as_before(layer: TuckALayer, x: Tensor) -> Tensor | None:
    """Adapt an input as earlier tokens of a generation, or other layers in this call, were; None if none were."""
    state = layer.tucka_scope.forwards.state
    if state.generations:
        steps = state.generations[-1].steps
        step = steps.take(layer, x)
        if step is not None:
            return step.add_update(x, None if step.adapter is None else _gates_of_token(layer, steps, step, x))
    opened: Opened | None = None if state.shared is None else state.shared.opened
    return None if opened is None else opened.adapted(layer, x)


def _gates_of_token(layer: TuckALayer, steps: Steps, step: Step, x: Tensor) -> Tensor:
    gates = steps.gates(step.kind)
    if gates is None or gates.device != x.device:
        gates = layer.tucka_scope.fit(step.adapter, layer, x).gates  # type: ignore[arg-type]
        steps.tell(step.kind, gates)
    return gates


def laid_out(layer: TuckALayer, name: str, parts: ExpertParts, x: Tensor, gates: Tensor) -> LaidOut:
    """Lay an adapter's factors out for an input, or go on with what an earlier call of a generation has kept."""
    generations = layer.tucka_scope.forwards.state.generations
    steps = generations[-1].steps if generations else None
    laid = None if steps is None else steps.laid_out(parts, x.dtype)
    is_own = has_own_gates(x, gates)
    if laid is not None and (is_own or laid.knows(gates)):
        return laid
    core = shared_core(layer, name, parts, x, gates)
    if laid is None:
        laid = LaidOut(parts, compute_dtype(x))
        if steps is not None and steps.now is not None and parts.is_at_rest():
            steps.keep(layer, name, parts, laid, Remembered)
    if core is not None:
        laid.take(core, None if is_own else gates)
    return laid


def shared_core(layer: TuckALayer, name: str, parts: ExpertParts, x: Tensor, gates: Tensor) -> Tensor | None:
    """Return what a layer has of the cores that the layers of the running call share, see `Shared.core`."""
    shared = layer.tucka_scope.forwards.state.shared
    if shared is None:
        return None
    return shared.core(name, parts, None if has_own_gates(x, gates) else gates, lambda: _group_of(layer, name))


def _group_of(layer: TuckALayer, adapter: str) -> Group:
    """Find the layers that a call of a layer's part of the model may use, and whose cores can be made together."""
    scope = layer.tucka_scope
    key = adapter, layer.tucka_part, layer.tucka_role
    group = scope.forwards.groups.get(key)
    if group is None or not group.is_as_it_was():
        near = [each for each in scope.layers if (each.tucka_part, each.tucka_role) == key[1:]]
        group = scope.forwards.groups[key] = _new_group(layer, adapter, near)
    return group


def _new_group(layer: TuckALayer, adapter: str, layers: Iterable[TuckALayer]) -> Group:
    dtype = layer_dtype(layer.get_base_layer())
    remembered: Any = Remembered()
    pairs = []
    for each in layers:
        base = each.get_base_layer()
        # A convolution's input has its channels elsewhere, and another dtype may not fit the base layer.
        if adapter not in each.tucka_experts or is_convolution(base) or layer_dtype(base) != dtype:
            continue
        parts = each.experts(adapter)
        if not is_free(parts):
            continue
        remembered.add(each, adapter, parts)
        if adapter in each.active_adapters and not (each._disable_adapters or each.merged_adapters):
            pairs.append((each, parts))
    return Group(remembered, pairs)


def note(layer: TuckALayer, name: str, laid: LaidOut | None, gates: Tensor, x: Tensor) -> None:
    """Let inputs like this one, of other layers or of a generation's next calls, not ask for their route again."""
    state = layer.tucka_scope.forwards.state
    is_few = x.shape[:-1].numel() <= FEW
    if state.generations and laid is not None and (is_few or laid.is_used_again):
        _note_steps(layer, name, laid, gates, x)
    elif state.shared is not None and layer.tucka_place is not None and layer.active_adapters == [name]:
        state.shared.open(name, layer, x, gates)


def _note_steps(layer: TuckALayer, name: str, laid: LaidOut, gates: Tensor, x: Tensor) -> None:
    """Note how a layer, and those like it, go on for the next tokens."""
    scope = layer.tucka_scope
    steps = scope.forwards.state.generations[-1].steps
    pinned = scope.pinned.get(name)
    running = scope.forwards.innermost(layer.tucka_part) if pinned is None else None
    route = None if running is None else running.known.get(name)
    is_known = gates is pinned or (route is not None and gates is route.gates and gates.ndim < 4)
    is_own = not is_known and has_own_gates(x, gates)  # each token's
    if not (is_known or is_own) or layer.tucka_layout is not Layout.SAMPLES_FIRST:
        return
    kept, adapter, place = (gates, None, None) if is_known else (None, name, layer.tucka_place)
    steps.note(layer, Step(laid, x.shape, x.dtype, kept, adapter, place), kept, is_used=True)
    if layer.active_adapters != [name]:
        return
    # All layers at once: one after the other, what they need would come from the memory again each time.
    for each, parts in _group_of(layer, name).pairs:
        is_alike = each.tucka_place == layer.tucka_place and each._active_adapter == layer._active_adapter
        if is_alike and not (parts.drops or steps.has(each)):
            its = laid_out(each, name, parts, x, gates)
            shape = (*x.shape[:-1], parts.basis.shape[0])
            steps.note(each, Step(its, shape, x.dtype, kept, adapter, place), kept, is_used=False)
