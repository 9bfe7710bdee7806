"""The command line: what it prints, its exit codes, and one line for whatever is wrong."""

import json
import subprocess
import sys
import types

import pytest
from typer.testing import CliRunner

import tucka
from tucka import cli
from tucka.core.counts.paper_tables import MODEL_LAYERS
from tucka.layer_lists import layers_of_folder, parse_layers

BLOCK = "768x768*3,768x3072,3072x768"


@pytest.fixture
def invoke(monkeypatch):
    """Run the app as a user would at a terminal 100 columns wide."""
    monkeypatch.setenv("COLUMNS", "100")
    return lambda *arguments: CliRunner().invoke(cli.app, list(arguments))


@pytest.fixture
def folder_of(tmp_path):
    """Write a configuration as transformers does, and return its folder."""

    def write(config):
        config.save_pretrained(tmp_path)
        return tmp_path

    return write


def fails(result, code, message):
    """Assert the exit code and the one line on standard error."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert result.stderr.startswith("tucka: ")


def test_layers_are_read_with_blanks_repeats_and_either_sign():
    assert parse_layers(" 4x4 *2 ,4 X 8,8×4", repeat=2) == [(4, 4), (4, 4), (4, 8), (8, 4)] * 2


@pytest.mark.parametrize(
    "text", ["", "4", "4x", "x4", "4x4x4", "4x4*", "4x-4", "4x4,,4x4", "4x4;4x4", "4.0x4", "axb", "4" * 5000 + "x4"]
)
def test_anything_else_is_no_layer(text):
    with pytest.raises(tucka.ConfigError, match="--layers: expected parts such as"):
        parse_layers(text)


@pytest.mark.parametrize(("text", "repeat"), [("4x4*0", 1), ("4x4*999999999999", 1), ("4x4*1000", 1000)])
def test_no_layer_and_too_many_layers_are_refused_before_they_are_listed(text, repeat):
    with pytest.raises(tucka.ConfigError, match="1 to 100,000 layers"):
        parse_layers(text, repeat=repeat)


def test_the_table_shows_every_method_with_its_counts(invoke):
    result = invoke("count", "--layers", BLOCK, "--repeat", "12", "--r", "6", "--k", "1")
    assert result.exit_code == 0, result.output
    assert "60 layers: 36 of 768x768, 12 of 768x3072, 12 of 3072x768" in result.stdout
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert "r=6 k=1 t=2 p=2" in rows["tucka"]
    layers = parse_layers(BLOCK, repeat=12)
    for method, sizes in {"lora": {"r": 6}, "hra": {"r": 6}, "boft": {"block_size": 8}, "full": {}}.items():
        assert f"{tucka.count_parameters(method, layers, **sizes):,}" in rows[method]
    assert {"tucka", "lora", "dora", "vera", "oft", "boft", "hra", "full"} <= rows.keys()


@pytest.mark.parametrize("columns", [80, 100, 200])
def test_no_digit_is_cut_off_on_narrow_terminals(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in (["count", "--layers", "4096x14336*1000"], ["count", "--paper"]):
        result = CliRunner().invoke(cli.app, arguments)
        assert "…" not in result.stdout
        assert ("58,720,256,000" in result.stdout) == ("--layers" in arguments)


def test_json_holds_the_numbers_of_the_functions(invoke):
    arguments = ["--layers", BLOCK, "--r", "4", "--k", "3", "--t", "5", "--p", "6", "--routing", "sample"]
    result = invoke("count", *arguments, "--tokens", "64", "--samples", "4", "--dtype", "bfloat16", "--json")
    report = json.loads(result.stdout)
    layers = [tuple(layer) for layer in report["layers"]]
    assert layers == parse_layers(BLOCK)
    tucka_row = report["methods"][0]
    sizes = {"r": 4, "k": 3, "t": 5, "p": 6, "routing": "sample"}
    passed = {"tokens": 64, "samples": 4, **sizes}
    assert tucka_row == {
        "method": "tucka",
        "sizes": sizes,
        "parameters": tucka.count_parameters("tucka", layers, **sizes),
        "share": tucka.count_parameters("tucka", layers, **sizes) / tucka.count_parameters("full", layers),
        "forward": tucka.count_flops("tucka", layers, **passed),
        "backward": tucka.count_flops("tucka", layers, backward=True, **passed),
        "file_bytes": tucka.count_file_bytes("tucka", layers, itemsize=2, **sizes),
        "activation_bytes": tucka.count_activation_bytes("tucka", layers, itemsize=2, **passed),
    }


def test_only_the_methods_asked_for_are_counted(invoke):
    # 7 is no multiple of a block, which is no matter when no method with blocks is asked for.
    report = json.loads(invoke("count", "--layers", "7x7", "--methods", "hra, tucka", "--json").stdout)
    assert [row["method"] for row in report["methods"]] == ["hra", "tucka"]


def test_the_papers_tables_say_which_cells_do_not_follow(invoke):
    result = invoke("count", "--paper")
    assert result.exit_code == 0
    assert result.stdout.count(" yes ") == 19
    assert result.stdout.count("does not follow") == 3
    assert "614,900" in result.stdout
    cells = json.loads(invoke("count", "--paper", "--json").stdout)
    assert len(cells) == 22
    assert [cell["count"] for cell in cells if not cell["agrees"]] == [136960, 614900, 8945920]
    assert all(bool(cell["other_sizes"]) != cell["agrees"] for cell in cells)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one of --layers, --model, --paper, got none"),
        (["--layers", "4x4", "--paper"], "got --layers and --paper"),
        (["--layers", "4x4", "--targets", "query"], "--targets: expected --model beside it"),
        (["--model", ".", "--repeat", "2"], "--repeat: expected --layers beside it"),
        (["--layers", "4x4", "--repeat", "99999999999"], "--layers: expected 1 to 100,000 layers in all"),
        (["--layers", "nonsense"], "--layers: expected parts such as 768x768"),
        (["--layers", "0x4"], "layers[0][0]: expected a whole number of at least 1, got 0"),
        (["--layers", "8x8", "--r", "0"], "r: expected a whole number of at least 1, got 0"),
        (["--layers", "8x8", "--routing", "layer"], "routing: expected one of 'batch', 'sample', 'token'"),
        (
            ["--layers", "9x9", "--methods", "boft"],
            "block_size: expected a divisor of the input width 9 of layers[0], got 8",
        ),
        (["--layers", "8x8", "--tokens", "0"], "tokens: expected a whole number of at least 1, got 0"),
        (["--layers", "8x8", "--routing", "sample", "--tokens", "2"], "samples: expected at most the 2 tokens, got 16"),
        (["--layers", "8x8", "--dtype", "int8"], "--dtype: expected one of 'float32'"),
        (["--layers", "8x8", "--methods", "lora,ia3"], "--methods: expected one of 'tucka'"),
        (["--model", "/nowhere"], "model: expected a folder, got /nowhere"),
    ],
)
def test_wrong_arguments_of_count_are_one_line_and_code_2(invoke, arguments, message):
    fails(invoke("count", *arguments), 2, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["count", "--layers", "4x4", "--r", "many"], "'--r'"),
        (["count", "--layers", "4x4", "--repeat", "0"], "'--repeat'"),
        (["count", "--nothing"], "--nothing"),
        (["compare"], "compare"),
    ],
)
def test_wrong_usage_is_one_line_too_when_run_as_a_program(capsys, arguments, message):
    assert cli.run(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("tucka: ")
    assert output.err.count("\n") == 1
    assert message in output.err


def test_version_and_help(invoke):
    assert invoke("--version").stdout == f"tucka {tucka.__version__}\n"
    assert "count" in invoke("--help").stdout


def test_the_papers_lists_are_those_of_the_models_themselves():
    transformers = pytest.importorskip("transformers")
    from torch import device, nn

    cases = {
        "DeBERTa-v3-base": (
            transformers.AutoModelForSequenceClassification,
            transformers.DebertaV2Config(hidden_size=768, num_hidden_layers=12, intermediate_size=3072),
            ("query_proj", "value_proj", "dense"),
        ),
        "ViT-base": (
            transformers.AutoModelForImageClassification,
            transformers.ViTConfig(),
            ("query", "value", "dense", "q_proj", "v_proj", "o_proj", "fc1", "fc2"),
        ),
        "Llama2-7B": (
            transformers.AutoModelForCausalLM,
            transformers.LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32),
            ("q_proj", "v_proj"),
        ),
    }
    assert cases.keys() == MODEL_LAYERS.keys()
    for name, (kind, config, targets) in cases.items():
        with device("meta"):
            model = kind.from_config(config)
        found = [
            (module.in_features, module.out_features)
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and path.endswith(targets)
        ]
        assert sorted(found) == sorted(MODEL_LAYERS[name])


def test_a_folder_gives_the_linear_layers_that_match(invoke, folder_of):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    folder = folder_of(transformers.BertConfig(**small))
    block = [(32, 32)] * 3 + [(32, 64), (64, 32)]
    assert layers_of_folder(folder, ["query", "value", "dense"]) == block * 2 + [(32, 32)]
    assert layers_of_folder(folder, ["attention.output.dense"]) == [(32, 32)] * 2
    assert len(layers_of_folder(folder)) == 2 * 6 + 1
    result = invoke("count", "--model", str(folder), "--targets", "query, value", "--json")
    assert json.loads(result.stdout)["layers"] == [[32, 32]] * 4
    fails(invoke("count", "--model", str(folder), "--targets", "quer"), 2, "(dense, key, query, value), got quer")


def test_a_transposed_linear_layer_counts_with_its_widths_in_order(folder_of):
    transformers = pytest.importorskip("transformers")
    folder = folder_of(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=8, vocab_size=16))
    assert layers_of_folder(folder, ["c_attn"]) == [(32, 96)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a folder that holds config.json"),
        ("{", "transformers can build a model from"),
        ("{}", "transformers can build a model from"),
        ('{"model_type": "unheard-of"}', "transformers can build a model from"),
    ],
)
def test_a_folder_without_a_usable_configuration_is_one_line(invoke, tmp_path, content, message):
    pytest.importorskip("transformers")
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    fails(invoke("count", "--model", str(tmp_path)), 2, message)


def test_a_missing_package_for_models_is_named_with_its_cure(invoke, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = invoke("count", "--model", str(tmp_path))
    fails(result, 2, "transformers")
    assert "pip install 'tucka[peft]'" in result.stderr


class DemoError(Exception):
    """Stands for the demo's own error."""


