"""The cached teacher: what it keeps, what it takes, and that training from it is training from the teacher."""

import copy
import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from test_accelerate import launch, script
from test_distillation import RAGGED, arguments, gradients
from transformers import DataCollatorWithFlattening

import hf_minitron.distillation.cache as writing
from hf_minitron.__main__ import main
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.cached import CachedCollator, CachedTeacher, teacher_identity
from hf_minitron.distillation.losses.chunked import chunked_loss
from hf_minitron.distillation.losses.tokens import TOKEN_LOSSES, forward_kl
from hf_minitron.distillation.records import RandomSampling, TopK, check_losses, pack, pack_ids, record_of, unpack, unpack_ids
from hf_minitron.distillation.signals import SparseSignal
from hf_minitron.distillation.teacher import LiveTeacher
from hf_minitron.distillation.trainer import DistillationTrainer, collate
from hf_minitron.head import head_of, next_token_rows
from hf_minitron.recipe import bind, load_recipe
from hf_minitron.stages import distill
from hf_minitron.stages.every import STAGES

ALL = {"top_k": 10**6}


def sure_teacher():
    """A teacher that is surer of its tokens than one of random weights."""
    model = tiny.model(dtype=torch.float32)
    model.lm_head.weight.data.mul_(4)
    return model


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def loss_of(student, teacher, batch, temperature=1.0, loss=forward_kl):
    """The chunked loss of a batch, as the trainer makes it, for any teacher."""
    signal = teacher(batch)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    rows, targets = next_token_rows(student.base_model(**inputs).last_hidden_state, batch["labels"])

    def chunk_loss(logits, some):
        return {"loss": loss(*signal.aligned_log_probs(logits, some, temperature))}

    return chunked_loss(rows, head_of(student), chunk_loss, {"loss": 1.0}, 5)[0] / len(targets)


# Records


def test_numbers_of_any_width_come_back():
    rng = np.random.default_rng(0)
    widths = rng.integers(0, 40, 1000)
    values = (rng.random(1000) * 2.0**widths).astype(np.int64)
    raw = pack(values, widths)
    assert len(raw) == math.ceil(widths.sum() / 8)
    assert np.array_equal(unpack(raw, widths), values)


@pytest.mark.parametrize("vocab", [2, 99, 49_152, 151_936, 256_000])
def test_ids_come_back(vocab):
    rng = np.random.default_rng(0)
    rows = [np.sort(rng.choice(vocab, min(vocab, 1 + i), replace=False)) for i in range(40)]
    rows += [np.array([0]), np.array([vocab - 1]), np.array([0, vocab - 1])]
    ids, first = np.concatenate(rows), np.concatenate([np.arange(len(row)) == 0 for row in rows])
    raw = pack_ids(ids, first, vocab)
    found, end = unpack_ids(raw + b"more", first, vocab)
    assert np.array_equal(found, ids)
    assert end == len(raw)


def language(rows, vocab):
    """Logits that fall with the rank of a token as a small model's do; as in BPE, frequent tokens have low ids more often."""
    noise = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))
    order = (torch.arange(1.0, vocab + 1).log() + 2.5 * noise).argsort(-1).argsort(-1)
    return -1.42 * torch.log(order + 1.0)


@pytest.mark.parametrize(("method", "most"), [({"random": 50}, 40), ({"top_k": 64}, 300)])
def test_bytes_per_token_at_a_real_vocabulary(method, most):
    record = record_of(method, 49_152)
    arrays = record.keep(language(64, 49_152), np.random.default_rng(0))
    if "random" in method:  # SmolLM2-135M: 20.4 different tokens on web text, 34.4 bytes
        assert np.mean([len(set(row)) for row in arrays[0].tolist()]) > 20
    assert most / 2 < len(record.encode(arrays)) / 64 <= most


