"""The card from facts, and pushing with the real client to a server on 127.0.0.1."""

import logging
import math
import os
import re
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from hub_server import CUT, LOST, OTHER_TOKEN, TOKEN
from huggingface_hub import constants, snapshot_download
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM

from hf_minitron import Architecture, Plan, Statistics, calibrate, make_plan, push_to_hub
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.trainer import DistillationTrainer
from hf_minitron.evaluation.report import TEXT, Comparison, Entry, Report
from hf_minitron.evaluation.significance import compare_paired
from hf_minitron.evaluation.wording import comparison_rows, counted, measured, sentence, sized
from hf_minitron.hub import publish as publishing
from hf_minitron.hub.card import write_card
from hf_minitron.hub.publish import Target, files_to_push, preview, push
from hf_minitron.modeling import PrunedConfig, PrunedForCausalLM
from hf_minitron.shape import Shape
from hf_minitron.tables import markdown_table


def report():
    entries = [Entry(name, TEXT, "perplexity", value, 0.34, direction="lower")
               for name, value in (("teacher", 11.0), ("pruned", 57.0), ("distilled", 16.0))]  # fmt: skip
    entries += [Entry(name, "task", "acc", 0.25, 0.05, n=80) for name in ("teacher", "pruned", "distilled")]
    sizes = {"teacher": 2_000_000, "pruned": 1_500_000, "distilled": 1_500_000}
    models = {name: {"path": f"models/{name}", "parameters": size, "bytes": 2 * size, "dtype": "bfloat16"}
              for name, size in sizes.items()}  # fmt: skip
    case = {"batch_size": 1, "prompt": 128, "prefill": {"value": 900.0}, "decode": {"value": 20.0}}
    speed = {name: [case] for name in ("teacher", "distilled")}
    return Report(models, entries, speed=speed, text={"sha256": "ab" * 32, "tokens": 4096, "blocks": 8})


def card(measured=None, **facts):
    history = [{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 8}, {"train_runtime": 60.0, "step": 9}]
    log = {"tokens": 1234, "steps": 9, "losses": {"forward_kl": 1.0}, "history": history}
    before = Shape(tiny.SIZES)
    cut = {"before": before.sizes, "after": before.cut_to({"ffn": 8}).sizes, "dropped": [], "by_layer": {}}
    known = {"name": "me/small", "load": "me/small", "base_model": "owner/big", "pictures": {"loss": "loss.png"}, "cut": cut}
    known |= {"command": "hf-minitron run r.yaml", "seconds": {"distill": 90.0}, "missing": [], "version": "0.1"} | facts
    return write_card(measured or report(), {"seed": 5}, log, known)


def test_the_card_holds_the_facts():
    text = str(card(license="apache-2.0"))
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "owner/big"
    assert metadata["base_model_relation"] == "finetune"
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "text-generation"
    assert metadata["license"] == "apache-2.0"
    assert "knowledge-distillation" in metadata["tags"]
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25
    for fact in ("16.00 ± 0.34", "57.00 ± 0.34", "0.250 ± 0.050", "| ffn      |     72 | **8** |", "1,234 tokens in 9 steps",
                 "seed: 5", "hf-minitron run r.yaml", "](loss.png)", "2407.14679"):  # fmt: skip
        assert fact in text, fact
    assert "shapes.png" not in text


def test_the_card_says_what_is_better_and_what_cannot_be_told():
    assert "95 % interval" not in str(card())
    assert "Bits per byte" not in str(card())
    values = np.stack([np.arange(60) % 2, np.ones(60)], axis=1)
    worse, same = compare_paired(values * [0, 1], values), compare_paired(values, np.roll(values, 2, axis=0))
    heading = {"model": "distilled", "baseline": "teacher", "task": "task"}
    comparisons = [Comparison(**vars(found), **heading, metric=name) for name, found in (("acc", worse), ("f1", same))]
    found = replace(report(), comparisons=comparisons, text={**report().text, "bytes": 12345})
    rows = comparison_rows(found)
    assert rows[1][0] == "task acc"
    assert rows[1][1] == "-0.50"
    assert rows[1][3] == "< 0.001"
    assert rows[1][-1] == "worse"
    assert rows[2][1:4] == ["+0.000", "+0.000 to +0.000", "1"]
    assert rows[2][-1] == "not distinguishable"
    text = str(card(found))
    assert all(sentence(found, comparison) in text for comparison in comparisons)
    assert "12,345 bytes" in text
    assert "| worse |" in text.replace("  ", "")


