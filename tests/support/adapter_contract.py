"""The contract of an adapter: a module that adapts a layer's input inherits `AdapterContract`, and all of its tests."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from tucka.errors import ArrayError, ShapeError

WIDTH, RANK = 6, 2

# Layers and inputs, of a size that numerical derivatives allow.
LAYERS = {
    "linear": (lambda: nn.Linear(WIDTH, 4), (2, 3, WIDTH)),
    "convolution": (lambda: nn.Conv2d(WIDTH, 3, 2), (2, WIDTH, 2, 3)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(WIDTH, 3, 2), (2, WIDTH, 3)),
}
layers = pytest.mark.parametrize("kind", LAYERS)


def layouts(x):
    """One tensor's values, and part of them, laid out in memory in other ways."""
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": torch.cat([x, x], dim=-1)[..., ::2],
        "expanded": x[:1].expand(4, *x.shape[1:]),
        "no samples": x[:0],
        "no tokens": x[:, :0],
    }


def wrong_inputs():
    """Inputs that a float32 linear layer's adapter refuses, with the error and a word of its rule and of its cure."""
    x = torch.ones(2, 3, WIDTH)
    return {
        "width": (x[..., 1:], ShapeError, f"d = {WIDTH}", "width"),
        "axes": (torch.ones(()), ShapeError, "axes", ""),
        "integers": (x.long(), ArrayError, "floating-point", "Convert"),
        "complex": (x.to(torch.complex64), ArrayError, "floating-point", "Convert"),
        "booleans": (x.bool(), ArrayError, "floating-point", "Convert"),
        "double": (x.double(), ArrayError, "float32", "Convert"),
        "half": (x.bfloat16(), ArrayError, "float32", "Convert"),
        "device": (x.to("meta"), ArrayError, "cpu", "Move"),
        "NumPy": (x.numpy(), ArrayError, "torch tensor", "Convert"),
        "list": (x.tolist(), ArrayError, "torch tensor", "Convert"),
    }


