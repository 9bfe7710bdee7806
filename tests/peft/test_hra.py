"""PEFT's HRA with thin products: everything equals PEFT's own layers, and only the given model changes."""

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import HRAConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.hra import layer as peft_hra
from torch import nn

from support.bases import make_base, run
from support.cost_meter import measure
from tucka.errors import ConfigError
from tucka.peft import accelerate_hra, restore_hra
from tucka.peft.hra import AcceleratedHRAConv2d, AcceleratedHRALinear

odd_rank = pytest.mark.filterwarnings("ignore:The symmetric initialization:UserWarning")


class Net(nn.Module):
    """Convolutions of several geometries, then linear layers with and without bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.pointwise = nn.Conv2d(5, 4, 1, bias=False)
        self.linear = nn.Linear(4, 6)
        self.last = nn.Linear(6, 2, bias=False)

    def forward(self, x):
        hidden = torch.tanh(self.pointwise(torch.tanh(self.conv(x))))
        return self.last(torch.tanh(self.linear(hidden.flatten(2).mean(dim=-1))))


TARGETS = ["conv", "pointwise", "linear", "last"]


def quiet_peft_model(base, config):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The symmetric initialization")
        return get_peft_model(base, config)


def adapted(*, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    config = HRAConfig(**{"r": 4, "target_modules": TARGETS, "init_weights": False, **options})
    return quiet_peft_model(Net().to(dtype), config)


def twins(**options):
    """PEFT's model and an accelerated copy."""
    model = adapted(**options)
    fast = copy.deepcopy(model)
    assert accelerate_hra(fast) == 4
    return model, fast


def image(dtype=torch.float32):
    return torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def close(one, other, tolerance=1e-5):
    scale = max(1.0, float(other.detach().abs().max()))
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def assert_alike(model, fast, dtype=torch.float32, tolerance=1e-5):
    """Outputs and gradients of input and parameters are the same."""
    results = []
    for each in (model, fast):
        x = image(dtype)
        each.zero_grad()
        output = each(x)
        assert output.dtype == x.dtype
        output.square().sum().backward()
        results.append((output, x.grad, {name: p.grad for name, p in each.named_parameters() if p.grad is not None}))
    (output, grad, grads), (fast_output, fast_grad, fast_grads) = results
    close(fast_output, output, tolerance)
    close(fast_grad, grad, tolerance)
    assert grads.keys() == fast_grads.keys()
    for name, value in grads.items():
        close(fast_grads[name], value, tolerance)


@given(
    rank=st.integers(1, 9),
    apply_gs=st.booleans(),
    bias=st.sampled_from(["none", "hra_only"]),
    seed=st.integers(0, 2**31),
)
def test_outputs_and_gradients_are_pefts(rank, apply_gs, bias, seed):
    # Gram-Schmidt of more columns than the narrowest layer has rows leaves noise.
    rank = min(rank, 3) if apply_gs else rank
    model, fast = twins(r=rank, apply_GS=apply_gs, bias=bias, seed=seed, dtype=torch.float64)
    assert_alike(model, fast, torch.float64, 1e-9)


@pytest.mark.parametrize("apply_gs", [False, True])
def test_single_precision_agrees_to_five_digits(apply_gs):
    assert_alike(*twins(apply_GS=apply_gs, r=2))


@pytest.mark.parametrize("apply_gs", [False, True])
def test_the_default_start_is_pefts(apply_gs):
    # With Gram-Schmidt, equal columns leave rounding noise there: it must be PEFT's noise.
    model, fast = twins(apply_GS=apply_gs, init_weights=True)
    with torch.no_grad():
        torch.testing.assert_close(fast(image()), model(image()), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("widened", [False, True])
@torch.no_grad()
def test_half_precision_agrees_to_its_rounding(dtype, widened):
    torch.manual_seed(0)
    base = Net().to(dtype)
    model = get_peft_model(
        base, HRAConfig(r=4, target_modules=TARGETS, init_weights=False), autocast_adapter_dtype=widened
    )
    fast = copy.deepcopy(model)
    accelerate_hra(fast)
    x = image(dtype)
    assert fast(x).dtype == dtype
    exact = copy.deepcopy(model).float()(x.float())
    error = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(fast(x).float(), exact, rtol=error, atol=error)
    torch.testing.assert_close(fast(x.float()), model(x.float()), rtol=error, atol=error)


def test_autocast_gives_the_same_dtype_and_trains():
    model, fast = twins()
    with torch.autocast("cpu", torch.bfloat16):
        output, desired = fast(image()), model(image())
    assert output.dtype == desired.dtype
    torch.testing.assert_close(output, desired, rtol=0.1, atol=0.1)
    output.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in fast.parameters() if p.requires_grad)


