"""The documents: their numbers are those of the result files, their code runs, their links lead somewhere."""

import ast
import json
import re
import runpy
import tomllib
import xml.etree.ElementTree as ElementTree
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from peft import LoraConfig
from peft.config import PeftConfig

import tucka
from tucka.peft import TuckAConfig

ROOT = Path(__file__).parent.parent
DEMO = json.loads((ROOT / "benchmarks" / "results" / "demo-cpu.json").read_text())
PAGES = [ROOT / "README.md", *(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Pages that the site's build writes.
BUILT = ROOT / "docs" / "tutorials"

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def row_of(page, name):
    """Return the cells of the one table row that begins with a name."""
    lines = (ROOT / page).read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"| {name}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


@pytest.mark.parametrize("row", DEMO["methods"], ids=lambda row: row["method"])
def test_the_demos_page_shows_the_committed_results(row):
    cells = row_of("docs/how-to/demo.md", row["method"])
    assert cells[:5] == [f"{value:.3f}" for value in [*row["accuracy"].values(), row["mean"]]]
    if row["learning_rate"] is not None:
        assert cells[5:] == [f"{row['adapter_parameters']:,}", f"{row['seconds']:.0f}"]


@pytest.mark.parametrize("row", [row for row in DEMO["methods"] if row["seconds"]], ids=lambda row: row["method"])
def test_the_readme_shows_the_committed_results(row):
    cells = row_of("README.md", row["method"])
    assert cells == [f"{row['mean']:.3f}", f"{row['adapter_parameters']:,}", f"{row['seconds']:.0f}"]


def test_the_readmes_times_are_those_of_the_result_file():
    prose = " ".join((ROOT / "README.md").read_text().split())
    methods = json.loads((ROOT / "benchmarks/results/stack-cpu-float32.json").read_text())["methods"]
    for said, method in (
        ("PEFT's HRA adds {} ms", "PEFT HRA"),
        ("Accelerated, it adds {} ms", "PEFT HRA, accelerated"),
        ("as LoRA does with {} ms", "PEFT LoRA"),
        ("routes by sample adds {} ms", "tucka sample"),
    ):
        assert said.format(f"{methods[method]['inference']['processor_overhead_ms']:.1f}") in prose


def test_the_readme_names_the_versions_that_the_package_requires():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    least = dict(item.split(">=") for item in extras["torch"] + extras["peft"] if ">=" in item)
    prose = " ".join((ROOT / "README.md").read_text().split())
    assert f"Python {project['requires-python'].removeprefix('>=')} or newer" in prose
    assert f"PyTorch {least['torch']}, PEFT {least['peft']} and transformers {least['transformers']}, or newer" in prose


@every_page
def test_python_on_a_page_is_a_doctest(page):
    for language, code in FENCE.findall(page.read_text()):
        assert language not in ("python", "py", "pycon") or code.lstrip().startswith(">>>"), code


@every_page
def test_a_page_says_so_where_something_was_not_run(page):
    text = page.read_text()
    assert "+SKIP" not in text or "not run" in text


def anchors_of(page):
    """Return the anchors of a page's headings, as MyST makes them."""
    headings = re.findall(r"^#{1,3} (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def targets_of(page):
    """Yield what a page links to, shows or refers to inside the project: a file, and an anchor in it."""
    text = FENCE.sub("", page.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            yield (page.parent / path if path else page), anchor
    for target in re.findall(r"\{doc\}`(?:[^`<]*<)?([^`>]+)>?`", text):
        folder = ROOT / "docs" if target.startswith("/") else page.parent
        yield folder / f"{target.lstrip('/')}.md", ""


@every_page
def test_links_inside_the_project_lead_somewhere(page):
    for target, anchor in targets_of(page):
        if BUILT in target.parents:
            continue
        assert target.exists() or target.with_suffix("").exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors_of(target), f"{page}: {target}#{anchor}"


def test_every_page_is_in_the_contents():
    contents = (ROOT / "docs" / "index.md").read_text()
    listed = re.findall(r"^([\w-]+(?:/[\w-]+)?)$", contents, re.MULTILINE)
    pages = {str(page.relative_to(ROOT / "docs"))[:-3] for page in PAGES[1:]} - {"index"}
    assert pages == set(listed) - {"tutorials/index"}
    assert len(listed) == len(set(listed))


def test_every_equation_of_the_paper_names_what_computes_it():
    rows = re.findall(r"^\| (.+?) \|.*\| (.+) \|$", (ROOT / "docs/reference/equations.md").read_text(), re.MULTILINE)
    numbers = {int(number) for what, by in rows if "tucka" in by for number in re.findall(r"\((\d+)\)", what)}
    assert numbers == set(range(1, 11))


@pytest.mark.parametrize("lesson", sorted((ROOT / "docs/lessons").glob("[0-9]*.py")), ids=lambda path: path.stem)
def test_a_lesson_asserts_what_it_claims(lesson):
    nodes = list(ast.walk(ast.parse(lesson.read_text())))
    assert sum(isinstance(node, ast.Assert) for node in nodes) >= 3
    # A comparison that is only shown, or printed, can be false without anybody noticing.
    shown = [node.value for node in nodes if isinstance(node, ast.Expr)]
    printed = [part for call in shown if isinstance(call, ast.Call) for part in call.args]
    for value in shown + printed:
        name = ast.unparse(value.func) if isinstance(value, ast.Call) else ""
        assert not isinstance(value, ast.Compare)
        assert name not in ("all", "np.allclose", "torch.equal")


def table_of(page, heading):
    """Return the rows of the first table under a heading, as lists of cells."""
    section = (ROOT / page).read_text().split(f"## {heading}\n")[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def defaults_of(config):
    return {
        item.name: item.default if item.default is not MISSING else item.default_factory() for item in fields(config)
    }


def test_the_page_for_lora_has_every_field_of_lora():
    lora, ours = defaults_of(LoraConfig), defaults_of(TuckAConfig)
    rows = {row[0].strip("`"): row[1] for row in table_of("docs/how-to/from-lora.md", "Every field")}
    assert lora.keys() - rows.keys() == set()
    for name in lora:
        here = rows[name]
        if here == "the same":
            assert ours[name] == lora[name]
        else:
            assert name not in ours
            assert here == "none" or here.strip("`") in ours


def test_the_reference_has_every_field_of_the_configuration():
    inherited = {item.name for item in fields(PeftConfig)}
    own, defaults = [item for item in fields(TuckAConfig) if item.name not in inherited], defaults_of(TuckAConfig)
    rows = [[f"`{item.name}`", f"`{defaults[item.name]!r}`", item.metadata["help"]] for item in own]
    assert table_of("docs/reference/peft.md", "Fields of TuckAConfig") == rows


def test_the_cheat_sheet_has_the_defaults():
    defaults = defaults_of(TuckAConfig)
    sizes = table_of("docs/reference/cheat-sheet.md", "Sizes")
    assert {tucka.spec.LETTERS[row[1].strip("`")]: row[0].strip("`") for row in sizes} == dict(
        zip("rktp", "rktp", strict=True)
    )
    options = table_of("docs/reference/cheat-sheet.md", "Options")
    shown = {row[0].strip("`"): row[2] for row in sizes} | {row[0].strip("`"): row[1] for row in options}
    assert len(shown) == len(sizes) + len(options)
    for name, default in shown.items():
        assert default.partition(":")[0] == f"`{defaults[name]!r}`"


def test_the_cheat_sheet_says_what_one_more_costs():
    d, sizes = 48, {"r": 5, "k": 3, "t": 4, "p": 2}
    r, k, t, p = sizes.values()

    def count(**changed):
        return tucka.count_parameters("tucka", [(d, 7)], **{**sizes, **changed}, pinned=True)

    for row in table_of("docs/reference/cheat-sheet.md", "Sizes"):
        formula = row[4].removesuffix(" numbers").replace("·", "*").replace("r²", "r**2").replace("(2r", "(2*r")
        letter = row[0].strip("`")
        cost = eval(formula, {"d": d, "r": r, "k": k, "t": t, "p": p})
        assert count(**{letter: sizes[letter] + 1}) - count() == cost


@pytest.mark.parametrize("page", ["core", "torch", "peft", "tools"])
def test_a_reference_page_sums_up_its_names(page):
    text = (ROOT / f"docs/reference/{page}.md").read_text()
    names = re.findall(r"^\.\. auto(?:function|class|exception):: (\S+)", text, re.MULTILINE)
    summaries = re.findall(r"^\.\. autosummary::\n   :nosignatures:\n\n((?:   \S+\n)+)", text, re.MULTILINE)
    assert sorted("".join(summaries).split()) == sorted(names)


def test_an_alternative_text_says_what_is_seen():
    for page in PAGES:
        text = page.read_text()
        texts = re.findall(r"!\[([^\]]*)\]\(", text) + re.findall(r"^:alt: (.*)$", text, re.MULTILINE)
        assert all(len(shown.split()) >= 3 for shown in texts), page
        assert text.count("```{image}") == text.count("\n:alt: ")


def test_the_figures_scripts_have_drawn():
    drawn = {path.stem for path in (ROOT / "docs" / "_static").glob("*.svg")}
    assert drawn >= {path.stem.replace("_", "-") for path in (ROOT / "docs" / "figures").glob("*.py")}


SHOWN = sorted(
    {path for page in PAGES for path, _ in targets_of(page) if path.suffix == ".svg"}
    | {
        page.parent / name
        for page in PAGES
        for name in re.findall(r"^```\{image\} (\S+\.svg)$", page.read_text(), re.M)
    }
)
SHOWN.remove(ROOT / "docs/_static/badges.svg")  # it brings a ground of its own
DARK_PAGE = "#131416"


def luminance(channels):
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
    return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def channels_of(colour):
    return [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]


def inverted(colour):
    """What the style sheet's ``invert(1) hue-rotate(180deg)`` makes of a colour."""
    red, green, blue = (1 - part for part in channels_of(colour))
    mixed = 0.426 * red + 1.430 * green + 0.144 * blue
    return [min(max(mixed - part, 0), 1) for part in (red, green, blue)]


def contrast(one, other):
    less, more = sorted((luminance(one), luminance(other)))
    return (more + 0.05) / (less + 0.05)


def least_contrast(colour):
    """The lesser of the contrasts with a white page, and on a dark page, where figures are inverted."""
    on_white = contrast(channels_of(colour), channels_of("#ffffff"))
    return min(on_white, contrast(inverted(colour), channels_of(DARK_PAGE)))


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.stem)
def test_a_figure_can_be_read_on_light_and_on_dark_pages(path):
    drawing = ElementTree.parse(path).getroot()
    space = "{http://www.w3.org/2000/svg}"
    assert drawing.get("width").endswith("pt")
    assert float(drawing.get("width")[:-2]) <= 600, "wider than a page, so that words become small"
    for group in drawing.iter(f"{space}g"):
        name = group.get("id") or ""
        for part in group.iter():
            style = part.get("style") or ""
            if float((re.search(r"opacity: ([\d.]+)", style) or [0, 1])[1]) < 0.5:
                continue  # a grid
            # Not white, which is the edge of a mark, or a word on a colour.
            colours = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", style)) - {"#ffffff"}
            if name.startswith("text_"):
                assert all(least_contrast(colour) >= 4.5 for colour in colours), f"{name}: {colours}"
            elif name.startswith(("line2d_", "PathCollection_")):
                assert all(least_contrast(colour) >= 3 for colour in colours), f"{name}: {colours}"


def test_the_badges_say_what_the_project_says():
    badges = runpy.run_path(str(ROOT / "docs" / "figures" / "badges.py"))
    assert (ROOT / "docs" / "_static" / "badges.svg").read_text() == badges["drawn"]()
    facts = badges["facts"]()
    assert (ROOT / "LICENSE").read_text().startswith(f"{facts['licence']} License")
    assert (ROOT / "tucka" / "py.typed").exists()
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["strict"]
    versions = " and ".join(facts["Python"].replace(" | ", ", ").rsplit(", ", 1))
    assert f"![Licence {facts['licence']}; Python {versions}; types " in (ROOT / "README.md").read_text()