def test_a_licence_is_never_guessed():
    assert "license" not in yaml.safe_load(str(card()).split("---")[1])


@pytest.mark.parametrize(
    ("value", "stderr", "text"), [(16.68, 1.13, "16.7 ± 1.1"), (0.2266, 0.0242, "0.227 ± 0.024"), (891.2, 181, "891 ± 181")]
)
def test_values_are_written_to_the_precision_of_their_error(value, stderr, text):
    assert measured(Entry("model", "task", "acc", value, stderr)) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (12.345, "12.3"), (0.00012345, "0.000123"), (7e10, "70,000,000,000"), (0, "0")]
)
def test_values_without_an_error_are_written_out(value, text):
    assert measured(Entry("model", TEXT, "perplexity", value)) == text


def test_sizes_have_the_unit_that_suits_them():
    numbers = (999, 1_500_000, 999_900_000, 8_030_261_248, 671_026_419_200)
    assert [counted(number) for number in numbers] == ["999", "1.5 M", "999.9 M", "8.03 B", "671.03 B"]
    assert [sized(number) for number in numbers] == ["1.0 kB", "1.5 MB", "999.9 MB", "8.0 GB", "671.0 GB"]
    big = replace(
        report(), models={name: {**model, "parameters": 8e9, "bytes": 16e9} for name, model in report().models.items()}
    )
    text = card(big).text
    assert "| **Size** | 8.00 B parameters, 100% of the teacher's parameters; 16.0 GB in bfloat16 |" in text
    assert text.count(" 16.0 GB |") == 3


def test_what_names_hold_leaves_tables_and_sentences_as_they_are():
    name = "a|b `c` *d* _e_.jsonl"
    found = replace(report(), models={**report().models, "x|y": report().models["pruned"]})
    written = card(found, hashes={f"score.text: {name}": "ab" * 32}, base_model=None, base_folder=name).text
    tokens = MarkdownIt("commonmark").enable("table").parse(written)
    shown = [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]
    assert {name, f"score.text: {name}", "ab" * 32} <= {*shown}
    kinds = [token.type for token in tokens]
    assert kinds.count("table_open") == len(re.findall(r"^\| -", written, re.MULTILINE))
    assert "x|y" in [token.content for token in tokens if token.type == "inline"]


def test_results_are_numbers_and_of_a_group_its_own():
    entries = [*report().entries, Entry("distilled", "inf", "perplexity", math.inf), Entry("distilled", "nan", "acc", math.nan)]
    parts = ("mmlu_law", "mmlu_art")
    entries += [Entry("distilled", part, "acc", 0.5, 0.1, dataset=("cais/mmlu", part, "test")) for part in parts]
    entries += [Entry("distilled", "mmlu", "acc", 0.5, math.nan, of=parts, dataset=("cais/mmlu", None, "test"))]
    (index,) = card(replace(report(), entries=entries)).data.to_dict()["model-index"]
    found = [(result["dataset"]["type"], result["dataset"]["name"], result["metrics"]) for result in index["results"]]
    assert [names[:2] for names in found] == [("task", "task"), ("cais/mmlu", "mmlu")]
    assert found[1][2] == [{"type": "acc", "value": 0.5}]


def test_what_is_not_known_is_not_explained():
    bare = [replace(entry, stderr=None) for entry in report().entries]
    text = card(replace(report(), entries=bare)).text
    assert "±" not in text
    assert "Intervals were not computed." in text
    assert "± is the standard error; intervals were not computed." in card().text


def test_tables_are_aligned():
    assert markdown_table([["a", "bb"], ["ccc", "1"]]).splitlines() == ["| a   | bb |", "| --- | -: |", "| ccc |  1 |"]


@pytest.fixture
def folder(tmp_path):
    return model_folder(tmp_path / "model")


def model_folder(path, seed=0, model=None, **facts):
    (model or tiny.model(dtype=torch.float32, seed=seed)).save_pretrained(path, max_shard_size="40KB")
    card(**facts).save(path / "README.md")
    for name in ("report.json", "plan.json", "recipe.yaml"):
        (path / name).write_text(f"{name}\n")
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def published(hub, **where):
    return {name: content for name, content in hub.files(**where).items() if name != ".gitattributes"}


