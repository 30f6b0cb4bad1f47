"""A served teacher: the cache is that of the same teacher run here, and whatever is wrong is said in one line."""

import json
import math

import numpy as np
import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from runtime_server import agreement, served_and_live
from teacher_server import OWNERS, serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minitron.__main__ import main
from hf_minitron.distillation import served
from hf_minitron.distillation.batch import collate
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.distillation.records import TopK
from hf_minitron.distillation.served import Served, ServedTeacher

KEY = "sesame-4711"
K = 9


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(served, "BACKOFF", 0.0)
    monkeypatch.delenv(served.API_KEY, raising=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a teacher and its tokenizer."""
    folder = tmp_path_factory.mktemp("served") / "teacher"
    model = tiny.model(dtype=torch.float32)
    model.lm_head.weight.data.mul_(4)  # surer of its tokens than one of random weights
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder, model


@pytest.fixture
def server(teacher):
    with serving(teacher[1], tiny.tokenizer()) as server:
        yield server


def chats():
    """Sequences of which the answers alone are learnt."""
    rows = [row.tolist() for row in tiny.blocks(5, 12, seed=3)["input_ids"]]
    labels = [[-100] * (3 + n % 4) + row[3 + n % 4 :] for n, row in enumerate(rows)]
    return Dataset.from_dict({"input_ids": rows, "labels": labels}).with_format("torch")


# The cache


@pytest.mark.parametrize("blocks", [tiny.blocks(7, 11), chats()], ids=["text", "chats"])
@pytest.mark.parametrize("kind", OWNERS)
def test_the_cache_is_that_of_the_live_teacher(kind, blocks, teacher, tmp_path):
    folder, model = teacher
    how = {"method": {"top_k": K}, "dtype": "float32", "batch_size": 3}
    live = write_cache(folder, blocks, tmp_path / "live", init_kwargs={"dtype": "float32"}, **how)
    with serving(model, tiny.tokenizer(), kind) as server:
        facts = write_cache(folder, blocks, tmp_path / "served", server=server.address, **how)
    assert facts.pop("served") == "teacher"
    sizes = ("bytes", "bytes_per_token")
    assert {k: v for k, v in facts.items() if k not in sizes} == {k: v for k, v in live.items() if k not in sizes}
    ours, theirs = (CachedTeacher(tmp_path / name) for name in ("served", "live"))
    ours.check_teacher(folder)
    ours.check_blocks(blocks)
    batch = collate([blocks[i] for i in range(len(blocks))])
    (ids, logp), (live_ids, live_logp) = (cache.columns(batch).values() for cache in (ours, theirs))
    assert torch.equal(ids, live_ids)
    assert logp.view(torch.float32).exp() == pytest.approx(live_logp.view(torch.float32).exp(), abs=1e-6)


def test_what_two_caches_both_name_is_compared_whatever_its_order(teacher, server, tmp_path):
    """As the benchmark and the tests of real servers do."""
    ids, logp = torch.tensor([[[1, 2], [3, 4]]]), torch.tensor([[[-1.0, -2.0], [-3.0, -4.0]]])
    live = torch.tensor([[[2, 1], [4, 5]]]), torch.tensor([[[-20.0, -10.0], [-40.0, -50.0]]])
    named, ours, theirs = agreement((ids, logp), live)
    assert (named, ours.tolist(), theirs.tolist()) == (0.75, [-1, -2, -4], [-10, -20, -40])
    caches, seconds = served_and_live(server.address, teacher[0], tiny.blocks(4, 11), K, tmp_path)
    named, ours, theirs = agreement(*caches)
    assert named == 1
    assert len(ours) == 4 * 10 * K
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert min(seconds) > 0


@pytest.mark.parametrize(("context", "most"), [(64, 2), (23, 2), (21, 1), (11, 1)])
def test_llama_cpp_is_asked_about_as_many_sequences_as_it_keeps(context, most, teacher):
    """More would share its context, and push each other's prompts out."""
    inputs, asked = {"input_ids": tiny.blocks(6, 11)["input_ids"][:]}, torch.ones(6, 11, dtype=torch.bool)
    asked[:, -1] = False
    with serving(teacher[1], tiny.tokenizer(), "llama.cpp") as server:
        server.context = context
        assert len(list(Served(ServedTeacher(server.address), TopK(K, 99, "float32"))(inputs, asked, 0))) == 6
        assert server.busiest <= most
        server.context = 10
        said = told(list, Served(ServedTeacher(server.address), TopK(K, 99, "float32"))(inputs, asked, 0))
        assert said.endswith("has a context of 10 tokens, and a sequence has 11; start it with -c 11 or more")
        server.context, server.spoil = 64, lambda answer: {**answer, "tokens_evaluated": 3}
        said = told(ServedTeacher(server.address).likeliest, [5, 6, 7, 8], [3], TopK(K, 99, "float32"))
        assert "it has read 3 tokens instead of the 4 it was sent" in said


def test_an_interrupted_write_goes_on_at_another_address(teacher, tmp_path, monkeypatch):
    folder, model = teacher
    blocks, how = tiny.blocks(9, 11), {"method": {"top_k": K}, "batch_size": 2}
    monkeypatch.setattr(served, "RETRIES", 0)
    with serving(model, tiny.tokenizer()) as server:
        whole = write_cache(folder, blocks, tmp_path / "whole", server=server.address, **how)
        server.statuses = [200] * 7 + [503]  # the models, the tokenizer, five sequences
        with pytest.raises(OSError, match=r"^server: http://127.0.0.1:\d+ fails \(503\). Start the same command again later"):
            write_cache(folder, blocks, tmp_path / "cache", server=server.address, **how)
    with serving(model, tiny.tokenizer()) as server:
        assert write_cache(folder, blocks, tmp_path / "cache", server=server.address, **how) == whole
        assert 4 <= sum(path == "/v1/completions" for path, _, _ in server.asked) <= 7, "what was there is not asked again"
    assert (tmp_path / "cache/00000.bin").read_bytes() == (tmp_path / "whole/00000.bin").read_bytes()


def test_a_failure_that_passes_is_waited_for(teacher, server, tmp_path):
    server.statuses = [503, 200, 429, 200, 500, 502]
    facts = write_cache(teacher[0], tiny.blocks(2, 11), tmp_path / "cache", {"top_k": K}, server=server.address)
    assert facts["tokens"] == 20
    assert len(server.asked) == 4 + 4


def test_a_recipe_fills_its_cache_from_a_server(project, tmp_path, capsys):
    model, folder = project["recipe"]["model"], tmp_path / "run"
    recipe = project["recipe"] | {"run": str(folder), "cache": {"method": "top_k", "k": K, "batch_size": 3}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with serving(loaded, AutoTokenizer.from_pretrained(model)) as server:
        for stage in ("score", "prune"):
            assert main([stage, str(path)]) == 0
        assert main(["cache", str(path), "--cache.server", server.address]) == 0
        assert "bytes per token" in capsys.readouterr().out
    assert json.loads((folder / "cache/cache.json").read_text())["served"] == "teacher"
    assert server.address not in (folder / "cache/cache.json").read_text()
    assert main(["cache", str(path), "--cache.server", "http://127.0.0.1:9/v1"]) == 0, "done, whoever serves now"
    assert "cache: done before, skipped" in capsys.readouterr().out
    assert main(["distill", str(path)]) == 0


# The key


def test_the_key_is_that_of_the_environment_and_is_repeated_nowhere(teacher, tmp_path, monkeypatch, caplog):
    folder, model = teacher
    with serving(model, tiny.tokenizer(), key=KEY) as server:
        with pytest.raises(ValueError, match=r"wants a key \(401\): set one in OPENAI_API_KEY"):
            ServedTeacher(server.address)
        monkeypatch.setenv(served.API_KEY, "wrong")
        with pytest.raises(ValueError, match=r"wants a key \(401\): set another in OPENAI_API_KEY"):
            ServedTeacher(server.address)
        monkeypatch.setenv(served.API_KEY, KEY)
        write_cache(folder, tiny.blocks(2, 11), tmp_path / "cache", {"top_k": K}, server=server.address)
        assert {authorization for *_, authorization in server.asked[2:]} == {f"Bearer {KEY}"}
        server.statuses = [418]
        with pytest.raises(ValueError) as caught:
            ServedTeacher(server.address)
    assert "(418)" in str(caught.value)
    assert "no: Bearer <key>" in str(caught.value)
    assert KEY not in caplog.text + "".join(path.read_text(errors="replace") for path in (tmp_path / "cache").iterdir())


# What is refused


def told(call, *args, **kwargs):
    with pytest.raises((ValueError, OSError)) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host/v1", "http:///v1", "http://host/v1?key=1", 7])
def test_an_address_that_is_none_is_refused(url):
    assert told(ServedTeacher, str(url)) == f"server: {str(url)!r} is no address such as http://127.0.0.1:8000/v1"


def test_a_key_in_the_address_is_refused_and_not_repeated():
    message = told(ServedTeacher, "http://me:secret@127.0.0.1:8000/v1")
    assert message == "server: the address holds a user or a password; set OPENAI_API_KEY in the environment instead"


def test_who_does_not_answer_or_is_of_another_kind_is_named(server, monkeypatch):
    monkeypatch.setattr(served, "RETRIES", 0)
    assert told(ServedTeacher, "http://127.0.0.1:9/v1").startswith("server: no answer from http://127.0.0.1:9 (")
    server.owner = "me"
    assert "(owned_by: me) is none of vLLM, SGLang, llama.cpp, of which it is known" in told(ServedTeacher, server.address)
    server.names = ["one", "two"]
    assert told(ServedTeacher, server.address).endswith("must serve one model, the teacher; it serves one, two")


def test_another_tokenizer_is_refused(teacher, tmp_path):
    other = tiny.tokenizer()
    with serving(teacher[1], lambda text, **how: {"input_ids": [7, *other(text, **how)["input_ids"]]}) as server:
        said = told(write_cache, teacher[0], tiny.blocks(2, 11), tmp_path / "cache", {"top_k": K}, server=server.address)
    assert "serves teacher with another tokenizer than the teacher's: token 0 of a text is" in said
    assert said.endswith("here and 7 there")
    assert not (tmp_path / "cache").exists()


def spoiled(change):
    """A change to the first table of a prompt, by its tokens as text."""

    def spoil(answer):
        change(answer["choices"][0]["prompt_logprobs"])
        return answer

    return spoil


def entries(tables, values):
    tables[1] = {str(token): {"logprob": value} for token, value in values.items()} | {
        token: {"logprob": -30.0} for token in tables[1] if token not in map(str, values)
    }


WRONG = {
    "cut short": (lambda tables: tables.pop(), "it has read other tokens than the 11 it was sent"),
    "other tokens": (lambda tables: tables.__setitem__(1, {"1": {"logprob": -1.0}}), "it has read other tokens than the 11"),
    "too few": (lambda tables: [tables[1].pop(t) for t in [*tables[1]][:3]], "it has read other tokens|tokens of a position"),
    "another vocabulary": (
        lambda tables: entries(tables, {123456: -0.1}),
        "token 123456, and the teacher has 99: it is another",
    ),
    "no probabilities": (lambda tables: entries(tables, {5: 3.0}), "log-probabilities of one position whose probabilities"),
    "overflow": (lambda tables: entries(tables, {5: 1e6}), "math range error"),
    "NaN": (lambda tables: entries(tables, {5: math.nan}), "log-probabilities of one position|tokens"),
    "text": (lambda tables: entries(tables, {5: "much"}), "TypeError: "),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_is_refused(name, teacher, server):
    change, message = WRONG[name]
    server.spoil = spoiled(change)
    asked = ServedTeacher(server.address)
    said = told(asked.likeliest, tiny.blocks(1, 11)["input_ids"][0].tolist(), range(10), TopK(K, 99, "float32"))
    assert said.startswith(f"server: {server.address.removesuffix('/v1')} gives an answer that cannot be used: ")
    assert any(part in said for part in message.split("|")), said


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"text": "x"}]}, [], b"<html>"])
def test_an_answer_of_another_shape_is_refused(answer, server):
    server.spoil = lambda _: answer
    said = told(ServedTeacher(server.address).likeliest, [5, 6, 7], [0, 1], TopK(K, 99, "float32"))
    assert "gives an answer that cannot be used" in said


