"""The only home of hypothesis strategies: bounded sizes, numbers of moderate size, NumPy float64 values."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tucka.spec import TuckerSpec

MAX_WIDTH = 6

# Multiples of 1/64 in [-4, 4]: exact in every dtype, and free of the underflow that is no concern here.
numbers = st.integers(-256, 256).map(lambda n: n / 64)


def arrays(*shape: int):
    """Arrays of one shape."""
    return hnp.arrays(np.float64, shape, elements=numbers)


sizes = st.integers(1, 4)
widths = st.integers(1, MAX_WIDTH)
shapes = hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=4)


@st.composite
def tensor_and_matrix(draw):
    """A tensor, a mode of it and a matrix that fits there."""
    shape = draw(shapes)
    mode = draw(st.integers(0, len(shape) - 1))
    return draw(arrays(*shape)), draw(arrays(draw(sizes), shape[mode])), mode


@st.composite
def specs(draw, **fixed):
    """Sizes of Tucker experts, p > t and r = d among them."""
    chosen = {name: draw(sizes) for name in ("rank", "groups", "experts_per_group", "expert_rank")}
    return TuckerSpec(**{**chosen, **fixed})


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


@st.composite
def tucker_parts(draw, spec=None):
    """Cores, expert factor and basis that fit each other; the rank is at most the width."""
    spec = spec or draw(specs())
    width = draw(st.integers(spec.rank, max(spec.rank, MAX_WIDTH)))
    k, p, r, t = spec.groups, spec.expert_rank, spec.rank, spec.experts_per_group
    return Parts(draw(arrays(k, p, r, r)), draw(arrays(t, p)), draw(arrays(width, r)))


@st.composite
def unit_columns(draw, max_rank=MAX_WIDTH):
    """A (d, r) matrix with unit columns, r <= d."""
    width = draw(st.integers(1, MAX_WIDTH))
    rank = draw(st.integers(1, min(width, max_rank)))
    raw = draw(arrays(width, rank))
    raw[0] += np.where(np.abs(raw).sum(axis=0) == 0, 1.0, 0.0)
    return raw / np.linalg.norm(raw, axis=0)


@st.composite
def hidden_and_mask(draw):
    """(B, S, d) hidden states and a (B, S) mask or None; rows may be masked out whole."""
    batch, length, width = draw(sizes), draw(sizes), draw(widths)
    mask = draw(st.none() | hnp.arrays(np.int64, (batch, length), elements=st.integers(0, 1)))
    return draw(arrays(batch, length, width)), mask


seeds = st.integers(0, 2**32 - 1)
