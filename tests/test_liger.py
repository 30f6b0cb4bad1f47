"""Liger's fused loss, an optional package, gives the loss and the weights of the chunked one, or is refused by name.

`pip install liger-kernel --no-deps` runs what is skipped without it.
"""

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_distillation import CONSTANT, RAGGED, arguments

from hf_minitron import DistillationTrainer
from hf_minitron.distillation.engine import prepare_engine
from hf_minitron.distillation.losses.output import OutputLosses
from hf_minitron.distillation.signals import DenseSignal
from hf_minitron.head import Head

LIGER = find_spec("liger_kernel") is not None
needs_liger = pytest.mark.skipif(not LIGER, reason="liger-kernel is not installed")
LOSSES = [{"forward_kl": 1.0}, {"reverse_kl": 0.7, "cross_entropy": 0.2}, {"jsd": 2.0}]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """What is refused for its settings is refused for them, installed or not."""
    monkeypatch.setattr("hf_minitron.distillation.losses.liger.is_liger_kernel_available", lambda: True)


@needs_liger
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("losses", LOSSES, ids=lambda losses: "+".join(losses))
def test_it_is_the_chunked_loss(losses, temperature):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(50, 16), torch.randn(97, 16), torch.randn(97)
    signal = DenseSignal(torch.randn(50, 24), Head(torch.randn(97, 24), torch.randn(97)))
    targets, found = torch.randint(97, (50,)), []
    for liger in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        made = OutputLosses(losses, temperature, 0.3, 0.0, 16, liger)
        total, sums = made(leaves[0], Head(*leaves[1:]), signal, targets)
        found.append((total, sums, torch.autograd.grad(total * 0.5, leaves)))
    (expected, parts, gradients), (total, sums, own) = found
    assert total.item() == pytest.approx(expected.item(), rel=1e-5)
    assert {name: part.item() for name, part in sums.items()} == pytest.approx(
        {n: p.item() for n, p in parts.items()}, rel=1e-5
    )
    for gradient, other in zip(gradients, own, strict=True):
        assert torch.allclose(gradient, other, atol=1e-5)


def trainer_of(folder, sizes=None, teacher=None, **changes):
    values = {"max_steps": 3, "per_device_train_batch_size": 2, **CONSTANT, "losses": LOSSES[1], "temperature": 2.0}
    data = {"train_dataset": RAGGED, "eval_dataset": RAGGED.select(range(4))}
    student = tiny.model(seed=1, dtype=torch.float32, **sizes or {})
    teacher = teacher or tiny.model(dtype=torch.float32, **sizes or {})
    return DistillationTrainer(student, teacher, arguments(folder, **(values | changes)), **data)


@needs_liger
@pytest.mark.parametrize("tied", [False, True])
def test_a_training_with_it_ends_at_the_same_weights(tmp_path, tied):
    settings = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "chunk_size": 8,
                "optim": "sgd", "learning_rate": 0.1}  # fmt: skip
    trainers = []
    for liger in (False, True):
        trainers.append(trainer_of(tmp_path, {"tie_word_embeddings": tied}, use_liger_loss=liger, **settings))
        trainers[-1].train()
    histories = [[{k: v for k, v in entry.items() if "loss" in k or "kl" in k or "entropy" in k}
                  for entry in trainer.state.log_history[:-1]] for trainer in trainers]  # fmt: skip
    for expected, found in zip(*histories, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    for (name, weight), (_, other) in zip(*(trainer.model.named_parameters() for trainer in trainers), strict=True):
        assert torch.allclose(weight, other, atol=1e-5), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"mse": 1.0}}, "use_liger_loss: losses has mse, and Liger one of forward_kl, reverse_kl, jsd"),
        (
            {"losses": {"forward_kl": 1.0, "reverse_kl": 1.0}},
            "use_liger_loss: losses has forward_kl, reverse_kl, and Liger one",
        ),
        ({"losses": {"forward_kl": 1.0, "block": 1.0}}, "use_liger_loss: losses has forward_kl, block, and Liger one"),
        ({"losses": {"cross_entropy": 1.0}}, "use_liger_loss: losses has cross_entropy, and Liger one"),
        ({"label_smoothing_factor": 0.1}, "use_liger_loss: Liger has no label_smoothing_factor"),
        ({"top_k": 5}, "use_liger_loss: Liger has no top_k"),
    ],
)
def test_settings_without_an_equal_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **({"losses": LOSSES[1], "use_liger_loss": True} | changes))


def test_models_and_engines_without_an_equal_are_refused(tmp_path, monkeypatch):
    larger = tiny.model(dtype=torch.float32, vocab_size=tiny.config().vocab_size + 8)
    with pytest.raises(ValueError, match=r"use_liger_loss: the vocabularies have \d+ and \d+ entries"):
        trainer_of(tmp_path, teacher=larger, use_liger_loss=True)
    with pytest.raises(ValueError, match="use_liger_loss: the student's logits have a scale or a softcap"):
        trainer_of(tmp_path, {"model_type": "gemma2"}, use_liger_loss=True)
    accelerator = SimpleNamespace(state=SimpleNamespace(), is_fsdp2=True)
    args = SimpleNamespace(n_gpu=1, ema_decay=None, use_liger_loss=True)
    with pytest.raises(ValueError, match="use_liger_loss: not with FSDP or DeepSpeed"):
        prepare_engine(SimpleNamespace(args=args, accelerator=accelerator, is_deepspeed_enabled=False))
    monkeypatch.setattr("hf_minitron.distillation.losses.liger.is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match="use_liger_loss: pip install liger-kernel first"):
        arguments(tmp_path, use_liger_loss=True)
