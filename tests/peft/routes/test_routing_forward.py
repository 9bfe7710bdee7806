"""Which tokens a route is made from, by which layer, and which layers use it."""

import threading

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import BertModel

from support.adapting import visible, watched
from support.refusals import refused
from support.tiny_models import WIDTH, bert_config, inputs_for, make, output_of, text, vectors
from tucka.backends.torch import routing_scope
from tucka.backends.torch.routing.scope import scope_of
from tucka.errors import ConfigError, RouteError
from tucka.peft import TuckAConfig, expert_load, last_route, pin_route, unpin_route

routings = pytest.mark.parametrize("routing", ["batch", "sample", "token"])


# Which layer routes


@torch.no_grad()
def test_the_first_layer_that_runs_routes_and_not_the_first_one_registered():
    model = visible("opt")
    owner = scope_of(model).owners["default"][""]
    attention = model.base_model.model.model.decoder.layers[0].self_attn
    assert owner is attention.k_proj
    order = []
    for name in ("k_proj", "v_proj", "q_proj"):
        getattr(attention, name).register_forward_pre_hook(lambda module, args: order.append(module))
    made = watched(model)
    model(**inputs_for("opt"))
    assert len(made) == 1
    assert order[0] is attention.q_proj
    assert order[0] is not owner


@torch.no_grad()
def test_router_module_names_the_layer_that_makes_the_route():
    torch.manual_seed(0)
    options = {"r": 4, "routing": "sample", "target_modules": ["q_proj", "v_proj"]}
    first = get_peft_model(make("llama"), TuckAConfig(router_module="layers.0.self_attn.q_proj", **options))
    first(**text())
    assert last_route(first).shape == (3, 2, 2)
    late = get_peft_model(make("llama"), TuckAConfig(router_module="layers.1.self_attn.q_proj", **options))
    with refused(RouteError, "route", "router_module | layers.1.self_attn.q_proj | to run first | layers.0.self_attn"):
        late(**text())


class Repeating(nn.Module):
    """A model whose second layer gets each row twice."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)).repeat_interleave(2, dim=0))


@pytest.mark.parametrize("shape", [(2, 4, WIDTH), (4, 2, WIDTH), (1, 4, WIDTH), (2, 2, WIDTH)], ids=str)
@pytest.mark.parametrize("routing", ["sample", "token"])
@torch.no_grad()
def test_rows_that_cannot_be_matched_are_an_error_that_names_the_module(routing, shape):
    options = {"r": 3, "target_modules": ["first", "second"]}
    model = get_peft_model(Repeating(), TuckAConfig(routing=routing, **options))
    with refused(RouteError, "route", f"{shape[0]} samples | (second) | exclude_modules | routing='batch'"):
        model(torch.randn(shape))
    assert get_peft_model(Repeating(), TuckAConfig(routing="batch", **options))(torch.randn(shape)) is not None


@routings
@torch.no_grad()
def test_layers_without_a_token_axis_take_the_mean_of_their_sample(routing):
    torch.manual_seed(0)
    base = BertModel(bert_config()).eval()
    model = get_peft_model(base, TuckAConfig(r=4, routing=routing, target_modules=["query", "dense"])).eval()
    inputs = text(batch=2)
    inputs["attention_mask"][0, 3:] = 0
    seen = {}
    pooler = model.base_model.model.pooler.dense
    pooler.register_forward_hook(
        lambda module, args, out: seen.update(gates=scope_of(model).fit("default", module, args[0]).gates)
    )
    model(**inputs)
    route = last_route(model)
    if routing == "token":
        mask = inputs["attention_mask"].float()
        route = (route * mask[..., None, None]).sum(1) / mask.sum(1)[:, None, None]
    torch.testing.assert_close(seen["gates"], route)


class Grid(nn.Module):
    """A model with two token axes, which one of its layers sees as one."""

    def __init__(self):
        super().__init__()
        self.first, self.flat, self.rows = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        hidden = self.first(x)
        hidden = hidden + self.flat(hidden.flatten(1, 2)).reshape(hidden.shape)
        return hidden + self.rows(hidden.reshape(-1, WIDTH)).reshape(hidden.shape)


@routings
@torch.no_grad()
def test_several_token_axes(routing):
    torch.manual_seed(0)
    config = TuckAConfig(r=3, routing=routing, target_modules=["first", "flat", "rows"], init_weights=False)
    model = get_peft_model(Grid().double(), config).eval()
    x = torch.randn(2, 4, 5, WIDTH, dtype=torch.float64)
    output = model(x)
    assert last_route(model).shape[:-2] == {"batch": (), "sample": (2,), "token": (2, 4, 5)}[routing]
    if routing == "token":  # tokens do not see each other here, so each is the whole of its own input
        alone = torch.stack([model(token.reshape(1, 1, 1, WIDTH))[0, 0, 0] for token in x.reshape(-1, WIDTH)])
        torch.testing.assert_close(output.reshape(-1, WIDTH), alone)
    else:
        route = last_route(model)
        torch.testing.assert_close(model(x.flatten(1, 2)[:, None]), output.flatten(1, 2)[:, None])
        torch.testing.assert_close(last_route(model), route)
        model(x[:, :2])  # of fewer tokens
        assert not torch.allclose(last_route(model), route)


@routings
@torch.no_grad()
def test_plain_vectors(routing):
    model, x = visible("plain", routing), vectors(4)["x"]
    output = model(x)
    assert last_route(model).shape == ((3, 2) if routing == "batch" else (4, 3, 2))
    if routing != "batch":
        torch.testing.assert_close(torch.cat([model(row) for row in x.split(1)]), output)


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean(dim=(2, 3)))


@pytest.mark.parametrize("routing", ["batch", "sample"])
@torch.no_grad()
def test_convolutions_route_on_their_spatial_mean(routing):
    torch.manual_seed(0)
    options = {"r": 2, "k": 3, "routing": routing, "target_modules": ["first", "second", "head"]}
    model = get_peft_model(Pictures(), TuckAConfig(init_weights=False, **options)).eval()
    x = torch.randn(4, 3, 6, 5)
    made = watched(model)
    output = model(x)
    mean = x.mean(dim=(2, 3), keepdim=True).expand_as(x)
    model(mean)
    torch.testing.assert_close(made[1][2], made[0][2])
    if routing == "sample":
        torch.testing.assert_close(torch.cat([model(picture) for picture in x.split(1)]), output)
    with pytest.raises(ConfigError, match="routing: expected 'batch' or 'sample'"):
        get_peft_model(Pictures(), TuckAConfig(**{**options, "routing": "token"}))


@torch.no_grad()
def test_a_samples_output_does_not_depend_on_its_batch():
    for routing in ("sample", "token"):
        model, inputs = visible("bert", routing), inputs_for("bert")
        together = output_of(model, inputs)
        alone = [output_of(model, {name: value[row : row + 1] for name, value in inputs.items()}) for row in range(3)]
        torch.testing.assert_close(torch.cat(alone), together)


class TorchEncoder(nn.Module):
    """Torch's own transformer, which in evaluation has a fast path past its layers."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.encoder(x)


