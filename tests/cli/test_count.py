"""``tucka count``: what it prints, its exit codes, and one line for whatever is wrong."""

import json
import subprocess
import sys

import pytest

import tucka
from tucka.cli.layer_lists import parse_layers
from tucka.cli.tables import _short
from tucka.core.counts.paper_tables import MODEL_LAYERS

BLOCK = "768x768*3,768x3072,3072x768"
SPEC = tucka.TuckerSpec()


def test_the_table_shows_every_method_with_its_counts(invoke):
    result = invoke("count", "--layers", BLOCK, "--repeat", "12", "--r", "6", "--k", "1")
    assert result.code == 0, result.err
    assert "60 layers: 36 of 768x768, 12 of 768x3072, 12 of 3072x768" in result.out
    rows = {line.split()[0]: line for line in result.out.splitlines() if line.strip()}
    assert "r=6 k=1 t=2 p=2" in rows["tucka"]
    layers = parse_layers(BLOCK, repeat=12)
    for method, sizes in {"lora": {"r": 6}, "hra": {"r": 6}, "boft": {"block_size": 8}, "full": {}}.items():
        assert f"{tucka.count_parameters(method, layers, **sizes):,}" in rows[method]
    assert {"tucka", "lora", "dora", "vera", "oft", "boft", "hra", "full"} <= rows.keys()


def test_the_defaults_are_those_of_the_specification(invoke):
    report = json.loads(invoke("count", "--layers", "8x8", "--methods", "tucka", "--json").out)
    sizes = {"r": SPEC.rank, "k": SPEC.groups, "t": SPEC.experts_per_group, "p": SPEC.expert_rank}
    assert report["methods"][0]["sizes"] == {**sizes, "routing": SPEC.routing}


def test_the_rotation_of_adapters_is_counted_where_it_is_asked_for(invoke):
    reports = [invoke("count", "--layers", "8x8*2", "--r", "4", "--json", *more).out for more in ([], ["--rotation"])]
    plain, turned = ({row["method"]: row for row in json.loads(report)["methods"]} for report in reports)
    expected = tucka.count_file_bytes("tucka", [(8, 8)] * 2, **turned["tucka"]["sizes"])
    assert turned["tucka"]["file_bytes"] == expected == plain["tucka"]["file_bytes"] + 8
    assert turned["tucka"]["forward"] > plain["tucka"]["forward"]
    assert turned["lora"] == plain["lora"]


