"""Search: what shapes cost, which ones a budget allows, how a budget is spent over layers, and both verbs on a tiny model."""

import itertools
import json
import math
import shutil
from functools import partial

import numpy as np
import pytest
import tiny
import torch
import yaml
from markdown_it import MarkdownIt
from transformers import DynamicCache

from hf_minitron import Architecture
from hf_minitron.__main__ import main
from hf_minitron.pruning import search
from hf_minitron.pruning.allocate import allocate
from hf_minitron.recipe import load_recipe
from hf_minitron.shape import Shape
from hf_minitron.stages import search as stage
from hf_minitron.stages.every import STAGES

GRID = {"layers": [2, 3], "hidden": [24, 32, 40], "ffn": [32, 48, 72], "heads": [2, 4], "kv_heads": [1, 2]}


def space(model_type="llama", **changes):
    config = tiny.config(model_type, **changes)
    architecture = Architecture.of(config)
    before, rows = architecture.shape, architecture.rows
    return before, rows, {name: partial(cost, rows=rows, size=2) for name, cost in search.COSTS.items()}


def scores_of(before, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = {"layers": (3,), "hidden": (40,), "ffn": (3, 72), "heads": (3, 4)}
    return {axis: torch.rand(size, generator=g) for axis, size in sizes.items()}


@pytest.mark.parametrize("tied", [False, True])
def test_costs_are_those_of_a_real_model(tied):
    before, _, costs = space(tie_word_embeddings=tied)
    shape = before.cut_to({"layers": 2, "hidden": 24, "ffn": 48, "kv_heads": 1})
    made = tiny.model(
        num_hidden_layers=2, hidden_size=24, intermediate_size=48, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=tied, dtype=torch.bfloat16,
    )  # fmt: skip
    vocab = sum(p.numel() for p in made.parameters() if tiny.SIZES["vocab"] in p.shape)
    cache = DynamicCache()
    with torch.inference_mode():
        made(torch.ones(1, 5, dtype=torch.long), past_key_values=cache)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    linear = sum(m.weight.numel() for m in made.modules() if isinstance(m, torch.nn.Linear))
    assert {name: cost(shape) for name, cost in costs.items()} == {
        "parameters": made.num_parameters(),
        "body_parameters": made.num_parameters() - vocab,
        "bytes": made.num_parameters() * 2,
        "kv_cache_bytes": held // 5,
        "flops": 2 * linear,
    }


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2_moe", "deepseek_v3", "mixtral"])
def test_many_shapes_are_counted_at_once_as_one_by_one(model_type):
    before, _, costs = space(model_type)
    grid = {axis: [size, before[axis]] for axis, size in tiny.target(before).items() if axis not in ("heads", "kv_heads")}
    legal = search.legal_shapes(before, grid, {})
    assert len(legal) == 2 ** len(grid) - 1
    many = Shape({axis: np.array([shape[axis] for _, shape in legal]) for axis in before.sizes})
    for name, cost in costs.items():
        assert np.broadcast_to(cost(many), len(legal)).tolist() == [cost(shape) for _, shape in legal], name


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_candidates_are_all_legal_shapes_near_the_budget(tensor_parallel):
    before, _, costs = space()
    limits = search.limits_of({"parameters": "60%"}, {name: cost(before) for name, cost in costs.items()})
    found = search.candidates(search.legal_shapes(before, GRID, {"ffn": 16}, tensor_parallel), limits, costs)
    expected = []
    for layers, hidden, ffn, heads, kv in itertools.product(*GRID.values()):
        count = 2 * 99 * hidden + hidden + layers * (hidden * (2 * heads * 6 + 2 * kv * 6) + 3 * hidden * ffn + 2 * hidden)
        legal = heads % kv == 0 and heads // kv <= 2 and all(n % tensor_parallel == 0 for n in (heads, kv, ffn))
        if legal and abs(count / limits["parameters"] - 1) <= 0.05:
            expected.append(((layers, hidden, ffn, heads, kv), count))
    assert sorted((tuple(c.shape[a] for a in GRID), c.costs["parameters"]) for c in found) == sorted(expected)
    assert expected
    for candidate in found:  # what a recipe gets makes the same shape again
        assert before.cut_to(candidate.target) == candidate.shape
        assert all(before[axis] != size for axis, size in candidate.target.items())
    assert len({candidate.name for candidate in found}) == len(found)


def test_of_several_budgets_none_is_exceeded_and_the_tightest_met():
    before, _, costs = space()
    limits = search.limits_of({"parameters": "80%", "kv_cache_bytes": "50%"}, {n: cost(before) for n, cost in costs.items()})
    for candidate in search.candidates(search.legal_shapes(before, GRID, {}), limits, costs):
        used = [candidate.costs[name] / limits[name] for name in limits]
        assert 0.95 <= max(used) <= 1.05
        assert candidate.shape.kv_cache_bytes_per_token(2) == candidate.costs["kv_cache_bytes"]


def test_a_hundred_thousand_shapes_take_seconds():
    before, _, costs = space(num_hidden_layers=30, hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                             num_key_value_heads=3, head_dim=64, vocab_size=49152)  # fmt: skip
    grid = {"layers": range(11, 31), "hidden": range(296, 577, 8), "ffn": range(424, 1537, 8)}
    legal = search.legal_shapes(before, {axis: list(sizes) for axis, sizes in grid.items()}, {"ffn": 8})
    assert len(legal) == 20 * 36 * 140 - 1
    assert search.candidates(legal, {"parameters": 100e6}, costs)


def test_default_grids_hold_the_model_itself_and_multiples():
    before, *_ = space(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
                       num_key_value_heads=8, head_dim=128)  # fmt: skip
    grid = search.default_grid(before, {"hidden": 64, "ffn": 64})
    assert grid["layers"] == [29, 30, 31, 32]
    assert grid["heads"] == [16, 24, 32]
    assert set(grid) == {*GRID} - {"kv_heads"}
    for axis in ("hidden", "ffn"):
        assert all(size % 64 == 0 and size >= before[axis] / 2 for size in grid[axis])
        assert grid[axis][-1] == before[axis]
    search.check_grid(before, grid, {"hidden": 64, "ffn": 64})


def test_the_score_is_the_share_that_is_kept():
    before, _, costs = space()
    scores = scores_of(before)
    legal = search.legal_shapes(before, GRID, {})
    found = search.rank([search.Candidate(*pair, {}) for pair in legal], scores, before)
    assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)
    assert 0 < found[-1].score < found[0].score < 1
    by_name = {c.name: c.score for c in found}
    hidden = scores["hidden"].sort(descending=True).values
    ffn = scores["ffn"].sort(descending=True).values
    assert by_name["hidden24"] == pytest.approx((hidden[:24].sum() / hidden.sum()).item())
    assert by_name["ffn32"] == pytest.approx((ffn[:, :32].sum(1) / ffn.sum(1)).mean().item())
    assert by_name["hidden24-ffn32"] == pytest.approx(by_name["hidden24"] * by_name["ffn32"])
    groups = scores["heads"].view(3, 2, 2)
    pair = groups.sum(2).max(1).values / groups.sum((1, 2))
    assert by_name["heads2-kv_heads1"] == pytest.approx(pair.mean().item())
    one_each = groups.max(2).values.sum(1) / groups.sum((1, 2))
    assert by_name["heads2"] == pytest.approx(one_each.mean().item())


