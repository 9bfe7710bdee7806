"""The paper's column "# Par.", cell by cell."""

import pytest

import tucka
from tucka.core.counts.paper_tables import MODEL_LAYERS, paper_counts

CELLS = {f"{cell.table}-{cell.method}-{cell.figure}": cell for cell in paper_counts()}
DIFFERENT = {"1-vera-0.23M", "1-tucka-0.64M", "3-tucka-10.7M"}
COUNTS = {
    "1-lora-1.19M": 1_191_936,
    "1-dora-1.27M": 1_266_432,
    "1-vera-0.23M": 136_960,
    "1-oft-0.67M": 670_464,
    "1-boft-0.67M": 670_464,
    "1-hra-0.60M": 595_968,
    "1-tucka-0.16M": 157_332,
    "1-tucka-0.46M": 459_076,
    "1-tucka-0.64M": 614_900,
    "2-lora-1.18M": 1_179_648,
    "2-dora-1.25M": 1_253_376,
    "2-vera-0.10M": 104_448,
    "2-oft-0.66M": 663_552,
    "2-boft-0.66M": 663_552,
    "2-hra-0.59M": 589_824,
    "2-tucka-0.16M": 157_776,
    "2-tucka-0.45M": 448_464,
    "2-tucka-0.60M": 599_280,
    "3-lora-16.8M": 16_777_216,
    "3-dora-17.0M": 17_039_360,
    "3-tucka-4.4M": 4_358_400,
    "3-tucka-10.7M": 8_945_920,
}


@pytest.mark.parametrize("name", CELLS)
def test_each_cell_counts_as_by_hand_and_agrees_unless_known_not_to(name):
    assert CELLS[name].count == COUNTS[name]
    assert CELLS[name].agrees == (name not in DIFFERENT)


def test_no_cell_is_left_out():
    assert len(paper_counts()) == len(COUNTS) == 22
    assert {model: len(layers) for model, layers in MODEL_LAYERS.items()} == {
        "DeBERTa-v3-base": 61,
        "ViT-base": 60,
        "Llama2-7B": 64,
    }


@pytest.mark.parametrize("name", sorted(DIFFERENT))
def test_the_sizes_proposed_give_the_printed_figure_and_differ_in_one_number(name):
    cell = CELLS[name]
    proposals = cell.other_sizes()
    assert proposals
    for sizes in proposals:
        count = tucka.count_parameters(cell.method, MODEL_LAYERS[cell.model], **sizes)
        unit = 10 ** (6 - len(cell.figure.partition(".")[2].removesuffix("M")))
        assert abs(count - float(cell.figure.removesuffix("M")) * 1e6) <= unit / 2
        assert sum(sizes[size] != cell.sizes[size] for size in sizes) == 1


def test_no_smaller_change_of_one_number_gives_the_figure():
    cell = CELLS["1-tucka-0.64M"]
    layers = MODEL_LAYERS[cell.model]
    nearest = {
        name: next((sizes[name] for sizes in cell.other_sizes() if sizes[name] != cell.sizes[name]), None)
        for name in cell.sizes
    }
    assert nearest == {"r": None, "k": 5, "t": 15, "p": 5}
    for name, value in nearest.items():
        for smaller in range(cell.sizes[name] + 1, value or 64):
            count = tucka.count_parameters("tucka", layers, **{**cell.sizes, name: smaller})
            assert not 635_000 <= count <= 645_000


def test_a_cell_that_agrees_needs_no_other_sizes():
    assert CELLS["1-lora-1.19M"].other_sizes() == ()


def test_pefts_oft_has_fewer_numbers_than_the_papers():
    count = tucka.count_parameters("oft", MODEL_LAYERS["DeBERTa-v3-base"], block_size=8)
    assert count == 260_736