@pytest.mark.parametrize("vocab", [99, 49_152, 128_256])
@pytest.mark.parametrize("draws", [1, 2, 50])
def test_draws_come_back_as_shares(vocab, draws):
    record = RandomSampling(draws, vocab)
    (kept,) = record.keep(language(20, vocab), np.random.default_rng(3))
    ids, shares = record.decode(record.encode([kept]), 20)
    for row in range(20):
        expected, counts = np.unique(kept[row], return_counts=True)
        assert np.array_equal(ids[row, : len(expected)], expected)
        assert (ids[row, len(expected) :] == vocab).all()
        assert shares[row, : len(expected)] == pytest.approx(counts / draws)
        assert shares[row].sum() == pytest.approx(1)


def test_top_k_comes_back_within_the_error_that_is_promised():
    record, logits = TopK(10, 99, "float16"), 4 * torch.randn(30, 99, generator=torch.Generator().manual_seed(0))
    ids, values = record.decode(record.encode(record.keep(logits, None)), 30)
    logp = logits.log_softmax(-1)
    best = logp.topk(10).indices.sort(-1).values
    assert np.array_equal(ids, best.numpy())
    rest = torch.stack([logp[i, [j for j in range(99) if j not in best[i]]].logsumexp(0) for i in range(30)])
    exact = torch.cat([logp.gather(-1, best), rest[:, None]], -1)
    assert ((torch.from_numpy(values.copy()).float() - exact) / exact).abs().max() <= 2**-11


# Signals


