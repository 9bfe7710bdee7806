"""Sentences with measured numbers say what the result files say.

A claim is a page, a sentence with gaps, and what fills them. Where results change, the message is the new sentence. A
claim in words has a condition instead; where it fails, the sentence has to be written anew.
"""

import json
import math
import re
import shutil
from statistics import fmean

import pytest

from benchmarks import decoding_report, growth_report, report
from benchmarks.gpu.run import LIMIT
from benchmarks.quality import capacity as capacity_report
from benchmarks.quality import report as quality_report
from benchmarks.quality import studies_report, windows
from benchmarks.quality.experiments import read_all
from benchmarks.quality.run import best_rate, score
from benchmarks.routing import balance_report, study_report, tasks_report
from support.measured import (
    ALIKE,
    APART,
    BY_METHOD,
    DEMO,
    FOUR,
    LATER,
    OPPOSITE,
    RESULTS,
    ROOT,
    ablation,
    accuracy,
    against_lora,
    ahead,
    ahead_of,
    at_rate,
    below,
    best_of,
    bits,
    both,
    capacity,
    curves,
    domains_with_a_group,
    experts_of_ranks_from_two,
    gains,
    gap,
    gaps,
    growth,
    in_words,
    kept,
    least_used,
    most_used,
    moved,
    movement,
    near_lora,
    noise,
    on_texts,
    over_lora,
    overheads,
    overlap,
    pays,
    quality,
    ranks,
    rate_of,
    seconds,
    seconds_of_the_search,
    seeds_of,
    share,
    sizes_of,
    starts,
    steps_of,
    study,
    task_table,
    tasks,
    times_loras,
    trained_start,
    window,
    windows_of_both,
    within_noise,
)

COMPARISON, ROUTING = "docs/explanation/comparison.md", "docs/explanation/routing.md"
CHOOSING, DESIGN, COSTS = "docs/how-to/choosing.md", "docs/explanation/design.md", "docs/explanation/costs.md"


# --- what the pages say: a page, a sentence with gaps, and what fills them ---

