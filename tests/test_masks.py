"""Padding in rows: nothing is learnt from it, by any loss, from any teacher, with any collator."""

import pytest
import tiny
import torch
from datasets import Dataset
from test_distillation import CONSTANT, arguments
from transformers import default_data_collator

from hf_minitron.distillation.batch import collate, supervised
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.cached import CachedTeacher
from hf_minitron.distillation.trainer import DistillationTrainer

LENGTHS = (5, 8, 6)
NEAR = 1e-6  # positions are turned in float32
PLAIN = [{"input_ids": tiny.blocks(1, length, seed=length)["input_ids"][0].tolist()} for length in LENGTHS]
LOSSES = {
    "labels": {"cross_entropy": 1.0},
    "teacher": {"forward_kl": 1.0, "jsd": 0.5},
    "states": {"forward_kl": 1.0, "block": 0.7, "query_key": 0.5, "embedding": 0.2},
}


def padded(side, filler, size=10):
    """The rows filled up with tokens that are as good as any, and masks that say so."""
    rows = []
    for row in PLAIN:
        ids, missing = row["input_ids"], size - len(row["input_ids"])
        before = {"right": 0, "left": missing, "both": missing // 2}[side]
        fill = [filler] * before, [filler] * (missing - before)
        mask = [0] * before + [1] * len(ids) + [0] * (missing - before)
        rows.append({"input_ids": [*fill[0], *ids, *fill[1]], "attention_mask": mask})
    return rows


def trainer_for(tmp_path, losses, rows=None, teacher=None, **changes):
    """One with plain steps."""
    settings = {"losses": losses, "layer_pairs": "uniform", "balance": "static", "optim": "sgd", **CONSTANT, **changes}
    needed = losses.keys() - {"cross_entropy"}
    data = None if rows is None else Dataset.from_list(rows)
    student = tiny.model(seed=1, num_hidden_layers=2, hidden_size=24)
    kwargs = {"train_dataset": data, "data_collator": changes.pop("data_collator", None)}
    return DistillationTrainer(
        student, (teacher or tiny.model()) if needed else None, arguments(tmp_path, **settings), **kwargs
    )


def gradients(trainer, rows):
    """The loss of a batch, and what it does to the student."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model.train(), collate(rows))
    loss.backward()
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("losses", LOSSES)
def test_padding_in_rows_changes_nothing(tmp_path, losses, side):
    trainer = trainer_for(tmp_path, LOSSES[losses])
    loss, expected = gradients(trainer, PLAIN)
    for filler in (0, 17):
        again, found = gradients(trainer, padded(side, filler))
        assert again == pytest.approx(loss, abs=NEAR)
        assert torch.allclose(found, expected, atol=NEAR)
    everything, _ = gradients(trainer, [{"input_ids": row["input_ids"]} for row in padded(side, 17)])
    assert abs(everything - loss) > 1e-3, "padding would make a difference"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("method", [{"top_k": 200}, {"top_k": 9}])
def test_a_cached_teacher_answers_for_padded_rows(tmp_path, side, method):
    cache = tmp_path / "cache"
    write_cache(tiny.model(), Dataset.from_list(PLAIN), cache, method, dtype="float32", batch_size=1)
    trainer = trainer_for(tmp_path, {"forward_kl": 1.0}, padded(side, 17), CachedTeacher(cache))  # finds all blocks
    loss, expected = gradients(trainer, PLAIN)
    again, found = gradients(trainer, padded(side, 17))
    assert again == pytest.approx(loss, abs=NEAR)
    assert torch.allclose(found, expected, atol=NEAR)
    with pytest.raises(ValueError, match="attention_mask: the sequences are padded. Leave padding out"):
        write_cache(tiny.model(), Dataset.from_list(padded(side, 0)), tmp_path / "other", method)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_collator_that_labels_padding_teaches_none(tmp_path, side):
    """Counted and learnt are the same tokens: a step is that on rows without padding."""
    rows = [{**row, "labels": row["input_ids"]} for row in padded(side, 17)]
    settings = {"max_steps": 1, "per_device_train_batch_size": 3, "learning_rate": 0.1, "train_sampling_strategy": "sequential"}
    results = []
    for data, collator in ((PLAIN, None), (rows, default_data_collator)):
        student = tiny.model(seed=1)
        args = arguments(tmp_path, losses={"cross_entropy": 0.5, "forward_kl": 0.5}, optim="sgd", **(CONSTANT | settings))
        trainer = DistillationTrainer(student, tiny.model(), args, collator, train_dataset=Dataset.from_list(data))
        trainer.train()
        results.append((trainer.state.log_history[0], list(student.parameters())))
    (expected, plain), (found, masked) = results
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert found["cross_entropy"] == pytest.approx(expected["cross_entropy"], abs=1e-6)
    assert all(torch.allclose(a, b, atol=NEAR) for a, b in zip(plain, masked, strict=True))


def test_a_masked_token_between_others_is_not_learnt_and_predicts_nothing():
    batch = {"labels": torch.arange(6)[None], "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}
    assert supervised(batch).tolist() == [[0, 1, -100, -100, 4, 5]]
    assert supervised({"labels": batch["labels"]}) is batch["labels"]


def test_labels_of_rows_and_masks_add_up(tmp_path):
    labels = [[-100, -100, *row["input_ids"][2:]] for row in PLAIN]
    rows = [{**row, "labels": label} for row, label in zip(PLAIN, labels, strict=True)]
    batch = collate(rows)
    assert (batch["labels"] != -100).sum() == sum(LENGTHS) - 6
    trainer = trainer_for(tmp_path, LOSSES["states"])
    assert gradients(trainer, rows)[0] != pytest.approx(gradients(trainer, PLAIN)[0])


def test_masks_of_ones_are_no_masks():
    rows = [{"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}] * 2
    assert collate(rows).keys() == {"input_ids", "labels"}
    apart = [{**row, "position_ids": [0, 1, 0]} for row in rows]
    assert collate(apart).keys() == {"input_ids", "labels", "position_ids"}


IDS = {"input_ids": [1, 2, 3]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**IDS, "label_ids": [1, 2, 3]}], "the rows' column 'label_ids' is none of input_ids, labels"),
        ([{**IDS, "labels": [1, 2]}], "labels: a row has 2 of them for 3 input_ids"),
        ([{**IDS, "attention_mask": [1]}], "attention_mask: a row has 1 of them for 3 input_ids"),
        ([{**IDS, "attention_mask": [1, 1, 1]}, IDS], r"a row has the columns \['input_ids'\], another"),
        ([{"labels": [1, 2, 3]}], r"a row has the columns \['labels'\]"),
        (
            [{**IDS, "attention_mask": [0, 1, 1], "position_ids": [0, 0, 1]}],
            "attention_mask: with position_ids attention is document-masked",
        ),
    ],
)
def test_rows_that_cannot_be_batched_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        collate(rows)


def test_a_mask_that_says_not_where_padding_is_is_refused(tmp_path):
    trainer = trainer_for(tmp_path, {"cross_entropy": 1.0})
    batch = collate(PLAIN) | {"attention_mask": torch.ones(3, 1, 8, 8)}
    with pytest.raises(ValueError, match=r"attention_mask: its shape is \(3, 1, 8, 8\), not \(batch, seq\)"):
        trainer.compute_loss(trainer.model, batch)
