"""A loss of one's own is one function, passed as a value: it runs live, cached, chunked and masked as the named ones do."""

import copy
import io
from functools import partial

import pytest
import tiny
import torch
from datasets import Dataset
from test_distillation import CONSTANT, RAGGED, arguments
from test_masks import padded

from hf_minitron import DistillationArguments, DistillationTrainer
from hf_minitron.distillation.batch import collate
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.losses.tokens import OwnLoss, forward_kl, generalized_jsd, total_variation


def bhattacharyya(student_logp, teacher_logp):
    return -((student_logp + teacher_logp) / 2).logsumexp(-1)


class Scaled:
    """A loss that is an object."""

    def __call__(self, student_logp, teacher_logp):
        return 3 * bhattacharyya(student_logp, teacher_logp)


def full(student, teacher, batch):
    """The loss on full logits, without the package."""
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch.get("attention_mask")}
    keep = batch["labels"][:, 1:] != -100
    p, q = (model(**inputs).logits[:, :-1][keep].softmax(-1) for model in (student, teacher))
    return -(p * q.detach()).sqrt().sum(-1).log().mean()


@pytest.mark.parametrize("chunk_size", [3, 1000])
@pytest.mark.parametrize("rows", ["ragged", "right", "left"])
@pytest.mark.parametrize("source", ["live", "cached"])
def test_it_is_the_loss_on_full_logits(tmp_path, source, rows, chunk_size):
    student, teacher = tiny.model(seed=1).train(), tiny.model()
    plain = Dataset.from_list([{"input_ids": ids[mask.index(1) :][: sum(mask)]} for ids, mask in
                               ((row["input_ids"], row["attention_mask"]) for row in padded("right", 0))])  # fmt: skip
    data = plain if rows == "ragged" else Dataset.from_list(padded(rows, 17))
    given = teacher
    if source == "cached":
        given = tmp_path / "cache"
        write_cache(teacher, plain, given, {"top_k": 10**6}, dtype="float32", batch_size=1)
    args = arguments(tmp_path / "out", losses={bhattacharyya: 1.0}, chunk_size=chunk_size)
    trainer = DistillationTrainer(student, given, args, train_dataset=data)
    loss = trainer.compute_loss(student, trainer.data_collator(list(data)))
    expected = full(student, teacher, collate(list(plain)))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    found, wanted = (torch.autograd.grad(total, list(student.parameters())) for total in (loss, expected))
    for ours, reference in zip(found, wanted, strict=True):
        assert torch.allclose(ours, reference, atol=1e-6)


def test_it_is_trained_logged_evaluated_and_saved_by_its_name(tmp_path):
    args = arguments(tmp_path, losses={bhattacharyya: 1.0, Scaled(): 0.5, forward_kl: 0.25, "cross_entropy": 0.1}, max_steps=2,
                     save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
                     metric_for_best_model="bhattacharyya", **CONSTANT)  # fmt: skip
    assert list(args.losses) == ["bhattacharyya", "Scaled", "forward_kl", "cross_entropy"]
    assert args.greater_is_better is False
    assert '"bhattacharyya": 1.0' in args.to_json_string()
    trainer = DistillationTrainer(tiny.model(seed=1), tiny.model(), args, train_dataset=RAGGED, eval_dataset=RAGGED)
    trainer.train()
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        parts = sum(weight * entry[name] for name, weight in args.losses.items())
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)
        assert entry["Scaled"] == pytest.approx(3 * entry["bhattacharyya"], rel=1e-5)
    assert trainer.state.best_metric == min(e["eval_bhattacharyya"] for e in trainer.state.log_history if "eval_loss" in e)
    assert (tmp_path / "checkpoint-2/training_args.bin").is_file()


def test_a_function_defined_anywhere_is_saved_as_its_name():
    def local(student_logp, teacher_logp):
        return forward_kl(student_logp, teacher_logp)

    args = DistillationArguments("out", losses={local: 1.0})
    assert copy.deepcopy(args).losses.keys() == {"local"}
    (kept,) = copy.deepcopy(args).losses
    assert kept.function is local
    torch.save(args.losses, file := io.BytesIO())
    file.seek(0)
    (name,) = torch.load(file, weights_only=False)
    assert type(name) is str
    assert name == "local"


def test_arguments_of_a_function_are_its_own(tmp_path):
    """Also where two are made of one function: their names must differ."""
    losses = {partial(generalized_jsd, beta=0.0): 1.0}
    trainers = [DistillationTrainer(tiny.model(seed=1), tiny.model(), arguments(tmp_path, losses=each), train_dataset=RAGGED)
                for each in (losses, {"forward_kl": 1.0})]  # fmt: skip
    one, other = (trainer.compute_loss(trainer.model, collate([RAGGED[1]])) for trainer in trainers)
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="losses: two are named generalized_jsd; rename one"):
        DistillationArguments("out", losses={**losses, partial(generalized_jsd, beta=0.1): 1.0})


def loss(student_logp, teacher_logp):
    return total_variation(student_logp, teacher_logp)


def block(student_logp, teacher_logp):
    return total_variation(student_logp, teacher_logp)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({lambda student, teacher: 0: 1.0}, "losses: .*lambda.* has no name to be logged by; define it by def"),
        ({loss: 1.0}, "losses: a function named loss, which is the name of something else in the log; rename it"),
        ({block: 1.0}, "losses: a function named block, which is a loss on states; rename it"),
        ({forward_kl: 1.0, "forward_kl": 1.0}, "losses: two are named forward_kl"),
        ({bhattacharyya: -1.0}, "none below zero"),
        ({bhattacharyya: "much"}, "losses: the weight of bhattacharyya: 'much' is not a finite number"),
        (
            {"bhattacharyya": 1.0},
            "losses: 'bhattacharyya' is not a loss; there are .*; in Python, pass your function",
        ),
    ],
)
def test_what_cannot_be_told_apart_is_refused(losses, message):
    with pytest.raises(ValueError, match=message):
        DistillationArguments("out", losses=losses)


def test_random_draws_cannot_serve_it(tmp_path):
    write_cache(tiny.model(), RAGGED, tmp_path / "cache", {"random": 5}, batch_size=2)
    args = arguments(tmp_path / "out", losses={bhattacharyya: 1.0})
    with pytest.raises(ValueError, match="losses: bhattacharyya cannot be had from random draws"):
        DistillationTrainer(tiny.model(seed=1), tmp_path / "cache", args, train_dataset=RAGGED)


def test_the_name_of_an_object():
    assert OwnLoss(Scaled()) == "Scaled"
    assert OwnLoss(partial(bhattacharyya)) == "bhattacharyya"
