"""A whole run with `prune.target.vocab`: from counting tokens to a published student with its own tokenizer."""

import json
import re
from pydoc_data import topics

import pytest
import tiny
import tiny_tokenizers
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_minitron.__main__ import main
from hf_minitron.data.packing import token_blocks
from hf_minitron.data.texts import load_text
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.teacher import keep_tokens
from hf_minitron.distillation.trainer import DistillationTrainer
from hf_minitron.evaluation.report import Report
from hf_minitron.evaluation.text import in_kept_tokens
from hf_minitron.plan import Plan
from hf_minitron.stages import prune

VOCAB = 480
TEXT = list(topics.topics.values())


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project of tiny.make_project whose teacher reads real text by byte-level BPE, and has ids without a token."""
    made = tiny_tokenizers.ALL["byte_level"]
    ids = {name: getattr(made, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    teacher = tiny.model("llama", torch.float32, vocab_size=len(made) + 12, tie_word_embeddings=True, **ids)
    found = tiny.make_project(tmp_path_factory.mktemp("vocab"), teacher)
    made.save_pretrained(found["folder"] / "teacher")
    for number, name in enumerate(("train", "calibration", "held_out")):
        rows = [json.dumps({"text": text[:2000]}) for text in TEXT[number::9]]
        (found["folder"] / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return found


def recipe(project, folder, **changes):
    content = {**project["recipe"], "run": str(folder / "run")}
    content["prune"] = {"target": {"vocab": VOCAB, "ffn": 48}, "multiple_of": {"vocab": 16}}
    content |= changes
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def whole(project, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    distill = {**project["recipe"]["distill"], "max_steps": 2}
    assert main(["run", recipe(project, folder, distill=distill)]) == 0
    return folder / "run"


def test_the_published_student_has_its_own_tokenizer(project, whole):
    student, small = tiny.load_complete(whole / "publish" / "model"), AutoTokenizer.from_pretrained(whole / "publish" / "model")
    made = tiny_tokenizers.ALL["byte_level"]
    assert len(small) == student.config.vocab_size == VOCAB
    assert student.lm_head.weight is student.model.embed_tokens.weight
    for text in (*tiny_tokenizers.ODD, tiny_tokenizers.OTHERS):
        assert small.decode(small(text)["input_ids"]) == made.decode(made(text)["input_ids"])
    assert student.generate(**small("the", return_tensors="pt"), max_new_tokens=2).max() < VOCAB
    assert (student.config.eos_token_id, student.config.pad_token_id) == (small.eos_token_id, small.pad_token_id)


def test_the_report_compares_per_byte(whole):
    report = Report.load(whole / "evaluate" / "report.json")
    for name in ("teacher", "pruned", "distilled"):
        assert report.value(name, "bits_per_byte") > 0
    assert report.models["distilled"]["tokenizer"] == f"{VOCAB} of the teacher's tokens"
    units = {entry.model: entry.unit for entry in report.entries if entry.metric == "perplexity"}
    assert units["distilled"] != units["teacher"], "perplexities per token of two tokenizers look comparable"
    assert units["distilled"] == units["pruned"]
    assert "perplexity" in {c.metric for c in report.against("pruned", "distilled")}
    card = (whole / "publish" / "model" / "README.md").read_text()
    assert "vocab" in card
    assert f"distilled has {VOCAB} of the teacher's tokens" in card
    assert "mass of dropped tokens" in card


def test_the_report_compares_on_the_tokens_that_student_and_teacher_have(project, whole):
    """By hand: what the teacher says where it reads the student's tokens, renormalised over these."""
    report = Report.load(whole / "evaluate" / "report.json")
    section, folder = project["recipe"]["evaluate"], whole / "prune" / "student"
    documents = load_text(section["text"], "test", "text")
    theirs, ours = AutoTokenizer.from_pretrained(project["folder"] / "teacher"), AutoTokenizer.from_pretrained(folder)
    blocks = token_blocks(documents, theirs, section["block_size"], section["tokens"], project["recipe"].get("seed", 0))
    kept = Plan.load(folder / "plan.json").keep["vocab"]
    teacher, student = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (project["folder"] / "teacher", folder))
    found = {"teacher_kl": [], "top1_match": [], "dropped_mass": []}
    for row in in_kept_tokens(ours, blocks, theirs, kept)[0]:
        with torch.no_grad():
            whole_logp = teacher(torch.tensor(kept)[torch.tensor([row])]).logits[0, :-1].double().log_softmax(-1)
            logp = student(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)
        some = whole_logp[:, kept].log_softmax(-1)
        found["teacher_kl"] += (some.exp() * (some - logp)).sum(-1).tolist()
        found["top1_match"] += (some.argmax(-1) == logp.argmax(-1)).tolist()
        found["dropped_mass"] += (1 - whole_logp[:, kept].exp().sum(-1)).tolist()
    for metric, values in found.items():
        assert report.value("pruned", metric) == pytest.approx(sum(values) / len(values), rel=0.03), (
            metric
        )  # models ran in bfloat16
        assert report.entry("pruned", metric).unit.endswith("in tokens of pruned"), metric
    assert report.entry("teacher", "dropped_mass") is None