class AdapterContract:
    """Inherit it, give the three methods, and set what differs."""

    starts_exactly = True  # as the base, bit for bit
    where = ""  # what an error's message calls the layer

    def create(self, layer, *, init_weights=False):
        """Make the module that adapts a layer of width `WIDTH` by a rank of `RANK`."""
        raise NotImplementedError

    def call(self, adapter, x):
        """Call the module on the layer's input, with further arguments if it needs some."""
        return adapter(x)

    def evaluate(self, adapter, x):
        """Adapt float64 rows (B, ..., d) of NumPy by the loops of the reference."""
        raise NotImplementedError

    def prepare(self, kind="linear", *, dtype=torch.float32, **options):
        """A layer, its adapter and an input."""
        torch.manual_seed(0)
        make, shape = LAYERS[kind]
        layer = make().requires_grad_(False)
        adapter = self.create(layer, **options).to(dtype)
        return layer, adapter, torch.randn(shape).to(dtype)

    def start_tolerance(self):
        """How close the start must be to the base."""
        return {"rtol": 0, "atol": 0} if self.starts_exactly else {"rtol": 1e-5, "atol": 1e-5}

    @layers
    def test_the_start_is_the_base(self, kind):
        layer, adapter, x = self.prepare(kind, init_weights=True)
        torch.testing.assert_close(self.call(adapter, x), layer(x), **self.start_tolerance())

    @layers
    def test_a_random_start_shows(self, kind):
        layer, adapter, x = self.prepare(kind)
        assert not torch.allclose(self.call(adapter, x), layer(x), atol=1e-2)

    @layers
    def test_it_is_the_layer_on_the_input_that_the_reference_adapts(self, kind):
        layer, adapter, x = self.prepare(kind, dtype=torch.float64)
        axis = -1 if kind == "linear" else 1
        adapted = torch.from_numpy(self.evaluate(adapter, x.movedim(axis, -1).numpy())).movedim(-1, axis)
        torch.testing.assert_close(self.call(adapter, x), layer(adapted))

    @layers
    def test_gradients_in_float64(self, kind):
        _, adapter, x = self.prepare(kind, dtype=torch.float64)
        trained = [name for name, parameter in adapter.named_parameters() if parameter.requires_grad]

        def run(x, *values):
            by_name = dict(zip(trained, values, strict=True))
            # Called through a module that holds it: the parameters are swapped while `call` does what it likes.
            return torch.func.functional_call(holder, {f"adapter.{name}": by_name[name] for name in trained}, (x,))

        holder = _Called(adapter, self.call)
        inputs = [x, *(adapter.get_parameter(name).detach() for name in trained)]
        assert gradcheck(run, [tensor.requires_grad_() for tensor in inputs])

    def test_gradients_reach_all_parameters_of_the_adapter_and_none_of_a_frozen_layer(self):
        layer, adapter, x = self.prepare()
        self.call(adapter, x).square().sum().backward()
        frozen = {id(parameter) for parameter in layer.parameters()}
        for parameter in adapter.parameters():
            if id(parameter) in frozen or not parameter.requires_grad:
                assert parameter.grad is None
            else:
                assert parameter.grad.abs().sum() > 0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_keeps_its_dtype(self, dtype):
        layer, adapter, x = self.prepare(dtype=dtype)
        result = self.call(adapter, x)
        assert result.dtype == dtype
        adapted = torch.from_numpy(self.evaluate(copy.deepcopy(adapter).double(), x.double().numpy()))
        exact = copy.deepcopy(layer).double()(adapted)
        torch.testing.assert_close(result.double(), exact, rtol=0.05, atol=0.02 * float(exact.abs().max()))

    def test_autocast_gives_its_dtype_and_gradients_in_the_parameters(self):
        _, adapter, x = self.prepare()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = self.call(adapter, x)
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.float(), self.call(adapter, x), rtol=0.1, atol=0.1)
        result.float().sum().backward()
        grads = [parameter.grad for parameter in adapter.parameters() if parameter.grad is not None]
        assert {grad.dtype for grad in grads} == {torch.float32}

    @pytest.mark.parametrize("name", layouts(torch.ones(2, 3, 4)))
    def test_layouts(self, name):
        _, adapter, x = self.prepare()
        given = layouts(x)[name]
        results = []
        for each in (given.detach(), given.detach().clone(memory_format=torch.contiguous_format)):
            adapter.zero_grad()
            result = self.call(adapter, each.requires_grad_())
            result.square().sum().backward()
            results.append((result.detach(), each.grad))
        torch.testing.assert_close(*results)
        assert results[0][0].shape[:-1] == given.shape[:-1]

    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    def test_a_convolutions_input_keeps_its_layout(self, memory_format):
        layer, adapter, x = self.prepare("convolution", init_weights=True)
        x = x.contiguous(memory_format=memory_format)
        seen = []
        handle = layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        result = self.call(adapter, x)
        handle.remove()
        assert seen[0].is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(result, layer(x), **self.start_tolerance())

    def test_a_saved_state_computes_the_same_elsewhere(self, tmp_path):
        _, adapter, x = self.prepare()
        torch.save(adapter.state_dict(), tmp_path / "adapter.pt")
        torch.manual_seed(1)
        other = self.create(nn.Linear(WIDTH, 4))
        assert not torch.equal(self.call(other, x), self.call(adapter, x))
        other.load_state_dict(torch.load(tmp_path / "adapter.pt"))
        assert torch.equal(self.call(other, x), self.call(adapter, x))

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
    def test_copies_compute_the_same_and_share_nothing(self, copied):
        _, adapter, x = self.prepare()
        before = self.call(adapter, x)
        twin = copied(adapter)
        assert torch.equal(self.call(twin, x), before)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter += 1.0
        assert torch.equal(self.call(adapter, x), before)

    def test_it_compiles_whole(self):
        _, adapter, x = self.prepare()
        torch._dynamo.reset()
        compiled = torch.compile(adapter, fullgraph=True, backend="eager")
        torch.testing.assert_close(self.call(compiled, x), self.call(adapter, x))
        torch._dynamo.reset()

    @pytest.mark.parametrize("what", wrong_inputs())
    def test_a_wrong_input_is_named_with_the_layer_and_the_cure(self, what):
        x, error, rule, cure = wrong_inputs()[what]
        _, adapter, right = self.prepare()
        with pytest.raises(error) as raised:
            self.call(adapter, x)
        for word in ("x: expected", rule, cure, self.where):
            assert word in str(raised.value)
        self.call(adapter, right)  # the next call is as any other

    def test_a_convolutions_input_with_too_few_axes_is_refused(self):
        _, adapter, _ = self.prepare("convolution")
        with pytest.raises(ShapeError, match="x: expected axes"):
            self.call(adapter, torch.ones(WIDTH, WIDTH))

    def test_a_layer_that_converts_its_input_may_get_any_dtype(self):
        layer, adapter, x = self.prepare()
        layer.register_forward_pre_hook(lambda _, arguments: (arguments[0].float(),))
        assert self.call(adapter, x.bfloat16()).dtype == torch.float32


class _Called(nn.Module):
    """Holds an adapter, and calls it as its contract says."""

    def __init__(self, adapter, call):
        super().__init__()
        self.adapter = adapter
        self.call = call

    def forward(self, x):
        return self.call(self.adapter, x)


def as_arrays(*tensors):
    """Tensors as NumPy arrays."""
    return [np.asarray(tensor.detach()) for tensor in tensors]