@pytest.mark.parametrize("private", [True, False])
def test_push_is_private_unless_told_and_complete(hub, folder, private):
    assert push(folder, Target("me/small", private)) == f"{hub.address}/me/small"
    assert hub.repos["me/small"]["private"] is private
    assert published(hub) == contents(folder)
    assert len(contents(folder)) > 8
    assert hub.asked("POST .*/commit/") == 1
    assert not hub.waits


def test_the_same_again_makes_no_commit_and_sends_nothing(hub, folder):
    push(folder, Target("me/small"))
    before = hub.asked("PUT"), hub.asked("POST .*/commit/"), dict(hub.repos["me/small"]["refs"])
    push(folder, Target("me/small"))
    assert (hub.asked("PUT"), hub.asked("POST .*/commit/"), hub.repos["me/small"]["refs"]) == before


def test_what_a_loader_would_read_of_the_old_model_goes_in_the_same_commit(hub, folder, tmp_path):
    push(folder, Target("me/small"))
    hub.commit("me/small", "main", hub.repos["me/small"]["commits"][hub.repos["me/small"]["refs"]["main"]]
               | {"LICENSE": b"ours", "gguf/a.gguf": b"x", "modeling_pruned.py": b"raise",
                  ".eval_results/gsm8k.yaml": b"x"})  # fmt: skip
    other = tmp_path / "other"
    tiny.model(dtype=torch.float32, seed=1).save_pretrained(other)  # one file, no index
    for name in ("README.md", "report.json", "plan.json", "recipe.yaml"):
        (other / name).write_bytes((folder / name).read_bytes())
    commits = len(hub.repos["me/small"]["commits"])
    push(other, Target("me/small"))
    assert published(hub) == contents(other) | {"LICENSE": b"ours", "gguf/a.gguf": b"x"}
    assert len(hub.repos["me/small"]["commits"]) == commits + 1


def test_a_branch_and_a_pull_request_leave_main_alone(hub, folder, tmp_path):
    push(folder, Target("me/small"))
    other = model_folder(tmp_path / "other", seed=1)
    assert push(other, Target("me/small", revision="v2")) == f"{hub.address}/me/small/tree/v2"
    assert push(other, Target("me/small", create_pr=True)) == f"{hub.address}/me/small/discussions/1"
    assert published(hub) == contents(folder)
    assert published(hub, revision="v2") == published(hub, revision="refs/pr/1") == contents(other)


def test_who_may_not_write_may_offer_a_pull_request(hub, folder, monkeypatch):
    hub.add_repo(private=False)
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    with pytest.raises(ValueError, match=r"may not write to me/small.*create_pr"):
        push(folder, Target("me/small"))
    assert push(folder, Target("me/small", create_pr=True)).endswith("/discussions/1")
    assert published(hub) == {}
    assert published(hub, revision="refs/pr/1") == contents(folder)


