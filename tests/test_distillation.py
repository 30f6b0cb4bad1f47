"""The chunked loss against full logits, and what the trainer's result does not depend on."""

import pytest
import tiny
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from hf_minitron.data.packing import token_blocks
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.teacher import check_tokenizers
from hf_minitron.distillation.trainer import DistillationTrainer, collate
from hf_minitron.evaluation.text import perplexity
from hf_minitron.importance.calibrate import calibrate

RAGGED = Dataset.from_dict(
    {"input_ids": [tiny.blocks(1, n, seed=n)["input_ids"][0].tolist() for n in (4, 12, 7, 9, 5, 11, 8, 6)]}
)

CONSTANT = {"learning_rate": 1e-2, "lr_scheduler_type": "constant", "lr_scheduler_kwargs": None}


def arguments(tmp_path, **changes):
    values = {"bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    return DistillationArguments(str(tmp_path), **(values | changes))


def trainer_for(tmp_path, student, teacher, **changes):
    return DistillationTrainer(student, teacher, arguments(tmp_path, **changes), train_dataset=RAGGED)


def full_loss(student, teacher, batch, losses, temperature=1.0):
    """The textbook: all logits, masked afterwards; entries that the teacher lacks have probability zero."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    targets = batch["labels"][:, 1:]
    keep = targets != -100
    s = student(**inputs).logits[:, :-1][keep]
    t = teacher(**inputs).logits[:, :-1][keep].detach()
    shared = min(s.shape[1], t.shape[1])
    p = (t[:, :shared] / temperature).softmax(-1)
    kl = (p * (p.log() - (s / temperature).log_softmax(-1)[:, :shared])).sum(-1).mean() * temperature**2
    cross_entropy = torch.nn.functional.cross_entropy(s, targets[keep])
    return losses.get("forward_kl", 0) * kl + losses.get("cross_entropy", 0) * cross_entropy


def gradients(student, loss):
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters()}


def assert_equal_to_full(tmp_path, student, teacher, **changes):
    trainer = trainer_for(tmp_path, student, teacher, **changes)
    batch = collate([RAGGED[i] for i in range(4)])
    student.train()
    ours = trainer.compute_loss(student, dict(batch))
    found = gradients(student, ours)
    reference = full_loss(student, teacher, batch, trainer.args.losses, trainer.args.temperature)
    expected = gradients(student, reference)
    assert abs(ours.item() - reference.item()) < 1e-10
    assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-10
    assert max(g.abs().max() for g in expected.values()) > 1e-3


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("losses", "temperature"),
    [({"forward_kl": 1.0}, 1.0), ({"forward_kl": 0.7, "cross_entropy": 0.3}, 2.0), ({"cross_entropy": 1.0}, 1.0)],
)
def test_loss_and_gradient_equal_full_logits(tmp_path, chunk_size, tied, losses, temperature):
    student = tiny.model(seed=1, hidden_size=24, intermediate_size=50, tie_word_embeddings=tied)
    changes = {"chunk_size": chunk_size, "losses": losses, "temperature": temperature}
    assert_equal_to_full(tmp_path, student, tiny.model("qwen3"), **changes)


@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(99, 107), (107, 99)])
def test_padded_vocabularies(tmp_path, student_vocab, teacher_vocab):
    assert_equal_to_full(
        tmp_path, tiny.model(seed=1, vocab_size=student_vocab), tiny.model(vocab_size=teacher_vocab), chunk_size=5
    )


def train(tmp_path, **changes):
    student = tiny.model(seed=1, hidden_size=24)
    values = {"max_steps": 2} | CONSTANT
    trainer = trainer_for(tmp_path, student, tiny.model(), **(values | {"train_sampling_strategy": "sequential"} | changes))
    trainer.train()
    return student, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


def test_accumulation_and_chunks_change_nothing(tmp_path):
    """Rows have different lengths: a mean of means would differ from the mean over tokens."""
    expected, losses, _ = train(tmp_path, per_device_train_batch_size=4)
    for changes in ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
                    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "chunk_size": 3}):  # fmt: skip
        student, found, _ = train(tmp_path, **changes)
        assert found == pytest.approx(losses, abs=1e-9)
        for (name, a), b in zip(expected.named_parameters(), student.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-9), name


def test_padding_changes_nothing(tmp_path):
    student, teacher = tiny.model(seed=1), tiny.model()
    trainer = trainer_for(tmp_path, student, teacher)
    rows = [RAGGED[i] for i in range(4)]
    tokens = torch.tensor([len(row["input_ids"]) - 1 for row in rows])
    alone = torch.stack([trainer.compute_loss(student, collate([row])) for row in rows])
    assert torch.allclose(trainer.compute_loss(student, collate(rows)), (alone * tokens).sum() / tokens.sum(), atol=1e-12)


def test_the_logits_of_a_batch_never_exist(tmp_path):
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == 103:
                    self.rows = max(self.rows, tensor.numel() // 103)
            return out

    student, teacher = (tiny.model(seed=seed, vocab_size=103).train() for seed in (0, 1))
    trainer = trainer_for(tmp_path, student, teacher, chunk_size=8)
    with Largest() as chunked:
        trainer.compute_loss(student, collate([RAGGED[i] for i in range(8)])).backward()
    # a chunk's logits; the transposed head (hidden, vocab) is not logits
    assert 8 <= chunked.rows <= tiny.SIZES["hidden"]
    with Largest() as full:
        full_loss(student, teacher, collate([RAGGED[i] for i in range(8)]), {"forward_kl": 1}).backward()
    assert full.rows >= 54


def test_evaluation_makes_no_gradients(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_minitron.distillation.losses.chunked._accumulate", lambda *args: 1 / 0)
    student = tiny.model(seed=1).train()
    trainer = trainer_for(tmp_path, student, tiny.model())
    with torch.no_grad():
        assert trainer.compute_loss(student, collate([RAGGED[0]])) > 0
    with pytest.raises(ZeroDivisionError):
        trainer.compute_loss(student, collate([RAGGED[0]]))


def test_the_teacher_is_frozen_and_stays_out_of_checkpoints(tmp_path):
    before = tiny.model().state_dict()
    student, _, trainer = train(tmp_path, save_strategy="steps", save_steps=2)
    assert all(torch.equal(before[name], t) for name, t in trainer.teacher.model.state_dict().items())
    assert not trainer.teacher.model.training
    assert not any(p.requires_grad for p in trainer.teacher.model.parameters())
    saved = type(student).from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), student.parameters(), strict=True))


def test_resume_equals_the_uninterrupted_run(tmp_path):
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    expected, losses, _ = train(tmp_path / "a", **common)
    changes = CONSTANT | {"train_sampling_strategy": "sequential"} | common
    trainer = trainer_for(tmp_path / "b", tiny.model(seed=1, hidden_size=24), tiny.model(), **changes)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in history] == losses
    assert all(entry["forward_kl"] == pytest.approx(entry["loss"], rel=1e-6) for entry in history)
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), trainer.model.parameters(), strict=True))


def test_resuming_a_finished_run_trains_no_further(tmp_path):
    """Three steps of four rows each end in the middle of the second epoch."""
    settings = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    done, losses, _ = train(tmp_path, **settings)
    trainer = trainer_for(tmp_path, tiny.model(seed=1, hidden_size=24), tiny.model(), **CONSTANT, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3
    assert len(losses) == 3
    assert all(torch.equal(a, b) for a, b in zip(done.parameters(), trainer.model.parameters(), strict=True))


def test_what_cannot_be_distilled_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"The tokenizer has 99 tokens.*differ by more than padding"):
        DistillationTrainer(tiny.model(vocab_size=50), tiny.model(), arguments(tmp_path), processing_class=tiny.tokenizer())
    with pytest.raises(ValueError, match=r"2 tokens differ, such as 'w0' with id 4 \(teacher\) and 3"):
        words = [tiny.WORDS[1], tiny.WORDS[0], *tiny.WORDS[2:]]
        check_tokenizers(tiny.tokenizer(words), tiny.tokenizer())


def bpe(merges=(("a", "b"), ("c", "d")), normalizer=None, scheme=None, added=()):
    vocabulary = {token: i for i, token in enumerate(["<unk>", "</s>", *"abcdABCD ", "ab", "cd"])}
    made = Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>"))
    made.normalizer, made.pre_tokenizer = normalizer, scheme or pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    tokenizer.add_tokens(list(added))
    return tokenizer


class InPython(PreTrainedTokenizer):
    """Words, split by a tokenizer that is no file of rules."""

    def __init__(self, split=str.split, **kwargs):
        self.ids, self.split = tiny.tokenizer().get_vocab(), split
        super().__init__(unk_token="<pad>", eos_token="</s>", **kwargs)

    vocab_size = property(lambda self: len(self.ids))

    def get_vocab(self):
        return dict(self.ids)

    def _tokenize(self, text, **kwargs):
        return self.split(text)

    def _convert_token_to_id(self, token):
        return self.ids.get(token, 0)

    def _convert_id_to_token(self, index):
        return next(token for token, i in self.ids.items() if i == index)


SAME = {
    "itself": (bpe(), bpe()),
    "a token that no model has": (bpe(), bpe(added=["<image>"])),
    "its name differs": (bpe(added=["<pad>"]), bpe(added=["<image>"])),
    "a BOS token is set": (tiny.tokenizer(), tiny.tokenizer(adds_bos=True)),
    "in Python": (InPython(), tiny.tokenizer()),
}
DIFFERENT = {
    "merges": (bpe(), bpe(merges=(("c", "d"), ("a", "b"))), 13, "another list of merges"),
    "normalizer": (bpe(), bpe(normalizer=normalizers.Lowercase()), 13, "another normalizer"),
    "pre-tokenizer": (bpe(), bpe(scheme=pre_tokenizers.ByteLevel()), 13, "another pre_tokenizer"),
    "an added token that models have": (bpe(), bpe(added=["<image>"]), 16, "'<image>' with id None .teacher. and 13 .student."),
    "special tokens": (bpe(added=["<x>", "<y>"]), bpe(added=["<y>", "<x>"]), 16, "2 tokens differ, such as '<x>' with id 13"),
    "in Python": (InPython(lambda text: list(text)), tiny.tokenizer(), 99, "split a text in different ways"),
}


@pytest.mark.parametrize("case", SAME)
def test_the_same_tokenizer_is_seen_as_such(case):
    first, second = SAME[case]
    check_tokenizers(first, second, min(first.vocab_size, second.vocab_size))
    check_tokenizers(second, first, min(first.vocab_size, second.vocab_size))


@pytest.mark.parametrize("case", DIFFERENT)
def test_tokens_alone_do_not_make_the_same_tokenizer(case):
    first, second, size, match = DIFFERENT[case]
    with pytest.raises(ValueError, match=f"different tokenizers: .*{match}.* Distill from a teacher of the same family"):
        check_tokenizers(first, second, size)


def test_ids_beyond_the_vocabulary_are_refused_where_the_text_has_them(tmp_path):
    """As Gemma 3's sign for images: the tokenizer has one token more than the model."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<image>"])
    texts = [" ".join(tiny.WORDS[:20])] * 9
    given = {
        "model": tiny.model(seed=1),
        "teacher_model": tiny.model(),
        "args": arguments(tmp_path),
        "processing_class": tokenizer,
    }
    blocks = token_blocks(Dataset.from_dict({"text": texts}), tokenizer, 16)
    DistillationTrainer(**given, train_dataset=blocks)
    blocks = token_blocks(Dataset.from_dict({"text": [*texts, "w1 <image> w2 w3"]}), tokenizer, 16)
    message = r"The text holds id 99 \('<image>'\), but the model's vocabulary has 99: take it out of the text"
    with pytest.raises(ValueError, match=message):
        DistillationTrainer(**given, train_dataset=blocks)
    with pytest.raises(ValueError, match="The text holds id 99, but the model's vocabulary has 99"):
        calibrate(given["teacher_model"], blocks)
    stream = blocks.to_iterable_dataset()
    given["args"] = arguments(tmp_path, max_steps=8)
    with pytest.raises(ValueError, match="The text holds id 99, but the model's vocabulary has 99"):
        DistillationTrainer(**given, train_dataset=stream).train()


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize(("column", "wrong"), [("input_ids", 99), ("input_ids", -1), ("labels", 99)])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_with_ids_that_the_model_lacks_are_refused(tmp_path, column, wrong, teacher, streaming):
    rows = [{"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, 6]} for _ in range(8)]
    rows[5] |= {column: [3, 4, wrong, 6]}
    rows = Dataset.from_list(rows)
    changes = {"teacher_model": tiny.model()} if teacher else {}
    args = arguments(tmp_path, max_steps=8, **({} if teacher else {"losses": {"cross_entropy": 1.0}}))
    trainer = DistillationTrainer(
        tiny.model(seed=1), args=args, train_dataset=rows.to_iterable_dataset() if streaming else rows, **changes
    )
    with pytest.raises(ValueError, match=f"The text holds id {wrong}, but the model's vocabulary has 99") as raised:
        trainer.train()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"losses": {"backward_kl": 1}},
            "'backward_kl' is not a loss; there are forward_kl, .*cross_entropy, emb",
        ),
        ({"losses": {"forward_kl": -1}}, "none below zero"),
        ({"temperature": 0}, "temperature: 0"),
        ({"chunk_size": 0}, "chunk_size: 0"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **changes)


def test_perplexity_equals_full_logits():
    model, blocks = tiny.model(), tiny.blocks()
    found = perplexity(model, blocks, batch_size=4, chunk_size=5)
    ids = blocks["input_ids"][:]
    expected = model(input_ids=ids, labels=ids).loss.exp().item()
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.stderr > 0
    assert found.n == len(blocks)


@pytest.mark.parametrize("model_type", ["opt", "llama4_text", "hyperclovax", "minicpm3"])
def test_the_loss_of_every_kind_of_class_is_that_of_its_own_logits(model_type, tmp_path):
    """OPT's head calls the decoder inside of the base model, Llama 4's prefix is another model's, others scale in their way."""
    student, teacher = tiny.model(model_type, torch.float32, seed=1), tiny.model(model_type, torch.float32)
    trainer = trainer_for(tmp_path, student, teacher, losses={"forward_kl": 1.0})
    batch = collate([{"input_ids": row} for row in tiny.blocks(2)["input_ids"]])
    with torch.no_grad():
        ours = trainer.compute_loss(student, dict(batch))
        s, t = (model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1) for model in (student, teacher))
    assert ours.item() == pytest.approx((t.exp() * (t - s)).sum(-1).mean().item(), rel=1e-5)


def test_a_head_that_is_more_than_a_matrix_is_refused(tmp_path):
    model = tiny.model("bert", torch.float32)
    with pytest.raises(ValueError, match="head of model type 'bert' is more than a matrix: cls.predictions.transform stands"):
        trainer_for(tmp_path, model, tiny.model("bert", torch.float32))
