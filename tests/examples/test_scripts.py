"""The programs to copy do what they say, at a small size."""

from pathlib import Path

import pytest

import examples
from examples import (
    causal_model,
    check_counts,
    export_and_serve,
    faster_hra,
    fine_tune_encoder,
    jax_experts,
    many_tasks,
    own_model,
)

FOLDER = Path(examples.__file__).parent
PROGRAMS = sorted(path for path in FOLDER.glob("*.py") if "Run it: python examples/" in path.read_text())


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_is_short_and_shown_on_the_page(program):
    assert len(program.read_text().splitlines()) < 120
    assert (
        f"{{literalinclude}} ../../examples/{program.name}" in (FOLDER.parent / "docs/how-to/examples.md").read_text()
    )


def test_the_page_says_how_many_programs_it_shows():
    assert len(PROGRAMS) == 8
    assert "shows eight programs" in (FOLDER.parent / "docs/how-to/examples.md").read_text()


def test_an_encoder_learns_and_its_saved_adapter_predicts_the_same(capsys):
    before, after = fine_tune_encoder.main(train_items=160, epochs=3)
    assert before < 0.6 < after
    assert "predicts the same: True" in capsys.readouterr().out


def test_a_causal_model_learns_and_merges_with_one_route_for_all():
    before, after, pinned = causal_model.main(train_items=64, epochs=4)
    assert after < before
    assert pinned < before


def test_a_model_of_ones_own_learns_in_both_ways():
    assert max(own_model.main(steps=60)) < 0.5


@pytest.mark.heavy
def test_many_tasks_are_learned_and_a_new_one_leaves_the_others_as_they_are():
    before, after = many_tasks.main(steps=60)
    assert list(after) == list(many_tasks.TASKS)
    assert min(after.values()) > 0.7
    assert before.items() < after.items()


def test_counts_are_what_torch_builds_and_executes():
    for counts in check_counts.main():
        for name in ("parameters", "multiply-adds"):
            counted, measured = counts[name]
            assert counted == measured > 0
        counted, measured = counts["kept bytes"]
        assert measured == pytest.approx(counted, rel=0.01)


def test_hra_stays_the_same_while_other_layers_compute_it():
    times, apart = faster_hra.main(width=64, steps=5, rounds=1)
    assert min(times) > 0
    assert max(apart) < 1e-5


@pytest.mark.heavy
def test_each_groups_lora_is_served_as_it_was_trained():
    (first, last), apart = export_and_serve.main(steps=60)
    assert last < first / 4
    assert list(apart) == list(export_and_serve.TASKS)
    assert max(apart.values()) < 1e-5


def test_experts_in_jax_fit_two_kinds_of_samples():
    before, after, new = jax_experts.main(steps=100)
    assert before == pytest.approx(1)
    assert after < 0.05
    assert new < 0.05
