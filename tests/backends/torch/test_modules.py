"""The adapter with Tucker experts as a module: its contract, its start, and what it refuses."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from support.adapter_contract import WIDTH, AdapterContract, as_arrays
from tucka import reference
from tucka.backends.torch import Router, TuckerAdapter, laid_out, tucker_adapt_gated
from tucka.backends.torch.modules import ExpertParts
from tucka.backends.torch.thin import FEW
from tucka.errors import ArrayError, ConfigError, RouteError, ShapeError
from tucka.peft import TuckAConfig
from tucka.spec import TuckerSpec

SPEC = TuckerSpec(rank=2, groups=3, alpha=0.5)
GATES = torch.tensor([[0.1, 0.9], [0.0, 0.0], [0.3, 0.2]])
SAMPLES = torch.stack([GATES, GATES.flip(0), GATES.flip(1), GATES])


class TestTuckerAdapter(AdapterContract):
    where = "TuckerAdapter around Linear(in_features=6, out_features=4, bias=True)"

    def create(self, layer, *, init_weights=False):
        return TuckerAdapter(layer, SPEC, init_weights=init_weights)

    def gates(self, _x):
        return GATES

    def call(self, adapter, x):
        gates = self.gates(x)
        if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
            gates = gates.double()
        return adapter(x, gates)

    def evaluate(self, adapter, x):
        parts = as_arrays(*adapter.parts.factors())
        return reference.adapt(x, self.gates(x).double().numpy(), *parts, alpha=SPEC.alpha)


class TestTuckerAdapterWithGatesForEachSample(TestTuckerAdapter):
    def gates(self, x):
        return SAMPLES[: len(x)] if np.ndim(x) else SAMPLES


def adapter():
    return TuckerAdapter(nn.Linear(WIDTH, 4), SPEC)


def message_of(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


@pytest.mark.parametrize(
    ("gates", "error", "words"),
    [
        (torch.ones(2, 3), ShapeError, ["(..., k, t)", "(3, 2)"]),
        (torch.ones(3), ShapeError, ["(..., k, t)"]),
        (torch.ones(5, 3, 2), ShapeError, ["leading axes", "(4, 7)"]),
        (np.ones((3, 2)), ArrayError, ["torch tensor", "numpy.ndarray", "Convert"]),
        ([[1.0, 1.0]] * 3, ArrayError, ["torch tensor", "list", "Convert"]),
        (torch.ones(3, 2, device="meta"), ArrayError, ["cpu", "meta", "Move"]),
    ],
    ids=["transposed", "one axis", "samples", "NumPy", "list", "device"],
)
def test_wrong_gates_are_named_with_the_layer(gates, error, words):
    message = message_of(error, lambda: adapter()(torch.ones(4, 7, WIDTH), gates))
    for word in ["gates: expected", "TuckerAdapter around Linear", *words]:
        assert word in message


def test_token_routing_of_a_convolution_is_refused():
    convolution = TuckerAdapter(nn.Conv2d(WIDTH, 4, 3), SPEC)
    message = message_of(RouteError, lambda: convolution(torch.randn(2, WIDTH, 5, 5), torch.rand(2, 5, 3, 2)))
    assert "gates: expected batch or sample routing" in message
    assert "Conv2d" in message


def test_a_configuration_is_no_spec():
    message = message_of(ConfigError, lambda: TuckerAdapter(nn.Linear(4, 4), TuckAConfig()))
    assert "spec: expected a TuckerSpec, got TuckAConfig" in message
    assert "config.spec" in message
    assert "spec: expected a TuckerSpec, got int" in message_of(ConfigError, lambda: TuckerAdapter(nn.Linear(4, 4), 8))


def test_a_rank_above_the_width_is_refused():
    message = message_of(ConfigError, lambda: TuckerAdapter(nn.Linear(2, 4), TuckerSpec(rank=3)))
    assert "rank: expected at most the layer's width 2, got 3" in message
    assert "smaller rank" in message


def test_a_convolution_without_a_batch_axis():
    convolution = TuckerAdapter(nn.Conv2d(WIDTH, 4, 3), SPEC, init_weights=False)
    x = torch.randn(WIDTH, 5, 6)
    torch.testing.assert_close(convolution(x, GATES), convolution(x[None], GATES)[0])


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_the_start_is_the_base_bit_for_bit(routing, dtype, autocast):
    if autocast is not None and dtype == torch.float64:
        pytest.skip("torch's linear has no float64 under autocast either")
    spec = TuckerSpec(rank=4, routing=routing)
    layer = nn.Linear(16, 8).to(dtype)
    started, router = TuckerAdapter(layer, spec), Router(spec, 16)
    x = torch.randn(3, 5, 16).to(dtype)
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        assert torch.equal(started(x, router(x)), layer(x))


# Layers that hide their weight.


class Hidden(nn.Module):
    """Stands in for a quantised layer: int8 numbers under names of its own, no weight."""

    def __init__(self, layer):
        super().__init__()
        self.in_features = layer.in_features
        scale = layer.weight.abs().amax() / 127
        self.register_buffer("packed", (layer.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.detach())

    def forward(self, x):
        return x @ (self.packed * self.scale).t().to(x.dtype)


def adapted_by_hand(adapter, x, gates):
    cores, factor, basis = adapter.parts.factors()
    return tucker_adapt_gated(x, basis, cores, factor, gates, alpha=adapter.spec.alpha)


def test_a_layer_that_hides_its_weight():
    layer = Hidden(nn.Linear(8, 4))
    hiding, x = TuckerAdapter(layer, SPEC, init_weights=False), torch.randn(5, 8)
    torch.testing.assert_close(hiding(x, GATES), layer(adapted_by_hand(hiding, x, GATES)))


def eight_bits(layer):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")  # which is when it quantises


def four_bits(layer):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    packed = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32)
    packed.load_state_dict(layer.state_dict())
    return packed.to("cpu")


def eight_bits_of_torchao(layer):
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(layer.requires_grad_(False))
    quantization.quantize_(holder, quantization.Int8WeightOnlyConfig())
    return holder[0]


@pytest.mark.parametrize("quantize", [eight_bits, four_bits, eight_bits_of_torchao])
@pytest.mark.parametrize("lead", [(), (5,)], ids=["batch", "sample"])
def test_a_quantised_linear(quantize, lead):
    torch.manual_seed(0)
    exact = nn.Linear(64, 32)
    layer = quantize(copy.deepcopy(exact))
    x = torch.randn(5, 64, requires_grad=True)
    error = (layer(x) - exact(x)).norm() / exact(x).norm()
    assert 0 < error < 0.2  # quantised it is
    quantised, gates = TuckerAdapter(layer, TuckerSpec(rank=3)), torch.rand(*lead, 2, 2, requires_grad=True)
    assert torch.equal(quantised(x, gates), layer(x))
    nn.init.normal_(quantised.parts.cores)
    result = quantised(x, gates)
    torch.testing.assert_close(result, layer(adapted_by_hand(quantised, x, gates)))
    result.square().sum().backward()
    assert all(tensor.grad.abs().sum() > 0 for tensor in (x, gates, *quantised.parts.parameters()))


def test_conv1d_of_transformers():
    transformers = pytest.importorskip("transformers")
    layer = transformers.pytorch_utils.Conv1D(4, 8)  # weight (in, out)
    transposed, x = TuckerAdapter(layer, SPEC, init_weights=False), torch.randn(2, 5, 8)
    torch.testing.assert_close(transposed(x, GATES), layer(adapted_by_hand(transposed, x, GATES)))


@pytest.mark.parametrize("lead", [(), (2,)], ids=["batch", "sample"])
@pytest.mark.parametrize(
    "layer",
    [nn.Conv1d(8, 4, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, (3, 2), padding=1, stride=2), nn.Conv3d(8, 4, 2)],
    ids=str,
)
def test_convolutions_of_any_geometry(layer, lead):
    convolution, gates = TuckerAdapter(layer, SPEC, init_weights=False), torch.rand(*lead, 3, 2)
    x = torch.randn(2, 8, *[5] * len(layer.kernel_size))
    by_hand = adapted_by_hand(convolution, x.movedim(1, -1), gates).movedim(-1, 1)
    torch.testing.assert_close(convolution(x, gates), layer(by_hand))


def test_any_layer_with_a_given_width_and_further_arguments():
    class Scaled(nn.Module):
        def forward(self, x, scale, *, shift):
            return x * scale + shift

    scaled, x = TuckerAdapter(Scaled(), SPEC, in_features=8), torch.randn(2, 8)
    assert torch.equal(scaled(x, GATES, 2.0, shift=1.0), x * 2.0 + 1.0)


# How the parts start: the update is zero, and a gradient reaches whatever there is to learn.

SIZES = {"rank": st.integers(1, 7), "k": st.integers(1, 3), "t": st.integers(1, 4), "p": st.integers(1, 4)}


def started(rank, k, t, p, **options):
    norm = options.pop("factor_norm", TuckerSpec.factor_norm)
    spec = TuckerSpec(rank=rank, groups=k, experts_per_group=t, expert_rank=p, factor_norm=norm)
    return ExpertParts(spec, 9, **options).double()


@pytest.mark.parametrize(("norm", "length", "lead"), [("columns", 0.5, 1.6), (None, 1.0, 12.0)])
@given(seed=st.integers(0, 99), **SIZES)
def test_every_expert_is_zero_and_all_lead_alike_to_the_zero_half(norm, length, lead, seed, rank, k, t, p):
    torch.manual_seed(seed)
    spec = TuckerSpec(rank=rank, groups=k, experts_per_group=t, expert_rank=p, factor_norm=norm)
    parts = ExpertParts(spec, 9).double()
    cores, factor, basis = as_arrays(*parts.factors())
    assert not any(reference.expert(cores, factor, basis, i, j).any() for i in range(k) for j in range(t))
    read = -(-rank // 2)
    gram = parts.basis[:, :read].T @ parts.basis[:, :read]
    torch.testing.assert_close(gram, length**2 * torch.eye(read).double(), atol=1e-5, rtol=0)
    assert not parts.basis[:, read:].any()
    inner = torch.einsum("jq,kqab->kjab", parts.expert_factor, parts.cores)
    wanted = torch.zeros(rank, rank, dtype=torch.float64)
    wanted[range(rank // 2), range(read, rank)] = lead / rank**0.5  # half of it, for a weight that cannot be read
    torch.testing.assert_close(inner, wanted.expand_as(inner), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [1, 2, 7, 8])
def test_groups_that_start_apart_lead_to_other_columns_with_the_same_strength(rank):
    torch.manual_seed(0)
    parts = started(rank, 3, 2, 2, starts_apart=True, factor_norm="columns")
    torch.manual_seed(0)
    alike = started(rank, 3, 2, 2, factor_norm="columns")
    cores, factor, basis = as_arrays(*parts.factors())
    assert not any(reference.expert(cores, factor, basis, i, j).any() for i in range(3) for j in range(2))
    torch.testing.assert_close(parts.cores[0], alike.cores[0])
    torch.testing.assert_close(parts.cores.flatten(1).norm(dim=1), alike.cores.flatten(1).norm(dim=1))
    if rank > 5:  # as many columns as groups
        products = parts.cores.flatten(1) @ parts.cores.flatten(1).T
        torch.testing.assert_close(products, products.diagonal().diag())


@given(seed=st.integers(0, 99), length=st.sampled_from([0.0, 0.3, 40.0]), **SIZES)
def test_factors_make_the_experts_of_a_basis_with_soft_unit_columns(seed, length, rank, k, t, p):
    torch.manual_seed(seed)
    parts = started(rank, k, t, p, init_weights=False, factor_norm="columns")
    parts.basis.data *= length
    made = as_arrays(*parts.factors())
    cores, factor, basis = as_arrays(parts.cores, parts.expert_factor, parts.basis)
    basis = reference.soft_unit_columns(basis)
    for i in range(k):
        for j in range(t):
            wanted = reference.expert(cores, factor, basis, i, j)
            np.testing.assert_allclose(reference.expert(*made, i, j), wanted, rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 99), length=st.sampled_from([0.0, 0.3, 40.0]), strength=st.floats(0.01, 9.0), **SIZES)
def test_experts_share_a_rotation_and_add_their_own_part_to_it(seed, length, strength, rank, k, t, p):
    torch.manual_seed(seed)
    parts = started(rank, k, t, p, init_weights=False)
    parts.basis.data *= length
    parts.strength.fill_(strength)
    made = as_arrays(*parts.factors())
    cores, factor, basis = as_arrays(parts.cores, parts.expert_factor, parts.basis)
    common = reference.rotation(basis, strength) - np.eye(9)
    for i in range(k):
        for j in range(t):
            wanted = common + reference.expert(cores, factor, basis, i, j) / rank
            np.testing.assert_allclose(reference.expert(*made, i, j), wanted, rtol=1e-7, atol=1e-9)


@given(
    seed=st.integers(0, 99),
    shape=st.tuples(st.sampled_from([0, 1, 3, FEW, FEW + 1]), st.sampled_from([1, 1, 2])),
    depth=st.integers(0, 2),
    is_base=st.booleans(),
    fold=st.sampled_from([0, 32]),
    **SIZES,
)
def test_few_tokens_without_gradients_are_adapted_as_the_reference_says(seed, shape, depth, is_base, fold, **sizes):
    torch.manual_seed(seed)
    parts = started(**sizes, init_weights=False)
    x, gates = torch.randn(*shape, 9).double(), torch.rand(*shape[:depth], sizes["k"], sizes["t"]).double()
    base = torch.randn_like(x) if is_base else x
    wanted = reference.adapt(*as_arrays(x, gates, *parts.factors()), alpha=parts.alpha) + as_arrays(base - x)[0]
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(laid_out, "_FOLDED", fold)
        np.testing.assert_allclose(parts(base, x, gates).numpy(), wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.each_value
@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("lead", [(), (4,), (4, 5)])
def test_an_exported_rotation_is_the_same_without_a_solver(rank, lead):
    torch.manual_seed(0)
    parts = started(rank, 2, 2, 2, init_weights=False)
    x, gates = torch.randn(4, 5, 9, dtype=torch.float64), torch.rand(*lead, 2, 2, dtype=torch.float64)
    program = torch.export.export(parts, (x, x, gates))
    torch.testing.assert_close(program.module()(x, x, gates), parts(x, x, gates))
    assert not [node for node in program.graph.nodes if "solve" in str(node.target)]
    # Inductor takes a buffer without axes for a constant, and fails where anything but arithmetic is done with it.
    (strength,) = (node for node in program.graph.nodes if node.name.endswith("strength"))
    assert {str(user.target) for user in strength.users} == {"aten.mul.Tensor"}


@given(seed=st.integers(0, 99), **SIZES)
def test_a_rotation_is_nothing_while_half_of_the_basis_is_zero(seed, rank, k, t, p):
    torch.manual_seed(seed)
    parts = started(rank, k, t, p)
    assert not parts.cores.any()
    assert not parts.basis[:, rank - rank // 2 :].any()
    experts = torch.einsum("ab,jq,kqbc,dc->kjad", parts.basis, *parts.factors()[1::-1], parts.basis)
    assert not experts.any()  # to the last bit


@pytest.mark.each_value
@pytest.mark.parametrize("norm", ["columns", "rotation"])
@pytest.mark.parametrize("rows", [5, 20])  # left to torch's differentiation, and written out
@pytest.mark.parametrize("lead", [(), (4,), (4, 5)])
def test_gradients_through_what_the_basis_does_to_the_cores(rows, lead, norm):
    torch.manual_seed(0)
    spec = TuckerSpec(rank=3, groups=2, experts_per_group=2, expert_rank=2, factor_norm=norm)
    parts = ExpertParts(spec, 6, init_weights=False).double()
    x, gates = torch.randn(4, rows, 6).double(), torch.rand(*lead, 2, 2).double()
    x, gates = (x, gates) if len(lead) < 2 else (x[:, :5], gates)

    def update(cores, factor, basis):
        return torch.func.functional_call(
            parts, {"cores": cores, "expert_factor": factor, "basis": basis}, (x, x, gates)
        )

    parameters = tuple(parts.parameters())
    cores, factor, basis = parts.factors()
    torch.testing.assert_close(update(*parameters), tucker_adapt_gated(x, basis, cores, factor, gates))
    weights = torch.randn(3, *x.shape).double()  # a few sums of all numbers say as much as all of them

    def few(*parts):
        return (weights * update(*parts)).flatten(1).sum(dim=1)

    assert torch.autograd.gradcheck(few, parameters)
    assert torch.autograd.gradgradcheck(few, parameters)


@given(seed=st.integers(0, 99), **SIZES)
def test_the_zero_half_learns_at_once_and_all_else_within_three_steps(seed, rank, k, t, p):
    torch.manual_seed(seed)
    parts = started(rank, k, t, p)
    before = {name: value.clone() for name, value in parts.named_parameters()}
    x, gates = torch.randn(20, 9, dtype=torch.float64), torch.rand(k, t, dtype=torch.float64)
    aim = torch.randn(20, 9, dtype=torch.float64)
    optimizer = torch.optim.SGD(parts.parameters(), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        (parts(x, x, gates) * aim).sum().backward()
        if step == 0 and rank > 1:
            assert parts.basis.grad[:, -(rank // 2) :].all()
        optimizer.step()
    for name, value in parts.named_parameters():
        assert (value != before[name]).all(), name


@pytest.mark.parametrize("rank", [1, 4])
def test_a_random_start_shows(rank):
    torch.manual_seed(0)
    parts, x = started(rank, 2, 2, 2, init_weights=False), torch.randn(3, 9).double()
    assert not torch.allclose(parts(x, x, torch.rand(2, 2).double()), x, atol=1e-2)


def test_nothing_is_measured_where_the_start_does_not_need_it():
    def gain():
        raise AssertionError

    ExpertParts(TuckerSpec(rank=4), WIDTH, init_weights=False, gain=gain)
    ExpertParts(TuckerSpec(rank=4, factor_norm="frobenius"), WIDTH, gain=gain)
    ExpertParts(TuckerSpec(rank=1), WIDTH, gain=gain)
    with torch.device("meta"):
        ExpertParts(TuckerSpec(rank=4), WIDTH, gain=gain)
    with pytest.raises(AssertionError):
        ExpertParts(TuckerSpec(rank=4), WIDTH, gain=gain)
