"""TuckA's formulas, against torch code: written out here, and the library's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tucka
from support.cost_meter import measure
from support.strategies import specs, widths
from tucka.spec import mixes_each_row

layer_lists = st.lists(st.tuples(widths, st.just(1)), min_size=1, max_size=3)


def leaves(*shape):
    return torch.randn(*shape, dtype=torch.float32, requires_grad=True)


class Written:
    """Eq. (9) as plain matrix products, one adapter after the other, each with an input of its own."""

    def __init__(self, spec, layers, samples, length):
        r, k, p, t = spec.rank, spec.groups, spec.expert_rank, spec.experts_per_group
        self.spec, self.lead = spec, {"batch": (), "sample": (samples,), "token": (samples, length)}[spec.routing]
        self.parts = [(leaves(k, p, r, r), leaves(t, p), leaves(width, r)) for width, _ in layers]
        self.centroids = leaves(k * t, layers[0][0])
        self.inputs = [leaves(samples, length, width) for width, _ in layers]
        # The router's feature and the route, as if they came from elsewhere: averaging and gating are element-wise.
        self.feature = leaves(*self.lead, layers[0][0])

    @property
    def owned(self):
        return [self.centroids, *(part for parts in self.parts for part in parts)]

    def gates(self):
        logits = self.feature.reshape(-1, self.feature.shape[-1]) @ self.centroids.T
        return logits.reshape(*self.lead, self.spec.groups, self.spec.experts_per_group)

    def adapt(self, x, cores, expert_factor, basis, gates):
        k, p, r, _ = cores.shape
        if self.spec.routing == "token":
            inner = x.reshape(-1, x.shape[-1]) @ basis
            if len(expert_factor) <= p:
                weights = gates.reshape(-1, k * len(expert_factor))
                factors = expert_factor.expand(k, *expert_factor.shape)
                cores = 0.5 * torch.bmm(factors, cores.reshape(k, p, r * r)).reshape(-1, r, r)
            else:
                weights = (gates.reshape(-1, gates.shape[-1]) @ expert_factor).reshape(-1, k * p)
                cores = 0.5 * cores.reshape(-1, r, r)
            if mixes_each_row(r, len(cores)):
                own = (weights @ cores.reshape(-1, r * r)).reshape(-1, r, r)
                inner = torch.bmm(inner[:, None, :], own).reshape(-1, r)
            else:
                outer = torch.bmm(weights[:, :, None], inner[:, None, :]).reshape(-1, len(cores) * r)
                inner = outer @ cores.reshape(-1, r)
        else:
            weights = (gates.reshape(-1, gates.shape[-1]) @ expert_factor).reshape(-1, k * p)
            mixed = (weights @ cores.reshape(k * p, r * r)).reshape(-1, r, r)
            mixed = 0.5 * mixed
            inner = torch.bmm((x.reshape(-1, x.shape[-1]) @ basis).reshape(mixed.shape[0], -1, r), mixed).reshape(-1, r)
        return x + (inner @ basis.T).reshape(x.shape)

    def library(self, x, cores, expert_factor, basis, gates):
        functional = pytest.importorskip("tucka.backends.torch.functional")
        return functional.tucker_adapt_gated(x, basis, cores, expert_factor, gates, alpha=0.5)

    def forward(self, adapt, gates=None):
        gates = self.gates() if gates is None else gates
        adapted = [adapt(x, *parts, gates) for x, parts in zip(self.inputs, self.parts, strict=True)]
        return sum(y.sum() for y in adapted)


@st.composite
def cases(draw, **fixed):
    spec = draw(specs(**fixed))
    layers = draw(layer_lists)
    samples, length = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    sizes = {"r": spec.rank, "k": spec.groups, "t": spec.experts_per_group, "p": spec.expert_rank}
    counted = {"tokens": samples * length, "samples": samples, "routing": spec.routing, **sizes}
    return Written(spec, layers, samples, length), layers, counted


routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


@routings
@given(data=st.data())
def test_counts_are_those_of_the_equations_as_matrix_products(routing, data):
    written, layers, counted = data.draw(cases(routing=routing))
    measured = measure(lambda: written.forward(written.adapt), owned=written.owned)
    assert tucka.count_flops("tucka", layers, **counted) == measured.forward
    assert tucka.count_flops("tucka", layers, backward=True, **counted) == measured.backward
    assert tucka.count_activation_bytes("tucka", layers, **counted) == measured.kept_bytes


@given(data=st.data())
def test_a_pinned_route_has_no_router_and_constant_gates(data):
    written, layers, counted = data.draw(cases(routing="batch"))
    gates = torch.rand(written.spec.groups, written.spec.experts_per_group)
    measured = measure(lambda: written.forward(written.adapt, gates), owned=[gates, *written.owned])
    for routing in ("batch", "sample", "token"):
        counted |= {"routing": routing, "pinned": True}
        assert tucka.count_flops("tucka", layers, **counted) == measured.forward
        assert tucka.count_flops("tucka", layers, backward=True, **counted) == measured.backward
        assert tucka.count_activation_bytes("tucka", layers, **counted) == measured.kept_bytes


@routings
@given(data=st.data())
def test_counts_are_those_of_the_librarys_adapter(routing, data):
    written, layers, counted = data.draw(cases(routing=routing))
    measured = measure(lambda: written.forward(written.library), owned=written.owned)
    # The library forms the outer product of token routing element by element, which torch's counter leaves out.
    spec = written.spec
    weighed = spec.groups * min(spec.experts_per_group, spec.expert_rank)
    forms_outer = routing == "token" and not mixes_each_row(spec.rank, weighed)
    outer = counted["tokens"] * weighed * spec.rank * len(layers) if forms_outer else 0
    assert tucka.count_flops("tucka", layers, **counted) == measured.forward + outer
    assert tucka.count_flops("tucka", layers, backward=True, **counted) == measured.backward + 2 * outer
    assert tucka.count_activation_bytes("tucka", layers, **counted) == measured.kept_bytes