@pytest.mark.parametrize("columns", [80, pytest.param(100, marks=pytest.mark.slow), 200])
def test_no_digit_is_cut_off_on_narrow_terminals(columns, invoke, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for arguments in (["count", "--layers", "4096x14336*1000"], ["count", "--paper"]):
        out = invoke(*arguments).out
        assert "…" not in out
        assert ("58,720,256,000" in out) == ("--layers" in arguments)


def test_json_holds_the_numbers_of_the_functions(invoke):
    arguments = ["--layers", BLOCK, "--r", "4", "--k", "3", "--t", "5", "--p", "6", "--routing", "sample"]
    result = invoke("count", *arguments, "--tokens", "64", "--samples", "4", "--dtype", "bfloat16", "--json")
    report = json.loads(result.out)
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
    # 7 is no multiple of a block, which does not matter where no method with blocks is asked for.
    report = json.loads(invoke("count", "--layers", "7x7", "--r", "4", "--methods", "hra, tucka", "--json").out)
    assert [row["method"] for row in report["methods"]] == ["hra", "tucka"]


def test_a_method_whose_blocks_do_not_fit_is_left_out_of_a_comparison_and_an_error_where_asked_for(invoke, fails):
    result = invoke("count", "--layers", "100x30")
    assert result.code == 0
    assert "Left out: oft and boft, whose block_size=8" in result.out
    assert "lora" in result.out
    fails(["count", "--layers", "100x30", "--methods", "oft"], "block_size: ", "divisor", "100")


def test_the_papers_tables_say_which_cells_do_not_follow(invoke):
    result = invoke("count", "--paper")
    assert result.code == 0
    assert result.out.count(" yes ") == 19
    assert result.out.count("does not follow") == 3
    assert "614,900" in result.out
    cells = json.loads(invoke("count", "--paper", "--json").out)
    assert len(cells) == 22
    assert [cell["count"] for cell in cells if not cell["agrees"]] == [136960, 614900, 8945920]
    assert all(bool(cell["other_sizes"]) != cell["agrees"] for cell in cells)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--layers, --model, --paper", "none"]),
        (["--layers", "4x4", "--paper"], ["got --layers and --paper"]),
        (["--layers", "4x4", "--targets", "query"], ["--targets: ", "--model"]),
        (["--model", ".", "--repeat", "2"], ["--repeat: ", "--layers"]),
        (["--layers", "4x4", "--repeat", "99999999999"], ["--layers: ", "100,000"]),
        (["--layers", "nonsense"], ["--layers: ", "768x768", "nonsense"]),
        (["--layers", "0x4"], ["layers[0][0]: ", "at least 1", "0"]),
        (["--layers", "8x8", "--r", "0"], ["r: ", "at least 1", "0"]),
        (["--layers", "8x8", "--routing", "layer"], ["routing: ", "'batch', 'sample', 'token'"]),
        (["--layers", "9x9", "--methods", "boft"], ["block_size: ", "layers[0]", "9", "8"]),
        (["--layers", "8x8", "--tokens", "0"], ["tokens: ", "at least 1", "0"]),
        (["--layers", "8x8", "--routing", "sample", "--tokens", "2"], ["samples: ", "2 tokens", "16"]),
        (["--layers", "8x8", "--dtype", "int8"], ["--dtype: ", "'float32'", "int8"]),
        (["--layers", "8x8", "--methods", "lora,ia3"], ["--methods: ", "'tucka'", "ia3"]),
        (["--model", "/nowhere"], ["--model: ", "folder", "/nowhere"]),
        (["--layers", "4x4", "--r", "many"], ["'--r'"]),
        (["--layers", "4x4", "--repeat", "0"], ["'--repeat'"]),
        (["--nothing"], ["--nothing"]),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else value,
)
def test_wrong_arguments_of_count_are_one_line_and_code_2(fails, arguments, words):
    fails(["count", *arguments], *words)


def test_an_unknown_command_is_one_line_and_code_2(fails):
    fails(["compare"], "compare")


def test_version_and_help(invoke):
    assert invoke("--version").out == f"tucka {tucka.__version__}\n"
    assert "count" in invoke("--help").out


def test_an_interruption_has_its_own_exit_code(invoke, monkeypatch):
    def interrupt(*_arguments, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tucka.cli.count.compare_methods", interrupt)
    result = invoke("count", "--layers", "8x8")
    assert (result.code, result.out, result.err) == (130, "", "tucka: interrupted\n")
    monkeypatch.setattr("typer.main.get_command", interrupt)  # as versions of typer that raise
    result = invoke("count", "--layers", "8x8")
    assert (result.code, result.out, result.err) == (130, "", "tucka: interrupted\n")


def test_an_error_in_the_program_is_not_hidden(invoke, monkeypatch):
    def fail(*_arguments, **_options):
        raise RuntimeError("within")

    monkeypatch.setattr("tucka.cli.count.compare_methods", fail)
    with pytest.raises(RuntimeError, match="within"):
        invoke("count", "--layers", "8x8")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1234, "1.23k"), (999_500, "1.00M"), (2.5e9, "2.50G"), (3e12, "3T")],
)
def test_numbers_are_short(number, text):
    assert _short(number) == text


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
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("tucka: --layers: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_command_lines_packages_one_line_says_what_to_install(package):
    code = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['tucka']; from tucka.__main__ import main; main()"
    result = run_python("-c", code)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert package in result.stderr
    assert "pip install 'tucka[cli]'" in result.stderr