def test_what_the_server_refuses_it_says_itself(teacher, server, tmp_path):
    server.most = 5
    said = told(write_cache, teacher[0], tiny.blocks(2, 11), tmp_path / "cache", {"top_k": K}, server=server.address)
    assert "/v1/completions refuses (400): " in said
    assert "Requested prompt logprobs of 9, more than 5" in said


REFUSED = [
    ({"method": {"random": 5}}, "server: it gives the likeliest tokens alone; set method to top_k"),
    ({"method": {"top_k": 500}}, "server: it gives the likeliest tokens alone; set method to top_k, with a k below"),
    ({"blocks": tiny.blocks(2, 11).add_column("position_ids", [[*range(11)]] * 2)}, "server: it attends to all that stands"),
    ({"model": tiny.model()}, "server: give the teacher by its name, whose tokenizer is compared"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_what_a_server_cannot_do_is_refused(changes, message, teacher, server, tmp_path):
    values = {"model": teacher[0], "blocks": tiny.blocks(2, 11), "folder": tmp_path / "c", "method": {"top_k": K}} | changes
    assert told(write_cache, **values, server=server.address).startswith(message)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"cache": {}}, "cache: server: it gives the likeliest tokens alone; set method to top_k"),
        ({"distill": {"cross_documents": False}}, "cache: server: it attends to all that stands before a token"),
        (
            {"correct": {"max_steps": 200, "block_size": 16}},
            "cache: server: the teacher of this run is the one that `correct:` makes",
        ),
        ({}, "cache: server: no answer from http://127.0.0.1:9 ("),
    ],
)
def test_a_recipe_is_refused_before_the_first_stage(sections, message, project, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(served, "RETRIES", 0)
    recipe = project["recipe"] | {"run": str(tmp_path / "run")}
    recipe["cache"] = sections.get("cache", {"method": "top_k", "k": K}) | {"server": "http://127.0.0.1:9/v1"}
    recipe["distill"] = recipe["distill"] | sections.get("distill", {})
    if "correct" in sections:
        recipe["correct"] = sections["correct"] | {"text": recipe["distill"]["text"]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["run", str(path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/score").exists()


def test_the_mass_of_the_rest_is_what_the_kept_tokens_leave():
    logp = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    table = dict(enumerate(logp.tolist()))
    ids, values = served._kept(table, TopK(7, 50, "float32"))
    assert ids == sorted(logp.topk(7).indices.tolist())
    assert np.exp(values).sum() == pytest.approx(1)
