"""The only home of hypothesis strategies: bounded sizes, numbers of moderate size, NumPy float64 values.

Shapes of arrays come from short lists, corner cases first: JAX compiles anew for every shape, so each costs time.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from tucka.spec import TuckerSpec

MAX_WIDTH = 6

# Multiples of 1/32 in [-4, 4): exact in every dtype, and free of the underflow that is no concern here.
numbers = st.integers(-128, 127).map(lambda n: n / 32)
# Their sums and products with small numbers stay exact too.
factors = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0])


def arrays(*shape: int):
    """Arrays of one shape, of such numbers."""
    # One draw of bytes instead of one draw an entry: many times faster.
    size = int(np.prod(shape))
    return st.binary(min_size=size, max_size=size).map(lambda raw: np.frombuffer(raw, np.int8).reshape(shape) / 32.0)


sizes = st.integers(1, 4)
widths = st.integers(1, MAX_WIDTH)
few_sizes = st.sampled_from([1, 3])
shapes = st.sampled_from([(1,), (3,), (3, 2), (2, 1, 4)])
leads = st.sampled_from([(), (3,), (2, 1, 3)])
seeds = st.integers(0, 2**32 - 1)


@st.composite
def tensor_and_matrix(draw):
    """A tensor, a mode of it and a matrix that fits there."""
    shape = draw(shapes)
    mode = draw(st.integers(0, len(shape) - 1))
    return draw(arrays(*shape)), draw(arrays(draw(few_sizes), shape[mode])), mode


@st.composite
def specs(draw, **fixed):
    """Sizes of Tucker experts, p > t among them."""
    chosen = {name: draw(sizes) for name in ("rank", "groups", "experts_per_group", "expert_rank")}
    return TuckerSpec(**{**chosen, **fixed})


# p > t and r = d, t = 1 and k = 1 are among them.
few_specs = st.sampled_from(
    [
        TuckerSpec(rank=1, groups=1, experts_per_group=1, expert_rank=1),
        TuckerSpec(rank=2, groups=2, experts_per_group=2, expert_rank=2),
        TuckerSpec(rank=3, groups=1, experts_per_group=2, expert_rank=4),
        TuckerSpec(rank=2, groups=3, experts_per_group=1, expert_rank=1),
    ]
)


@dataclass(frozen=True)
class Parts:
    """Tucker parts as NumPy arrays."""

    cores: np.ndarray
    expert_factor: np.ndarray
    basis: np.ndarray

    @property
    def all(self):
        return self.cores, self.expert_factor, self.basis

    @property
    def gate_shape(self):
        return self.cores.shape[0], self.expert_factor.shape[0]

    @property
    def width(self):
        return self.basis.shape[0]

    @property
    def terms(self):
        """How many products are summed for one entry of an expert or of an adapted row."""
        return self.cores[0].size * self.cores.shape[0] * self.expert_factor.shape[0] * self.width


@st.composite
def tucker_parts(draw, spec=None):
    """Cores, expert factor and basis that fit each other; odd ranks fill the width, others are below it."""
    spec = spec or draw(few_specs)
    width = spec.rank if spec.rank % 2 else MAX_WIDTH
    k, p, r, t = spec.groups, spec.expert_rank, spec.rank, spec.experts_per_group
    return Parts(draw(arrays(k, p, r, r)), draw(arrays(t, p)), draw(arrays(width, r)))


@st.composite
def unit_columns(draw, max_rank=MAX_WIDTH):
    """A (d, r) matrix with unit columns, r <= d."""
    width, rank = draw(st.sampled_from([(1, 1), (3, 3), (MAX_WIDTH, 2)]))
    raw = draw(arrays(width, min(rank, max_rank))).copy()
    raw[0] += np.where(np.abs(raw).sum(axis=0) == 0, 1.0, 0.0)
    return raw / np.linalg.norm(raw, axis=0)


@st.composite
def hidden_and_mask(draw, *, masked=None):
    """(B, S, d) hidden states and a (B, S) mask or None; rows may be masked out whole."""
    batch, length, width = draw(st.sampled_from([(1, 1, 1), (2, 1, 4), (3, 4, 2)]))
    masks = st.binary(min_size=batch * length, max_size=batch * length)
    masks = masks.map(lambda raw: np.frombuffer(raw, np.uint8).reshape(batch, length).astype(np.int64) % 2)
    choice = {None: st.none() | masks, True: masks, False: st.none()}[masked]
    return draw(arrays(batch, length, width)), draw(choice)


gate_shapes = st.sampled_from([(1, 2), (3, 1), (3, 2)])


@st.composite
def logits(draw, *, ties=True):
    """(k, t) logits; without ties, all entries differ."""
    groups, experts = draw(gate_shapes)
    if ties:
        return draw(arrays(groups, experts))
    order = draw(st.permutations(range(groups * experts)))
    return (np.array(order).reshape(groups, experts) - groups * experts / 2) / 2


@st.composite
def features_and_centroids(draw):
    """A (d,) feature, (k, t, d) centroids and a (d,) centre."""
    groups, experts, width = draw(st.sampled_from([(1, 1, 1), (3, 1, 4), (2, 3, 4)]))
    return draw(arrays(width)), draw(arrays(groups, experts, width)), draw(arrays(width))