@torch.no_grad()
def test_torchs_fast_path_does_not_pass_the_adapter_by():
    torch.manual_seed(0)
    model = get_peft_model(TorchEncoder(), TuckAConfig(r=4, target_modules=["linear1"], init_weights=False))
    x = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(model.eval()(x), model.train()(x))


# Calls of parts of a model, and of layers by themselves


@torch.no_grad()
def test_a_layer_called_by_itself_names_its_path_and_the_cure():
    model, inputs = visible("llama"), inputs_for("llama")
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    for _ in range(2):  # before a forward, and after one has ended
        with refused(RouteError, "route", "model.layers.1.self_attn.v_proj | routing_scope(model)"):
            layer(torch.zeros(1, WIDTH))
        output_of(model, inputs)


@routings
@torch.no_grad()
def test_a_backbone_called_by_itself_routes_as_inside_of_its_model(routing):
    model, inputs = visible("llama", routing), text(batch=2)
    inputs["attention_mask"][0, 4:] = 0
    logits = model(**inputs).logits
    route, made = last_route(model), watched(model)
    root = model.base_model.model
    hidden = root.model(**inputs).last_hidden_state
    assert torch.equal(root.lm_head(hidden), logits)
    assert torch.equal(last_route(model), route)
    assert len(made) == 1


@routings
@torch.no_grad()
def test_an_encoder_called_by_itself_hands_its_route_on_with_its_output(routing):
    model, inputs = visible("t5", routing), text(batch=2)
    inputs["attention_mask"][0, 4:] = 0
    expected = model(**inputs, decoder_input_ids=inputs["input_ids"]).logits
    route, made = last_route(model), watched(model)
    hidden = model.get_encoder()(**inputs)
    assert torch.equal(last_route(model), route)
    output = model(encoder_outputs=hidden, decoder_input_ids=inputs["input_ids"], **inputs)
    torch.testing.assert_close(output.logits, expected)
    assert len(made) == 1
    copied = type(hidden)(last_hidden_state=hidden.last_hidden_state.clone())
    if routing != "token":
        with refused(RouteError, "route", "encoder_outputs | given_route"):
            model(encoder_outputs=copied, decoder_input_ids=inputs["input_ids"], **inputs)


@torch.no_grad()
def test_layers_called_inside_of_a_routing_scope_are_one_forward():
    model, x = visible("plain", "sample"), torch.randn(3, 5, WIDTH)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    root, made = model.base_model.model, watched(model)
    with routing_scope(model, attention_mask=mask):
        first = root.first(x)
        inside = root.head(torch.tanh(root.second(torch.tanh(first))))
        other = model(x.flip(0))  # a forward of its own, inside too
        assert torch.equal(root.first(x), first)
    assert [int(mask is not None) for _, mask, _ in made] == [1, 0]
    torch.testing.assert_close(made[0][0], x)
    assert not torch.allclose(made[1][2].flip(0), made[0][2])
    assert torch.equal(other, model(x.flip(0)))
    with routing_scope(root, attention_mask=mask):  # the route is that of the first layer's input alone
        torch.testing.assert_close(root.head(torch.tanh(root.second(torch.tanh(root.first(x))))), inside)
    with pytest.raises(RouteError):
        root.first(x)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@torch.no_grad()