def test_a_top_k_signal_compares_the_kept_tokens_and_the_rest(tmp_path):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(8, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    t = teacher.softmax(-1)
    ids = teacher.topk(5).indices
    kept = torch.zeros_like(t).scatter(1, ids, 1.0).bool()
    signal = SparseSignal(ids, t.log().gather(1, ids), (t * ~kept).sum(-1).log(), 20)
    student_logp, teacher_logp = signal.aligned_log_probs(student[2:7], slice(2, 7), 1.0)
    s = student.softmax(-1)
    for found, p in ((student_logp, s), (teacher_logp, t)):
        expected = torch.cat([p.gather(1, ids), (p * ~kept).sum(-1, keepdim=True)], -1)[2:7]
        assert found.shape == (5, 6)
        assert torch.allclose(found.exp(), expected, atol=1e-12)
    assert (forward_kl(student_logp, teacher_logp) < forward_kl(s.log(), t.log())[2:7]).all()
    with pytest.raises(ValueError, match="temperature: 2"):
        signal.aligned_log_probs(student, slice(0, 1), 2.0)


@pytest.mark.parametrize("loss", TOKEN_LOSSES.values(), ids=TOKEN_LOSSES)
@pytest.mark.parametrize("student_vocab", [17, 20, 26])
def test_top_k_and_vocabularies_that_differ_by_padding(loss, student_vocab):
    """A padding token that the teacher kept counts for nothing; the student's own padding is not in the rest."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(4, 20, generator=generator, dtype=torch.float64)
    teacher[:, 17:] += 30 if student_vocab == 17 else -30
    student = torch.randn(4, student_vocab, generator=generator, dtype=torch.float64).requires_grad_()
    record = TopK(8, 20, "float32")
    signal = record.signal(*map(torch.from_numpy, record.keep(teacher, None)))
    student_logp, teacher_logp = signal.aligned_log_probs(student, slice(0, 4), 1.0)
    shared, p = min(student_vocab, 20), student.softmax(-1)
    for row, ids in enumerate(signal.ids):
        kept = ids[ids < shared]
        assert len(kept) == (5 if student_vocab == 17 else 8)
        rest = [token for token in range(shared) if token not in kept]
        expected = torch.cat([p[row, kept], p.new_zeros(8 - len(kept)), p[row, rest].sum()[None]])
        assert torch.allclose(student_logp[row].exp(), expected, atol=1e-9)
        t = teacher[row, :shared].softmax(-1)
        expected = torch.cat([t[kept], t.new_zeros(8 - len(kept)), t[rest].sum()[None]])
        assert torch.allclose(teacher_logp[row].exp(), expected, atol=1e-5)
    found = loss(student_logp, teacher_logp)
    assert found.isfinite().all()
    assert torch.autograd.grad(found.sum(), student)[0].isfinite().all()


def test_a_student_sure_of_the_kept_tokens_gives_no_nan():
    logits = torch.full((2, 50), -40.0)
    logits[:, :4] = 10.0
    logits.requires_grad_()
    ids, teacher = torch.arange(4).expand(2, 4), torch.tensor([[0.2] * 4, [0.25] * 4]).log()
    signal = SparseSignal(ids, teacher, torch.tensor([0.2, 1e-30]).log(), 50)
    loss = forward_kl(*signal.aligned_log_probs(logits, slice(0, 2), 1.0))
    assert loss.isfinite().all()
    assert loss[1].abs() < 1e-5
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()


def test_random_sampling_is_unbiased():
    """The mean gradient of many caches is the whole distribution's, within four standard errors, everywhere."""
    generator = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(1, 12, generator=generator, dtype=torch.float64)
    student = torch.randn(1, 12, generator=generator, dtype=torch.float64).requires_grad_()
    (exact,) = torch.autograd.grad(forward_kl(student.log_softmax(-1), teacher.log_softmax(-1)).sum(), student)
    tries, record = 4000, RandomSampling(5, 12)
    arrays = record.keep(teacher.expand(tries, 12), np.random.default_rng(0))
    signal = record.signal(*map(torch.from_numpy, record.decode(record.encode(arrays), tries)))
    many = student.detach().expand(tries, 12).clone().requires_grad_()
    (grads,) = torch.autograd.grad(forward_kl(*signal.aligned_log_probs(many, slice(0, tries), 1.0)).sum(), many)
    error = grads.std(0) / tries**0.5
    assert (error < 0.01).all()
    assert ((grads.mean(0) - exact[0]).abs() < 4 * error).all()
    # the fewer, likelier tokens that top-k renormalised would keep are another distribution
    best = teacher.topk(5).indices
    biased = SparseSignal(best, teacher.log_softmax(-1).gather(1, best), None, 12)
    (grad,) = torch.autograd.grad(forward_kl(*biased.aligned_log_probs(student, slice(0, 1), 1.0)).sum(), student)
    assert ((grad - exact).abs() > 4 * error).any()


# Caches


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(99, 99), (99, 107), (107, 99)])
def test_with_all_tokens_it_equals_the_teacher(tmp_path, student_vocab, teacher_vocab, temperature):
    """Loss and gradient, on rows of different lengths and with masked labels."""
    model = tiny.model("qwen3", vocab_size=teacher_vocab)
    write_cache(model, RAGGED, tmp_path / "cache", ALL, dtype="float32", batch_size=3)
    cached, live = CachedTeacher(tmp_path / "cache"), LiveTeacher(model, torch.device("cpu"))
    assert cached.config.vocab_size == teacher_vocab
    student = tiny.model(seed=1, hidden_size=24, vocab_size=student_vocab)
    batch = collate([RAGGED[i] for i in (5, 2, 0, 5)])  # in any order, again
    batch["labels"][0, 3:6] = -100
    batch["labels"][2, :] = -100
    for loss in TOKEN_LOSSES.values():
        ours, theirs = (loss_of(student, teacher, batch, temperature, loss) for teacher in (cached, live))
        found, expected = gradients(student, ours), gradients(student, theirs)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        for name, grad in expected.items():
            assert torch.allclose(found[name], grad, atol=1e-5 * float(grad.abs().max() + 1e-3)), name


@pytest.mark.parametrize("method", [{"random": 7}, {"top_k": 9}])
def test_a_batch_gets_the_answers_to_its_labelled_tokens(tmp_path, method):
    model, blocks = sure_teacher(), tiny.blocks(40)
    facts = write_cache(model, blocks, tmp_path / "cache", method)
    teacher = CachedTeacher(tmp_path / "cache")
    assert teacher.meta == facts
    assert facts["tokens"] == 40 * 11
    assert facts["block_size"] == 12
    size = sum(len(raw) for name, raw in files(tmp_path / "cache").items() if name.endswith(".bin"))
    assert facts["bytes_per_token"] == pytest.approx(size / 440, abs=0.01)
    batch = collate([blocks[i] for i in (39, 4, 17)])
    batch["labels"][1, 4:9] = -100
    whole, masked = (teacher(batch | {"labels": labels}) for labels in (batch["input_ids"], batch["labels"]))
    wanted = (batch["labels"][:, 1:] != -100).flatten()
    assert wanted.sum() == 28
    assert torch.equal(whole.ids[wanted], masked.ids)
    assert torch.equal(whole.logp[wanted], masked.logp)
    logp = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    likely = []
    for row in range(33):
        kept = whole.ids[row][whole.ids[row] < 99]
        if "top_k" in method:
            assert set(kept.tolist()) == set(logp[row].topk(9).indices.tolist())
            assert torch.allclose(whole.logp[row].float(), logp[row, kept], rtol=2**-10, atol=1e-4)
        else:
            assert whole.logp[row].exp().sum() == pytest.approx(1)
            likely.append(logp[row, kept].exp().mean().item())
    assert "top_k" in method or np.mean(likely) > 3 / 99