def test_collections_by_title_and_slug(hub, folder):
    for _ in range(2):  # the second finds both the collection and the model in it
        push(folder, Target("me/small", collection="Small models"))
    ((slug, made),) = hub.collections.items()
    assert made["title"] == "Small models"
    assert made["private"]
    assert [item["id"] for item in made["items"]] == ["me/small"]
    push(folder, Target("me/other", collection=slug))
    assert [(item["id"], item["type"]) for item in made["items"]] == [("me/small", "model"), ("me/other", "model")]
    with pytest.raises(ValueError, match=r"(?s)The model is at .*/me/small, but not in 'me/gone-0+'.*404"):
        push(folder, Target("me/small", collection=f"me/gone-{0:024}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "small"}, "'small' is not owner/name"),
        ({"create_pr": True, "revision": "v2"}, "'v2' and create_pr: true"),
        ({"create_pr": True, "collection": "Small models"}, "collection and create_pr: true"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Target(**{"repo_id": "me/small", **options})


@pytest.mark.parametrize("name", ["README.md", "report.json", "plan.json", "recipe.yaml", "config.json"])
def test_an_incomplete_folder_is_not_pushed(hub, folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"lacks {name}; run the publish stage again"):
        push(folder, Target("me/small"))
    assert not hub.requests


def test_missing_weights_are_named(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"lacks {shard.name}"):
        files_to_push(folder)
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"lacks \*.safetensors"):
        files_to_push(folder)


def test_what_the_hub_would_not_take_is_told_before(folder, monkeypatch):
    monkeypatch.setattr(publishing, "MAX_FILES_PER_FOLDER", 5)
    with pytest.raises(ValueError, match=r"holds \d+ files; the Hub takes 5 in a folder"):
        files_to_push(folder)
    monkeypatch.setattr(publishing, "MAX_FILE_BYTES", 5_000)
    with pytest.raises(ValueError, match=r"has [\d,]+ bytes, and the Hub takes 5,000 in a file: save it in smaller shards"):
        files_to_push(folder)


def test_a_token_in_the_recipe_is_not_published(folder):
    (folder / "recipe.yaml").write_text(f"distill: {{hub_token: {TOKEN}}}\n")
    with pytest.raises(ValueError, match="recipe.yaml holds an access token") as caught:
        files_to_push(folder)
    assert TOKEN not in str(caught.value)
    with pytest.raises(ValueError, match="hub_token: the Trainer would write it") as caught:
        DistillationArguments("out", hub_token=TOKEN)
    assert TOKEN not in str(caught.value)


def test_a_preview_needs_no_network(folder, hub):
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("not a file of the model")
    text = preview(folder, Target("me/small", revision="v2"))
    sizes = {name: len(content) for name, content in contents(folder).items()}
    for name, size in sizes.items():
        assert f"| {name} " in text
        assert f" {size:,} |" in text
    assert f"{len(sizes)} files" in text
    assert f"{sum(sizes.values()):,}" in text
    assert "v2 of me/small" in text
    assert "HEAD" not in text
    assert not hub.requests


def other_model(**card):
    text = f"---\n{yaml.safe_dump(card)}---\n" if card else "A model\n"
    return {"README.md": text.encode(), "config.json": b"{}", "tokenizer.model": b"x", "notes.txt": b"kept"}


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (other_model(), "holds a model that hf_minitron did not make"),
        (other_model(tags=["llama"], base_model="owner/big"), "holds a model that hf_minitron did not make"),
        (
            other_model(tags=["hf_minitron"], base_model="owner/else"),
            "made from owner/else, and this one is made from owner/big",
        ),
        ({"weights.gguf": b"x"}, "holds a model that hf_minitron did not make"),
        (other_model(tags=["hf_minitron"], base_model=["owner/big"]), None),
        ({"README.md": b"Coming soon", "LICENSE": b"x"}, None),
    ],
)
def test_a_model_of_other_provenance_is_not_replaced_unless_told(hub, folder, held, message):
    hub.add_repo(**held)
    if message:
        for target in (Target("me/small"), Target("me/small", revision="v2"), Target("me/small", create_pr=True)):
            with pytest.raises(ValueError, match=f"{message}.*overwrite it"):
                push(folder, target)
        assert published(hub) == held
        assert list(hub.repos["me/small"]["refs"]) == ["main"]
        assert not hub.asked("PUT")
    push(folder, Target("me/small", overwrite=message is not None))
    kept = {name: held[name] for name in ("notes.txt", "LICENSE", "weights.gguf") if name in held}
    assert published(hub) == contents(folder) | kept


# What happens, and how often a commit was asked for in the end.
PASSING = {
    "500 while creating": [("POST", "/repos/create", 500)],
    "500 while looking": [("GET", "/api/models/", 500)],
    "a proxy's page": [("POST", "/validate-yaml", 502)],
    "cut while looking": [("GET", "/api/models/", CUT)],
    "answer of creating lost": [("POST", "/repos/create", LOST)],
    "503 for a large file": [("PUT", "/lfs/", 503)],
    "cut in the middle of a large file": [("PUT", "/lfs/", CUT)],
    "cut in the middle of the commit": [("POST", "/commit/", CUT)],
    "500 for the commit": [("POST", "/commit/", 500, 500)],
    "answer of the commit lost": [("POST", "/commit/", LOST)],
    "answer of verifying lost": [("GET", "/revision/", LOST)],
    "500 for the collection": [("POST", "/api/collections", 500)],
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING.keys())
def test_what_passes_is_waited_for(hub, folder, faults):
    for method, pattern, *answers in faults:
        hub.fail(method, pattern, *answers, body="<html>")
    push(folder, Target("me/small", collection="Small models"))
    assert not hub.faults
    assert 1 <= sum(hub.waits) <= 60
    assert published(hub) == contents(folder)
    assert len(hub.repos["me/small"]["commits"]) == 2, "one commit beside the empty one"
    assert len(hub.collections) == 1
    assert len(hub.repos) == 1


