"""Paired comparisons against independent references: enumeration, closed forms, simulation."""

import itertools
import math

import numpy as np
import pytest

from hf_minitron.evaluation import wording
from hf_minitron.evaluation.report import Comparison, Entry, Report
from hf_minitron.evaluation.significance import compare_paired, estimate, mcnemar, samples_needed


def rows(values, weights=None):
    values = np.asarray(values, dtype=float)
    return np.stack([values, np.ones(len(values)) if weights is None else np.asarray(weights, dtype=float)], axis=1)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (0, 6), (5, 1), (3, 3), (9, 2)])
def test_mcnemar_equals_enumerating_every_outcome(wins, losses):
    ours = np.array([1] * wins + [0] * losses + [1, 1, 0])
    theirs = np.array([0] * wins + [1] * losses + [1, 1, 0])
    outcomes = [sum(signs) for signs in itertools.product((0, 1), repeat=wins + losses)]
    extreme = sum(abs(2 * won - wins - losses) >= abs(wins - losses) for won in outcomes)
    assert mcnemar(ours, theirs) == pytest.approx(extreme / len(outcomes))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator, covered, found, trials = np.random.default_rng(0), 0, 0, 200
    for trial in range(trials):
        hardness = generator.normal(size=80)  # shared by both models: what pairing takes out
        ours = rows(hardness + generator.normal(0.3, 1, 80))
        low, high = compare_paired(ours, rows(hardness), seed=trial).interval
        covered += low <= 0.3 <= high
        same = compare_paired(rows(hardness + generator.normal(0, 1, 80)), rows(hardness), seed=trial)
        found += same.verdict != "not distinguishable"
    assert 0.9 <= covered / trials <= 0.985
    assert 0.015 <= found / trials <= 0.1


def test_as_many_samples_as_needed_find_the_difference_four_times_in_five():
    generator, difference, deviation, trials = np.random.default_rng(1), 0.25, 1.3, 200
    count, found = samples_needed(difference, deviation), 0
    for trial in range(trials):
        ours = rows(generator.normal(difference, deviation, count))
        found += compare_paired(ours, rows(np.zeros(count)), seed=trial).verdict == "better"
    assert 0.72 <= found / trials <= 0.88


@pytest.mark.parametrize("right", [(8, 1), (1, 0)])
def test_an_accuracy_loses_no_more_than_all(right):
    """Where a resample of the baseline is without a right answer and where none is."""
    theirs, ours = ([1] * count + [0] * (40 - count) for count in right)
    found = compare_paired(rows(ours[::-1]), rows(theirs))
    assert (found.retention_interval is None) == (right == (1, 0))
    assert 100 * found.interval[0] / found.baseline_value < -100
    middle, low, high = found.relative("mean")
    assert middle == pytest.approx(100 * (right[1] - right[0]) / right[0])
    assert -100 <= low <= middle <= high
    assert low == -100


@pytest.mark.parametrize("higher", [True, False])
def test_a_metric_that_can_be_negative_may_lose_more_than_all(higher):
    """Of a baseline that is positive in every resample, in some and in none."""
    spread = np.random.default_rng(5).normal(0, 0.1, 60)
    for baseline, ours in ((1.0, -1.0), (0.02, -0.5), (-1.0, -3.0)):
        found = compare_paired(rows(spread[::-1] + ours), rows(spread + baseline), higher_is_better=higher)
        middle, low, high = found.relative("mean")
        assert low < middle < high < -100
        assert middle == pytest.approx(100 * found.difference / abs(found.baseline_value))


@pytest.mark.parametrize("aggregation", ["perplexity", "bits"])
def test_what_is_made_of_log_likelihoods_loses_no_more_than_all(aggregation):
    theirs = np.zeros(30)
    theirs[0] = -90  # a resample has it several times
    found = compare_paired(rows(np.full(30, -1e-3)), rows(theirs), aggregation, higher_is_better=False)
    assert 100 * found.interval[0] / found.baseline_value < -100
    assert found.relative(aggregation)[1] == -100
    assert found.relative("mean")[1] < -100


def test_pairing_finds_what_two_separate_intervals_hide():
    hardness = np.random.default_rng(2).normal(0, 10, 100)
    found = compare_paired(rows(hardness - 0.5), rows(hardness + np.random.default_rng(3).normal(0, 0.3, 100)))
    assert found.verdict == "worse"
    assert found.interval[1] < 0
    assert found.difference == pytest.approx(-0.5, abs=0.1)


def test_swapping_the_models_mirrors_everything():
    generator = np.random.default_rng(4)
    ours, theirs = (rows(-generator.gamma(2, 30, 40), generator.integers(20, 40, 40)) for _ in range(2))
    one, other = (compare_paired(*pair, "perplexity", higher_is_better=False) for pair in ((ours, theirs), (theirs, ours)))
    assert one.interval == pytest.approx([-bound for bound in other.interval[::-1]])
    assert one.p == other.p
    assert one.samples_needed == other.samples_needed
    assert {one.verdict, other.verdict} in ({"better", "worse"}, {"not distinguishable"})


def test_perplexity_is_of_all_tokens_and_lower_is_better():
    likely, unlikely = rows([-10, -30, -20, -25], [10, 20, 10, 20]), rows([-20, -62, -40, -55], [10, 20, 10, 20])
    found = compare_paired(np.tile(unlikely, (5, 1)), np.tile(likely, (5, 1)), "perplexity", higher_is_better=False)
    assert found.value == pytest.approx(math.exp(177 / 60))
    assert found.baseline_value == pytest.approx(math.exp(85 / 60))
    assert found.verdict == "worse"
    assert found.retention is None, "a ratio of perplexities is no share of anything"
    bits = compare_paired(unlikely, likely, "bits", higher_is_better=False)
    assert bits.value == pytest.approx(177 / 60 / math.log(2))


