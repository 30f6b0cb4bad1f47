"""The race's arithmetic, the order of its runs, and that a run which was killed goes on: benchmarks/race.py and models.py."""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import models  # noqa: E402
import race  # noqa: E402
import race_page  # noqa: E402
import training_claims  # noqa: E402
import update_readme  # noqa: E402

LENGTHS = np.array([10.0, 20.0, 30.0, 40.0, 25.0, 15.0])


def losses(tokens, hard=0.0, seeds=1):
    """Documents that get easier by 0.3 nats per e-fold of tokens; some are harder than others."""
    of_token = 6 - 0.3 * math.log(tokens) + hard * np.linspace(-1, 1, len(LENGTHS))
    return np.stack([(of_token + 0.001 * seed) * LENGTHS for seed in range(seeds)])


def test_tokens_needed_are_read_off_the_logarithmic_curve():
    tokens, curve = np.array([100.0, 400.0, 1600.0]), np.array([5.0, 4.0, 3.5])
    assert race.tokens_needed(tokens, curve, 4.5) == pytest.approx(200)
    assert race.tokens_needed(tokens, curve, 4.0) == pytest.approx(400)
    assert race.tokens_needed(tokens, curve, 6.0) == 100, "there from the start: the fewest measured are a bound"
    assert race.tokens_needed(tokens, curve, 3.0) == math.inf, "nothing is extrapolated"


def test_tokens_needed_are_those_of_the_first_crossing():
    tokens, curve = np.array([100.0, 200.0, 400.0, 800.0]), np.array([5.0, 4.0, 4.6, 3.0])
    assert race.tokens_needed(tokens, curve, 4.5) == pytest.approx(100 * 2**0.5)


@pytest.mark.parametrize("hard", [0.0, 1.0])
def test_a_recipe_that_needs_a_third_is_found_to(hard):
    published = {tokens: losses(tokens, hard) for tokens in (300, 900, 2700)}
    ours = {tokens: losses(3 * tokens, hard) for tokens in (30, 100, 300, 900)}
    rows = race.answers({"published": published, "ours": ours}, LENGTHS, (900, 2700))["rows"]
    assert [(row["budget"], row["shape"], row["seeds"]) for row in rows] == [(900, "ours", 1), (2700, "ours", 1)]
    for row in rows:  # every document gains the same, so no choice of them changes the answer
        for key in ("fraction", "low", "high"):
            assert row[key] == pytest.approx(1 / 3), key


def test_the_interval_is_as_wide_as_documents_differ():
    gain = 0.3 * math.log(3) + np.linspace(-0.1, 0.1, len(LENGTHS))  # of each document
    published = {tokens: losses(tokens) for tokens in (300, 900)}
    ours = {tokens: losses(tokens) - gain * LENGTHS for tokens in (30, 100, 300, 900)}
    (row,) = race.answers({"published": published, "ours": ours}, LENGTHS, (900,))["rows"]
    assert row["low"] < row["fraction"] < row["high"]
    assert row["low"] < 1 / 3 < row["high"]
    (ratio,) = race.answers({"published": published, "ours": ours}, LENGTHS, (900,))["equal_tokens"]
    assert ratio["ratio"] == pytest.approx(math.exp(-(gain * LENGTHS).sum() / LENGTHS.sum()))
    assert ratio["low"] < ratio["ratio"] < ratio["high"] < 1


def test_seeds_widen_the_interval():
    ours = {tokens: losses(3 * tokens) for tokens in (30, 100, 300, 900)}
    one, three = ({tokens: losses(tokens, seeds=seeds) for tokens in (300, 900)} for seeds in (1, 3))
    (of_one,), (of_three,) = (race.answers({"published": p, "ours": ours}, LENGTHS, (900,))["rows"] for p in (one, three))
    assert of_three["seeds"] == 3
    assert of_one["high"] - of_one["low"] < 1e-9
    assert of_three["high"] - of_three["low"] > 1e-3