def test_speed_is_predicted_from_a_few_shapes():
    before, rows, _ = space()
    legal = search.legal_shapes(before, GRID, {})
    truth = lambda shape: 1 / (2e-4 + 3e-4 * shape["layers"] + 1e-8 * shape.flops_per_token(rows))  # noqa: E731
    probes = search.size_probes(legal, lambda shape: shape["hidden"] != 24, rows, 5)
    assert len(probes) == 5
    assert all(shape["hidden"] != 24 for shape in probes)
    speed = search.fit_speed(probes, [truth(shape) for shape in probes], rows)
    for _, shape in legal:
        assert speed(shape) == pytest.approx(truth(shape), rel=1e-3)
    limits = {"decode_tokens_per_second": 800.0}
    found = search.candidates(legal, limits, {"decode_tokens_per_second": speed})
    assert found
    assert all(800 / 1.05 <= truth(c.shape) <= 800 / 0.95 for c in found)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"paramters": 1}, "budget: 'paramters' is not something to budget; did you mean 'parameters'"),
        ({"parameters": "half"}, "budget: parameters: 'half' is neither a number above 0 nor a share .* such as '50%'"),
        ({"parameters": "x%"}, "'x%' is neither"),
        ({"parameters": -1}, "-1 is neither"),
        ({"parameters": True}, "True is neither"),
        ({}, "budget is empty: set any of parameters, body_parameters"),
    ],
)
def test_budgets_that_cannot_be_read_are_refused(budget, message):
    with pytest.raises(ValueError, match=message):
        search.limits_of(budget, {"parameters": 100, "body_parameters": 50})