def test_few_pairs_prove_nothing_and_no_difference_needs_no_samples():
    found = compare_paired(rows([1.0, 2.0, 3.0]), rows([0.0, 0.5, 1.0]))
    assert found.verdict == "not distinguishable"
    assert found.p >= 0.25
    assert found.samples_needed > 3
    same = compare_paired(rows([1, 0, 1]), rows([1, 0, 1]))
    assert (same.p, same.interval, same.samples_needed) == (1.0, (0.0, 0.0), None)
    assert same.retention == pytest.approx(100)
    assert same.retention_interval is None
    nothing = compare_paired(rows([1, 0, 1]), rows([0, 0, 0]))
    assert nothing.retention is None
    with pytest.raises(ValueError, match="at least two samples"):
        compare_paired(rows([1]), rows([1]))


def test_the_sentence_is_plain():
    generator = np.random.default_rng(5)
    theirs = (generator.random(200) < 0.5).astype(float)
    ours = np.where(generator.random(200) < 0.1, 1 - theirs, theirs)
    found = compare_paired(rows(ours), rows(theirs))
    what = {"model": "student", "baseline": "teacher", "task": "task", "metric": "acc"}
    report = Report({}, [Entry("teacher", "task", "acc", theirs.mean(), 0.04, (0.42, 0.57), chance=0.25)])
    sentence = wording.sentence(report, Comparison(**vars(found), **what))
    assert sentence.startswith("student and teacher are not distinguishable on task acc with these 200 samples")
    assert f"{ours.mean():.3f} against {theirs.mean():.3f}" in sentence
    assert "% retained" in sentence
    assert "would be needed" in sentence
    worse = wording.sentence(report, Comparison(**vars(compare_paired(rows(np.zeros(200)), rows(theirs))), **what))
    assert worse.startswith("student is worse than teacher on task acc (")
    assert "p < 0.001" in worse
    assert "needed" not in worse


SHARE = {"value": 0.4, "baseline_value": 0.5, "interval": (-0.2, 0.0), "p": 0.04, "test": "exact McNemar", "samples": 99,
         "samples_needed": 99, "verdict": "worse", "retention": 80.0, "retention_interval": (65.0, 95.0)}  # fmt: skip


@pytest.mark.parametrize(
    ("share", "teacher", "shown"),
    [
        ({}, {}, True),
        ({"retention": 104.0, "retention_interval": (90.0, 125.0)}, {}, True),
        ({}, {"chance": 0.25}, True),
        ({}, {"chance": 0.5}, False),  # it guesses
        ({}, {"chance": 0.45}, False),  # or may do so
        ({}, {"interval": (0.0, 0.6)}, False),
        ({"baseline": "pruned"}, {}, False),  # 128 % of what was no good
        ({"retention": 128.0, "retention_interval": (115.0, 140.0)}, {}, False),
        ({"retention": 80.0, "retention_interval": (30.0, 150.0)}, {}, False),
        ({"retention": None, "retention_interval": None}, {}, False),
        ({"retention_interval": None}, {}, False),
    ],
)
def test_what_is_retained_is_said_where_it_says_something(share, teacher, shown):
    """A score that is better when higher, of a teacher above chance, known well enough, and a share of it."""
    values = SHARE | {"model": "distilled", "baseline": "teacher", "task": "task", "metric": "acc"} | share
    reference = {"value": 0.5, "stderr": 0.05, "interval": (0.4, 0.6)} | teacher
    entries = [Entry(name, "task", "acc", **reference) for name in ("teacher", "pruned")]
    found = Comparison(**values)
    report = Report({"distilled": {}}, [*entries, Entry("distilled", "task", "acc", 0.4)], [found])
    assert ("% retained" in wording.sentence(report, found)) == shown
    rows = wording.comparison_rows(report, baseline=found.baseline)
    assert (rows[1][4] != "") == shown
    assert (wording.kept(report) is not None) == shown


def test_tasks_in_which_the_teacher_guesses_are_left_out_of_the_mean():
    heading = {"model": "distilled", "baseline": "teacher", "metric": "acc"}
    tasks = {"known": ({}, 0.25), "guessed": ({"retention": 200.0, "retention_interval": (180.0, 220.0)}, 0.5)}
    found = [Comparison(**SHARE | share, **heading, task=task) for task, (share, _) in tasks.items()]
    entries = [
        Entry(name, task, "acc", 0.5, 0.05, (0.4, 0.6), chance=chance)
        for name in ("teacher", "distilled") for task, (_, chance) in tasks.items()
    ]  # fmt: skip
    share = wording.kept(Report({"distilled": {}}, entries, found))
    assert share[:3] == (80, 65, 95)
    assert share[3] == "of the teacher's score, known acc; not of 1 task, where the teacher is not above chance"


def test_one_models_error_is_the_classical_one():
    values = np.random.default_rng(6).normal(2, 3, 50)
    value, stderr, (low, high) = estimate(rows(values))
    assert value == pytest.approx(values.mean())
    assert stderr == pytest.approx(values.std(ddof=1) / 50**0.5)
    assert low < value < high
    assert high - low == pytest.approx(2 * 1.96 * stderr, rel=0.1)
    assert estimate(rows(-values, np.full(50, 2)), "perplexity")[0] == pytest.approx(math.exp(values.mean() / 2))
    assert estimate(rows(values[:1])) == (values[0], None, None)
