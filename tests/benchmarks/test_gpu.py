"""The measurement on a GPU, run at tiny sizes on a CPU: its code works, and what was not run is said to be so."""

import argparse
import json

import pytest

from benchmarks.gpu import run, sections
from benchmarks.gpu.report import text

NEEDS_CUDA = {"tests", "graphs", "quality"}
# What differs from a section that is run here in names alone, and what takes long.
NOT_HERE = {"decoder llama-7b bfloat16", "decoder llama-1b float32", "decoder llama-7b float32", "compiled"}
HERE = [name for name in sections.SECTIONS if name not in NOT_HERE]


def outcome(name, folder):
    return sections.one(name, argparse.Namespace(device="cpu", tiny=True, seconds=60.0, folder=folder))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Sections that ran in this process."""
    folder = tmp_path_factory.mktemp("gpu")
    return {name: outcome(name, folder) for name in HERE}


@pytest.mark.parametrize("name", HERE)
def test_each_section_runs_at_tiny_sizes_or_says_that_it_needs_cuda(name, results):
    if name in NEEDS_CUDA:
        assert results[name] == {"not run": "needs a CUDA device"}
    else:
        assert "found" in results[name], results[name]


def test_nothing_is_read_back_to_the_host(results):
    for counts in results["reads"]["found"].values():
        assert all(count == counts["frozen"] for name, count in counts.items() if name.startswith("tucka"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NOT_HERE))
def test_the_other_sections_run_too(name, tmp_path):
    found = outcome(name, tmp_path)["found"]
    if name == "compiled":
        assert found.keys() == {"frozen", "tucka batch"}
        for one in found.values():
            assert one["difference"] < 0.02
            assert one["breaks"] == 0


def test_the_tables_say_what_was_not_run(results):
    about = {"versions": {"torch": "2"}, "device": "a CPU", "commit": None, "options": {"tiny": True}}
    written = text({"about": about, "sections": results})
    assert written.count("Not run: needs a CUDA device") == len(NEEDS_CUDA)
    assert "Tiny sizes" in written
    assert "| tucka-r2-k5 |" in written


def test_the_committed_tables_are_those_of_the_committed_results():
    assert (run.RESULTS / "gpu.md").read_text() == text(json.loads((run.RESULTS / "gpu.json").read_text()))


def test_the_time_is_less_than_eight_minutes_and_every_section_fits_into_it():
    assert run.LIMIT + 10 < 8 * 60
    assert sum(seconds for name, (_, seconds) in sections.SECTIONS.items() if name != "quality") <= run.LIMIT + 20


@pytest.mark.slow
def test_a_section_in_its_own_process_is_written_to_the_folder(tmp_path):
    run.main(["--device", "cpu", "--tiny", "--sections", "graphs", "memory", "--folder", str(tmp_path)])
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["sections"]["graphs"] == {"not run": "needs a CUDA device"}
    assert "found" in report["sections"]["memory"]
    assert (tmp_path / "gpu.md").read_text() == text(report)