FILLED = [
    (
        "README.md",
        "one adapter was as good as [a LoRA for each task](docs/explanation/routing.md#where-routing-pays), "
        "with {:.0%} of the parameters",
        lambda: [
            task_table(OPPOSITE, APART)["parameters"] / task_table(OPPOSITE, "a LoRA r=8 for each task")["parameters"]
        ],
    ),
    (
        "README.md",
        "rated sentences from four domains, {} for training and {} for testing in each domain",
        lambda: [DEMO["plan"]["train_per_domain"], DEMO["plan"]["test_per_domain"]],
    ),
    (
        "README.md",
        "means are {:.3f} to {:.3f}",
        lambda: [edge(row["error"] for row in DEMO["methods"] if row["seconds"]) for edge in (min, max)],
    ),
    (
        "README.md",
        "has {:.0f} to {:.0%} of the parameters of LoRA",
        lambda: [100 * share("reviews", "tucka_r8"), share("causal", "tucka_r8")],
    ),
    (
        "README.md",
        "TuckA with r = 2, with {:.0%} of the parameters, was as accurate too: {:.2f} ± {:.2f} points ahead of LoRA "
        "with r = 8 over both, which tells no difference",
        lambda: [share("reviews", "tucka_r2_default"), *on_texts("tucka_r2_default")[1:]],
    ),
    (
        "README.md",
        "TuckA with r = 16 is ahead of LoRA with as many parameters by {:.1f} points on one, and within {:.1f} points",
        lambda: [-min(gaps("tucka_r16")), max(abs(found) for found in gaps("tucka_r16") if found > -2)],
    ),
    (
        "docs/how-to/demo.md",
        "with seed {}, {} training and {} test sentences a domain",
        lambda: [DEMO["plan"][name] for name in ("seed", "train_per_domain", "test_per_domain")],
    ),
    (
        "docs/how-to/demo.md",
        "means are {:.3f} to {:.3f}",
        lambda: [edge(row["error"] for row in DEMO["methods"] if row["seconds"]) for edge in (min, max)],
    ),
    (
        "docs/how-to/demo.md",
        "LoRA has {:.1f} times the parameters",
        lambda: [BY_METHOD["LoRA"]["adapter_parameters"] / BY_METHOD["TuckA"]["adapter_parameters"]],
    ),
    (
        "docs/how-to/demo.md",
        "head only has {:.1%} accuracy, TuckA {:.1%} with {:.0f} thousand parameters, LoRA {:.1%} with {:.0f} thousand",
        lambda: [
            BY_METHOD["head only"]["mean"],
            *(
                part
                for name in ("TuckA", "LoRA")
                for part in (
                    BY_METHOD[name]["mean"],
                    (BY_METHOD[name]["adapter_parameters"] + BY_METHOD[name]["head_parameters"]) / 1e3,
                )
            ),
        ],
    ),
    (
        CHOOSING,
        "as accurate as LoRA of the same rank with {:.0%} of the parameters",
        lambda: [share("reviews", "tucka_r8")],
    ),
    (
        CHOOSING,
        "had {:.0%} of the parameters of LoRA with r = 8 and was as accurate at its best",
        lambda: [share("reviews", "tucka_r2_default")],
    ),
    (
        CHOOSING,
        "Each group is {:.0%} of the whole at r = 8",
        lambda: [(ranks()["r8_k4"].parameters - ranks()["r8_k2"].parameters) / 2 / ranks()["r8_k2"].parameters],
    ),
    *(
        (
            page,
            "from {:.0f} to {:.0f} % at r = 2 up to {:.0f} to {:.0f} % at r = 16, and cross each other",
            lambda: [
                edge(100 * row.mean for name, row in ranks().items() if name.startswith(rank))
                for rank in ("r2_", "r16_")
                for edge in (min, max)
            ],
        )
        for page in (CHOOSING, COMPARISON)
    ),
    (
        COMPARISON,
        "from r = 2 to r = 16 accuracy rises by {:.0f} to {:.0f} points with each number of groups",
        lambda: [
            edge(100 * (ranks()[f"r16_k{k}"].mean - ranks()[f"r2_k{k}"].mean) for k in (1, 2, 4, 8))
            for edge in (min, max)
        ],
    ),
    (
        COMPARISON,
        "TuckA reaches {:.1f} % on test data and HRA {:.1f} %, at about equal parameters",
        lambda: [curves()["TuckA"][2], curves()["HRA"][2]],
    ),
    (
        COMPARISON,
        "TuckA reaches a validation accuracy of {:.0f} % and HRA {:.0f} %",
        lambda: [curves()["TuckA"][1], curves()["HRA"][1]],
    ),
    (
        COMPARISON,
        "TuckA with r = 8 is ahead by {:.1f} points on the glosses, {:.1f} on the sounds and {:.1f} on the languages, "
        "and with r = 16 by {:.1f}, {:.1f} and {:.1f}",
        lambda: [-found for name in ("tucka_r8", "tucka_r16") for found in gaps(name)],
    ),
    (
        COMPARISON,
        "On the sounds, TuckA with r = 16 is {:.1f} points above LoRA with r = 16, with {:.0%} of its parameters. "
        "Small ranks do worse on the glosses: r = 4 is {:.1f} points below",
        lambda: [
            ahead_of("sounds", "tucka_r16", "lora_r16"),
            capacity("sounds")["tucka_r16"].parameters / capacity("sounds")["lora_r16"].parameters,
            gap("glosses", "tucka_r4"),
        ],
    ),
    (
        COMPARISON,
        "and is {:.1f} points below it on the glosses, {:.1f} above it on the sounds and {:.1f} below it on the "
        "languages. TuckA with r = 8 and one expert, which is about as large, is ahead of HRA by {:.1f}, {:.1f} and "
        "{:.1f} points",
        lambda: [
            ahead_of("glosses", "lora_r4", "hra_r8"),
            ahead_of("sounds", "hra_r8", "lora_r4"),
            ahead_of("languages", "lora_r4", "hra_r8"),
            *(ahead_of(task, "tucka_r8_k1", "hra_r8") for task in ("glosses", "sounds", "languages")),
        ],
    ),
    (
        COMPARISON,
        "With bounded columns, the default before, TuckA with r = 8 was {:.0f} to {:.0f} points below the curve",
        lambda: [min(gaps("tucka_r8_columns")), max(gaps("tucka_r8_columns"))],
    ),
    (
        COMPARISON,
        "it gains {:.0f} points on the glosses and {:.0f} on the sounds",
        lambda: [ahead_of(task, "lora_r16", "lora_r1") for task in ("glosses", "sounds")],
    ),
    (
        COMPARISON,
        "has {:.0%} of the parameters of LoRA with r = 8, and is {:.0f} to {:.0f} points below it",
        lambda: [
            capacity("glosses")["tucka_r2_k4"].parameters / capacity("glosses")["lora_r8"].parameters,
            min(ahead_of(task, "lora_r8", "tucka_r2_k4") for task in ("glosses", "sounds", "languages")),
            max(ahead_of(task, "lora_r8", "tucka_r2_k4") for task in ("glosses", "sounds", "languages")),
        ],
    ),
    (
        COMPARISON,
        "with blocks of 32 it is {:.0f} to {:.0f} points above LoRA's curve",
        lambda: [-max(gaps("oft_b32")), -min(gaps("oft_b32"))],
    ),
    (
        COMPARISON,
        "has {:.0%} of the parameters of LoRA.** Over both tasks it is ahead by {} points, and without the "
        "bound by {}.",
        lambda: [share("reviews", "tucka_r8_columns"), ahead("tucka_r8_columns"), ahead("tucka")],
    ),
    (
        COMPARISON,
        "on the texts, with {:.0%} of its parameters.** Over both tasks it is ahead by {:.2f} ± {:.2f} points",
        lambda: [share("reviews", "tucka_r2_default"), *on_texts("tucka_r2_default")[1:]],
    ),
    (
        COMPARISON,
        "It is {} points ahead on the reviews and {} behind on the sentences",
        lambda: [below("reviews", "tucka_r2_default", sign=1), below("sentences", "tucka_r2_default")],
    ),
    (
        COMPARISON,
        "At 6e-3 it is as accurate on the texts as LoRA with r = 8 at its best, or more: {:.1%} and {:.1%} on the "
        "sentences, {:.1%} and {:.1%} on the reviews. On the causal task its best is {:.1%}, at {:g}e-3, and that of "
        "LoRA {:.1%}. All with three seeds",
        lambda: [
            window("sentences", "tucka_r2_default").means[6e-3],
            best_of("sentences", "lora_r8"),
            window("reviews", "tucka_r2_default").means[6e-3],
            best_of("reviews", "lora_r8"),
            best_of("causal", "tucka_r2_default"),
            1e3 * window("causal", "tucka_r2_default").best,
            best_of("causal", "lora_r8"),
        ],
    ),
    (
        COMPARISON,
        "DoRA and Lily are within {:.1f} points of LoRA's curve on every task",
        lambda: [max(abs(found) for name in ("dora_r8", "lily_r8") for found in gaps(name))],
    ),
    (
        COMPARISON,
        "fewer parameters than LoRA with r = 1, is {:.0f} to {:.0f} points below it",
        lambda: [
            edge(ahead_of(task, "lora_r1", "vera_r256") for task in ("glosses", "sounds", "languages"))
            for edge in (min, max)
        ],
    ),
    (
        COMPARISON,
        "at about equal parameters**, by {} points on average",
        lambda: [in_words(on_texts("tucka")[1] - on_texts("hra_r8")[1])],
    ),
    (COMPARISON, "where {} steps are too few for HRA", lambda: [steps_of("reviews", "hra_r8")]),
    (COMPARISON, "as many parameters as LoRA with r = 8 and is ahead of it by {} points", lambda: [ahead("tucka_r16")]),
    (
        COMPARISON,
        "TuckA with r = 8 is below LoRA by {} points, and without the bound by {}, with the same",
        lambda: [below("causal", name) for name in ("tucka_r8_columns", "tucka")],
    ),
    (
        COMPARISON,
        "TuckA with r = 2 and half of this learning rate is above LoRA by {}.",
        lambda: [below("causal", "tucka_r2", sign=1)],
    ),
    (
        COMPARISON,
        "The task is tiny: {} sentences, {} steps, {} tested sentences",
        lambda: [4 * sizes_of("causal")["train"], steps_of("causal", "lora_r8"), 4 * sizes_of("causal")["test"]],
    ),
    (
        COMPARISON,
        "The standard error of one accuracy is {:.1f} points",
        lambda: [
            100 * math.sqrt(quality()["images"]["lora_r8"].mean * (1 - quality()["images"]["lora_r8"].mean) / 1000)
        ],
    ),
    (
        COMPARISON,
        "falls by {:.0f} to {:.0f} points with bounded columns, and by {:.0f} to {:.0f} with the paper's equations",
        lambda: [
            edge(-ablation(task, name) for task in ("glosses", "sounds"))
            for name in ("norm_columns", "norm_none")
            for edge in (min, max)
        ],
    ),
    (
        COMPARISON,
        "takes {} to {} times as long as LoRA",
        lambda: [
            in_words(
                edge(seconds(task, "boft_b8") / seconds(task, "lora_r8") for task in ("causal", "images", "reviews"))
                - shift
            )
            for edge, shift in ((min, 0.3), (max, 0))
        ],
    ),
    (
        COMPARISON,
        "After {} steps its accuracy is at most that of a head alone. After {} steps",
        lambda: [steps_of(task, "tucka_authors_r8") for task in ("reviews", "sentences")],
    ),
    (
        COMPARISON,
        "LoRA and TuckA of ranks 2 to 16 lie between {:.0f} and {:.0f} %, head only at {:.0f} %, TF-IDF at {:.0f} %",
        lambda: [
            math.floor(min(experts_of_ranks_from_two("sentences"))),
            max(experts_of_ranks_from_two("sentences")),
            accuracy("sentences", "head_only"),
            math.floor(accuracy("sentences", "tfidf")),
        ],
    ),
    (
        COMPARISON,
        "LoRA and TuckA of ranks 2 to 16 lie between {:.0f} and {:.0f} %, head only at {:.0f} %, HRA at {:.0f} %",
        lambda: [
            min(experts_of_ranks_from_two("reviews")),
            max(experts_of_ranks_from_two("reviews")),
            accuracy("reviews", "head_only"),
            accuracy("reviews", "hra_r8"),
        ],
    ),
    (
        COMPARISON,
        "with {:.0f} to {:.0%} of the parameters: {:.1%} and {:.1%} on the reviews, {:.1%} and {:.1%} on the causal "
        "task, {:.1%} and {:.1%} on the sentences",
        lambda: [
            100 * share("reviews", "tucka_r8"),
            share("causal", "tucka_r8"),
            *(best_of(task, name) for task in ("reviews", "causal", "sentences") for name in ("tucka_r8", "lora_r8")),
        ],
    ),
    (
        COMPARISON,
        "because its best accuracy there is {:.1f} points above LoRA's",
        lambda: [100 * (best_of("reviews", "tucka_r8") - best_of("reviews", "lora_r8"))],
    ),
    (
        COMPARISON,
        "At 4e-3 and at 6e-3 it is {:.1f} and {:.1f} points above LoRA, at 1e-2 it is {:.1f} points above, and at 3e-3 "
        "it is {:.1f} points below",
        lambda: [
            100 * sign * over_lora("reviews", rate) for rate, sign in ((4e-3, 1), (6e-3, 1), (1e-2, 1), (3e-3, -1))
        ],
    ),
    (
        COMPARISON,
        "At 6e-3 on the causal task, TuckA with bounded columns is {} points below LoRA",
        lambda: [
            in_words(100 * (window("causal", "lora_r8").means[6e-3] - window("causal", "tucka_r8_columns").means[6e-3]))
        ],
    ),
    (
        COMPARISON,
        "outputs move {} to {} times as far as LoRA's at one rate**",
        lambda: [in_words(times) for times in times_loras("TuckA r=8, unbounded")],
    ),
    (
        COMPARISON,
        "outputs move {:.1f} to {:.1f} times as far as LoRA's**",
        lambda: times_loras("TuckA r=8, columns bounded"),
    ),
    (
        COMPARISON,
        "The gain is {:.1f} to {:.1f} in MiniLM and {:.1f} to {:.0f} in SmolLM2",
        lambda: [*gains("MiniLM"), *gains("SmolLM2-135M")],
    ),
    (
        ROUTING,
        "of nine means over {} seeds",
        lambda: [json.loads((RESULTS / "routing-balance-start.json").read_text())["seeds"]],
    ),
    (
        ROUTING,
        "{} of the twelve intervals lie above zero and none lies below: four groups with batch routing and "
        "eight with token routing, {:.1f} points each",
        lambda: [
            in_words(sum(mean - half > 0 for *_, mean, half in pays())).capitalize(),
            min(mean for *_, mean, half in pays() if mean > half),
        ],
    ),
    (ROUTING, "k = 4 finds {:.2f} of the 2 bits", lambda: [bits(4, "one domain")]),
    (
        ROUTING,
        "{} sentences of each domain are few",
        lambda: [json.loads((RESULTS / "routing-pays.jsonl").read_text().splitlines()[0])["train"]],
    ),
    (
        ROUTING,
        "as well as a LoRA for each task, with {:.0%} of the parameters",
        lambda: [
            task_table(OPPOSITE, APART)["parameters"] / task_table(OPPOSITE, "a LoRA r=8 for each task")["parameters"]
        ],
    ),
    (
        ROUTING,
        "With cores that start alike it stays {:.0f} points behind",
        lambda: [task_table(OPPOSITE, "a LoRA r=8 for each task")["mean"] - task_table(OPPOSITE, ALIKE)["mean"]],
    ),
    (
        ROUTING,
        "not even separate LoRAs with {} times the parameters",
        lambda: [
            in_words(
                task_table(FOUR, "a LoRA r=8 for each task")["parameters"]
                / task_table(FOUR, "one LoRA r=8")["parameters"]
            )
        ],
    ),
    (
        ROUTING,
        "groups that start apart among them, gain {} to {} points on *domain* and lose {} to {} on *five stars*",
        lambda: [
            in_words(
                edge(
                    sign * (task_table(FOUR, row)[column] - task_table(FOUR, "one LoRA r=8")[column])
                    for row in ("a LoRA r=1 for each task", "a LoRA r=8 for each task", APART)
                )
            )
            for column, sign in (("domain", 1), ("five stars", -1))
            for edge in (min, max)
        ],
    ),
    (
        ROUTING,
        "learns it best, and loses {} points on the other three",
        lambda: [in_words(-task_table(LATER, "one LoRA r=8, which goes on; a new head")["change of the other three"])],
    ),
    (
        ROUTING,
        "A new core has {:,.0f} numbers",
        lambda: [task_table(LATER, f"{ALIKE}: a new core from zero; a new head")["parameters"]],
    ),
    (
        ROUTING,
        "as good as a LoRA of its own is with this seed ({:.1f} %)",
        lambda: [
            next(
                100 * row["test"]["five stars"]
                for row in tasks()
                if (row["set"], row["method"], row["rate"], row["seed"]) == ("four", "loras_r8", 6e-3, 0)
            )
            + 1e-9
        ],
    ),
    (
        ROUTING,
        "The smallest of the three rates that were tried, {:g}, is best for the core",
        lambda: {
            row["ways"]["core"]["rate"] for row in tasks() if row["set"].startswith("later") and "core" in row["ways"]
        },
    ),
]