@pytest.mark.parametrize("pattern", ["/api/models/", "/repos/create", "/preupload/", "/lfs/", "/commit/"])
def test_a_rate_limit_is_respected(hub, folder, pattern):
    method = {"/api/models/": "GET", "/lfs/": "PUT"}.get(pattern, "POST")
    hub.fail(method, pattern, 429, headers={"Retry-After": "77"})
    push(folder, Target("me/small"))
    assert max(hub.waits) in (77, 78)
    assert len(hub.waits) == 1
    assert published(hub) == contents(folder)


def test_a_longer_wait_than_a_window_is_left_to_the_user(hub, folder):
    hub.fail("POST", "/commit/", 429, headers={"RateLimit": '"api";r=0;t=301'})
    with pytest.raises(OSError, match=r"too many requests and asks to wait 301 seconds. Push again later"):
        push(folder, Target("me/small"))
    assert not hub.waits
    assert published(hub) == {}


LASTING = {
    "401": ("GET", "/api/models/", [401], ValueError, "does not accept the token.*hf auth login"),
    "403 for the commit": ("POST", "/commit/", [403], ValueError, "may not write to me/small"),
    "409": ("POST", "/commit/", [409], ValueError, "me/small is in use"),
    "412": ("POST", "/commit/", [412], ValueError, "me/small was changed during the push"),
    "500 for ever": ("POST", "/commit/", [500] * 9, OSError, r"The Hub fails \(500\). Push again later"),
    "500 for ever for a large file": ("PUT", "/lfs/", [500] * 99, OSError, r"The Hub fails \(500\). Push again later"),
    "no connection": ("POST", "/commit/", [CUT] * 9, OSError, "cannot be reached.*Push again"),
}


@pytest.mark.parametrize(("method", "pattern", "answers", "kind", "message"), LASTING.values(), ids=LASTING.keys())
def test_what_does_not_pass_is_told_and_nothing_looks_published(hub, folder, method, pattern, answers, kind, message):
    hub.echo = True  # what the Hub repeats of our headers is not shown
    hub.fail(method, pattern, *answers)
    with pytest.raises(kind, match=message) as caught:
        push(folder, Target("me/small"))
    assert TOKEN not in str(caught.value)
    assert len(hub.waits) < 40
    assert not hub.repos or published(hub) == {}
    sent = hub.asked("PUT")
    hub.faults.clear()
    push(folder, Target("me/small"))
    assert published(hub) == contents(folder)
    if pattern == "/commit/":
        assert sent > 1, "blobs that arrived were sent again"
        assert hub.asked("PUT") == sent, "blobs that arrived were sent again"


def test_after_a_kill_only_what_is_missing_is_sent(hub, folder):
    shards = len(list(folder.glob("*.safetensors")))
    hub.fail("PUT", "/lfs/", *[403] * (shards - 1))  # what one does not get through
    with pytest.raises(ValueError, match="403"):
        push(folder, Target("me/small"))
    arrived, sent = len(hub.objects), hub.asked("PUT")
    assert shards > 2
    assert published(hub) == {}
    hub.faults.clear()
    push(folder, Target("me/small"))
    assert hub.asked("PUT") - sent == shards - arrived
    assert published(hub) == contents(folder)


def test_a_pull_request_is_not_opened_twice(hub, folder):
    push(folder, Target("me/small"))
    (folder / "plan.json").write_text("other\n")
    hub.fail("POST", "/commit/", LOST)
    with pytest.raises(OSError, match="/me/small/discussions whether the pull request is there"):
        push(folder, Target("me/small", create_pr=True))
    assert sorted(hub.repos["me/small"]["refs"]) == ["main", "refs/pr/1"]
    assert published(hub)["plan.json"] == b"plan.json\n"
    hub.fail("POST", "/commit/", 429)  # not done, so it can be asked for again
    push(folder, Target("me/small", create_pr=True))
    assert sorted(hub.repos["me/small"]["refs"]) == ["main", "refs/pr/1", "refs/pr/2"]