@pytest.fixture
def demo(monkeypatch):
    """A demo that does what it is told, and remembers its arguments."""
    module = types.ModuleType("tucka.demo")
    module.DemoError, module.calls, module.outcome = DemoError, [], None

    def run_demo(**arguments):
        module.calls.append(arguments)
        if module.outcome is not None:
            raise module.outcome

    module.run_demo = run_demo
    monkeypatch.setitem(sys.modules, "tucka.demo", module)
    return module


def test_the_demo_gets_its_arguments(invoke, demo, tmp_path):
    assert invoke("demo").exit_code == 0
    assert invoke("demo", "--full", "--out", str(tmp_path), "--seed", "3", "--fetch-only").exit_code == 0
    assert [call["out"].name for call in demo.calls] == ["demo", tmp_path.name]
    assert [(call["full"], call["seed"], call["fetch_only"]) for call in demo.calls] == [
        (False, 0, False),
        (True, 3, True),
    ]


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (DemoError("out: expected free disk space,\ngot none"), 1, "out: expected free disk space, got none"),
        (tucka.ConfigError("seed: expected 0, got 1"), 2, "seed: expected 0, got 1"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_demo_that_fails_or_is_stopped_says_so_in_one_line(invoke, demo, capsys, outcome, code, message):
    demo.outcome = outcome
    fails(invoke("demo"), code, message)
    assert cli.run(["demo"]) == code
    assert capsys.readouterr().err == f"tucka: {message}\n"


def test_a_demo_without_its_packages_names_the_cure(invoke, monkeypatch):
    monkeypatch.setitem(sys.modules, "tucka.demo", None)
    fails(invoke("demo"), 2, "pip install 'tucka[demo]'")


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def test_counting_as_a_program_imports_neither_torch_nor_peft():
    code = (
        "import sys; from tucka.cli import run\n"
        "code = run(['count', '--layers', '8x8', '--json'])\n"
        "assert not {'torch', 'transformers', 'peft', 'jax'} & set(sys.modules)\n"
        "sys.exit(code)\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["layers"] == [[8, 8]]


def test_the_module_runs_as_a_program():
    result = run_python("-m", "tucka", "count", "--layers", "8x8x8")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr == "tucka: --layers: expected parts such as 768x768 or 768x3072*12, got '8x8x8'\n"


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_command_lines_packages_one_line_says_what_to_install(package):
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['tucka']; from tucka.__main__ import main; main()"
    result = run_python("-c", code)
    assert result.returncode == 2
    assert result.stderr == f"tucka: the command line needs {package}. Install it with: pip install 'tucka[cli]'\n"


def test_a_method_whose_blocks_do_not_fit_is_left_out_of_a_comparison_and_an_error_where_asked_for(invoke):
    result = invoke("count", "--layers", "100x30")
    assert result.exit_code == 0
    assert "Left out: oft and boft, whose block_size=8" in result.stdout
    assert "lora" in result.stdout
    fails(invoke("count", "--layers", "100x30", "--methods", "oft"), 2, "block_size: expected a divisor")