def add_another(model, **options):
    torch.manual_seed(5)
    model.add_adapter("other", HRAConfig(r=3, target_modules=["conv", "linear"], init_weights=False, **options))
    return model


@odd_rank
@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")  # the layers that only one adapter is on
@pytest.mark.parametrize("order", [["default", "other"], ["other", "default"], ["other"]])
@pytest.mark.parametrize("apply_gs", [False, True])
def test_several_adapters_multiply_in_pefts_order(order, apply_gs):
    model = add_another(adapted(dtype=torch.float64), apply_GS=apply_gs)
    model.base_model.set_adapter(order)
    fast = copy.deepcopy(model)
    accelerate_hra(fast)
    # PEFT computes in single precision in a layer that none of the active adapters is on.
    assert_alike(model, fast, torch.float64, 1e-9 if "default" in order else 1e-6)
    for safe in (False, True):
        for each in (model, fast):
            each.merge_adapter(safe_merge=safe)
        for (name, value), desired in zip(fast.state_dict().items(), model.state_dict().values(), strict=True):
            assert name
            close(value, desired, 1e-9)
        assert_alike_output(model, fast)
        for each in (model, fast):
            each.unmerge_adapter()
        for value, desired in zip(fast.state_dict().values(), model.state_dict().values(), strict=True):
            close(value, desired, 1e-9)


@odd_rank
@torch.no_grad()
def test_one_token_of_each_sample_is_multiplied_in_pefts_order():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(9, 5)), HRAConfig(r=4, target_modules=["0"], init_weights=False))
    model.add_adapter("other", HRAConfig(r=3, target_modules=["0"], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    fast = copy.deepcopy(model.double())
    accelerate_hra(fast)
    for samples in (1, 4, 40):
        x = torch.randn(samples, 1, 9, dtype=torch.float64)
        close(fast(x), model(x), 1e-9)


@torch.no_grad()
def assert_alike_output(model, fast):
    x = image(next(model.parameters()).dtype)
    close(fast(x), model(x))


@torch.no_grad()
def test_merging_disabling_and_unloading_work_as_in_peft():
    model, fast = twins()
    x, plain = image(), copy.deepcopy(model).unload()
    with fast.disable_adapter():
        assert torch.equal(fast(x), plain(x))
    output = fast(x)
    close(output, model(x))
    fast.merge_adapter()
    close(fast(x), output)
    with fast.disable_adapter():  # takes the merged adapter out
        close(fast(x), plain(x))
    close(fast(x), output)
    clean = fast.merge_and_unload()
    close(clean(x), output)
    assert type(clean.linear) is nn.Linear


def layers(model):
    return [module for module in model.modules() if isinstance(module, peft_hra.HRALayer)]


def test_a_safe_merge_finds_broken_numbers_before_the_weight_is_written():
    _, fast = twins()
    layer = fast.base_model.model.linear
    layer.hra_u["default"].data[0, 0] = float("nan")
    before = layer.base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.*adapter default"):  # PEFT's own words
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before)
    assert not layer.merged


@pytest.mark.parametrize("direction", ["to accelerated", "to PEFT"])
def test_checkpoints_go_both_ways(direction, tmp_path):
    model, fast = twins(bias="hra_only")
    saved, other = (model, fast) if direction == "to accelerated" else (fast, model)
    assert list(model.state_dict()) == list(fast.state_dict())
    saved.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path)
    if direction == "to accelerated":
        accelerate_hra(loaded)
    with torch.no_grad():
        close(loaded(image()), other(image()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_accelerated_and_train_on_their_own(copied):
    _, fast = twins()
    twin = copied(fast)
    assert isinstance(twin.base_model.model.linear, AcceleratedHRALinear)
    assert isinstance(twin.base_model.model.conv, AcceleratedHRAConv2d)
    assert_alike(fast, twin)
    twin.base_model.model.linear.hra_u["default"].data.add_(1.0)
    assert not torch.equal(twin(image()), fast(image()))


@odd_rank
def test_adapters_can_be_added_and_deleted_later():
    model, fast = twins()
    for each in (model, fast):
        add_another(each)
        each.set_adapter("other")
    assert_alike(model, fast)
    for each in (model, fast):
        each.delete_adapter("default")
    assert_alike(model, fast)
    torch.manual_seed(3)
    narrow = quiet_peft_model(Net(), HRAConfig(r=2, target_modules=["linear"], init_weights=False))
    assert accelerate_hra(narrow) == 1
    narrow.add_adapter("wide", HRAConfig(r=2, target_modules=["linear", "last"], init_weights=False))
    assert accelerate_hra(narrow) == 2
    assert restore_hra(narrow) == 2


def test_restoring_gives_pefts_classes_back_and_nothing_of_peft_was_changed():
    methods = dict(vars(peft_hra.HRALinear)), dict(vars(peft_hra.HRAConv2d)), dict(vars(peft_hra.HRALayer))
    model, fast = twins()
    bystander = adapted()
    assert accelerate_hra(fast) == 4  # again: the same
    assert {type(layer) for layer in layers(bystander)} == {peft_hra.HRALinear, peft_hra.HRAConv2d}
    assert (dict(vars(peft_hra.HRALinear)), dict(vars(peft_hra.HRAConv2d)), dict(vars(peft_hra.HRALayer))) == methods
    assert restore_hra(fast) == 4
    assert restore_hra(fast) == 0
    assert {type(layer) for layer in layers(fast)} == {peft_hra.HRALinear, peft_hra.HRAConv2d}
    assert torch.equal(fast(image()), model(image()))


def test_several_adapters_compile_whole():
    _, fast = twins()
    add_another(fast)
    fast.base_model.set_adapter(["default", "other"])
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    close(compiled(image()), fast(image()))


def test_models_without_hra_have_nothing_to_accelerate():
    assert accelerate_hra(nn.Linear(2, 2)) == 0
    assert accelerate_hra(get_peft_model(Net(), LoraConfig(target_modules=["linear"]))) == 0


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, (1, 3)), nn.Conv2d(3, 4, (3, 1)), nn.Conv2d(3, 4, 3, padding="same")], ids=str
)
def test_convolutions_that_pefts_hra_crashes_on_are_refused_before_any_layer_changes(layer):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    model = get_peft_model(net, HRAConfig(r=2, target_modules=["0", "1"], init_weights=False))
    with pytest.raises((RuntimeError, ValueError)):
        model(torch.randn(1, 3, 4, 4))
    with pytest.raises(ConfigError, match=r"expected .*base_model\.model\.1.*exclude_modules"):
        accelerate_hra(model)
    assert {type(layer) for layer in layers(model)} == {peft_hra.HRAConv2d}