def test_a_change_between_looking_and_committing_is_not_overwritten(hub, folder, monkeypatch):
    hub.add_repo()
    create_commit = publishing.HfApi.create_commit

    def slow(*args, **kwargs):
        hub.commit("me/small", "main", {"config.json": b"of somebody else"})
        return create_commit(*args, **kwargs)

    monkeypatch.setattr(publishing.HfApi, "create_commit", slow)
    with pytest.raises(ValueError, match="was changed during the push"):
        push(folder, Target("me/small"))
    assert hub.files() == {"config.json": b"of somebody else"}


def test_a_file_that_the_repository_ignores_is_told(hub, folder):
    hub.add_repo(**{".gitignore": b"plan.json"})
    with pytest.raises(OSError, match=r"did not take plan.json: is there a .gitignore"):
        push(folder, Target("me/small"))


def test_a_name_that_is_taken_and_a_missing_login_are_told(hub, folder, monkeypatch):
    hub.add_repo("you/small")
    with pytest.raises(ValueError, match=r"no you/small that this token may see.*taken"):
        push(folder, Target("you/small"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(publishing, "get_token", lambda: None)
    with pytest.raises(ValueError, match="Not logged in to the Hub: run `hf auth login`"):
        push(folder, Target("me/small"))


def test_no_output_holds_the_token(hub, folder, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level("DEBUG")
    monkeypatch.setattr(constants, "HF_DEBUG", True)  # requests are logged as curl commands
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "level", logging.DEBUG)
    hub.echo = True
    hub.fail("PUT", "/lfs/", 500)
    hub.fail("POST", "/commit/", 500, 403)
    with pytest.raises(ValueError, match="may not write") as caught:
        push(folder, Target("me/small"))
    push(folder, Target("me/small"))
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    assert "Bearer <token>" in shown
    assert "curl -X POST" in shown
    assert "once more in" in shown
    assert TOKEN not in shown
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in [*files, *hub.files().values()])


PROMPT = torch.tensor([[3, 14, 15, 92, 65]])
LOAD = """
import sys, torch
sys.modules["hf_minitron"] = None  # any import of it fails
from transformers import AutoModelForCausalLM
for name, more in {"uniform": {}, "nonuniform": {"trust_remote_code": True}}.items():
    model = AutoModelForCausalLM.from_pretrained(f"me/{name}", revision="v2", **more)
    assert torch.equal(model(torch.tensor([[3, 14, 15, 92, 65]])).logits, torch.load(name + ".pt"))
    print(type(model).__module__)
"""


def test_published_models_are_loaded_by_name_with_transformers_alone(hub, tmp_path):
    config = PrunedConfig.from_stock(tiny.config(), layer_intermediate_size=[72, 0, 30])
    models = {"uniform": tiny.model(dtype=torch.float32), "nonuniform": PrunedForCausalLM(config).eval()}
    for name, model in models.items():
        folder = model_folder(tmp_path / name, model=model, remote_code=name == "nonuniform")
        assert ("trust_remote_code=True" in (folder / "README.md").read_text()) is (name == "nonuniform")
        push(folder, Target(f"me/{name}", revision="v2"))
        torch.save(model(PROMPT).logits, tmp_path / f"{name}.pt")
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
                   "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}  # fmt: skip
    command = [sys.executable, "-I", "-c", LOAD]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stock, own = done.stdout.splitlines()
    assert stock.startswith("transformers.models.llama")
    assert own.startswith("transformers_modules.me.nonuniform")


def test_the_trainer_pushes_with_our_card(hub, tmp_path):
    args = DistillationArguments(
        str(tmp_path / "out"), push_to_hub=True, hub_model_id="me/small", hub_private_repo=True, max_steps=3, bf16=False,
        logging_steps=1, report_to="none", disable_tqdm=True, per_device_train_batch_size=2, save_strategy="no",
        losses={"forward_kl": 0.75, "cross_entropy": 0.25},
    )  # fmt: skip
    student, teacher = tiny.model(dtype=torch.float32, seed=1), tiny.model(dtype=torch.float32)
    teacher.config.name_or_path = "owner/big"
    trainer = DistillationTrainer(student, teacher, args, train_dataset=tiny.blocks(), processing_class=tiny.tokenizer())
    trainer.train()
    trainer.push_to_hub(license="apache-2.0", tags="mine")
    assert hub.repos["me/small"]["private"]
    text = hub.files()["README.md"].decode()
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "owner/big"
    assert metadata["license"] == "apache-2.0"
    assert "hf_minitron" in metadata["tags"]
    assert "mine" in metadata["tags"]
    for fact in (
        "quality has not",
        "0.75 forward_kl, 0.25 cross_entropy",
        "Step 3 of 3, 6 sequences",
        "| precision | float32 |",
        "| step | loss | forward_kl |",
    ):
        assert fact in text, fact
    loss = next(entry["loss"] for entry in reversed(trainer.state.log_history) if "loss" in entry)
    assert f"| 3 | {loss:.4f} |" in text
    assert not any(TOKEN.encode() in content for content in hub.files().values())
    (tmp_path / "loaded").mkdir()
    for name, content in hub.files().items():
        (tmp_path / "loaded" / name).write_bytes(content)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "loaded")
    assert torch.equal(loaded(PROMPT).logits, student.eval()(PROMPT).logits)
    folder = model_folder(tmp_path / "finished")
    push(folder, Target("me/small"))  # the finished model takes its place: the same teacher, our card
    assert published(hub).keys() - {"training_args.bin"} == contents(folder).keys()


