"""Is a review of food the best a buyer can give? MiniLM, small_fine_foods of R's modeldata (5 stars against fewer)."""

# The reviews are from the Amazon fine food reviews of McAuley & Leskovec (2013). Training and validation are from the
# package's 4,000 training reviews, without those that also occur among its 1,000 test reviews.

from __future__ import annotations

import html
import json
import lzma
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.quality.problem import Problem, Sizes, Task
from benchmarks.quality.tasks.minilm import text_problem
from benchmarks.quality.tasks.sources import cached, debian_path
from examples.data import DataError, Sentence, package_folder, split_domains
from tucka.errors import expected

MAX_LENGTH = 48  # tokens: half of the reviews are longer than 68
PART = "reviews"

FILE = "small-fine-foods.json"
SHA256 = "7defc2a5cdeaf7a6f2ca6009f19cd892879f9d9ef46dd7f58c5b531c046f1b12"
_PACKAGE, _INSIDE = "r-cran-modeldata", "usr/lib/R/site-library/modeldata/data"
_TABLES = {"train": "training_data", "test": "testing_data"}


def load(sizes: Sizes) -> Problem:
    train, test = load_reviews()
    split = split_domains({PART: train}, train=sizes.train, test=sizes.validation)
    return text_problem(split.train, split.test, {PART: test[: sizes.test]}, max_length=MAX_LENGTH)


def load_reviews() -> tuple[list[Sentence], list[Sentence]]:
    """Read the reviews, which are fetched once."""
    return read_reviews(cached("small-fine-foods", {FILE: SHA256}, _make) / FILE)


def read_reviews(path: Path) -> tuple[list[Sentence], list[Sentence]]:
    """Read the reviews, cleaned of markup, each text once and no test review among the others."""
    tables = json.loads(path.read_text(encoding="utf-8"))
    test = _cleaned(tables["test"])
    train = {text: row for text, row in _cleaned(tables["train"]).items() if text not in test}
    return list(train.values()), list(test.values())


def _cleaned(rows: Iterable[tuple[str, int]]) -> dict[str, Sentence]:
    texts = [(" ".join(html.unescape(text.replace("<br />", " ")).split()), label) for text, label in rows]
    return {text: Sentence(PART, text, label) for text, label in texts}


def _make(made: Path, scratch: Path) -> None:
    package_folder("rdata", "rdata==1.1.0")
    base = debian_path(_PACKAGE, _INSIDE, scratch) / "Rdata"
    try:
        found = read_lazy_database(base, _TABLES.values())
        rows = {part: _rows(found[name]) for part, name in _TABLES.items()}
    except Exception as error:  # any reader of any of its files may raise an error of its own
        value = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(expected(_PACKAGE, f"the tables {' and '.join(_TABLES.values())}", value)) from error
    (made / FILE).write_text(json.dumps(rows, ensure_ascii=False, indent=0), encoding="utf-8")


def _rows(table: Any) -> list[tuple[str, int]]:
    """Take text and label, 1 for five stars, out of a data frame."""
    return [(str(text), int(score == "great")) for text, score in zip(table["review"], table["score"], strict=True)]


def read_lazy_database(base: Path, names: Iterable[str]) -> Mapping[str, Any]:
    """Read objects from the files BASE.rdx, which says where each object lies, and BASE.rdb of a package of R."""
    import rdata

    places = rdata.read_rds(base.with_suffix(".rdx"))["variables"]
    content = base.with_suffix(".rdb").read_bytes()
    # An object is 4 bytes of length, the letter Z and a stream of LZMA2 without the container of a .xz file.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
    found = {}
    for name in names:
        start, length = (int(number) for number in places[name])
        raw = lzma.decompress(content[start + 5 : start + length], lzma.FORMAT_RAW, filters=filters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the class of R's tables, which is read as a data frame
            found[name] = rdata.conversion.convert(rdata.parser.parse_data(raw, extension=".rds"))
    return found


TASK = Task(
    title="reviews of food, MiniLM",
    load=load,
    quick=Sizes(train=400, validation=300, test=1000, epochs=2, batch_size=32),
    full=Sizes(train=None, validation=600, test=1000, epochs=2, batch_size=32),
    head_rate=3e-3,
)
