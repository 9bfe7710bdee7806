"""The programs to copy do what they say, at a small size."""

from examples import causal_model, fine_tune_encoder, many_tasks, own_model


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


def test_many_tasks_are_learned_and_a_new_one_leaves_the_others_as_they_are():
    before, after = many_tasks.main(steps=60)
    assert list(after) == list(many_tasks.TASKS)
    assert min(after.values()) > 0.7
    assert before.items() < after.items()