@pytest.mark.parametrize("absolute", [True, False])
def test_a_teacher_from_a_folder_leaves_no_path_in_the_card(tmp_path, monkeypatch, absolute):
    monkeypatch.chdir(tmp_path)
    args = DistillationArguments(str(tmp_path / "out"), report_to="none", bf16=False)
    tiny.model(dtype=torch.float32).save_pretrained(tmp_path / "private" / "teacher")
    teacher = tmp_path / "private" / "teacher" if absolute else "private/teacher"  # the latter looks like a Hub id
    trainer = DistillationTrainer(tiny.model(dtype=torch.float32), teacher, args, train_dataset=tiny.blocks())
    trainer.create_model_card(model_name="small")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "private" not in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])
    assert "a llama model" in text


def test_statistics_reports_and_plans_are_pushed_as_they_save_themselves(hub, tmp_path):
    model = tiny.model(dtype=torch.float32)
    model.config.name_or_path = "/secret/place/of/mine"
    statistics = calibrate(model, tiny.blocks(), moments=True)
    shape = Architecture.of(model.config).shape
    plan = make_plan(statistics.scores, shape, shape.cut_to({"ffn": 32}))
    report = Report({"student": {"path": "/secret/place/of/mine"}}, [Entry("student", "arc_easy", "acc", 0.5)])
    for value, repo_id in ((statistics, "me/statistics"), (plan, "me/plan"), (report, "me/report")):
        assert push_to_hub(value, repo_id) == f"{hub.address}/datasets/{repo_id}"
        assert hub.repos[f"datasets/{repo_id}"]["private"], "private unless told"
        assert not any(b"secret" in content for content in hub.files(f"datasets/{repo_id}").values()), repo_id
    fetched = {name: Path(snapshot_download(f"me/{name}", repo_type="dataset")) for name in ("statistics", "plan", "report")}
    loaded = Statistics.load(fetched["statistics"])
    assert loaded.scores.keys() == statistics.scores.keys()
    assert torch.equal(loaded.moments["model.norm.output"], statistics.moments["model.norm.output"])
    assert Plan.load(fetched["plan"] / "plan.json") == plan
    assert Report.load(fetched["report"] / "report.json").entries == report.entries
    push_to_hub(report, "me/report")
    hub.fail("POST", "/commit/", 503)
    push_to_hub(replace(report, settings={"limit": 3}), "me/report")
    assert hub.waits, "a Hub that fails for a moment is asked again"
    assert b'"limit": 3' in hub.files("datasets/me/report")["report.json"]


def test_what_cannot_be_pushed_is_refused(hub, monkeypatch):
    with pytest.raises(ValueError, match="push_to_hub: dict is none of Statistics, Report and Plan"):
        push_to_hub({}, "me/small")
    with pytest.raises(ValueError, match="holds an access token"):
        push_to_hub(Report({"student": {}}, settings={"key": TOKEN}), "me/small")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="Not logged in"):
        push_to_hub(Report({}), "me/small")
