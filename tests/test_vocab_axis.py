"""The axis `vocab`: rows of embedding and head go, ids get new numbers, in memory and on disk alike."""

import dataclasses
import json
import shutil

import pytest
import tiny
import tiny_tokenizers
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import PRUNED_VOCAB
from hf_minitron.data.tokens import token_scores
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.plan import make_plan
from hf_minitron.pruning.prune import prune_checkpoint, prune_model
from hf_minitron.pruning.vocab import cut_tokenizer, vocab_scores
from hf_minitron.shape import ShapeError
from hf_minitron.statistics import Statistics

KEPT = sorted({0, 1, 2, *torch.randperm(99, generator=torch.Generator().manual_seed(4))[:60].tolist()})
SCORES = torch.zeros(99)
SCORES[KEPT] = 1


def plan_of(shape):
    return make_plan({"vocab": SCORES}, shape, shape.cut_to({"vocab": len(KEPT)}))


# Embeddings and heads under other names, with a bias, a scale, between projections, of experts and hybrids.
TYPES = (
    "llama", "gemma2", "gpt2", "gpt_neox", "opt", "phi", "codegen", "bloom", "mamba2", "nemotron_h", "deepseek_v3", "cohere2",
    "roberta", "electra", "rembert",
)  # fmt: skip


@pytest.mark.parametrize("model_type", TYPES)
def test_a_student_of_some_tokens_gives_the_teachers_logits_of_them(model_type):
    tied = TYPES.index(model_type) % 2 == 0
    teacher = tiny.model(model_type, tie_word_embeddings=tied)
    student = prune_model(teacher, plan_of(Architecture.of(teacher.config).shape))
    ids = torch.randint(0, len(KEPT), (2, 7), generator=torch.Generator().manual_seed(1))
    found, every = logits(student, ids), logits(teacher, torch.tensor(KEPT)[ids])
    torch.testing.assert_close(found, every[..., KEPT], rtol=1e-6, atol=1e-6)
    assert student.config.vocab_size == found.shape[-1] == len(KEPT)
    assert getattr(student.config, PRUNED_VOCAB)


def logits(model, ids):
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # the default kernel takes no float64
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_configs_name_tokens_by_their_new_ids():
    teacher = tiny.model("llama", bos_token_id=KEPT[5], eos_token_id=[KEPT[7], KEPT[9]], pad_token_id=KEPT[-1])
    teacher.generation_config.suppress_tokens = [KEPT[8]]
    teacher.generation_config.eos_token_id = [KEPT[7], KEPT[9]]
    plan = plan_of(Architecture.of(teacher.config).shape)
    student = prune_model(teacher, plan)
    assert (student.config.bos_token_id, student.config.eos_token_id, student.config.pad_token_id) == (5, [7, 9], len(KEPT) - 1)
    assert student.generation_config.suppress_tokens == [8]
    assert student.generation_config.eos_token_id == [7, 9]
    assert teacher.config.bos_token_id == KEPT[5]