@pytest.mark.parametrize("method", [{"random": 7}, {"top_k": 9}, ALL])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_collator_reads_what_the_step_would_look_up(tmp_path, monkeypatch, method, side):
    """In the DataLoader's workers, in any order: the step itself sees columns, and no hash is made in it."""
    write_cache(sure_teacher(), RAGGED, tmp_path / "cache", method, batch_size=1)
    teacher = CachedTeacher(tmp_path / "cache")
    collator = CachedCollator(partial(padded_to, 15, side), teacher)
    workers = {"num_workers": 1, "multiprocessing_context": "fork"}
    loader = torch.utils.data.DataLoader(RAGGED, 3, sampler=[5, 2, 0, 7, 1, 3, 6, 4], collate_fn=collator, **workers)
    batches = list(loader)
    assert len(batches) == 3
    for batch in batches:
        columns = [name for name in batch if name.startswith("teacher_")]
        assert len(columns) == len(teacher.record.columns)
        assert not any(batch[name].is_floating_point() for name in columns), "DeepSpeed would round them"
        assert all(batch[name].shape[:2] == batch["input_ids"].shape for name in columns)
        batch["labels"][0, 3:6] = -100
        expected = teacher({name: value for name, value in batch.items() if name not in columns})
        with monkeypatch.context() as patch:
            patch.setattr("hf_minitron.distillation.cached.key_of", lambda *args: 1 / 0)
            found = teacher(batch)
        for ours, looked_up in zip(vars(found).values(), vars(expected).values(), strict=True):
            assert torch.equal(ours, looked_up) if isinstance(ours, torch.Tensor) else ours == looked_up


def padded_to(length, side, rows):
    """A collator of somebody else's, which pads to one length."""
    fill = [[0] * (length - len(row["input_ids"])) for row in rows]
    ids = [row["input_ids"] + f if side == "right" else f + row["input_ids"] for row, f in zip(rows, fill, strict=True)]
    mask = [[1] * (length - len(f)) + f if side == "right" else f + [1] * (length - len(f)) for f in fill]
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def test_a_collator_of_one_s_own_learns_from_a_cache(tmp_path):
    """As with the usual one, in workers; one that changes the rows is refused, and one that makes no labels predicts."""
    teacher = sure_teacher()
    write_cache(teacher, RAGGED, tmp_path / "cache", ALL, dtype="float32", batch_size=1)
    losses = []
    for collator, workers in ((None, 0), (partial(padded_to, 15, "left"), 1)):
        args = arguments(tmp_path / "out", max_steps=3, train_sampling_strategy="sequential", dataloader_num_workers=workers)
        student = tiny.model(seed=1, hidden_size=24, dtype=torch.float32)
        trainer = DistillationTrainer(student, tmp_path / "cache", args, collator, train_dataset=RAGGED)
        trainer.train()
        losses.append([entry["forward_kl"] for entry in trainer.state.log_history if "forward_kl" in entry])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)

    def short(rows):
        return collate([{"input_ids": row["input_ids"][:3]} for row in rows])

    trainer = DistillationTrainer(student, tmp_path / "cache", args, short, train_dataset=RAGGED)
    trainer.args.dataloader_num_workers = 0
    with pytest.raises(ValueError, match="A row of the batch is not in the cache"):
        trainer.train()
    unlabelled = CachedCollator(lambda rows: {"input_ids": torch.tensor([[1, 2, 3]])}, trainer.teacher)
    assert unlabelled([None]).keys() == {"input_ids"}