@pytest.mark.parametrize(
    ("grid", "tensor_parallel", "message"),
    [
        ({"ffn": [30, 100], "hiden": [24]}, 1, "grid: ffn: 30 is not a multiple of 8; .*ffn: 100 is larger.*hiden: .*'hidden'"),
        ({"ffn": 32}, 1, "grid: ffn: 32 is not a list of sizes"),
        ({"ffn": []}, 1, r"grid: ffn: \[\] is not a list"),
        ({"ffn": [32] * 71_000, "hidden": list(range(1, 40))}, 1, "2,769,000 shapes; at most 1,000,000"),
        ({"ffn": [32]}, 3, r"legal with tensor_parallel 3 \(the teacher has heads 4, kv_heads 2, ffn 72\)"),
    ],
)
def test_grids_without_a_legal_shape_are_refused(grid, tensor_parallel, message):
    before, *_ = space()
    with pytest.raises(ValueError, match=message):
        search.legal_shapes(before, grid, {"ffn": 8}, tensor_parallel)


def test_a_budget_out_of_reach_names_the_nearest():
    before, _, costs = space()
    with pytest.raises(
        ValueError, match=r"No shape within 5% of the budget parameters 1,000: .* the nearest .* \(layers 2, hidd"
    ):
        search.candidates(search.legal_shapes(before, GRID, {}), {"parameters": 1000}, costs)


def brute_force(options, budget):
    best = math.inf
    for chosen in itertools.product(*options.values()):
        cost = np.sum([np.atleast_1d(cost) for cost, _ in chosen], axis=0)
        if (cost <= np.atleast_1d(budget)).all():
            best = min(best, sum(error for _, error in chosen))
    return best


@pytest.mark.parametrize("seed", range(40))
def test_allocation_is_the_best_there_is(seed):
    rng = np.random.default_rng(seed)
    budgets, groups = int(rng.integers(1, 3)), int(rng.integers(1, 6))
    scale = 10.0 ** rng.integers(0, 9, budgets)  # parameters and bytes are large numbers
    options = {
        ("ffn", layer): [
            (tuple(rng.integers(0, 20, budgets) * scale), float(rng.random() * 10.0 ** rng.integers(-4, 1)))
            for _ in range(rng.integers(1, 6))
        ]
        for layer in range(groups)
    }
    budget = rng.integers(4, 12, budgets) * groups * scale
    best = brute_force(options, budget)
    if best == math.inf:
        with pytest.raises(ValueError, match="least possible cost"):
            allocate(options, budget)
        return
    chosen = allocate(options, budget)
    picked = [options[group][index] for group, index in chosen.items()]
    assert set(chosen) == set(options)
    assert (np.sum([cost for cost, _ in picked], axis=0) <= budget).all()
    assert sum(error for _, error in picked) == pytest.approx(best, abs=1e-9)


def test_allocation_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="The least possible cost is 5, more than the budget of 4"):
        allocate({"a": [(2, 0.0), (3, 1.0)], "b": [(3, 0.0)]}, 4)
    with pytest.raises(ValueError, match="can be met one by one, but not all at once"):
        allocate({"a": [((0, 1), 0.0), ((1, 0), 0.0)]}, (0, 0))
    with pytest.raises(ValueError, match="'a' has no choices"):
        allocate({"a": []}, 1)
    with pytest.raises(ValueError, match="A choice has 1 costs, but there are 2 budgets"):
        allocate({"a": [(1, 0.0)]}, (1, 2))
    with pytest.raises(ValueError, match="finite"):
        allocate({"a": [(1, math.nan)]}, 1)
    assert allocate({"a": [(0, 0.5), (1, 0.0)]}, 0) == {"a": 0}


@pytest.fixture(scope="module")
def searched(project, tmp_path_factory):
    """A recipe with a search section, scored and searched."""
    folder = tmp_path_factory.mktemp("search")
    recipe = {**project["recipe"], "run": str(folder / "run")}
    recipe["prune"] = {}
    recipe["search"] = {
        "budget": {"parameters": "60%"},
        "grid": {"hidden": [24, 32], "ffn": [32, 40, 48, 72], "layers": [2, 3]},
        "top": 2,
        "steps": 2,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["search", str(path)]) == 1  # not scored yet
    assert main(["score", str(path)]) == 0
    assert main(["search", str(path)]) == 0
    return path