def test_a_quality_that_is_not_reached_has_no_fraction():
    published = {900: losses(9_000)}
    (row,) = race.answers({"published": published, "ours": {300: losses(300), 900: losses(900)}}, LENGTHS, (900,))["rows"]
    assert (row["fraction"], row["low"], row["high"]) == (None, None, None)


def test_curves_hold_every_point():
    found = race.answers({"published": {300: losses(300, seeds=2)}, "ours": {}}, LENGTHS, (300,))
    assert found["rows"] == found["equal_tokens"] == []
    (point,) = found["curves"]
    assert (point["budget"], point["shape"], point["seeds"]) == (300, "published", 2)
    assert point["perplexity"] == pytest.approx(math.exp(losses(300, seeds=2).sum(1).mean() / LENGTHS.sum()))


def finish(out, entry, names, loss=1.0):
    folder = out / entry.name
    folder.mkdir(parents=True, exist_ok=True)
    content = {"seconds": 3600, "parameters": 1, "losses": {name: [[loss * 10, 10]] for name in names}}
    (folder / models.MEASURED).write_text(json.dumps(content))


def try_all(out):
    """Make all that is tried; later trials are worse."""
    found = []
    while missing := [entry for entry in models.trials(out) if models.validation_loss(out, entry) is None]:
        found.append(missing[0])
        finish(out, missing[0], [models.VALIDATION], loss=len(found))
    return found


def test_widths_and_then_the_settings_of_every_budget_are_tried_on_the_validation_split_alone(tmp_path):
    tried = try_all(tmp_path)
    first, *_ = models.SETTINGS
    for size, (widths, _) in models.SIZES.items():
        for shape in models.SHAPES:
            of = [entry for entry in tried if (entry.size, entry.shape) == (size, shape)]
            before = [entry.width for entry in of[: 1 if shape == "nonuniform" else len(widths)]]
            assert before == (["nonuniform"] if shape == "nonuniform" else list(widths)), (size, shape)
            for budget in models.BUDGETS:
                settings = {entry.setting for entry in of if entry.budget == budget and entry.width == before[0]}
                asked = models.TRIED[budget]
                assert settings == set(asked) if isinstance(asked, tuple) else len(settings) == asked, (size, shape, budget)
                assert first in settings or budget not in models.ON_CPU
    assert {entry.seed for entry in tried} == {0}


def test_settings_are_those_of_the_best_width_and_more_tokens_try_the_two_best_of_fewer(tmp_path):
    first, second, third = models.TRIED[models.TRIED_WITH]
    for entry in (widths := models.widths_of("100m", "uniform")):
        assert models.settings_of(tmp_path, "100m", "uniform", 36_864) == []
        finish(tmp_path, entry, [models.VALIDATION], loss=9 - (entry == widths[1]))
    losses = {first: 5, second: 3, third: 4}
    for entry in models.settings_of(tmp_path, "100m", "uniform", models.TRIED_WITH):
        assert models.settings_of(tmp_path, "100m", "uniform", 36_864) == [], "the budget below is not known"
        assert entry.width == widths[1].width
        finish(tmp_path, entry, [models.VALIDATION], loss=losses[entry.setting])
    tried = models.settings_of(tmp_path, "100m", "uniform", 36_864)
    assert {entry.setting for entry in tried} == {second, third}
    finish(tmp_path, tried[0], [models.VALIDATION], loss=2)
    assert models.chosen(tmp_path, "100m", "uniform", 36_864) is None, "one of the two is missing"
    finish(tmp_path, tried[1], [models.VALIDATION], loss=1)
    assert models.chosen(tmp_path, "100m", "uniform", 36_864) == tried[1]
    assert models.chosen(tmp_path, "100m", "uniform", models.TRIED_WITH).setting == second
    assert models.chosen(tmp_path, "70m", "uniform", 36_864) is None, "a size has trials of its own"