class OwnLoader(DistillationTrainer):
    """With a DataLoader that knows no cache."""

    def get_train_dataloader(self):
        return self.accelerator.prepare(torch.utils.data.DataLoader(self.train_dataset, batch_size=2, collate_fn=collate))


class OwnDataset(torch.utils.data.Dataset):
    """Rows from anywhere."""

    def __len__(self):
        return len(RAGGED)

    def __getitem__(self, number):
        return {"input_ids": RAGGED[number]["input_ids"]}


@pytest.mark.parametrize("data", [RAGGED, RAGGED.to_iterable_dataset(), OwnDataset()], ids=["dataset", "stream", "torch"])
@pytest.mark.parametrize("kind", [DistillationTrainer, OwnLoader])
def test_data_and_loaders_of_one_s_own_learn_from_a_cache(tmp_path, kind, data):
    teacher = sure_teacher()
    write_cache(teacher, RAGGED, tmp_path / "cache", ALL, dtype="float32", batch_size=1)
    losses = []
    for given in (teacher, tmp_path / "cache"):
        args = arguments(tmp_path / "out", max_steps=2, train_sampling_strategy="sequential", per_device_train_batch_size=2)
        trainer = kind(tiny.model(seed=1, hidden_size=24, dtype=torch.float32), given, args, train_dataset=data)
        trainer.train()
        losses.append([entry["forward_kl"] for entry in trainer.state.log_history if "forward_kl" in entry])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_a_collator_that_joins_rows_is_refused_with_a_cache(tmp_path):
    write_cache(sure_teacher(), RAGGED, tmp_path / "cache", {"top_k": 9}, batch_size=1)
    args = arguments(tmp_path / "out", max_steps=1)
    student = tiny.model(seed=1, dtype=torch.float32)
    trainer = DistillationTrainer(student, tmp_path / "cache", args, DataCollatorWithFlattening(), train_dataset=RAGGED)
    with pytest.raises(ValueError, match="A row of the batch is not in the cache .* data_collator that leaves rows whole"):
        trainer.train()


def test_a_cache_goes_to_worker_processes(tmp_path):
    write_cache(sure_teacher(), RAGGED, tmp_path, {"top_k": 9}, batch_size=1)
    teacher = CachedTeacher(tmp_path)
    again = copy.copy(teacher)
    assert again is not teacher
    batch = collate([RAGGED[0]])
    assert torch.equal(again(batch).logp, teacher(batch).logp)


def test_documents_kept_apart_are_other_blocks(tmp_path):
    blocks = tiny.blocks(3)
    positions = [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]] * 3
    apart = Dataset.from_dict({"input_ids": blocks["input_ids"][:].tolist(), "position_ids": positions}).with_format("torch")
    model = tiny.model(dtype=torch.float32)
    write_cache(model, apart, tmp_path / "cache", ALL, dtype="float32")
    teacher = CachedTeacher(tmp_path / "cache")
    teacher.check_blocks(apart)
    with pytest.raises(
        ValueError, match="3 of 3 sequences.*the same text, packed in another way.*12 tokens, with document-masked attention"
    ):
        teacher.check_blocks(blocks)
    batch = {key: apart[key][:] for key in ("input_ids", "position_ids")} | {"labels": blocks["input_ids"][:]}
    expected = LiveTeacher(model, torch.device("cpu"))(batch)
    assert torch.allclose(teacher(batch).logp, expected.head.logits(expected.hidden).log_softmax(-1), atol=1e-5)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("method", [{"random": 7}, {"top_k": 9}])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, method):
    model, blocks = tiny.model(dtype=torch.float32), tiny.blocks(70)  # 14 shards of five blocks, in batches of two
    write = partial(write_cache, model, blocks, tmp_path / "b", method, batch_size=2)
    write_cache(model, blocks, tmp_path / "a", method, batch_size=2)
    ask, asked = writing._Recorder.__call__, []

    def die(self, rows, first):
        for number, entry in enumerate(ask(self, rows, first)):
            if first + number in (8, 9, 33, 69) and first + number not in asked:
                asked.append(first + number)
                raise Killed
            yield entry

    monkeypatch.setattr(writing._Recorder, "__call__", die)
    for kill in range(4):
        with pytest.raises(Killed):
            write()
        assert not (tmp_path / "b/cache.json").exists()
        with pytest.raises(ValueError, match="is not finished"):
            CachedTeacher(tmp_path / "b")
        if kill == 1:  # cut in the middle of a write
            for path in (tmp_path / "b").glob("*.part"):
                path.write_bytes(path.read_bytes()[:-3])
    monkeypatch.setattr(writing._Recorder, "__call__", ask)
    write()
    assert asked == [8, 9, 33, 69]
    assert files(tmp_path / "b") == files(tmp_path / "a")