def test_search_and_select_through_the_command(searched, monkeypatch, capsys):
    folder = searched.parent / "run"
    found = json.loads((folder / "search/candidates.json").read_text())
    names = [entry["name"] for entry in found["candidates"]]
    assert len(names) == 2
    assert found["budget"]["parameters"] == pytest.approx(0.6 * tiny.model().num_parameters())
    capsys.readouterr()
    assert main(["search", str(searched)]) == 0
    out = capsys.readouterr().out
    paths = [folder / "candidates" / name / "recipe.yaml" for name in names]
    assert "search: done before, skipped" in out
    assert all(f"hf-minitron run {path}" in out for path in paths)
    assert main(["select", str(searched)]) == 1
    assert f"no candidate is finished yet:\n    hf-minitron run {paths[0]}" in capsys.readouterr().err
    monkeypatch.setattr("hf_minitron.stages.score.calibrate", lambda *args, **kwargs: 1 / 0)  # nothing is scored again
    assert main(["run", str(paths[0])]) == 0
    assert "score: done before, skipped" in capsys.readouterr().out
    report = json.loads((folder / "candidates" / names[0] / "evaluate/report.json").read_text())
    entry = found["candidates"][0]
    assert report["models"]["distilled"]["parameters"] == entry["costs"]["parameters"]
    assert not report["speed"]
    assert {axis: report["models"]["pruned"]["shape"][axis] for axis in entry["target"]} == entry["target"]
    log = json.loads((folder / "candidates" / names[0] / "distill/log.json").read_text())
    assert log["history"][-1]["step"] == 2
    assert main(["select", str(searched)]) == 0
    out = capsys.readouterr().out
    assert names[0] in out
    assert f"Not finished:\n\n    hf-minitron run {paths[1]}" in out
    rendered = MarkdownIt().render((folder / "select/ranking.md").read_text())
    assert f"<pre><code>hf-minitron run {paths[1]}\n</code></pre>" in rendered
    for verb in ("prune", "distill", "evaluate"):
        assert main([verb, str(paths[1])]) == 0
    capsys.readouterr()
    assert main(["select", str(searched)]) == 0
    assert "Not finished" not in capsys.readouterr().out
    ranking = json.loads((folder / "select/ranking.json").read_text())
    values = [entry["distilled"]["value"] for entry in ranking["ranking"]]
    assert values == sorted(values)
    assert len(values) == 2
    assert not ranking["unfinished"]
    assert {entry["rank_pruned"] for entry in ranking["ranking"]} == {1, 2} == {e["rank_by_score"] for e in ranking["ranking"]}
    assert (folder / "select/candidates.png").stat().st_size > 0
    assert names[1] in (folder / "select/ranking.md").read_text()
    assert main(["report", str(searched)]) == 0
    page = (folder / "report.html").read_text()
    assert "Candidates of the search</h2>" in page
    assert f"<td>{names[1]}</td>" in page
    assert 'alt="Quality against size of the candidates"' in page
    best = yaml.safe_load((folder / "select/best.yaml").read_text())
    assert best["prune"]["target"] == ranking["ranking"][0]["target"]
    assert best["distill"]["max_steps"] == 6
    assert best["evaluate"]["tasks"] == ["tiny_last_word"]
    assert "search" not in best
    assert main(["prune", str(folder / "select/best.yaml")]) == 0


def test_another_search_keeps_what_has_run(searched, tmp_path, capsys):
    folder = searched.parent / "run"
    first = json.loads((folder / "search/candidates.json").read_text())["candidates"]
    mark = folder / "candidates" / first[0]["name"] / "mark"
    mark.write_text("a finished run")
    capsys.readouterr()
    assert main(["search", str(searched), "--search.budget.parameters", "80%", "--search.steps", "3"]) == 0
    out = capsys.readouterr().out
    assert f"Left from another search in {folder / 'candidates'}: " in out
    assert first[0]["name"] in out
    assert mark.is_file()
    assert (folder / "candidates" / first[0]["name"] / "recipe.yaml").is_file()
    assert main(["search", str(searched)]) == 0  # the same as at first
    assert json.loads((folder / "search/candidates.json").read_text())["candidates"] == first


