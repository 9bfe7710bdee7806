"""The one table of functions that take arrays only: what can be differentiated, compiled, batched, cast."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import tucka


@dataclass(frozen=True)
class Case:
    """A function of arrays of given shapes. Another function makes its mask or its objects from them."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]

    def values(self) -> list[np.ndarray]:
        """Inputs that every dtype holds exactly, none of them near a tie."""
        rng = np.random.default_rng(0)
        return [rng.permutation(np.prod(shape)).reshape(shape) / 8 - 1.0625 for shape in self.shapes]


def _of_experts(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda cores, factor, basis, *operands: method(tucka.TuckerExperts(cores, factor, basis), *operands)


PARTS = ((2, 3, 2, 2), (2, 3), (4, 2))
GATES = (2, 2)

CASES = [
    Case("mode_product", lambda tensor, matrix: tucka.mode_product(tensor, matrix, mode=1), ((2, 3, 2), (4, 3))),
    Case(
        "multi_mode_product",
        lambda tensor, *matrices: tucka.multi_mode_product(tensor, matrices, modes=[2, 0]),
        ((2, 3, 2), (4, 2), (1, 2)),
    ),
    Case("to_tensor", _of_experts(lambda experts: experts.to_tensor(1)), PARTS),
    Case("expert", _of_experts(lambda experts: experts.expert(1, 0)), PARTS),
    Case("mix", _of_experts(lambda experts, gates: experts.mix(gates)), (*PARTS, GATES)),
    Case(
        "apply-batch",
        _of_experts(lambda experts, x, gates: experts.apply(x, gates, alpha=0.5)),
        (*PARTS, (2, 3, 4), GATES),
    ),
    Case(
        "apply-sample",
        _of_experts(lambda experts, x, gates: experts.apply(x, gates)),
        (*PARTS, (2, 3, 4), (2, *GATES)),
    ),
    Case("apply-token", _of_experts(lambda experts, x, gates: experts.apply(x, gates)), (*PARTS, (3, 4), (3, *GATES))),
    Case("norm", _of_experts(lambda experts: experts.norm(0)), PARTS),
    Case("inner", _of_experts(lambda experts: experts.inner(experts, 0, 1)), PARTS),
    Case("householder_gamma", tucka.householder_gamma, ((4, 3),)),
    Case("householder_product", tucka.householder_product, ((3, 2),)),
    Case(
        "householder_experts",
        lambda vectors, x, gates: tucka.householder_experts(vectors).apply(x, gates),
        ((3, 2), (2, 3), (1, 1)),
    ),
    Case("routing_feature-batch", tucka.routing_feature, ((2, 3, 2),)),
    Case("routing_feature-sample", lambda h: tucka.routing_feature(h, routing="sample"), ((2, 3, 2),)),
    Case("routing_feature-masked", lambda h, kept: tucka.routing_feature(h, mask=kept > 0), ((2, 3, 2), (2, 3))),
    Case("affinity_logits-dot", tucka.affinity_logits, ((2, 4), (2, 3, 4))),
    Case(
        "affinity_logits-group_norm", lambda h, e: tucka.affinity_logits(h, e, affinity="group_norm"), ((4,), (2, 3, 4))
    ),
    Case(
        "affinity_logits-centered",
        lambda h, e, mu: tucka.affinity_logits(h, e, affinity="centered", center=mu),
        ((4,), (2, 3, 4), (4,)),
    ),
    Case(
        "affinity_logits-directional",
        lambda h, e, mu: tucka.affinity_logits(h, e, affinity="directional", center=mu),
        ((2, 4), (2, 3, 4), (4,)),
    ),
    Case("select_gates", tucka.select_gates, ((2, 2, 3),)),
    Case("select_gates-raw", lambda logits: tucka.select_gates(logits, gate_norm=False), ((2, 2, 3),)),
]