def test_a_finished_cache_is_not_written_again(tmp_path, monkeypatch):
    model, blocks = tiny.model(dtype=torch.float32), tiny.blocks(3)
    facts = write_cache(model, blocks, tmp_path, {"random": 7})
    monkeypatch.setattr(writing, "LiveTeacher", lambda *args: 1 / 0)
    assert write_cache(model, blocks, tmp_path, {"random": 7}) == facts
    for changes, key in ({"seed": 1}, "seed"), ({"method": {"random": 8}}, "method"), ({"blocks": tiny.blocks(4)}, "text"):
        with pytest.raises(ValueError, match=f"holds another cache: its {key} is"):
            write_cache(**{"model": model, "blocks": blocks, "folder": tmp_path, "method": {"random": 7}} | changes)


def test_it_is_read_where_it_is_looked_at(tmp_path):
    """Of a file of megabytes only some pages come into memory."""
    blocks = tiny.blocks(1500, 60)
    model = tiny.model(dtype=torch.float32, num_hidden_layers=1)
    write_cache(model, blocks, tmp_path, {"top_k": 98}, dtype="float32", batch_size=50)
    teacher = CachedTeacher(tmp_path)
    path = tmp_path / "00003.bin"
    before = teacher._read(3 * 94)[0].copy()
    lines = Path("/proc/self/smaps").read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
    resident = next(int(line.split()[1]) for line in lines[place:] if line.startswith("Rss:")) * 1024
    assert path.stat().st_size > 2.2e6
    assert resident < path.stat().st_size / 4
    raw = bytearray(path.read_bytes())
    raw[200_000:300_000] = bytes(100_000)  # other blocks' records
    path.write_bytes(raw)
    assert np.array_equal(CachedTeacher(tmp_path)._read(3 * 94)[0], before)


def test_another_text_packing_or_teacher_is_refused(tmp_path):
    folder, blocks = tmp_path / "cache", tiny.blocks(6)
    model = tiny.model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "teacher")
    write_cache(tmp_path / "teacher", blocks, folder, {"random": 7})
    teacher = CachedTeacher(folder)
    teacher.check_blocks(blocks)
    teacher.check_blocks(blocks.select([4, 1]))  # a part of it, in any order
    with pytest.raises(ValueError, match=r"3 of 8 sequences, the first of 12 .*other text. It holds 6 sequences of 12 tokens"):
        text = tiny.blocks(8, seed=0)["input_ids"][:]
        text[2] = 5
        teacher.check_blocks(Dataset.from_dict({"input_ids": text.tolist()}))
    with pytest.raises(ValueError, match="12 of 12 sequences, the first of 6 tokens.*the same text, packed in another way"):
        teacher.check_blocks(Dataset.from_dict({"input_ids": blocks["input_ids"][:].reshape(12, 6).tolist()}))
    with pytest.raises(ValueError, match="is not in the cache .*: It holds 6 sequences of 12 tokens"):
        teacher(collate([tiny.blocks(1, seed=5)[0]]))
    teacher.check_teacher(tmp_path / "teacher")
    teacher.check_teacher(model.to(torch.bfloat16))  # the same parameters
    with torch.no_grad():
        model.model.norm.weight *= 1.5
    with pytest.raises(ValueError, match="is of another teacher: its weights is"):
        teacher.check_teacher(model)
    with pytest.raises(ValueError, match="is of another teacher: its vocab_size is 99, not 107"):
        teacher.check_teacher(tiny.model(vocab_size=107))
    (tmp_path / "teacher/model.safetensors").unlink()
    teacher.check_teacher(tmp_path / "teacher")  # by its config
    (shard := folder / "00003.bin").write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match="00003.bin is missing or damaged"):
        CachedTeacher(folder)
    with pytest.raises(ValueError, match="No cache of a teacher at .*: it has none"):
        CachedTeacher(tmp_path)


