"""Lists of layers: from a text, and from a model's configuration."""

import json
import sys

import pytest

import tucka
from tucka.cli.layer_lists import layers_of_model, parse_layers


@pytest.fixture
def folder_of(tmp_path):
    """Write a configuration as transformers does, and return its folder."""

    def write(config):
        config.save_pretrained(tmp_path)
        return tmp_path

    return write


def test_layers_are_read_with_blanks_repeats_and_either_sign():
    assert parse_layers(" 4x4 *2 ,4 X 8,8×4", repeat=2) == [(4, 4), (4, 4), (4, 8), (8, 4)] * 2


@pytest.mark.parametrize(
    "text", ["", "4", "4x", "x4", "4x4x4", "4x4*", "4x-4", "4x4,,4x4", "4x4;4x4", "4.0x4", "axb", "4" * 5000 + "x4"]
)
def test_anything_else_is_no_layer(text):
    with pytest.raises(tucka.ConfigError, match=r"--layers: .*768x768"):
        parse_layers(text)


@pytest.mark.parametrize(("text", "repeat"), [("4x4*0", 1), ("4x4*999999999999", 1), ("4x4*1000", 1000)])
def test_no_layer_and_too_many_layers_are_refused_before_they_are_listed(text, repeat):
    with pytest.raises(tucka.ConfigError, match=r"--layers: .*100,000"):
        parse_layers(text, repeat=repeat)


def test_a_folder_gives_the_linear_layers_that_match(invoke, fails, folder_of):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    folder = folder_of(transformers.BertConfig(**small))
    block = [(32, 32)] * 3 + [(32, 64), (64, 32)]
    assert layers_of_model(str(folder), ["query", "value", "dense"]) == block * 2 + [(32, 32)]
    assert layers_of_model(str(folder), ["attention.output.dense"]) == [(32, 32)] * 2
    assert len(layers_of_model(str(folder))) == 2 * 6 + 1
    result = invoke("count", "--model", str(folder), "--targets", "query, value", "--json")
    assert json.loads(result.out)["layers"] == [[32, 32]] * 4
    fails(["count", "--model", str(folder), "--targets", "quer"], "--targets: ", "dense, key, query, value", "quer")


def test_a_transposed_linear_layer_counts_with_its_widths_in_order(folder_of):
    transformers = pytest.importorskip("transformers")
    folder = folder_of(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=8, vocab_size=16))
    assert layers_of_model(str(folder), ["c_attn"]) == [(32, 96)]


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model_type": "unheard-of"}'])
def test_a_folder_without_a_usable_configuration_is_one_line(fails, tmp_path, content):
    pytest.importorskip("transformers")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    fails(["count", "--model", str(tmp_path)], "--model: ", "config.json", str(tmp_path))


def test_a_missing_package_for_models_is_named_with_its_cure(fails, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    fails(["count", "--model", str(tmp_path)], "--model: ", "transformers", "pip install 'tucka[peft]'")


def test_a_name_that_is_no_folder_is_looked_for_on_the_hub(fails, monkeypatch):
    transformers = pytest.importorskip("transformers")
    asked = []

    def unreachable(name, **options):
        asked.append((name, options["local_files_only"], options["trust_remote_code"]))
        msg = "we could not connect"
        raise OSError(msg)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    fails(["count", "--model", "somebody/some-model"], "--model: ", "hub", "somebody/some-model", "could not connect")
    assert asked == [("somebody/some-model", False, False)]


def test_the_configuration_of_a_name_counts_like_a_folder(monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=8, vocab_size=16)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: config)
    assert layers_of_model("somebody/some-model", ["c_attn"]) == [(32, 96)]


def test_a_rank_above_the_narrowest_layer_is_refused_for_tucka_only(fails, invoke):
    fails(
        ["count", "--layers", "32x8,8x32", "--r", "9"], "--r: ", "at most the smallest input width, 8", "9", "--methods"
    )
    rows = json.loads(invoke("count", "--layers", "32x8,8x32", "--r", "9", "--methods", "lora", "--json").out)
    assert rows["layers"] == [[32, 8], [8, 32]]
