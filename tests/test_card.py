"""The card of a real, tiny run: its facts, what it says of what is not known, and its snippet executed as it stands."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from hub_server import TOKEN
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from test_publish import card, report

from hf_minitron.__main__ import main
from hf_minitron.evaluation.report import Comparison, Entry, Report
from hf_minitron.evaluation.wording import metric_rows, sentence, size_rows
from hf_minitron.hub import facts
from hf_minitron.hub.card import benchmark_files, loss_parts, spans, write_card
from hf_minitron.hub.command import command
from hf_minitron.hub.page import _facts
from hf_minitron.hub.publish import files_to_push
from hf_minitron.plan import Plan
from hf_minitron.planning.estimate import with_values
from hf_minitron.recipe import load_recipe
from hf_minitron.recipe_file import read_overrides
from hf_minitron.run import made_by
from hf_minitron.shape import Shape
from hf_minitron.stages import publish
from hf_minitron.stages.every import STAGES


def load(path, **overrides):
    return load_recipe(Path(path), overrides, {name: stage.args for name, stage in STAGES.items()})


def test_the_card_says_what_was_done(whole):
    folder = whole / "run/publish/model"
    found = ModelCard.load(folder / "README.md")
    text, log = " ".join(found.text.split()), json.loads((whole / "run/distill/log.json").read_text())
    data = Report.load(folder / "report.json")
    assert found.data.base_model == "owner/teacher"
    assert found.data.language == "en"
    assert found.data.datasets is None
    wrote = json.loads((whole / "run/synthesize/synthesize.json").read_text())
    machine, losses = log["machine"], [entry for entry in log["history"] if "loss" in entry]
    for fact in (
        "once it was fine-tuned on the training text", "(teacher correction) by LoRA adapters",
        f"The teacher wrote text for training: {wrote['documents']} documents, {wrote['tokens']} tokens",
        "a precomputed (cached) teacher: `top_k`, 8 for every token", "lower bound of the true divergence",
        "sizes differ from layer to layer", "](kept.png)", "](shapes.png)", "](loss.png)",
        f"Python {sys.version.split()[0]}, torch {torch.__version__}", f"on {machine['hardware']}", "Seed 3",
        f"| cross_entropy | {losses[0]['cross_entropy']:.3f} | {losses[-1]['cross_entropy']:.3f} |", "| sum |",
        "losses: 0.25 cross_entropy, 0.75 forward_kl", f"{log['tokens']} tokens in 2 steps", "Energy was not measured",
        "No loss on held-out text", "Nobody has written down", "2407.14679", "2408.11796", "hours together",
    ):  # fmt: skip
        assert fact in text, fact
    low, high = data.entry("distilled", "perplexity").interval
    assert any(f"({low:,.{digits}f} to {high:,.{digits}f})" in text for digits in range(3))
    assert all(sentence(data, comparison) in text for comparison in data.against("teacher", "distilled"))
    plan = Plan.load(folder / "plan.json")
    assert f"| ffn | 72 | **{min(plan.by_layer['ffn'])} to {max(plan.by_layer['ffn'])}** |" in text
    stages = ["correct", "synthesize", "score", "prune", "cache", "distill", "evaluate"]
    assert list(json.loads((whole / "run/publish/card.json").read_text())["seconds"]) == stages


def test_the_card_says_whether_vllm_takes_layers_that_differ(whole):
    found = json.loads((whole / "run/publish/card.json").read_text())
    assert found["same_attention"] is False
    for same, words in ((False, "vLLM takes it only padded: `hf-minitron export . --to stock`."),
                        (True, "vLLM's Transformers backend takes it")):  # fmt: skip
        assert words in write_card(None, {}, None, {**found, "missing": [], "same_attention": same}).text
    assert "vLLM" not in write_card(None, {}, None, {k: v for k, v in found.items() if k != "same_attention"}).text


def test_the_licence_is_the_base_models_with_its_file(whole):
    folder = whole / "run/publish/model"
    data = ModelCard.load(folder / "README.md").data
    assert data.license == "other"
    assert data.license_name == "tiny-1"
    assert data.license_link == "https://huggingface.co/owner/teacher/blob/main/USE_POLICY.md"  # it did not come along
    assert (folder / "LICENSE").read_text() == "Do what you like.\n"
    assert "other (tiny-1), as the card of the base model says" in (folder / "README.md").read_text()


def test_the_licence_is_found_behind_the_models_between(whole):
    for model in ("prune/student", "distill/student", "correct/teacher", "publish/model"):
        found = facts.license_of(load(whole / "recipe.yaml", model=str(whole / "run" / model)))
        assert (found["license"], found["license_name"], found["license_source"]) == ("other", "tiny-1", "card"), model


def test_another_licence_than_the_cards_is_refused_before_any_work(whole, capsys, tmp_path):
    command = ["publish", str(whole / "recipe.yaml"), "--publish.license", "mit", "--run", str(tmp_path / "run")]
    assert main(command) == 1
    assert "license: 'mit', but the card of" in capsys.readouterr().err
    assert main([*command[:3], "other", *command[4:], "--publish.notes", TOKEN]) == 1
    error = capsys.readouterr().err
    assert "the command line holds an access token" in error
    assert TOKEN not in error


def test_no_path_of_this_machine_is_published(whole):
    folder = whole / "run/publish/model"
    for path in (*folder.rglob("*.*"), whole / "run/report.html"):
        assert str(whole).encode() not in path.read_bytes(), path.name
        assert path.suffix in (".py", ".safetensors") or b"/tmp/" not in path.read_bytes(), path.name
    assert ".../" + whole.name + "/teacher" in (folder / "recipe.yaml").read_text()


def test_paths_are_shortened_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    monkeypatch.chdir(tmp_path)
    for text, short in {
        f"{tmp_path}/runs/a": "runs/a", "/home/me/x/y.jsonl": "~/x/y.jsonl", "/data/web/c4.jsonl": ".../web/c4.jsonl",
        "~/x": "~/x", "owner/name": "owner/name", "/no thinking": "/no thinking", "see /home/me/x": "see ~/x",
        "https://x.y/home/me/z": "https://x.y/home/me/z", "model:/home/me/x": "model:~/x", "see /mnt/home/me/x": "see .../me/x",
        "a:/srv/data/b c": "a:.../data/b c", "s3://bucket/a/b": "s3://bucket/a/b", "x/home/me/y": "x/home/me/y",
        "/srv": ".../srv", "/data/runs/small/distill/student": ".../small/distill/student",
    }.items():  # fmt: skip
        assert facts.shorten(text) == short
    assert facts.public([f"a {TOKEN} b"]) == ["a <token> b"]
    found = facts.public({"/data/web/c4.jsonl": {"weight": 1.0}, "tasks": ["/data/web/t.yaml", 7], "limit": None})
    assert found == {".../web/c4.jsonl": {"weight": 1.0}, "tasks": [".../web/t.yaml", 7], "limit": None}


def test_the_snippet_of_the_card_runs_as_it_stands(whole, hub, tmp_path):
    assert main(["publish", str(whole / "recipe.yaml"), "--push"]) == 0
    text = hub.files()["README.md"].decode()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert 'model="me/small"' in snippet
    assert "trust_remote_code=True" in snippet
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
                   "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}  # fmt: skip
    assert said(snippet, tmp_path, environment).startswith("The library")


def test_the_snippet_of_a_model_that_is_not_on_the_hub_runs_in_its_folder(whole, project, tmp_path):
    recipe = {**project["recipe"], "run": str(tmp_path / "run")}
    recipe["evaluate"] = {**recipe["evaluate"], "speed": False, "tasks": []}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    folder = tmp_path / "run/publish/model"
    text = (folder / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert said(snippet, folder, dict(os.environ)).startswith("The library")
    for honest in ("not on the Hub", "Speed and memory were not measured", "No task was measured",
                   "apache-2.0, as the recipe says", "cut to the same sizes"):  # fmt: skip
        assert honest in text, honest


def said(snippet, folder, environment):
    command = [sys.executable, "-I", "-c", "import sys; sys.modules['hf_minitron'] = None\n" + snippet]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_a_kept_card_is_rendered_again_to_the_byte(whole, tmp_path, capsys):
    run = made_by(str(whole / "run/publish/model"))
    publish.keep(run, tmp_path / "small")
    assert str(publish.render(tmp_path / "small")) == (whole / "run/publish/model/README.md").read_text()
    kept = {path.name for path in (tmp_path / "small").iterdir()}
    assert kept == {
        "README.md",
        "report.json",
        "recipe.yaml",
        "log.json",
        "card.json",
        "shapes.png",
        "kept.png",
        "loss.png",
        "differences.png",
        "models.png",
    }
    log = json.loads((tmp_path / "small/log.json").read_text())
    assert {key for entry in log["history"] for key in entry} == {
        "step", "loss", "forward_kl", "cross_entropy", "train_runtime",
    }  # fmt: skip
    assert not any(str(whole) in path.read_text() for path in (tmp_path / "small").glob("*.*") if path.suffix != ".png")
    with pytest.raises(ValueError, match="is not published: hf-minitron publish"):
        publish.keep(replace(run, folder=tmp_path), tmp_path / "other")


def test_datasets_are_those_of_the_recipe_that_the_hub_has(whole, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    run = load(whole / "recipe.yaml", **{
        "distill.text": {"HuggingFaceFW/fineweb-edu:sample-10BT": 0.5, str(tmp_path / "a.jsonl"): 0.2, "synthesized": 0.3},
        "score.text": "Salesforce/wikitext:wikitext-2-raw-v1", "evaluate.text": "me/held-out", "correct.text": "data/x.txt",
    })  # fmt: skip
    assert facts.gather(run)["datasets"] == ["Salesforce/wikitext", "HuggingFaceFW/fineweb-edu"]


def test_a_folder_is_no_base_model_of_the_hub(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(whole.parent)  # its relative path has the form of a Hub id
    run = load(whole / "recipe.yaml", **{"model": f"{whole.name}/teacher", "publish.base_model": None})
    found = facts.gather(run)
    assert found["base_model"] is None
    assert found["base_folder"] == f"{whole.name}/teacher"
    text = card(base_model=None, base_folder=found["base_folder"])
    assert text.data.base_model is None
    assert f"the model in `{whole.name}/teacher`" in text.text


def test_dropped_layers_are_shown():
    before = Shape({**tiny.SIZES, "layers": 4})
    plan = Plan(before, before.cut_to({"layers": 2}), {"layers": [0, 3]})
    cut = facts.cut_of(plan)
    assert cut["dropped"] == [1, 2]
    assert cut["by_layer"]["ffn"] == [72, 0, 0, 72]
    text = str(card(cut=cut, pictures={"kept": "kept.png"}))
    assert "counted from 0: 1, 2." in text
    assert "](kept.png)" in text
    assert "| ffn      |     72 |    72 |" in text
    alike = facts.cut_of(Plan(before, before.cut_to({"ffn": 8}), {}))
    assert alike["by_layer"] == {}
    assert alike["dropped"] == []


def test_layers_in_a_row_are_said_by_their_ends():
    assert spans([0, 2, 3, 7, 8, 9, 15]) == ["0", "2", "3", "7 to 9", "15"]
    assert spans([]) == []
    before = Shape({**tiny.SIZES, "layers": 64})
    cut = facts.cut_of(Plan(before, before.cut_to({"layers": 24}), {"layers": [*range(20), 60, 61, 62, 63]}))
    assert "counted from 0: 20 to 59." in card(cut=cut).text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("o/a@1f:c", "Text: `o/a@1f:c`."),
        ({"a.txt": 3, "b`c.txt": {"weight": 1, "split": "test"}}, "Text: `a.txt` (75%), `` b`c.txt `` (25%)."),
        ({f"{n}.txt": n for n in range(1, 7)}, "Text: `6.txt` (29%), `5.txt` (24%), `4.txt` (19%), `3.txt` (14%), "
         "`2.txt` (10%) and 1 other (5%)."),
        ({f"{n}.txt": 1 for n in range(40)}, "Text: `0.txt` (2%), `1.txt` (2%), `2.txt` (2%), `3.txt` (2%), `4.txt` (2%) "
         "and 35 others (88%)."),
    ],
)  # fmt: skip
def test_texts_are_named_the_largest_first(text, said):
    log = {"tokens": 10, "steps": 2, "losses": {"forward_kl": 1.0}, "history": []}
    known = {"name": "a", "load": ".", "base_model": "o/b", "pictures": {}, "command": "c", "seconds": {}, "missing": []}
    assert said in write_card(report(), {"distill": {"text": text}}, log, known).text


def test_facts_and_links_hold_any_sign():
    found = replace(report(), machine={"hardware": "A|B `c`"})
    link = "https://x.y/LICENSE (v2).md"
    text = card(found, license="other", license_link=link, license_source="card").text
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    facts_shown = dict(_facts(tokens))
    assert facts_shown["Speed"].endswith("on A|B c")
    links = [child.attrs["href"] for token in tokens for child in token.children or () if child.type == "link_open"]
    assert "https://x.y/LICENSE%20(v2).md" in links


def test_sizes_count_the_cache_of_the_layers_that_stay():
    before = Shape({"layers": 3, "hidden": 8, "ffn": 8, "heads": 4, "kv_heads": 2, "head_dim": 5, "vocab": 9})
    cut = {
        "before": before.sizes,
        "after": before.sizes,
        "dropped": [],
        "by_layer": {"heads": [4, 0, 2], "kv_heads": [2, 0, 1]},
        "layer_sizes": {"after": {"heads": [4, 0, 2], "kv_heads": [2, 0, 1]}},
    }
    rows = size_rows(report(), cut)
    assert [row[-1] for row in rows[1:]] == ["0.1 kB", "0.1 kB", "0.1 kB"]
    big = {**cut, "before": {**before.sizes, "head_dim": 5000}, "after": {**before.sizes, "head_dim": 5000}}
    assert [row[-1] for row in size_rows(report(), big)[1:]] == ["120.0 kB", "60.0 kB", "60.0 kB"]  # 2 x 2 bytes x 6, x 3


def test_values_have_intervals_or_errors_and_say_which_way_is_better():
    found = report()
    acc = Entry("distilled", "task", "acc", 0.25, 0.05, (0.151, 0.349))
    rows = metric_rows(replace(found, entries=[*found.entries[:-1], acc]))
    assert rows[0] == ["metric", "teacher", "pruned", "distilled"]
    assert rows[1] == ["perplexity ↓", "11.00 ± 0.34", "57.00 ± 0.34", "16.00 ± 0.34"]
    assert rows[2] == ["task acc ↑", "0.250 ± 0.050", "0.250 ± 0.050", "0.25 (0.15 to 0.35)"]


@pytest.mark.parametrize(
    ("settings", "section", "written"),
    [
        ({"limit": None, "few_shot": None}, {}, "the task's own examples"),
        ({"limit": None, "few_shot": 5, "chat_template": True}, {}, "5-shot, chat template"),
        ({"limit": 100}, {}, None),  # not the whole benchmark
        ({}, {}, None),  # not known
        ({"limit": None}, {"include_path": "tasks"}, None),  # perhaps another task of that name
        ({"limit": None}, {"tasks": ["./gsm8k.yaml"]}, None),
    ],
)
def test_results_of_registered_benchmarks_only(settings, section, written):
    entries = [Entry("distilled", "gsm8k", "exact_match", 0.12345, 0.01), Entry("distilled", "arc_easy", "acc", 0.5, 0.1)]
    found = replace(report(), settings=settings, entries=entries)
    files = benchmark_files(found, {"tasks": ["gsm8k", "arc_easy"]} | section)
    assert list(files) == ([".eval_results/gsm8k.yaml"] if written else [])
    if written:
        (entry,) = yaml.safe_load(files[".eval_results/gsm8k.yaml"])
        assert entry["dataset"] == {"id": "openai/gsm8k", "task_id": "gsm8k"}
        assert entry["value"] == 12.35
        assert entry["notes"] == f"lm-eval gsm8k, {written}"


def test_results_of_benchmarks_lie_in_their_folder(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "benchmark_files", lambda report, section: {".eval_results/gsm8k.yaml": "- value: 1\n"})
    run = load(whole / "recipe.yaml")
    publish.run(publish.Args(repo_id="me/small"), run, tmp_path)
    assert (tmp_path / "model/.eval_results/gsm8k.yaml").read_text() == "- value: 1\n"
    assert ".eval_results/gsm8k.yaml" in files_to_push(tmp_path / "model")


def test_a_chain_s_sizes_stand_beside_their_models():
    text = " ".join(card(between="first", teacher="owner/other").text.split())
    assert (
        "pruned from first (2.0 M), a student of [owner/big](https://huggingface.co/owner/big) and taught by owner/other"
        in text
    )
    assert '"teacher" the model that was pruned, not owner/other.' in text


def test_a_resumed_training_s_time_is_that_of_its_last_start():
    log = {"tokens": 10, "steps": 2, "losses": {"forward_kl": 1.0}, "precision": "float32", "resumed": "checkpoint-1"}
    log["history"] = [{"loss": 2.0, "step": 1}, {"train_runtime": 60.0, "step": 2}]
    facts = {"name": "a", "load": ".", "base_model": "o/b", "pictures": {}, "command": "c", "seconds": {}, "missing": []}
    text = " ".join(str(publish.write_card(report(), {}, log, facts)).split())
    assert "10 tokens in 2 steps in float32, 1.0 minutes since it went on from checkpoint-1; losses: 1.0 forward_kl." in text


def test_text_that_was_read_again_is_said():
    log = {"tokens": 3_000, "packed_tokens": 2_000, "steps": 2, "losses": {"forward_kl": 1.0}, "history": []}
    facts = {"name": "a", "load": ".", "base_model": "o/b", "pictures": {}, "command": "c", "seconds": {}, "missing": []}
    text = " ".join(str(publish.write_card(report(), {}, log, facts)).split())
    assert "3,000 tokens, 2,000 of packed text read 1.5 times in 2 steps" in text
    assert "| **Distillation** | 3,000 tokens, 2,000 of packed text read 1.5 times |" in text
    once = " ".join(str(publish.write_card(report(), {}, {**log, "packed_tokens": 3_000}, facts)).split())
    assert "packed text" not in once


@pytest.mark.parametrize(
    ("method", "words"),
    [({"random": 50}, "higher than the true"), ({"top_k": 98}, "a lower bound"), ({"top_k": 99}, None)],
)
def test_a_cached_loss_is_called_what_it_is(method, words):
    text = " ".join(card(cache={"method": method, "bytes_per_token": 7.5}).text.split())
    assert "The student learned from a precomputed (cached) teacher: `" in text
    assert "for every token, in 7.5 bytes." in text
    said = [found for found in ("higher than the true", "a lower bound") if f"The loss is then {found}" in text]
    assert said == ([words] if words else [])


def test_the_command_holds_what_its_recipe_does_not(whole, tmp_path):
    """Values of the command line, and what `minutes` has left on this machine: another one would leave something else."""
    assert facts.gather(load(whole / "recipe.yaml"))["command"].endswith("/recipe.yaml")
    given = {"distill.max_steps": 7, "distill.losses": {"jsd": 1.0}, "publish.notes": "a: b\n'c'", "prune.target.ffn": 8,
             "run": "runs/x y", "publish.language": "no"}  # fmt: skip
    run = load(whole / "recipe.yaml", **given)
    words = shlex.split(facts.gather(run)["command"])
    assert words[:2] == ["hf-minitron", "run"]
    assert load(whole / "recipe.yaml", **read_overrides(words[3:])).recipe == run.recipe
    timed = tmp_path / "recipe.yaml"
    timed.write_text((whole / "recipe.yaml").read_text() + "minutes: 5\n")
    words = shlex.split(facts.gather(with_values(load(timed), {"distill.max_steps": 1}))["command"])
    again = load(timed, **read_overrides(words[3:])).recipe
    assert again["distill"]["max_steps"] == 1
    assert "minutes" not in again


@pytest.mark.parametrize(
    "given",
    [
        {"evaluate": {"text": "x.txt"}},
        {"search": {}},
        {"correct": None},
        {"minutes": None},
        {"score.tokens": 64, "search": {"budget": {"parameters": "50%"}}, "cache.k": 4},
        {"publish": None, "distill.losses": {}},
    ],
    ids=lambda given: " ".join(given),
)
def test_the_command_makes_the_recipe_that_was_run(whole, tmp_path, given):
    """Sections that were replaced, left out or added as a whole, too."""
    path = tmp_path / "recipe.yaml"
    path.write_text((whole / "recipe.yaml").read_text() + "minutes: 5\n")
    run = load(path, **{"minutes": None} | given)
    words = shlex.split(command(run))
    assert load(path, **read_overrides(words[3:])).recipe == run.recipe


def test_the_command_starts_as_many_processes_as_there_were(whole, monkeypatch):
    log = {"machine": {"processes": 4}, "tokens": 1}
    monkeypatch.setattr(facts, "_log", lambda run, stage: log)
    found = facts.gather(load(whole / "recipe.yaml"))["command"]
    assert found.startswith("accelerate launch --num_processes 4 -m hf_minitron run ")


def test_recipes_of_a_chain_get_their_own_values(whole, tmp_path):
    (tmp_path / "second.yaml").write_text(yaml.safe_dump({"model": str(whole / "run/publish/model")}))
    first, second = facts.gather(load(tmp_path / "second.yaml", seed=7))["command"].split(" && ")
    assert first.endswith("/recipe.yaml")
    assert second.endswith("/second.yaml --seed 7")


def test_the_cache_of_latent_attention_is_its_row():
    """A token adds one narrow row per layer, whatever the heads and though layers are gone."""
    sizes = {"layers": 3, "hidden": 8, "ffn": 8, "heads": 4, "kv_rank": 1000, "rope": 24, "vocab": 9}
    cut = {"before": sizes, "after": {**sizes, "layers": 2}, "dropped": [1], "by_layer": {"heads": [4, 0, 4]}}
    assert [row[-1] for row in size_rows(report(), cut)[1:]] == ["6.1 kB", "4.1 kB", "4.1 kB"]


def test_other_models_are_compared_too():
    pairs = [
        ("pruned", "teacher"),
        ("distilled", "teacher"),
        ("distilled", "pruned"),
        ("peer", "distilled"),
        ("peer", "pruned"),
    ]
    found = [Comparison(0.5, 0.4, (0.0, 0.2), 0.1, "paired bootstrap", None, None, 9, None, "better", a, b, "task", "acc")
             for a, b in pairs]  # fmt: skip
    text = card(replace(report(), comparisons=found)).text
    details = text.partition("compared in the same way:")[2].split("</details>")[0]
    said = [line.partition(" on ")[0] for line in details.splitlines() if line.startswith("- ")]
    assert said == ["- distilled is better than pruned", "- peer is better than distilled"]
    assert "- distilled is better than teacher" in text
    assert "- Better than the teacher on task acc." in text
    assert "peer is better than pruned" not in text
    assert "pruned is better than teacher" not in text


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("~/models/100m/published/distill/student", "the distilled student of the run `published`"),
        (".../small/prune/student", "the pruned student of the run `small`"),
        ("runs/a/publish/model", "the published student of the run `a`"),
        ("../a/correct/teacher", "the fine-tuned teacher of the run `a`"),
        ("../distill/student", "the distilled student of a run"),
        ("distill/student", "the distilled student of a run"),
        (".../home/peer", "`peer`"),
        ("owner/peer", "`peer`"),
        ("in memory", "`in memory`"),
        ("owner/peer@main", "[owner/peer](https://huggingface.co/owner/peer/tree/0f)"),
    ],
)
def test_every_model_that_is_compared_is_explained(path, said):
    """By its Hub id, its run or its folder's name; a folder may be named as an id is, but it has no revision."""
    peer = {"path": path, "parameters": 1_400_000, "bytes": 1, "dtype": "float32"} | ({"revision": "0f"} if "@" in path else {})
    text = card(replace(report(), models={**report().models, "peer": peer})).text
    assert f'"pruned" is the student before distillation, "peer" {said} (1.4 M parameters), for comparison.' in text
    listed = text.partition("What the models are:\n\n")[2].partition("\n\n")[0]
    assert listed.splitlines() == [
        "- **teacher**: `teacher` (2.0 M parameters), which was pruned.",
        "- **pruned**: the student before distillation (1.5 M parameters).",
        "- **distilled**: this model (1.5 M parameters).",
        f"- **peer**: {said} (1.4 M parameters), for comparison.",
    ]


def test_parts_of_the_loss_are_named_where_there_are_several():
    entry = {"loss": 2.0, "step": 1, "grad_norm": 1.0, "train_runtime": 0.1, "anything": 0.5, "forward_kl": 2.0}
    losses = {"forward_kl": 1.0, "cross_entropy": 1.0}
    assert loss_parts({"history": [entry], "losses": losses}) == []
    history = [entry | {"cross_entropy": 1.0}, {"eval_loss": 3.0}]
    assert loss_parts({"history": history, "losses": losses}) == ["forward_kl", "cross_entropy"]
    history = [{"loss": 2.0, "step": 1}, {"eval_loss": 2.5, "step": 1}, {"eval_loss": 1.5, "step": 2}, {"loss": 1.0, "step": 2}]
    log = {"tokens": 10, "steps": 2, "losses": losses, "history": history}
    text = str(publish.write_card(report(), {}, log, dict(yaml.safe_load("""
        {name: a, load: ., base_model: o/b, pictures: {}, command: c, seconds: {}, missing: []}"""))))  # fmt: skip
    assert "On held-out text 2.500 at first, 1.500 at the end" in text
    assert "not recorded" in text
    assert "Not known:" in text