def test_a_teacher_is_the_same_in_other_shards(tmp_path):
    model = tiny.model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size="40KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert teacher_identity(tmp_path / "a") == teacher_identity(tmp_path / "b") == teacher_identity(model)


def test_what_a_cache_cannot_serve_is_refused():
    random, some, whole = record_of({"random": 50}, 99), record_of({"top_k": 9}, 99), record_of(ALL, 99)
    check_losses(random, ["forward_kl", "cross_entropy"], 1.0)
    check_losses(some, [*TOKEN_LOSSES, "cross_entropy"], 1.0)
    check_losses(whole, TOKEN_LOSSES, 2.0)
    for record, losses, temperature, message in (
        (random, ["forward_kl", "reverse_kl"], 1.0, "losses: reverse_kl cannot be had from random draws"),
        (some, ["hidden_mse"], 1.0, "losses: hidden_mse reads the teacher's states"),
        (random, ["forward_kl"], 2.0, "temperature: 2.0, but a cache of some tokens"),
        (some, ["forward_kl"], 0.5, "temperature: 0.5, but a cache of some tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            check_losses(record, losses, temperature)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"random": 0}}, r"method: \{'random': 0\} is neither"),
        ({"method": {"top_p": 3}}, "is neither"),
        ({"method": {}}, "is neither"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of float16, float32"),
        ({"blocks": Dataset.from_dict({"input_ids": [[1, 2], [3]]})}, "the shortest has 1"),
        ({"blocks": tiny.blocks().to_iterable_dataset()}, "A streamed dataset cannot be cached"),
    ],
)
def test_bad_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        write_cache(**{"model": tiny.model(), "blocks": tiny.blocks(), "folder": tmp_path, "method": ALL} | changes)
    assert not any(tmp_path.iterdir())


def test_the_trainer_learns_from_a_cache(tmp_path):
    """With all tokens as from the teacher itself; from draws it comes nearer to the teacher, too."""
    teacher, blocks = sure_teacher(), tiny.blocks(8)
    write_cache(teacher, blocks, tmp_path / "all", ALL, dtype="float32")
    write_cache(teacher, blocks, tmp_path / "some", {"random": 30})
    last = {}
    for name in ("live", "all", "some"):
        student = tiny.model(seed=1, hidden_size=24, dtype=torch.float32)
        args = arguments(tmp_path / "out", max_steps=12, learning_rate=1e-2, train_sampling_strategy="sequential")
        trainer = DistillationTrainer(student, teacher, args, train_dataset=blocks)
        if name != "live":
            trainer.teacher = CachedTeacher(tmp_path / name)
        trainer.train()
        last[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        last[f"{name} true"] = loss_of(student, LiveTeacher(teacher, torch.device("cpu")), collate(list(blocks))).item()
    assert last["all"] == pytest.approx(last["live"], rel=1e-4)
    assert last["some true"] < 0.7 * last["live"][0]


# The stage


@pytest.fixture(scope="module")
def pruned(project, tmp_path_factory):
    """A run up to its pruned student, with a teacher of its own."""
    folder = tmp_path_factory.mktemp("cached")
    shutil.copytree(project["folder"] / "teacher", folder / "teacher")
    recipe = {**project["recipe"], "model": str(folder / "teacher"), "run": str(folder / "run"), "cache": {}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for stage in ("score", "prune"):
        assert main([stage, str(folder / "recipe.yaml")]) == 0
    return folder


def command(folder, verb, *more):
    return main([verb, str(folder / "recipe.yaml"), *map(str, more)])


def test_distill_learns_from_the_cache_without_the_teachers_weights(project, tmp_path, capsys):
    folder = tmp_path
    shutil.copytree(project["folder"] / "teacher", folder / "teacher")
    whole = {"method": "top_k", "k": 1000, "dtype": "float32"}
    recipe = {**project["recipe"], "model": str(folder / "teacher"), "run": str(folder / "run"), "cache": whole}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for stage in ("score", "prune", "cache"):
        assert command(folder, stage) == 0
    out = capsys.readouterr().out
    assert "180 tokens of 12 sequences, 397.6 bytes per token" in out  # 99 of 4 bytes, and 24 a block
    live = folder / "live.yaml"
    live.write_text(yaml.safe_dump({key: value for key, value in recipe.items() if key != "cache"}))
    for stage in ("score", "prune", "distill"):
        assert main([stage, str(live), "--run", str(folder / "live")]) == 0
    for path in (folder / "teacher").glob("*.safetensors*"):
        path.unlink()
    run = load_recipe(folder / "recipe.yaml", {}, {name: stage.args for name, stage in STAGES.items()})
    args, out = bind(run, "distill", distill.Args), folder / "run/distill.tmp"
    out.mkdir()
    distill.check(args, run)
    distill.run(args, run, out)
    logs = [json.loads(path.read_text()) for path in (out / "log.json", folder / "live/distill/log.json")]
    losses = [[entry["loss"] for entry in log["history"] if "loss" in entry] for log in logs]
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert logs[0]["cache"]["bytes_per_token"] > 396
    assert "cache" not in logs[1]


def test_a_cache_is_made_again_when_the_blocks_change(pruned, capsys):
    assert command(pruned, "cache") == 0
    assert "bytes per token" in capsys.readouterr().out
    assert command(pruned, "cache") == 0
    assert "cache: done before, skipped" in capsys.readouterr().out
    assert command(pruned, "distill", "--distill.block_size", 8) == 1
    assert "distill needs cache, which was done with other settings" in capsys.readouterr().err
    assert command(pruned, "cache", "--distill.learning_rate", 0.1) == 0
    assert "skipped" in capsys.readouterr().out
    assert command(pruned, "cache", "--distill.block_size", 8) == 0
    assert "84 tokens of 12 sequences" in capsys.readouterr().out
    assert command(pruned, "cache", "--cache.tokens", 64) == 0
    assert "60 tokens of 4 sequences" in capsys.readouterr().out
    assert command(pruned, "distill", "--cache.tokens", 64) == 1
    assert "8 of 12 sequences, the first of 16 tokens, are not in the cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("--cache.method", "top_p"), "cache: method: 'top_p' is not one of random, top_k"),
        (("--cache.dtype", "int4"), "cache: dtype: 'int4' is not one of float16, float32"),
        (("--cache.draws", "0"), "cache.draws: 0 must be at least 1"),
        (("--distill.temperature", "2"), "cache: temperature: 2.0, but a cache of some tokens is of temperature 1"),
    ],
)
def test_a_cache_that_cannot_serve_is_told_before_it_is_made(pruned, capsys, override, message):
    for verb in ("cache", "run"):
        assert command(pruned, verb, *override) == 1
        assert message in capsys.readouterr().err


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import tiny
from hf_minitron.distillation.cache import write_cache
write_cache(tiny.model(dtype=tiny.torch.float32), tiny.blocks(70), sys.argv[1], {{"random": 7}}, batch_size=2)
"""


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one(tmp_path):
    for processes in (1, 2):
        launch(processes, script(tmp_path, SCRIPT), tmp_path / str(processes))
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert len(files(tmp_path / "1")) == 15


@pytest.mark.slow
def test_the_command_caches_in_two_processes(project, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**project["recipe"], "run": str(tmp_path / "run"), "cache": {"draws": 9}}))
    out = launch(2, "-m", "hf_minitron", "cache", recipe)
    assert out.count("cache: done in") == 1
    assert out.count("bytes per token") == 1
    assert json.loads((tmp_path / "run/cache/cache.json").read_text())["tokens"] == 6 * 2 * 15 * 2