def test_a_result_brings_its_runs_to_another_machine(tmp_path, monkeypatch):
    texts = {name: [[0] * 11] * 4 for name in (models.VALIDATION, *models.TESTS)}
    try_all(tmp_path / "one")
    for entry in models.entries(tmp_path / "one")[:40]:
        finish(tmp_path / "one", entry, [models.VALIDATION, *models.TESTS], loss=1.5)
    for file in (tmp_path / "one").rglob(models.MEASURED):
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "losses": {name: rows * 4 for name, rows in content["losses"].items()}}))
    (stage := tmp_path / "one" / "100m/x/distill").mkdir(parents=True)
    (stage / "done.json").write_text(json.dumps({"seconds": 7200}))
    models.save(tmp_path / "one", texts, tmp_path / "race.json")
    first = json.loads((tmp_path / "race.json").read_text())
    (two := tmp_path / "two").mkdir()
    models.restore(two, texts, tmp_path / "race.json")
    assert models.following(two, "*", models.BUDGETS) == models.following(tmp_path / "one", "*", models.BUDGETS)
    models.save(two, texts, tmp_path / "race.json")
    again = json.loads((tmp_path / "race.json").read_text())
    assert list(again["hours"].values()) == [2]
    assert again == first
    monkeypatch.setattr(models, "environment", lambda: {"hardware": "a GPU"})
    models.save(tmp_path / "one", texts, tmp_path / "race.json")
    assert json.loads((tmp_path / "race.json").read_text())["hours"] == first["hours"], "made elsewhere"


def test_runs_come_by_their_cost_and_what_is_measured_is_skipped(tmp_path):
    try_all(tmp_path)
    every = sorted(models.entries(tmp_path), key=lambda entry: entry.budget * (1 + 3 * entry.seed))
    assert len(every) == len(models.SIZES) * len(models.SHAPES) * sum(len(seeds) for seeds in models.SEEDS.values())
    order = [(entry.budget, entry.seed) for entry in every]
    assert order.index((36_864, 0)) < order.index((12_288, 1)) < order.index((122_880, 0)) < order.index((36_864, 1))
    for entry in every:
        found = models.following(tmp_path, "*", models.BUDGETS)
        assert found[0] == entry
        finish(tmp_path, entry, [models.VALIDATION, *models.TESTS])
    assert models.following(tmp_path, "*", models.BUDGETS) is None


def test_only_what_is_asked_for_runs(tmp_path):
    try_all(tmp_path)
    found = models.following(tmp_path, "70m/nonuniform-*", [4_096])
    assert (found[0].size, found[0].shape, found[0].budget) == ("70m", "nonuniform", 4_096)


@pytest.fixture
def small(project, tmp_path, monkeypatch):
    """A race of tiny models, whose text is in `race/`."""
    monkeypatch.setattr(models, "SIZES", {"100m": ({"48": {"ffn": 48}}, 0.7)})
    monkeypatch.setattr(models, "BLOCK", 16)
    monkeypatch.setattr(models, "CALIBRATION", dict.fromkeys(models.CALIBRATION, {"tokens": 256, "block_size": 16}))
    (out := tmp_path / "race").mkdir()
    for name in (*(f"{name}.jsonl" for name in models.TRAINING), *itertools.chain(*models.TEXTS.values())):
        (out / name).write_text((project["folder"] / "train.jsonl").read_text())
    return project["folder"]