def test_after_an_exception_the_next_forward_starts_clean(error):
    model, inputs = visible("llama"), inputs_for("llama")
    expected = output_of(model, inputs)

    def fail(module, args):
        raise error

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(error):
        output_of(model, text(batch=2, seed=7))
    handle.remove()
    if error is RuntimeError:
        with pytest.raises(RouteError):
            model.base_model.model.model.layers[0].self_attn.q_proj(torch.zeros(1, 1, WIDTH))
    assert torch.equal(output_of(model, inputs), expected)


@torch.no_grad()
def test_pinned_disabled_and_merged_adapters_compute_no_route(monkeypatch):
    model, inputs = visible("llama"), inputs_for("llama")
    monkeypatch.setattr(
        "tucka.backends.torch.routing.router.Router.forward", lambda *_: pytest.fail("a route was made")
    )
    pin_route(model, group=1)
    pinned = output_of(model, inputs)
    assert torch.equal(last_route(model), torch.tensor([[0.0, 0.0], [0.5, 0.5], [0.0, 0.0]]))
    model.merge_adapter()
    torch.testing.assert_close(output_of(model, inputs), pinned, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    unpin_route(model)
    with model.disable_adapter():
        output_of(model, inputs)
    assert not expert_load(model).any()


def test_a_pinned_router_is_frozen_and_freed_again():
    model = visible("llama")
    centroids = scope_of(model).router("default").centroids
    pin_route(model, gates=[[0, 0], [0.3, 0.7], [0, 0]])
    assert not centroids.requires_grad
    model.set_adapter("default")
    assert not centroids.requires_grad
    unpin_route(model)
    assert centroids.requires_grad


# Looking at routes


@torch.no_grad()
def test_last_route_needs_a_run_and_is_detached():
    model = visible("bert")
    with pytest.raises(RouteError, match="has run"):
        last_route(model)
    with torch.enable_grad():
        output_of(model, inputs_for("bert"))
    assert not last_route(model).requires_grad
    assert torch.equal((last_route(model) != 0).any(dim=-1).sum(dim=-1), torch.ones(3, dtype=torch.long))


@pytest.mark.parametrize(("routing", "per_call"), [("batch", 1), ("sample", 3), ("token", 15)])
@torch.no_grad()
def test_the_load_counts_decisions_without_padding(routing, per_call):
    model, inputs = visible("bert", routing), inputs_for("bert")
    assert expert_load(model).tolist() == [0, 0, 0]
    inputs["attention_mask"][0, 3:] = 0
    for calls in (1, 2):
        output_of(model, inputs)
        assert int(expert_load(model).sum()) == calls * per_call
    chosen = (last_route(model) != 0).any(dim=-1)
    if routing == "token":
        chosen = chosen[inputs["attention_mask"] != 0]
    assert expert_load(model, reset=True).tolist() == (2 * chosen.reshape(-1, 3).sum(dim=0)).tolist()
    assert expert_load(model).tolist() == [0, 0, 0]


@torch.no_grad()
def test_the_adapter_asked_for_must_exist():
    with pytest.raises(ConfigError, match="adapter_name: expected the name of a TuckA adapter"):
        last_route(visible("bert"), adapter_name="nobody")


# Independence


@torch.no_grad()
def test_threads_and_models_share_nothing():
    model, twin = visible("llama"), visible("llama", seed=1)
    prompts = [text(batch=2, seed=seed) for seed in range(8)]
    expected = [(output_of(model, prompt), output_of(twin, prompt)) for prompt in prompts]
    failures = []

    def work(number):
        for _ in range(5):
            with torch.no_grad():
                pair = output_of(model, prompts[number]), output_of(twin, prompts[number])
            if not all(torch.equal(one, other) for one, other in zip(pair, expected[number], strict=True)):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize(
    ("kind", "routing"),
    [
        ("plain", "batch"),
        pytest.param("plain", "token", marks=pytest.mark.heavy),
        pytest.param("bert", "sample", marks=pytest.mark.slow),
        pytest.param("llama", "batch", marks=pytest.mark.slow),
        pytest.param("llama", "token", marks=pytest.mark.slow),
    ],
)
def test_a_compiler_sees_one_graph(kind, routing):
    torch._dynamo.reset()
    model, inputs = visible(kind, routing), inputs_for(kind)
    inputs.pop("labels", None)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(output_of(compiled, inputs), output_of(model, inputs), rtol=1e-4, atol=1e-4)
    loss = output_of(compiled, inputs).square().mean()
    loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    output_of(model, inputs).square().mean().backward()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-3, atol=1e-5)
