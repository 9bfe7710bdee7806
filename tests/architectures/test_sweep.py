"""Each architecture works as it does with LoRA, or is refused by name for a reason that is listed."""

import os

import pytest

from architectures.adapted import Subject
from architectures.checks import NOTHING, WORKS, check
from architectures.expected import refusal_of
from architectures.selection import ALL, CHOSEN, NOT_RUN
from architectures.sweep import findings, quiet, unexpected

GIVEN = os.environ.get("ARCHITECTURES", "")
NAMES = CHOSEN if not GIVEN else [*ALL] if GIVEN == "all" else GIVEN.split()
# One for each way in which rows belong to samples, and for each way in which masks are converted.
FEW = """
    xlnet swin mask2former deberta-v3 deepseek-v3 mllama fsmt mistral3 lxmert opt longformer vilt luke wav2vec2
    timm-naflexvit timm-swin timm-tnt diffusers-unet-motion diffusers-lumina-2 diffusers-ernie-image
"""

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries say of old architectures


def require(name):
    if name in NOT_RUN:
        pytest.skip(f"{NOT_RUN[name]} is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_architecture(name):
    require(name)
    quiet()
    assert unexpected(name, findings(name)) == []


# Each takes seconds to make; the whole sweep has them too.
HEAVY = ("mask2former", "mllama", "mistral3", "longformer")


@pytest.mark.each_value
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in HEAVY else ()) for name in FEW.split()]
)
@pytest.mark.parametrize("routing", ["sample", "token"])
def test_rows_and_padding(name, routing):
    require(name)
    subject = Subject(ALL[name])
    subject.rounds = True  # in some of them LoRA rounds otherwise too, which the sweep finds out
    found = check(subject, routing, only="padding")
    assert [
        (each, outcome)
        for each, outcome in found.items()
        if not outcome.startswith((WORKS, NOTHING)) and refusal_of(name, routing, each) is None
    ] == []