def prose_of(page):
    text = (ROOT / page).read_text()
    return " ".join(re.sub(r"^> ?", "", text, flags=re.MULTILINE).split())


@pytest.mark.parametrize(
    ("page", "sentence", "numbers"), FILLED, ids=lambda part: part[:40] if isinstance(part, str) else ""
)
def test_a_sentence_has_the_numbers_of_its_result_file(page, sentence, numbers):
    now = re.sub(r"(\d)%", r"\1 %", sentence.format(*numbers()))
    assert now in prose_of(page), f"{page} should say: {now}"


HOLDS = [
    (
        ROUTING,
        "The advantage of Eq. (10) does not show.** With products of features and batch routing, one group takes 88 % "
        "of the decisions after training with random centroids and 85 % with Eq. (10), and the intervals of both "
        "overlap",
        lambda: (
            [f"{most_used(start, 'batch'):.0%}" for start in ("kaiming", "dai")] == ["88%", "85%"]
            and overlap(*(trained_start(start, "batch") for start in ("kaiming", "dai")))
        ),
    ),
    (
        ROUTING,
        "no group gets less than 9.9 % of the decisions in any seed",
        lambda: f"{least_used(None):.1%}" == "9.9%",
    ),
    (
        "README.md",
        "The demo takes two to four minutes",
        lambda: 60 < sum(row["seconds"] for row in DEMO["methods"]) < 180,  # and the rest takes a minute
    ),
    ("README.md", "LoRA of half the rank is as good", lambda: within_noise("lora_r4")),
    (
        "README.md",
        "TuckA with r = 8 is as accurate as LoRA of the same rank",
        lambda: all(
            best_of(task, "tucka_r8") >= best_of(task, "lora_r8") - 0.01 for task in ("causal", "reviews", "sentences")
        ),
    ),
    (
        "README.md",
        "On three tasks, with three seeds and the best",
        lambda: {seeds_of(task) for task in ("causal", "reviews", "sentences")} == {3},
    ),
    (
        "docs/how-to/demo.md",
        "TuckA and LoRA are closer to each other than that",
        lambda: abs(BY_METHOD["TuckA"]["mean"] - BY_METHOD["LoRA"]["mean"]) < 0.008,
    ),
    (
        CHOOSING,
        "4e-3 is inside the window of good rates everywhere, for LoRA too",
        lambda: all(low <= 4e-3 <= high for low, high in windows_of_both()),
    ),
    (
        "docs/how-to/from-lora.md",
        "4e-3 is inside the windows of both methods",
        lambda: all(low <= 4e-3 <= high for low, high in windows_of_both()),
    ),
    (
        COMPARISON,
        "**4e-3 is inside the window of both methods within three points on all three tasks.**",
        lambda: all(low <= 4e-3 <= high for low, high in windows_of_both()),
    ),
    (
        COMPARISON,
        "**At its best rate, TuckA is as accurate as LoRA on all three tasks, or more**",
        lambda: all(
            best_of(task, "tucka_r8") > best_of(task, "lora_r8") - 0.003 for task in ("causal", "reviews", "sentences")
        ),
    ),
    (
        COMPARISON,
        "reaches as far, or further**, at the accuracy that LoRA has at its best",
        lambda: all(
            high / low >= lora[1] / lora[0]
            for lora, (low, high) in (near_lora(task, 0.03) for task in ("causal", "reviews", "sentences"))
        ),
    ),
    (
        COMPARISON,
        "from 1e-3 to 6e-3 on the causal task (LoRA: 1e-3 to 4e-3), from 3e-3 to 1e-2 on the reviews (LoRA: 3e-3 to "
        "6e-3), and from 1e-3 to 1e-2 on the sentences (LoRA: 1e-3 to 6e-3)",
        lambda: (
            [near_lora(task, 0.03) for task in ("causal", "reviews", "sentences")]
            == [[(1e-3, 4e-3), (1e-3, 6e-3)], [(3e-3, 6e-3), (3e-3, 1e-2)], [(1e-3, 6e-3), (1e-3, 1e-2)]]
        ),
    ),
    (
        COMPARISON,
        "**Around its own best, the window of TuckA on the reviews is one rate, 4e-3**",
        lambda: both("reviews", 0.03)[1] == (4e-3, 4e-3),
    ),
    (
        COMPARISON,
        "On the causal task this window within three points is LoRA's, and on the sentences it is wider",
        lambda: len(set(both("causal", 0.03))) == 1 and both("sentences", 0.03) == [(1e-3, 6e-3), (1e-3, 1e-2)],
    ),
    (
        COMPARISON,
        "On the sentences they do not, and it reaches from 1e-3 to 6e-3 (LoRA: 1e-3 to 4e-3)",
        lambda: (
            both("sentences", 0.01) == [(1e-3, 4e-3), (1e-3, 6e-3)]
            and all(
                max(scores) - min(scores) < 0.03
                for name in ("lora_r8", "tucka_r8")
                for rate, scores in window("sentences", name).scores.items()
                if rate <= 6e-3
            )
        ),
    ),
    (
        COMPARISON,
        "Both methods learn nothing at 1e-3, because there are 26 steps, and nothing at 2e-2",
        lambda: all(
            100 * window("reviews", name).means[rate] < accuracy("reviews", "head_only")
            for name in ("lora_r8", "tucka_r8")
            for rate in (1e-3, 2e-2)
        ),
    ),
    (
        COMPARISON,
        "**On texts of two classes, TuckA with r = 8 is as accurate as LoRA of the same rank",
        lambda: within_noise("tucka_r8_columns", "tucka"),
    ),
    (COMPARISON, "and LoRA of half the rank is as accurate too", lambda: within_noise("lora_r4")),
    (
        COMPARISON,
        "LoRA with r = 1 has about as many parameters, and is behind LoRA with r = 8 on both",
        lambda: (
            max(against_lora(task, "lora_r1")[0] for task in quality_report.TEXTS) < 0
            and abs(share("reviews", "tucka_r2_default") / share("reviews", "lora_r1") - 1) < 0.1
        ),
    ),
    (
        COMPARISON,
        "it is within one point of its best from 2e-3 to 2e-2",
        lambda: window("sentences", "tucka_r2_default").ends(0.01) == (2e-3, 2e-2),
    ),
    (
        COMPARISON,
        "where the validation data chose a rate that is too small for it",
        lambda: (
            window("sentences", "tucka_r2_default").ends(0.01)[0]
            > rate_of("sentences", "tucka_r2_default")
            == min(quality()["sentences"]["tucka_r2_default"].experiment.learning_rates)
        ),
    ),
    (
        COMPARISON,
        "**One expert is as accurate as two groups of two** at its best",
        lambda: all(
            abs(best_of(task, "tucka_one_default") - best_of(task, "tucka_r8")) < 0.01 for task in ("reviews", "causal")
        ),
    ),
    (
        COMPARISON,
        "it was best at the largest of the three rates",
        lambda: all(
            capacity(task)["vera_r256"].runs[0]["learning_rate"] == 2e-2 for task in ("glosses", "sounds", "languages")
        ),
    ),
    (
        COMPARISON,
        "Most of this difference comes from the reviews",
        lambda: against_lora("reviews", "hra_r8")[0] < 3 * against_lora("sentences", "hra_r8")[0],
    ),
    (
        COMPARISON,
        "The best learning rate of HRA there was the largest of the three",
        lambda: rate_of("reviews", "hra_r8") == max(quality()["reviews"]["hra_r8"].experiment.learning_rates),
    ),
    (
        COMPARISON,
        "LoRA with r = 4 has as few parameters as TuckA with r = 8 and is as good",
        lambda: (
            abs(share("reviews", "lora_r4") / share("reviews", "tucka_r8_columns") - 1) < 0.1
            and abs(on_texts("lora_r4")[1] - on_texts("tucka")[1]) < 0.5
        ),
    ),
    (
        COMPARISON,
        "has about as many parameters as LoRA with r = 8",
        lambda: abs(share("reviews", "tucka_r16") - 1) < 0.15,
    ),
    (
        COMPARISON,
        "DoRA, rsLoRA and OFT differ from LoRA by no more than the noise",
        lambda: all(
            abs(against_lora(task, name)[0]) <= 2 * noise(task)
            for task in quality_report.TEXTS
            for name in ("dora_r8", "rslora_r8", "oft_b32")
        ),
    ),
    (
        COMPARISON,
        "**On a causal model, we see no difference.**",
        lambda: abs(against_lora("causal", "tucka_r8_columns")[0]) <= 2 * against_lora("causal", "tucka_r8_columns")[1],
    ),
    (
        COMPARISON,
        "and half of this learning rate",
        lambda: rate_of("causal", "tucka_r2") == rate_of("causal", "tucka") / 2,
    ),
    (
        COMPARISON,
        "LoRA with r = 1 leads, with one seed",
        lambda: (
            max(quality()["causal"].values(), key=lambda row: row.mean).experiment.name == "lora_r1"
            and len(quality()["causal"]["lora_r1"].runs) == 1
        ),
    ),
    (
        COMPARISON,
        "every method is within three points of a head alone",
        lambda: all(
            abs(against_lora("images", name)[0] - against_lora("images", "head_only")[0]) <= 3
            for name in quality()["images"]
        ),
    ),
    (
        COMPARISON,
        "as long as LoRA, and is no better",
        lambda: fmean(against_lora(task, "boft_b8")[0] for task in ("causal", "images", "reviews")) < 1,
    ),
    (
        COMPARISON,
        "its accuracy is at most that of a head alone",
        lambda: accuracy("reviews", "tucka_authors_r8") <= accuracy("reviews", "head_only"),
    ),
    (
        COMPARISON,
        "with every step between. On the languages it gains up to r = 8",
        lambda: all(
            ahead_of(task, f"lora_r{high}", f"lora_r{low}") > 0
            for task in ("glosses", "sounds", "languages")
            for low, high in ((1, 4), (4, 8), (8, 16))
            if (task, high) != ("languages", 16)
        ),
    ),
    (
        COMPARISON,
        "it equals that of HRA",
        lambda: abs(accuracy("sentences", "tucka_authors_r8") - accuracy("sentences", "hra_r8")) < 0.5,
    ),
    (
        COMPARISON,
        "*TuckA r=8, unbounded* has one learning rate on every task, 2e-3",
        lambda: all(
            made["tucka"].experiment.learning_rates == (2e-3,) for made in quality().values() if "tucka" in made
        ),
    ),
    (
        COMPARISON,
        "at 4e-3 a layer moves by four fifths of its output in the middle of the training",
        lambda: any(
            abs(seen["worst"] - 0.8) < 0.05 and 10 <= seen["step"] <= 18
            for seen in movement()["TuckA r=8, unbounded", 4e-3]["seen"]
        ),
    ),
    (
        COMPARISON,
        "At 1e-3, the unbounded adapter moves outputs almost as far as LoRA does at 4e-3",
        lambda: 0.7 < moved("TuckA r=8, unbounded", 1e-3) / moved("LoRA r=8", 4e-3) < 1,
    ),
    (
        COMPARISON,
        "A column of length 0.71 enters the equations with length 0.94",
        lambda: (
            round(0.71 / math.sqrt(0.71**2 + 1 / 16), 2) == 0.94
            and "| 0.71 | 0.71 |" in (RESULTS / "quality/movement.md").read_text()
        ),
    ),
    (
        COMPARISON,
        "The authors' division of the factors by their norms learns almost nothing in so few steps",
        lambda: all(study("ablation", task)["norm_frobenius"].mean < 0.12 for task in ("glosses", "sounds")),
    ),
    (
        COMPARISON,
        "With cores that never train, the rotation alone is left, and accuracy is the same",
        lambda: all(abs(ablation(task, "cores_still")) < 0.5 for task in ("glosses", "sounds")),
    ),
    (
        COMPARISON,
        "the granularity of the routing changes less than one point",
        lambda: all(
            abs(ablation(task, name)) < 1
            for task in ("glosses", "sounds")
            for name in ("routing_batch", "routing_token")
        ),
    ),
    (
        COMPARISON,
        "With half the learning rate for it alone, accuracy falls as much as with half the learning rate for all",
        lambda: all(
            abs(ablation(task, "basis_slower") - ablation(task, "rate_half")) < 1 and ablation(task, "rate_half") < -9
            for task in ("glosses", "sounds")
        ),
    ),
    (
        COMPARISON,
        "**Another α is worse**, half of it and twice of it",
        lambda: all(
            ablation(task, name) < -2 for task in ("glosses", "sounds") for name in ("alpha_double", "alpha_half")
        ),
    ),
    (
        COMPARISON,
        "Accuracy is the same when they do not train, or train ten times as fast",
        lambda: all(
            abs(ablation(task, name)) < 1
            for task in ("glosses", "sounds")
            for name in ("centroids_still", "centroids_faster")
        ),
    ),
    (
        COMPARISON,
        "At r = 2, more groups do worse; elsewhere no number of groups is the best",
        lambda: (
            max(ranks()["r2_k4"].mean, ranks()["r2_k8"].mean) < ranks()["r2_k1"].mean - 0.04
            and len({max((1, 2, 4, 8), key=lambda k: ranks()[f"r{r}_k{k}"].mean) for r in (4, 8, 16)}) > 1
        ),
    ),
    (
        COMPARISON,
        "**HRA needs the largest rate**, 2e-2. It has as many parameters as LoRA with r = 4",
        lambda: all(
            capacity(task)["hra_r8"].runs[0]["learning_rate"] == 2e-2
            and capacity(task)["hra_r8"].parameters == capacity(task)["lora_r4"].parameters
            for task in ("glosses", "sounds", "languages")
        ),
    ),
    (
        COMPARISON,
        "**At 2e-2, LoRA with r = 4 or more only guesses on all three tasks**, with one seed. TuckA still learns "
        "there at every rank, and so does HRA",
        lambda: all(
            max(at_rate(task, name, 2e-2) for name in ("lora_r4", "lora_r8", "lora_r16")) < 0.1
            and min(at_rate(task, name, 2e-2) for name in capacity(task) if name[:4] in ("tuck", "hra_")) > 0.1
            for task in ("glosses", "sounds", "languages")
        ),
    ),
    (
        COMPARISON,
        "HRA needs the larger one, 2e-2.",
        lambda: study("curves", "glosses")["hra"].runs[0]["learning_rate"] == 2e-2,
    ),
    (COMPARISON, "BOFT on the sentences has not been run", lambda: "boft_b8" not in quality()["sentences"]),
    (
        COMPARISON,
        "takes about an hour on two cores. BOFT needs a quarter of this hour",
        lambda: 600 < seconds_of_the_search("boft_b8") < 1200,
    ),
    (
        ROUTING,
        "The centre has the largest effect",
        lambda: (
            min(low for name in ("Kaiming, centred", "DAI (a = 10), centred") for low, _ in starts()[name])
            > max(starts()[name][0][1] for name in ("Kaiming, dot", "DAI (a = 10), dot: the paper's"))
        ),
    ),
    (
        ROUTING,
        "The distance to the centroids of Eq. (10) sends every input to the centroid in the middle",
        lambda: starts()["DAI (a = 10), distance"] == [(0, 0), (0, 0)],
    ),
    (
        ROUTING,
        "Clusters by k-means split the data no more evenly than a simplex does",
        lambda: starts()["k-means, directional"][0][0] <= starts()["balanced, directional: the default"][0][0],
    ),
    (ROUTING, "none lies below", lambda: len(pays()) == 12 and all(mean + half >= 0 for *_, mean, half in pays())),
    (
        ROUTING,
        "four groups with batch routing and eight with token routing",
        lambda: {row[:2] for row in pays() if row[3] > row[4]} == {(4, "batch"), (8, "token")},
    ),
    (
        ROUTING,
        "Eight groups with batch routing vary most, and lose on the mean",
        lambda: (
            {row[:2] for row in sorted(pays(), key=lambda row: -row[4])[:2]} == {(8, "batch")}
            and all(row[3] < 0 for row in pays() if row[:2] == (8, "batch"))
        ),
    ),
    (ROUTING, "each domain has a group with more than half of its sentences", lambda: domains_with_a_group() == (4, 4)),
    (
        ROUTING,
        "so it is right in half of all cases",
        lambda: (
            task_table(OPPOSITE, "one LoRA r=8")["mean"] == task_table(OPPOSITE, "TuckA r=8, one group")["mean"] == 50
        ),
    ),
    (
        ROUTING,
        "A group for each task does as well as a LoRA for each task",
        lambda: task_table(OPPOSITE, APART)["mean"] >= task_table(OPPOSITE, "a LoRA r=8 for each task")["mean"] - 1,
    ),
    (
        ROUTING,
        "No method with an adapter differs clearly from one shared LoRA",
        lambda: all(
            abs(task_table(FOUR, row)["mean"] - task_table(FOUR, "one LoRA r=8")["mean"]) < 2
            for row in ("a LoRA r=8 for each task", APART, ALIKE, "TuckA r=8, one group")
        ),
    ),
    (
        ROUTING,
        "and better than a new head on a frozen LoRA. It does not reach the LoRA that goes on",
        lambda: (
            task_table(LATER, "one LoRA r=8, frozen; a new head")["five stars"]
            < task_table(LATER, f"{ALIKE}: a new core from zero; a new head")["five stars"]
            < task_table(LATER, "one LoRA r=8, which goes on; a new head")["five stars"]
        ),
    ),
    (
        ROUTING,
        "the bias changes nothing in the 76 steps of these trainings: it moved by 0.08 at most",
        lambda: -(-4 * 300 // 32) * 2 == 76 and round(76 * 0.001, 2) == 0.08,
    ),
    (
        DESIGN,
        "Only those that split the centred and whitened features passed 0.97 in every cell",
        lambda: (
            {
                name
                for name, row in starts().items()
                if row[0][0] >= 0.97 and "chance" not in name and "random" not in name
            }
            == {"k-means, directional", "balanced, centred", "balanced, directional: the default"}
        ),
    ),
    (COSTS, "**Groups are nearly free.**", lambda: growth("groups", 32) < 1.5 * growth("groups", 1)),
    (
        COSTS,
        "**The rank matters less than the tokens.**",
        lambda: growth("rank", 64) / growth("rank", 8) < growth("tokens", 1024) / growth("tokens", 16),
    ),
    (
        COSTS,
        "**On short inputs with few layers, tucka is slower than LoRA.**",
        lambda: all(
            overheads("stack-cpu-float32-short")[name] > 1 for name in ("tucka batch", "tucka sample", "tucka token")
        ),
    ),
    (COSTS, "**Token routing** keeps and computes more than LoRA", lambda: kept("tucka token") > kept("PEFT LoRA")),
    (
        COSTS,
        "**Householder layers** are many times as fast as those of PEFT's HRA",
        lambda: all(
            overheads(name)["PEFT HRA"] > 5 * overheads(name)["tucka HRA"]
            for name in ("stack-cpu-float32", "stack-cpu-float32-short", "encoder-cpu-float32")
        ),
    ),
    (
        COSTS,
        "so the advantage is smaller with more tokens",
        lambda: (
            overheads("stack-cpu-float32")["PEFT HRA"] / overheads("stack-cpu-float32")["tucka HRA"]
            < overheads("stack-cpu-float32-short")["PEFT HRA"] / overheads("stack-cpu-float32-short")["tucka HRA"]
        ),
    ),
    (COSTS, "on a CUDA device, in less than eight minutes", lambda: LIMIT < 480),
]


@pytest.mark.parametrize(
    ("page", "sentence", "holds"), HOLDS, ids=lambda part: part[:40] if isinstance(part, str) else ""
)
def test_a_sentence_holds_in_its_result_file(page, sentence, holds):
    assert sentence in prose_of(page), f"{page} no longer says: {sentence}. Change the list here too"
    assert holds(), f"no longer true after new results. Write it anew in {page}: {sentence}"


# Settings, counts that doctests compute, the paper's numbers, versions: no result file has them.
NOT_MEASURED = {
    "README.md": ("PEFT 0.21", "PyTorch 2.5", "transformers 5.18", "Python 3.11, 3.12 and 3.13", "Python 3.11"),
    COMPARISON: ("3.2 / (√r · gain)",),
    ROUTING: ("0.6 such intervals", "γ = 0.001", "0.08 at most"),
    COSTS: ("0.23M", "0.64M", "10.7M"),
    CHOOSING: (),
    "docs/how-to/demo.md": (),
}


@pytest.mark.parametrize("page", NOT_MEASURED)
def test_no_measured_number_is_left_without_a_claim(page):
    """Decimal fractions, percentages, and numbers of points or times."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\|.*\|$|^\$ .*$", "", text, flags=re.MULTILINE)
    prose = " ".join(re.sub(r"\$[^$]*\$|`[^`]*`|\]\([^)]*\)|arXiv:\S+", "", text).split())
    claims = [re.sub(r"(\d)%", r"\1 %", sentence.format(*numbers())) for on, sentence, numbers in FILLED if on == page]
    claims += [sentence for on, sentence, _ in HOLDS if on == page]
    for claim in [*claims, *NOT_MEASURED[page]]:
        prose = prose.replace(re.sub(r"`[^`]*`|\]\([^)]*\)", "", claim), "")
    left = re.findall(r"[^.]{0,40}(?:\d+\.\d+|\d+ %|\d+ (?:points|times|ms))[^.]{0,20}", prose)
    if page == "README.md":  # a test of its own has the times
        left = [text for text in left if " ms" not in text]
    assert left == []


# --- the tables on the pages are those of the results ---

WRITERS = {
    "quality methods": lambda folder: quality_report.write(folder / "quality", read_all(None)),
    "quality studies": lambda folder: studies_report.write(folder / "quality"),
    "quality capacity": lambda folder: capacity_report.write(folder / "quality"),
    "quality windows": lambda folder: windows.write(folder / "quality"),
    "decoding": lambda folder: decoding_report.write(folder / "decoding-smollm2-135m-cpu-float32.json"),
    "growth": lambda folder: growth_report.write(folder / "growth-cpu.json"),
    "routing start": lambda folder: balance_report.write_report(folder / "routing-balance-start.json"),
    "routing balance": lambda folder: study_report.write_report(folder / "routing-balance.jsonl"),
    "routing starts, trained": lambda folder: study_report.write_report(folder / "routing-starts.jsonl"),
    "routing pays": lambda folder: study_report.write_report(folder / "routing-pays.jsonl"),
    "routing tasks": lambda folder: tasks_report.write_report(folder / "routing-tasks.jsonl"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_table_is_what_its_program_writes_from_the_results(name, tmp_path, monkeypatch):
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *_, **__: None)  # drawing takes seconds
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    WRITERS[name](folder)
    for written in folder.rglob("*.md"):
        assert written.read_text() == (RESULTS / written.relative_to(folder)).read_text(), written.name


def test_the_table_of_single_layers_is_that_of_its_reports():
    names = ("stack-cpu-float32", "stack-cpu-float32-deep", "stack-cpu-float32-short", "encoder-cpu-float32")
    reports = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in names}
    assert (RESULTS / "single-layers.md").read_text() == report.summary(list(reports.values()), "processor")
    for name, one in reports.items():
        text = f"{report.table(one, 'processor')}\n\n{report.caption(one, 'processor')}\n"
        assert (RESULTS / f"{name}.md").read_text() == text


def test_best_rates_are_those_of_the_validation_part():
    for made in quality().values():
        for row in made.values():
            first = [record for record in row.runs if record["seed"] == min(one["seed"] for one in row.runs)]
            assert best_rate(first) == row.runs[0]["learning_rate"]
            assert all(0 <= score(record, "test") <= 1 for record in row.runs)
