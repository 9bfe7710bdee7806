"""The benchmark of whole decoders: it runs, goes on where it stopped, and its tables say what was measured."""

import json

import pytest
import torch

from benchmarks import decoding, decoding_report
from benchmarks.decoders import adapted, base_of
from benchmarks.turns import Turns, Work

TINY = ["--sizes", "tiny", "--layers", "1", "--repeats", "2"]


@pytest.mark.parametrize(
    "regimes",
    [
        pytest.param(["train-1x32", "classify-32"], marks=pytest.mark.heavy),
        ["generate-1", "prefill-512", "forward-two"],
    ],
)
def test_a_part_runs_and_its_report_names_the_losses(regimes, tmp_path):
    output = tmp_path / "part.json"
    decoding.main([*TINY, "--rows", "batch", "merged", "--regimes", *regimes, "--output", str(output)])
    report, text = json.loads(output.read_text()), output.with_suffix(".md").read_text()
    assert {"versions", "device", "commit", "options"} <= report["about"].keys()
    methods = {"frozen", "PEFT LoRA", "tucka batch", "tucka merged"}
    assert {name: set(times) for name, times in report["times"].items()} == {
        name: methods - ({"tucka merged"} if "train" in name else set()) for name in regimes
    }
    assert all(len(turns) == 2 for times in report["times"].values() for turns in times.values())
    assert text.count("tucka batch is slower than LoRA in: ") == 1
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_goes_on_where_it_stopped_and_leaves_times_of_other_code(tmp_path):
    path, calls = tmp_path / "times.json", []
    works = {"regime": {"method": Work(lambda: calls.append("run"), lambda: calls.append("clear"), calls=1)}}
    Turns({"commit": "one"}, path).measure(works, 2, budget=60)
    assert calls == ["run", "clear"] * 3  # one round to warm up
    again = Turns({"commit": "one"}, path)
    again.measure(works, 3, budget=60)
    assert calls == ["run", "clear"] * 5
    again.report()
    assert not path.with_suffix(".partial").exists()
    complete = Turns({"commit": "one"}, path)
    assert complete.repeats == 3
    assert set(complete.times["regime"]["method"]) == {"0", "1", "2"}
    other = Turns({"commit": "two"}, path)
    assert (other.repeats, other.times) == (0, {})


def test_a_slow_method_sits_rounds_out():
    turns, runs = Turns({}, None), []
    turns.times = {"regime": {"slow": {str(number): [30.0, 30.0, 0.0, 0.0] for number in range(3)}}}
    turns.measure({"regime": {"slow": Work(lambda: runs.append(1), lambda: None, calls=1)}}, 5, budget=60)
    assert len(turns.times["regime"]["slow"]) == 3
    assert len(runs) == 1  # to warm up


def test_a_turn_is_compared_with_the_base_beside_it(monkeypatch):
    order = []
    base, own = (Work(lambda name=name: order.append(name), lambda: None, calls=2) for name in ("base", "own"))
    clock = iter(range(1000))
    monkeypatch.setattr("benchmarks.turns.time.perf_counter", lambda: next(clock) ** 2 / 1024)
    monkeypatch.setattr("benchmarks.turns.time.process_time", lambda: 0.0)
    wall, processor, over, _ = own.turn(base)
    assert order == ["base", "own"] * 3
    # Calls begin and end at squares: each takes 4 / 1024 more than the one before it.
    assert (over, processor) == (4 / 1024, 0)
    assert wall == pytest.approx((7**2 - 6**2 + 11**2 - 10**2) / 2 / 1024, rel=1e-5)
    assert own.turn(base, base_first=False)[2] == -4 / 1024


def test_a_slow_call_is_made_once(monkeypatch):
    order = []
    base, own = (Work(lambda name=name: order.append(name), lambda: None, calls=9) for name in ("base", "own"))
    monkeypatch.setattr("benchmarks.turns.time.perf_counter", iter([0.0, 1.0, 1.0, 6.0]).__next__)
    assert own.turn(base)[::2] == [5.0, 4.0]
    assert order == ["base", "own"]


def test_ratios_are_those_of_the_overheads():
    base, lora, ours = ({str(number): [0, number, 0, over] for number in range(5)} for over in (0, 4, 2))
    times = {"generate-1": {"frozen": base, "PEFT LoRA": lora, "tucka batch": ours}}
    report = {"about": {"options": {"device": "cpu"}}, "times": times}
    assert decoding_report.ratio(report, "generate-1", "tucka batch") == (0.5, 0.5, 0.5)
    assert "slower than LoRA in: no regime" in decoding_report.losses(report)
    times |= {"forward-1x32": {"PEFT HRA": {"0": [0, 6, 0, 3]}, "PEFT HRA, accelerated": {"0": [0, 4, 0, 1]}}}
    assert decoding_report.losses(report).endswith("the base included: forward, 1×32 (1.5)")


@pytest.mark.parametrize("path", sorted(decoding.RESULTS.glob("decoding-*.json")), ids=lambda path: path.stem)
def test_the_committed_tables_are_those_of_the_committed_results(path):
    assert path.with_suffix(".md").read_text() == decoding_report.text(json.loads(path.read_text()))


@pytest.mark.parametrize("row", decoding.ROWS)
def test_models_share_the_weights_of_the_base_unless_they_are_merged(row):
    base = base_of("decoder", "tiny", 1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = adapted(base, decoding.ROWS[row], 4)
    shared = {value.data_ptr() for value in base.parameters()} <= {value.data_ptr() for value in model.parameters()}
    assert shared is (row != "merged")
    torch.testing.assert_close(base.state_dict(), before, rtol=0, atol=0)
