"""Each architecture works as it does with LoRA, or is refused by name for a reason that is listed."""

import os

import pytest

from architectures.adapted import Subject
from architectures.checks import NOTHING, WORKS, check
from architectures.expected import refusal_of
from architectures.selection import ALL, CHOSEN
from architectures.sweep import findings, quiet, unexpected

GIVEN = os.environ.get("ARCHITECTURES", "")
NAMES = CHOSEN if not GIVEN else [*ALL] if GIVEN == "all" else GIVEN.split()
# One for each way in which rows belong to samples, and for each way in which masks are converted.
FEW = "xlnet swin mask2former deberta-v3 deepseek-v3 mllama fsmt mistral3 lxmert opt longformer vilt luke wav2vec2"

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries say of old architectures


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_architecture(name):
    quiet()
    assert unexpected(name, findings(name)) == []


@pytest.mark.parametrize("name", FEW.split())
@pytest.mark.parametrize("routing", ["sample", "token"])
def test_rows_and_padding(name, routing):
    subject = Subject(ALL[name])
    subject.rounds = True  # in some of them LoRA rounds otherwise too, which the sweep finds out
    found = check(subject, routing, only="padding")
    assert [
        (each, outcome)
        for each, outcome in found.items()
        if not outcome.startswith((WORKS, NOTHING)) and refusal_of(name, routing, each) is None
    ] == []