@pytest.mark.parametrize(
    "geometry",
    [{"dilation": 2}, {"stride": (2, 1), "padding": (1, 0)}, {"padding": 1, "padding_mode": "circular"}],
    ids=str,
)
@torch.no_grad()
def test_convolutions_whose_geometry_peft_ignores_give_pefts_outputs(geometry):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, **geometry))
    model = get_peft_model(net, HRAConfig(r=2, target_modules=["0"], init_weights=False))
    desired = model(image())
    accelerate_hra(model)
    close(model(image()), desired)


def test_a_layer_that_another_library_wrapped_is_refused():
    model = adapted()
    layer = model.base_model.model.linear
    layer.__class__ = type("Sharded", (peft_hra.HRALinear,), {})
    with pytest.raises(ConfigError, match=r"model: expected .*PEFT.*Sharded.*linear.*before"):
        accelerate_hra(model)


def test_a_real_model_keeps_its_outputs():
    base, _, inputs = make_base("bert")
    model = get_peft_model(base, HRAConfig(r=4, target_modules="all-linear", init_weights=False)).eval()
    desired = run(model, inputs)
    assert accelerate_hra(model) == 14
    close(run(model, inputs), desired)


def test_no_square_matrix_is_ever_formed():
    width, out, rank, rows = 64, 32, 2, 5
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(width, out)), HRAConfig(r=rank, target_modules=["0"], init_weights=False)
    )
    accelerate_hra(model)
    x = torch.randn(rows, width, requires_grad=True)
    measured = measure(lambda: model(x), owned=model.parameters())
    # The layer, two thin products on activations, UᵀU and UΓ.
    assert measured.forward == rows * width * out + 2 * rows * width * rank + 2 * width * rank**2
    assert measured.kept_bytes < 4 * width * width


@pytest.mark.parametrize("write", ["in place", "past the counter", "replaced", "option"])
@torch.no_grad()
def test_factors_are_made_anew_when_the_vectors_change(write):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(12, 6)), HRAConfig(r=4, target_modules=["0"], init_weights=False))
    accelerate_hra(model)
    x = torch.randn(3, 12)
    before = model(x)
    assert torch.equal(model(x), before)
    layer = model.base_model.model[0]
    vectors = layer.hra_u["default"]
    if write == "in place":
        vectors[:, 0] += 1
    elif write == "past the counter":
        vectors.data[:, 0] += 1
    elif write == "replaced":
        layer.hra_u["default"] = nn.Parameter(vectors.flip(1))
    else:
        layer.hra_apply_GS["default"] = True
    after = model(x)
    assert not torch.allclose(after, before)
    restore_hra(model)
    torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-5)