def test_a_block_in_the_students_tokens_says_the_same(project, whole):
    """Signs between and in texts stay, and what is not predicted: the BOS token of a block, the questions of a chat."""
    theirs = AutoTokenizer.from_pretrained(project["folder"] / "teacher")
    folder = whole / "prune" / "student"
    ours, kept = AutoTokenizer.from_pretrained(folder), Plan.load(folder / "plan.json").keep["vocab"]
    asked, said = (theirs(text, add_special_tokens=False)["input_ids"] for text in ("assert the <|tool|>", "Größe import "))
    ids = [theirs.bos_token_id, *asked, theirs.eos_token_id, *said, theirs.eos_token_id]
    labels = [*[-100] * (len(asked) + 2), *said, theirs.eos_token_id]
    (row,), (wanted,) = in_kept_tokens(ours, tiny.Dataset.from_dict({"input_ids": [ids], "labels": [labels]}), theirs, kept)
    assert ours.decode(row) == theirs.decode(ids)
    assert ours.decode([token for token in wanted if token != -100]) == theirs.decode([*said, theirs.eos_token_id])
    assert [(row[0], wanted[0]), row[-1]] == [(ours.bos_token_id, -100), ours.eos_token_id]


def test_plan_counts_the_rows(project, tmp_path, capsys):
    assert main(["plan", recipe(project, tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (vocab,) = [line for line in lines if line.startswith("| vocab")]
    assert f"{VOCAB}" in vocab
    (parameters,) = [line for line in lines if line.startswith("| parameters")]
    was, now = (int(cell.replace(",", "")) for cell in parameters.split("|")[2:4])
    saved = (len(tiny_tokenizers.ALL["byte_level"]) + 12 - VOCAB) * 40
    assert was - now == saved + 3 * 3 * 40 * (72 - 48)


def test_a_share_of_the_tokens_is_a_size(project, tmp_path, capsys):
    assert main(["plan", recipe(project, tmp_path, prune={"target": {"vocab": "60%"}, "multiple_of": {"vocab": 16}})]) == 0
    (vocab,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| vocab")]
    assert vocab.split("|")[3].strip() == "432"  # of 714, a multiple of 16


@pytest.fixture(scope="module")
def pair(project, whole):
    """Teacher, student, the student's tokenizer, packed sequences in its tokens, and which ids of the teacher these are."""
    folder = whole / "prune" / "student"
    small, kept = AutoTokenizer.from_pretrained(folder), Plan.load(folder / "plan.json").keep["vocab"]
    documents = tiny.Dataset.from_dict({"text": [text[:500] for text in TEXT[:8]]})
    blocks = token_blocks(documents, small, block_size=16, max_tokens=128)
    teacher = AutoModelForCausalLM.from_pretrained(project["folder"] / "teacher")
    return teacher, AutoModelForCausalLM.from_pretrained(folder), small, blocks, kept


def trainer_of(pair, teacher, folder, **settings):
    _, student, small, blocks, _ = pair
    settings = {"report_to": "none", "bf16": False, "max_steps": 1, "disable_tqdm": True, **settings}
    args = DistillationArguments(str(folder), teacher_model_init_kwargs=settings.pop("kwargs", None), **settings)
    return DistillationTrainer(student, teacher, args, train_dataset=blocks, processing_class=small)


def loss_by_hand(pair):
    """KL on the kept tokens: the teacher reads its own ids, and its logits of these are renormalised."""
    teacher, student, _, blocks, kept = pair
    ids = torch.stack(list(blocks["input_ids"]))
    with torch.no_grad():
        theirs = teacher(torch.tensor(kept)[ids]).logits[:, :-1, kept].log_softmax(-1)
        ours = student(ids).logits[:, :-1].log_softmax(-1)
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def test_a_live_teacher_is_compared_on_the_students_tokens(project, pair, tmp_path):
    trainer = trainer_of(pair, str(project["folder"] / "teacher"), tmp_path, kwargs={"dtype": "float32"})
    batch = trainer.data_collator(list(pair[3]))
    with torch.no_grad():
        assert float(trainer.compute_loss(pair[1], batch)) == pytest.approx(loss_by_hand(pair), rel=1e-5)
    assert trainer.teacher.config.vocab_size == VOCAB


@pytest.mark.parametrize("method", [{"top_k": VOCAB}, {"random": 50}])
def test_a_cached_teacher_is_one_of_the_students_tokens(project, whole, pair, tmp_path, method):
    source = str(project["folder"] / "teacher")
    student = whole / "prune" / "student"
    facts = write_cache(
        source, pair[3], tmp_path / "cache", method, "float32", init_kwargs={"dtype": "float32"}, student=student
    )
    cached = CachedTeacher(tmp_path / "cache")
    assert facts["vocab_size"] == cached.config.vocab_size == VOCAB
    cached.check_teacher(source)
    trainer = trainer_of(pair, cached, tmp_path / "out")
    batch = trainer.data_collator(list(pair[3]))
    with torch.no_grad():
        found = float(trainer.compute_loss(pair[1], batch))
    assert found == pytest.approx(loss_by_hand(pair), rel=1e-5) if "top_k" in method else found > 0


def test_a_teacher_of_all_tokens_is_refused_in_one_line(project, pair, tmp_path):
    with pytest.raises(ValueError, match="The student has some tokens of the model that it was cut out of") as caught:
        trainer_of(pair, pair[0], tmp_path)
    assert "\n" not in str(caught.value)
    write_cache(pair[0], pair[3], tmp_path / "cache", {"top_k": 4})
    with pytest.raises(ValueError, match="which are not the student's: make one of those"):
        trainer_of(pair, CachedTeacher(tmp_path / "cache"), tmp_path)


def test_a_student_of_other_tokens_is_refused(project, pair, tmp_path):
    small = tiny_tokenizers.ALL["unigram"]
    student = tiny.model("llama", torch.float32, vocab_size=len(small))
    student.config.pruned_vocab = "something"
    args = DistillationArguments(str(tmp_path), report_to="none", bf16=False, max_steps=1)
    with pytest.raises(ValueError, match=r"The student's vocabulary of \d+ is no part of the teacher's of \d+: it has"):
        DistillationTrainer(student, str(project["folder"] / "teacher"), args, train_dataset=pair[3], processing_class=small)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi", "minitron_pruned"])
def test_a_teacher_loses_the_rows_of_other_tokens_in_place(model_type):
    made = tiny.model("llama" if model_type == "minitron_pruned" else model_type, torch.float32)
    kept, ids = [3, 1, 98, 40, 7], torch.tensor([[0, 2, 4, 1]])
    with torch.no_grad():
        expected = made(torch.tensor(kept)[ids]).logits[..., kept]
        keep_tokens(made, kept)
        torch.testing.assert_close(made(ids).logits, expected)


def test_a_run_with_a_cache_reads_it_in_the_students_tokens(project, whole, tmp_path):
    distill = {**project["recipe"]["distill"], "max_steps": 2}
    path = recipe(project, tmp_path, distill=distill, cache={"method": "top_k", "k": 8}, tokenize={"tokens": 256})
    for stage in ("score", "prune", "tokenize", "cache", "distill"):
        assert main([stage, path]) == 0, stage
    meta = json.loads((tmp_path / "run" / "cache" / "cache.json").read_text())
    assert meta["vocab_size"] == VOCAB
    log = json.loads((tmp_path / "run" / "distill" / "log.json").read_text())
    assert log["cache"]["pruned_vocab"] == meta["pruned_vocab"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"vocab": 128}, r"vocab: 128 is fewer than the [\d,]+ tokens that always stay"),
        ({"vocab": 10_000}, r"vocab: 10000 is larger than the model's"),
        ({"vocab": 481}, r"vocab: 481 is not a multiple of 16"),
    ],
)
def test_a_target_that_cannot_be_is_refused_before_scoring(project, tmp_path, capsys, target, message):
    section = {"target": target, "multiple_of": {"vocab": 16}}
    assert main(["run", recipe(project, tmp_path, prune=section)]) == 1
    error = capsys.readouterr().err.strip()
    assert re.search(message, error), error
    assert "\n" not in error
    assert not (tmp_path / "run" / "score").exists()


def test_layers_of_different_sizes_go_with_fewer_tokens(project, tmp_path):
    score = {**project["recipe"]["score"], "sublayers": True}
    path = recipe(project, tmp_path, score=score, prune={"target": {"vocab": VOCAB}, "nonuniform": 0.6})
    for stage in ("score", "prune", "distill"):
        assert main([stage, path, "--distill.max_steps", "1"]) == 0, stage
    folder = tmp_path / "run" / "distill" / "student"
    student, small = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert student.config.model_type == "minitron_pruned"
    assert student.config.vocab_size == len(small) == VOCAB
    assert student.config.pruned_vocab


def test_a_text_of_the_teachers_tokens_is_refused(project, tmp_path, capsys):
    (tmp_path / "ready.jsonl").write_text('{"input_ids": [5, 6, 7, 8]}\n' * 20)
    distill = {**project["recipe"]["distill"], "text": str(tmp_path / "ready.jsonl")}
    assert main(["run", recipe(project, tmp_path, distill=distill)]) == 1
    error = capsys.readouterr().err.strip()
    assert re.search(r"text: .*ready.jsonl holds input_ids, which are the teacher's", error), error


def test_what_stands_in_for_a_student_in_a_chain_has_its_vocabulary(project, tmp_path):
    args = prune.Args(target={"vocab": VOCAB})
    prune.outline(args, str(project["folder"] / "teacher"), tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == len(AutoTokenizer.from_pretrained(tmp_path)) == VOCAB