def test_another_number_of_steps_is_not_finished(searched, capsys):
    folder = searched.parent / "run"
    name = json.loads((folder / "search/candidates.json").read_text())["candidates"][0]["name"]
    path = folder / "candidates" / name / "recipe.yaml"
    for verb in ("prune", "distill", "evaluate"):
        assert main([verb, str(path)]) == 0
    assert main(["search", str(searched), "--search.steps", "3"]) == 0
    capsys.readouterr()
    main(["select", str(searched), "--search.steps", "3"])
    assert f"hf-minitron run {path}" in "".join(capsys.readouterr())


def test_measured_speed_is_a_budget(searched, monkeypatch, capsys):
    measured = []

    def speed(config, shape, dtype, device):
        measured.append(shape)
        return {"prefill": 1e9 / (1e4 + shape["ffn"] * shape["hidden"]), "decode": 1000.0}

    folder = searched.parent / "speed"
    shutil.copytree(searched.parent / "run/score", folder / "score")
    monkeypatch.setattr(stage, "shape_tokens_per_second", speed)
    recipe = yaml.safe_load(searched.read_text())
    recipe |= {"run": str(folder), "search": {**recipe["search"], "tolerance": 0.2}}
    recipe["search"]["budget"] = {"prefill_tokens_per_second": "110%"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    (folder / "run.json").write_text(json.dumps({"recipe": "recipe.yaml", "model": recipe["model"]}))
    assert main(["search", str(path)]) == 0, capsys.readouterr().err
    found = json.loads((folder / "search/candidates.json").read_text())
    wanted = found["budget"]["prefill_tokens_per_second"]
    for entry in found["candidates"]:
        assert abs(wanted / entry["costs"]["prefill_tokens_per_second"] - 1) <= 0.2
        assert entry["costs"]["parameters"] > 0
    assert measured[0]["ffn"] == 72
    assert len(measured) <= 1 + stage.PROBES + 4


def test_random_models_of_a_shape_can_be_measured():
    config = tiny.config()
    shape = Architecture.of(config).shape.cut_to({"hidden": 24, "layers": 2})
    speed = stage.shape_tokens_per_second(config, shape, torch.float32, torch.device("cpu"))
    assert set(speed) == {"prefill", "decode"}
    assert min(speed.values()) > 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("--search.budget", "{}"), "search: budget is empty: set any of parameters"),
        (("--search.budget.parameters", "1"), "search: No shape within 5% of the budget"),
        (("--search.grid.ffn", "[100]"), "grid: ffn: 100 is larger"),
        (("--search.multiple_of", "{ffn: 0}"), "multiple_of: 'ffn': 0 is not"),
        (("--search.top", "0"), "search.top: 0 must be at least 1"),
        (("--search.budgt", "1"), "Unknown key 'budgt' in search; did you mean 'budget'"),
        (("--distill.max_stps", "1"), "did you mean 'max_steps'"),
    ],
)
def test_a_search_that_cannot_work_is_refused(searched, capsys, override, message):
    assert main(["search", str(searched), *override]) == 1
    assert message in capsys.readouterr().err


def test_help_explains_both_verbs(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert "hf-minitron search recipe.yaml" in out
    assert "hf-minitron select recipe.yaml" in out
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    assert "search.budget" in capsys.readouterr().out


def test_fewer_tokens_are_worth_the_share_of_the_text_that_they_are():
    before = Architecture.of(tiny.config()).shape
    counts = torch.zeros(before["vocab"], dtype=torch.float64)
    counts[[5, 9, 20]] = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64)
    legal = search.legal_shapes(before, {"vocab": [1, 2, before["vocab"]]}, {})
    found = search.rank([search.Candidate(*pair, {}) for pair in legal], {"vocab": counts}, before)
    assert [(c.name, round(c.score, 6)) for c in found] == [("vocab2", 0.9), ("vocab1", 0.6)]


def test_a_candidate_answers_no_questions(project):
    evaluate = {"evaluate.generate": ["w5"], "evaluate.max_new_tokens": 4, "evaluate.chat_template": False}
    run = load_recipe(project["path"], evaluate, {name: value.args for name, value in STAGES.items()})
    made = stage.candidate(run, "a", {"hidden": 24}, stage.Args(budget={"parameters": "90%"}))
    assert made.recipe["evaluate"] == {
        key: value for key, value in project["recipe"]["evaluate"].items() if key not in ("tasks", "include_path")
    } | {"tasks": [], "speed": False, "models": {}}
