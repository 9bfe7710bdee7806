"""PEFT's own tests for custom models, with TuckA in their tables in the place of all other methods."""

import sys
from pathlib import Path

import pytest

from tucka.peft import TuckAConfig

PINNED = {"pinned_gates": [[0.5, 0.5], [0.0, 0.0]]}


def _routed(name, targets, **options):
    """A case for each routing."""
    return [
        (f"{name} {routing}", "MLP", {"target_modules": targets, "routing": routing, **options})
        for routing in ("batch", "sample", "token")
    ]


# A name, the suite's name of a model, options. The model of the convolution makes other rows of its input, so that
# only batch routing knows what they are.
CASES = [
    *_routed("one layer as text", "lin0"),
    *_routed("one layer", ["lin0"]),
    *_routed("another layer", ["lin1"], r=4),
    *_routed("two layers", ["lin0", "lin1"]),
    *_routed("a module saved whole", ["lin0"], modules_to_save=["lin1"]),
    *_routed("other sizes", ["lin0", "lin1"], r=3, k=3, t=3, p=1, alpha=0.5),
    ("pinned", "MLP", {"target_modules": ["lin0", "lin1"], "routing": "batch", **PINNED}),
    (
        "pinned, a module saved whole",
        "MLP",
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], "routing": "sample", **PINNED},
    ),
    ("Conv1D", "EmbConv1D", {"target_modules": ["conv1d"], "r": 2, "routing": "sample"}),
    ("Conv1D, pinned", "EmbConv1D", {"target_modules": ["conv1d"], "r": 2, "routing": "sample", **PINNED}),
    ("convolution", "Conv2d", {"target_modules": ["conv2d"], "r": 4, "routing": "batch"}),
    ("convolution and linear", "Conv2d", {"target_modules": ["conv2d", "lin0"], "r": 4, "routing": "batch"}),
    ("convolution, pinned", "Conv2d", {"target_modules": ["conv2d"], "r": 4, "routing": "batch", **PINNED}),
]
# As the suite does for other methods of several factors. An update's first step of plain SGD grows with the square of
# the cores at the start, which are chosen for optimisers that scale their steps: the suite's own rates end in NaN.
# In the model with an embedding, gradients are small, and the expert factor has none before the cores have moved.
RATE, SMALL_RATE = "(0.01 if model_id != 'EmbConv1D' else 5.0)", 0.001
TWO = [
    ("the same layers", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
    ("other layers", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
]

TABLES = """
from clients.peft_suite import tables as _tables
TEST_CASES[:], MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = _tables()
ALL_PEFT_CONFIG_CLASSES[:] = []


"""
MERGES = "def _skip_if_merging_not_supported(model_id, config_cls, config_kwargs):\n"


def skip_if_routed(options):
    """Routed adapters cannot be merged, like those of some of PEFT's methods."""
    if "pinned_gates" not in options:
        pytest.skip("A routed adapter has no update that could be merged")


def tables():
    """The rows of the suite's tables."""
    rows = [(name, model, TuckAConfig, dict(options)) for name, model, options in CASES]
    pairs = [
        (name, "tucka", TuckAConfig, *({**options, **PINNED, "init_weights": False} for options in both))
        for name, *both in TWO
    ]
    return rows, pairs


EDITS = {
    "test_custom_models.py": {
        "def _skip_tests_with_multiple": TABLES + "def _skip_tests_with_multiple",
        "        lr = 0.5\n": f"        lr = {RATE}\n",
        "        lr = 0.01 if model_id": f"        lr = {SMALL_RATE} if model_id",
    },
    "testing_common.py": {
        MERGES: MERGES + "    from clients.peft_suite import skip_if_routed\n\n    skip_if_routed(config_kwargs)\n",
    },
}


def write_suite(source, target):
    """Copy the suite's files that are needed, and put our tables where the suite has made its own."""
    package = Path(target) / "peft_tests"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in ("testing_common.py", "testing_utils.py", "test_custom_models.py"):
        text = (Path(source) / name).read_text("utf-8")
        for place, added in EDITS.get(name, {}).items():
            assert place in text, f"{name} has changed: {place}"
            text = text.replace(place, added)
        (package / name).write_text(text, "utf-8")
    return package / "test_custom_models.py"


if __name__ == "__main__":
    print(write_suite(*sys.argv[1:]))  # noqa: T201
