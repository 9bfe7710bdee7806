"""The model card: true, complete, and gentle to what people have written."""

import re

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from support.adapter_files import WEIGHTS, base, trained
from support.adapting import adapt
from tucka._version import __version__
from tucka.peft import TuckAConfig, pin_route


def card_of(folder):
    return (folder / "README.md").read_text("utf-8")


def experts_of(model):
    return model.base_model.model[0].experts("default")


def row(text, name):
    return re.search(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)[1]


def test_a_card_says_what_is_in_the_folder(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    text = card_of(tmp_path)
    assert "More Information Needed" not in text
    numbers = sum(value.numel() for value in load_file(tmp_path / WEIGHTS).values())
    assert row(text, "numbers in the file") == f"{numbers:,}"
    assert row(text, "rank r, groups k, experts of a group t, rank of their mode p") == "2, 2, 2, 1"
    assert row(text, "layers") == "`first, second`"
    assert row(text, "modules saved whole") == "head"
    assert row(text, "routing") == "one route for each sample"
    assert f"tucka {__version__}" in row(text, "versions")
    assert "library_name: peft" in text
    assert "- tucka" in text


def test_a_pinned_route_and_the_base_model_are_told(tmp_path):
    model = adapt("llama", routing="token")
    model.peft_config["default"].base_model_name_or_path = "someone/some-model"
    pin_route(model, group=0)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    text = card_of(tmp_path)
    assert row(text, "routing").startswith("pinned")
    assert row(text, "base model") == "someone/some-model"
    assert 'base = AutoModelForCausalLM.from_pretrained("someone/some-model")' in text
    assert "base_model: someone/some-model" in text


def test_patterns_are_told_and_leave_the_table_whole(tmp_path):
    options = {"rank_pattern": {"q_proj": 2, "(k|v)_proj": 3}, "alpha_pattern": {"v_proj": 0.5}}
    model = adapt("llama", routing="sample", target_modules=r".*\.(q|v)_proj", **options)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    text = card_of(tmp_path)
    assert row(text, "layers") == r"`.*\.(q\|v)_proj`"
    assert row(text, "other ranks") == r"2 in `q_proj`, 3 in `(k\|v)_proj`"
    assert row(text, "other scales") == "0.5 in `v_proj`"
    adapt("llama", routing="sample").save_pretrained(tmp_path, save_embedding_layers=False)
    assert "other ranks" not in card_of(tmp_path)


def test_the_cards_own_lines_load_the_adapter(tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), TuckAConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path)
    lines = re.search(r"```python\n(.*?)```", card_of(tmp_path), re.DOTALL)[1]
    lines = lines.replace("base = ...", "import torch; base = torch.nn.Sequential(torch.nn.Linear(4, 4))")
    made = {}
    exec(lines.replace("path or name of this repository", str(tmp_path)), made)
    assert torch.equal(experts_of(made["model"]).cores, experts_of(model).cores)


def test_what_people_have_written_stays(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    text = card_of(tmp_path)
    (tmp_path / "README.md").write_text(
        text.replace("<!-- tucka: end -->", "<!-- tucka: end -->\nMy own words"), "utf-8"
    )
    pin_route(model, group=1)
    model.save_pretrained(tmp_path)
    assert "My own words" in card_of(tmp_path)
    assert row(card_of(tmp_path), "routing").startswith("pinned")
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\nAll mine\n", "utf-8")
    model.save_pretrained(tmp_path)
    assert "All mine" in card_of(tmp_path)
    assert "TuckA adapter" not in card_of(tmp_path)


def test_each_adapter_has_a_card_and_a_configuration_alone_has_none(tmp_path):
    model = trained()
    model.add_adapter("other", TuckAConfig(r=3, target_modules=["first"]))
    model.save_pretrained(tmp_path)
    assert row(card_of(tmp_path / "other"), "layers") == "`first`"
    TuckAConfig(target_modules=["first"]).save_pretrained(tmp_path / "config")
    assert not (tmp_path / "config" / "README.md").exists()
    assert PeftModel.from_pretrained(base(), tmp_path / "other").peft_config["default"].r == 3