def test_a_run_that_was_killed_goes_on_where_it_was(small, tmp_path, monkeypatch):
    out, stages = tmp_path / "race", []
    texts = {name: list(tiny.blocks(3).with_format(None)["input_ids"]) for name in (models.VALIDATION, *models.TESTS)}
    entry, model, real = models.Entry("100m", "uniform", "48", 256, 1, "3e-4"), str(small / "teacher"), models.command

    def command(arguments):
        stages.append(arguments[0])
        if stages == ["score", "prune", "distill"]:
            raise KeyboardInterrupt
        return real(arguments)

    monkeypatch.setattr(models, "command", command)
    with pytest.raises(KeyboardInterrupt):
        models.make(out, model, entry, texts)
    scored = (out / entry.scores / "score/done.json").stat().st_mtime_ns
    models.make(out, model, entry, {models.VALIDATION: texts[models.VALIDATION]})
    assert (out / entry.scores / "score/done.json").stat().st_mtime_ns == scored, "the scores were made again"
    assert models.measured(out, entry.name).keys() == {models.VALIDATION}
    models.make(out, model, entry, texts)
    assert models.measured(out, entry.name).keys() == texts.keys()
    assert models.validation_loss(out, entry) > 0
    log = json.loads((out / entry.name / "distill/log.json").read_text())
    assert (log["steps"], log["tokens"]) == (256 // 16, 256)


def test_the_result_holds_every_row_and_says_which_setting_was_chosen(tmp_path):
    texts = {name: [[0] * 11] * 4 for name in (models.VALIDATION, *models.TESTS)}
    first, second, *_ = models.SETTINGS
    for entry in try_all(tmp_path):
        finish(tmp_path, entry, [models.VALIDATION], loss=1 + (entry.setting == first))
    for entry in models.entries(tmp_path):
        if entry.budget <= 12_288:
            folder = tmp_path / entry.name
            folder.mkdir(parents=True, exist_ok=True)
            loss = [[10 * (9 - math.log10(entry.budget) - (entry.shape != "published")), 10]] * 4
            content = {
                "seconds": 1,
                "parameters": 1,
                "losses": {**dict.fromkeys(models.TESTS, loss), models.VALIDATION: [[1, 1]]},
            }
            (folder / models.MEASURED).write_text(json.dumps(content))
    models.save(tmp_path, texts, tmp_path / "race.json")
    found = json.loads((tmp_path / "race.json").read_text())
    rows = {(row["size"], row["budget"], row["shape"]): row for row in found["rows"]}
    assert rows.keys() == {(size, 12_288, shape) for size in models.SIZES for shape in ("uniform", "nonuniform")}
    for row in rows.values():
        assert {"size", "budget", "shape", "fraction", "low", "high", "seeds"} <= row.keys()
        assert (row["fraction"], row["seeds"]) == (pytest.approx(0.1), 3)
    assert {row["text"] for row in found["other_texts"]} == set(models.TESTS[1:])
    chosen = {(row["size"], row["shape"], row["budget"]): row["setting"] for row in found["tried"]
              if row["chosen"] and row["budget"] in models.ON_CPU}  # fmt: skip
    assert len(chosen) == 3 * len(models.SIZES) * len(models.SHAPES), "of more tokens the third setting is to be tried now"
    assert set(chosen.values()) == {second}


def test_a_size_that_was_not_measured_here_keeps_its_rows(tmp_path):
    texts = {name: [[0] * 11] for name in (models.VALIDATION, *models.TESTS)}
    row = {"size": "70m", "text": "c4_2", "shape": "uniform", "budget": 900}
    old = {key: [row] for key in ("rows", "other_texts", "equal_tokens", "curves", "tried")} | {
        "seconds": {"a GPU": {"a": 1800}}
    }
    (tmp_path / "race.json").write_text(json.dumps(old))
    for entry in models.widths_of("100m", "nonuniform"):
        finish(tmp_path, entry, [models.VALIDATION])
    models.save(tmp_path, texts, tmp_path / "race.json")
    found = json.loads((tmp_path / "race.json").read_text())
    assert found["rows"] == found["curves"] == [row]
    assert [one["size"] for one in found["tried"]] == ["100m", "70m"]
    assert found["hours"]["a GPU"] == 0.5


def test_the_page_says_what_the_rows_say():
    facts = {"size": "100m", "budget": 900, "seeds": 1}
    points = [{**facts, "text": "c4_2", "shape": shape, "budget": budget, "perplexity": value, "low": 90.0, "high": 99.0}
              for shape, budget, value in (("published", 900, 97.5), ("uniform", 300, 98.5), ("uniform", 900, 95.5),
                                           ("nonuniform", 300, 91.5))]  # fmt: skip
    rows = [{**facts, "shape": "uniform", "fraction": 0.6, "low": 0.5, "high": None},
            {**facts, "shape": "nonuniform", "fraction": 300 / 900, "low": 300 / 900, "high": 0.4}]  # fmt: skip
    ratios = [{**facts, "shape": "uniform", "text": text, "ratio": ratio, "low": 0.9, "high": 1.2}
              for text, ratio in (("c4_2", 0.98), ("code", 1.12))]  # fmt: skip
    tried = [{"size": "100m", "shape": shape, "width": width, "budget": budget, "setting": setting, "chosen": chosen}
             for shape, width, budget, setting, chosen in (
                 ("uniform", "504x1152", 300, "3e-4", False), ("uniform", "576x864", 900, "6e-4", True),
                 ("uniform", "576x864", 300, "3e-4", True), ("nonuniform", "nonuniform", 300, "3e-4", True),
                 ("nonuniform", "nonuniform", 900, "3e-4", True))]  # fmt: skip
    found = {"curves": points, "rows": rows, "equal_tokens": ratios, "hours": {"2 CPU cores": 2.0, "a GPU": 0.5},
             "tried": tried, "calibration": {"ours": 64, "published": 16},
             "seconds": {
                 "a GPU": {"100m/uniform-5x8-9000-1e-3x16-0/distill": 90},
                 "2 CPU cores": {"100m/uniform-5x8-300-1.5e-4-0/score": 20, "100m/uniform-5x8-300-1.5e-4-0/prune": 40,
                                 "100m/published-5x8-300-3e-4-0/distill": 1, "100m/nonuniform-300-1.5e-4-0/distill": 60}},
             }  # fmt: skip
    page = race_page.table_block(found)
    for words in (
        "0.60 (0.50 to more than was measured)",
        "at most 0.33 (up to 0.40)",
        "ours reads 64 tokens, once for all budgets, in forward passes alone, and takes for scores and fits as long as for 300",
        "the published recipe scores with 16.",
        "ours has at most 1.12 of its perplexity on any of 2 texts (code, 100M, 900 tokens, uniform)",
        "100M uniform 576x864 at 3e-4 (300 tokens), 6e-4 (900 tokens); 100M nonuniform at 3e-4. 2.0 hours of 2 CPU "
        "cores, 300 to 300 tokens; 0.5 hours of a GPU, 9,000 to 9,000 tokens.",
    ):
        assert words in page, page
    first, second = ([cell.strip() for cell in row.split("|")] for row in page.splitlines()[2:4])
    assert first[1:5] == ["100M, 900 tokens", "97.5", "uniform", "95.5"]
    assert second[3:5] == ["nonuniform", ""], "not measured with as many tokens"
    longer = {**found, "rows": [*rows, {**rows[0], "budget": 2700, "fraction": None, "low": None}]}
    assert "2,700" in race_page.table_block(longer)
    assert "2,700" not in race_page.race_block(longer), "ours was not trained with as many"
    said = race_page.race_block(found)
    assert "with 900 tokens, ours needs of them uniform 0.60 (0.50 to more than was measured), nonuniform at most" in said, said


def test_widths_stand_beside_each_other():
    tried = [{"size": "100m", "shape": shape, "width": width, "budget": 12, "setting": setting, "validation_perplexity": value}
             for shape, width, setting, value in (("published", "5x9", "3e-4", 44.0), ("published", "6x8", "3e-4", 41.0),
                                                  ("published", "6x8", "6e-4", 47.0), ("uniform", "6x8", "3e-4", 38.0),
                                                  ("nonuniform", "nonuniform", "3e-4", 36.0))]  # fmt: skip
    rows = race_page.widths_block({"settings": {"3e-4": {}, "6e-4": {}}, "tried_with": 12, "tried": tried}).splitlines()[2:]
    assert [[cell.strip() for cell in row.strip("|").split("|")] for row in rows] == [
        ["100M", "5x9", "44.0", ""], ["100M", "6x8", "41.0", "38.0"],
    ]  # fmt: skip


def test_the_curves_are_drawn(tmp_path):
    point = {"size": "100m", "text": "c4_2", "shape": "uniform", "perplexity": 95.0, "low": 90.0, "high": 99.0}
    race_page.plot_race({"curves": [{**point, "budget": budget} for budget in (300, 900)]}, tmp_path / "race.png")
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")


def test_no_text_is_in_two_parts(tmp_path):
    data, out = tmp_path / "data", tmp_path / "race"
    for folder in (data / "text", data / "tasks"):
        folder.mkdir(parents=True)
    for name in ("c4_1", "c4_2", "stackexchange", "code"):
        rows = [json.dumps({"text": f"{name} {number} " + "word " * 900}) for number in range(60)]
        (data / f"text/{name}.jsonl").write_text("\n".join(rows) + "\n")
    book = [json.dumps({"context": "a book " + "word " * 90, "continuation": "end"})] * 20
    (data / "tasks/lambada_openai.jsonl").write_text("\n".join(book) + "\n")
    tiny.tokenizer([*(f"{n}" for n in range(60)), "word", "c4_1", "c4_2", "stackexchange", "code"]).save_pretrained(
        tmp_path / "t"
    )
    texts = models.prepare(data, out, str(tmp_path / "t"))
    assert {name: len(rows) for name, rows in texts.items()} | {"documentation": 0} == {
        "validation": 12, "c4_2": 32, "stackexchange": 12, "code": 12, "books": 16, "documentation": 0,
    }  # fmt: skip
    first = {name: [tuple(row[:2]) for row in rows] for name, rows in texts.items()}
    for name in models.TRAINING:
        trained = [tuple(tiny_tokens(tmp_path / "t", line)[:2]) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        held_out = {*first["validation"], *first.get(name, ())}
        assert not held_out & {*trained}, name
        assert not {*first.get(name, ())} & {*first["validation"]}, name
    documents = {}
    for recipe, count in {"ours": 132, "published": 40}.items():
        lines = [line for name in models.TEXTS[recipe] for line in (out / name).read_text().splitlines()]
        assert len(lines) == 3 * count, recipe
        documents[recipe] = {text for text in (json.loads(line)["text"] for line in lines) if not text.startswith("word")}
    assert len(documents["ours"]) > len(documents["published"]), "as many documents as there are"
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")}
    assert models.prepare(data, out, str(tmp_path / "t")) == texts
    assert {path.name: path.stat().st_mtime_ns for path in out.glob("*.jsonl")} == before


def tiny_tokens(folder, line):
    return AutoTokenizer.from_pretrained(folder)(json.loads(line)["text"])["input_ids"]


def test_training_claims_follow_one_another_and_are_compared_by_document(small, tmp_path, monkeypatch):
    out = tmp_path / "race"
    texts = {name: list(tiny.blocks(3).with_format(None)["input_ids"]) for name in (models.VALIDATION, *models.TESTS)}
    ways = ("once", [{}]), ("chain", [{"distill": {"max_steps": 4}}, {"prune": {"target": {"ffn": 32}}}])
    monkeypatch.setattr(training_claims, "CLAIMS", [training_claims.Claim("says", "a paper", *ways)])
    monkeypatch.setattr(models, "TRIED_WITH", 128)
    model = str(small / "teacher")
    training_claims.save(out, texts, tmp_path / "claims.json")
    assert json.loads((tmp_path / "claims.json").read_text())["claims"] == [], "nothing is measured yet"
    for name, recipes in ways:
        training_claims.make(out, model, name, recipes, texts)
    second = json.loads((out / "claims/chain/prune/student/plan.json").read_text())
    assert second["before"]["ffn"] == 48, "the second recipe begins with the first one's student"
    training_claims.save(out, texts, tmp_path / "claims.json")
    (row,) = json.loads((tmp_path / "claims.json").read_text())["claims"]
    once, chain = (models.measured(out, f"claims/{name}")["c4_2"] for name in ("once", "chain"))
    difference = sum(a - b for (a, _), (b, _) in zip(once, chain, strict=True)) / sum(tokens for _, tokens in once)
    assert row["ratios"]["c4_2"]["ratio"] == pytest.approx(math.exp(difference))


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.8, 0.9, "the same"), (0.9, 1.1, "no difference"), (1.1, 1.2, "the other way")]
)
def test_the_verdict_is_the_intervals(low, high, word):
    assert update_readme.verdict({"ratio": (low + high) / 2, "low": low, "high": high}) == word