def test_two_cuts_of_the_same_tokens_have_the_same_mark_and_others_another():
    teacher = tiny.model()
    shape = Architecture.of(teacher.config).shape
    scores = {"vocab": SCORES, "ffn": torch.rand(3, 72)}
    marks = [
        getattr(prune_model(teacher, make_plan(scores, shape, shape.cut_to(target))).config, PRUNED_VOCAB, None)
        for target in ({"vocab": len(KEPT)}, {"vocab": len(KEPT), "ffn": 32}, {"vocab": len(KEPT) - 1}, {"ffn": 32})
    ]
    assert marks[0] == marks[1]
    assert len(set(marks)) == 3
    assert marks[3] is None


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    """A model with a tokenizer of byte-level BPE, and some ids without a token."""
    made, path = tiny_tokenizers.ALL["byte_level"], tmp_path_factory.mktemp("model")
    ids = {name: getattr(made, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = tiny.model("llama", torch.float32, vocab_size=len(made) + 12, tie_word_embeddings=request.param, **ids)
    model.save_pretrained(path)
    made.save_pretrained(path)
    for name in ("vocab.json", "merges.txt", "tokenizer.model"):
        (path / name).write_text("of all tokens")
    return path


def test_a_checkpoint_is_cut_as_a_model_in_memory_with_corrections(folder, tmp_path):
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(tiny_tokenizers.ENGLISH)["input_ids"][:192]).view(12, 16)
    blocks = tiny.Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")
    calibrate(teacher, blocks, moments=True).save(tmp_path / "statistics")
    statistics = Statistics.load(tmp_path / "statistics")
    assert statistics.token_counts.tolist() == ids.flatten().bincount(minlength=len(tokenizer) + 12).tolist()
    target = {"vocab": 400, "hidden": 24, "ffn": 32}
    prune_checkpoint(folder, target, tmp_path / "student", statistics=statistics)
    student, small = tiny.load_complete(tmp_path / "student"), AutoTokenizer.from_pretrained(tmp_path / "student")
    shape = Architecture.of(teacher.config).shape
    scores = {**statistics.scores, "vocab": token_scores(tokenizer, statistics.token_counts, 400)}
    plan = make_plan(scores, shape, shape.cut_to(target))
    in_memory = prune_model(teacher, plan, statistics)
    for name, tensor in in_memory.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name
    configs = [model.config.to_dict() | {"dtype": None, "_name_or_path": None} for model in (student, in_memory)]
    assert configs[0] == configs[1]
    assert len(small) == student.config.vocab_size == 400
    assert not [path.name for path in (tmp_path / "student").iterdir() if path.read_bytes() == b"of all tokens"]
    assert json.loads((tmp_path / "student" / "plan.json").read_text())["keep"]["vocab"] == plan.keep["vocab"]
    for text in tiny_tokenizers.ODD:
        assert small.decode(small(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    written = student.generate(**small("the", return_tensors="pt"), max_new_tokens=3)
    assert written.max() < 400


def test_a_rotated_student_has_a_cut_head_of_its_own(folder, tmp_path):
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(tiny_tokenizers.ENGLISH)["input_ids"][:192]).view(12, 16)
    statistics = calibrate(teacher, tiny.Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch"), moments=True)
    shape = Architecture.of(teacher.config).shape
    scores = {**statistics.scores, "vocab": token_scores(tokenizer, statistics.token_counts, 400)}
    plans = [make_plan(scores, shape, shape.cut_to(target)) for target in ({"hidden": 24}, {"hidden": 24, "vocab": 400})]
    whole, cut = (prune_model(teacher, plan, statistics, ["rotation"]) for plan in plans)
    kept = torch.tensor(plans[1].keep["vocab"])
    new = torch.arange(0, 400, 23)[None]
    torch.testing.assert_close(logits(cut, new), logits(whole, kept[new])[..., kept])


def test_illegal_targets_are_refused():
    shape = Architecture.of(tiny.config()).shape
    for target, message in (
        ({"vocab": 100}, "vocab: 100 is larger than the model's 99"),
        ({"vocab": 50}, "vocab: 50 is not a multiple of 16; nearest: 48, 64"),
    ):
        with pytest.raises(ShapeError, match=message):
            shape.cut_to(target, {"vocab": 16})
    with pytest.raises(ValueError, match=r"No scores for vocab; .*token_scores gives those of vocab"):
        make_plan({}, shape, shape.cut_to({"vocab": 64}))


def test_statistics_of_before_are_refused_in_one_line(folder, tmp_path):
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    blocks = tiny.Dataset.from_dict({"input_ids": [[5] * 8] * 4}).with_format("torch")
    older = dataclasses.replace(calibrate(teacher, blocks), token_counts=None)
    with pytest.raises(ValueError, match="vocab: the statistics do not count the tokens.*score the model again"):
        prune_checkpoint(folder, {"vocab": 400}, tmp_path / "student", statistics=older)


def test_a_plan_without_a_token_that_the_config_names_is_refused():
    teacher = tiny.model("llama", eos_token_id=next(index for index in range(99) if index not in KEPT))
    with pytest.raises(ShapeError, match="vocab: the plan drops token .* which the config names"):
        prune_model(teacher, plan_of(Architecture.of(teacher.config).shape))


def test_ids_among_other_numbers_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sequence_bias": [[[5], -2.0]]}))
    with pytest.raises(ValueError, match="vocab: sequence_bias in .* names tokens by their ids"):
        vocab_scores(tmp_path / "model", torch.zeros(712), 400)


# Classes that transformers makes of a tokenizer.json of their own.
CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast", "CohereTokenizer")


@pytest.mark.parametrize("kind", CLASSES)
def test_a_tokenizer_of_a_class_of_its_own_is_cut(kind, tmp_path):
    name = "byte_fallback" if kind in ("LlamaTokenizer", "GemmaTokenizer") else "byte_level"
    tiny_tokenizers.ALL[name].save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": kind}))
    made = AutoTokenizer.from_pretrained(tmp_path)
    size = max(made.get_vocab().values()) + 1
    counts = torch.tensor(made(tiny_tokenizers.ENGLISH)["input_ids"]).bincount(minlength=size)
    ids = token_scores(made, counts, 450).nonzero().flatten().tolist()
    small = cut_tokenizer(made, ids, size)
    assert len(small) == 450
    for text in (*tiny_tokenizers.ODD, tiny_tokenizers.OTHERS):
        assert small.decode(small(text)["input_ids"]) == made.decode(made(text)["input_ids"]), text
