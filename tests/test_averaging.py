"""The average of weights (EMA): what it is, where it is used, and how a resumed training goes on."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_distillation import CONSTANT, RAGGED, arguments
from transformers import TrainerCallback

from hf_minitron import DistillationTrainer
from hf_minitron.distillation.engine import prepare_engine

DECAY, STEPS = 0.2, 4


class Weights(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self):
        self.after = []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.after.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})


def student_of(adapters):
    student = tiny.model(seed=1, dtype=torch.float32)
    if not adapters:
        return student
    torch.manual_seed(3)
    return get_peft_model(student, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False))


def trainer_of(folder, adapters=False, callbacks=None, **changes):
    values = {"max_steps": STEPS, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2, **CONSTANT}
    data = {"train_dataset": RAGGED, "eval_dataset": RAGGED.select(range(4))}
    student, teacher = student_of(adapters), tiny.model(dtype=torch.float32)
    return DistillationTrainer(student, teacher, arguments(folder, **(values | changes)), callbacks=callbacks, **data)


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_the_student_is_the_average_of_its_weights(tmp_path, adapters):
    plain, seen = trainer_of(tmp_path / "plain", adapters), Weights()
    expected = weights_of(plain.model)
    plain.add_callback(seen)
    plain.train()
    averages = []
    for step, weights in enumerate(seen.after, 1):
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = {name: decay * mean + (1 - decay) * weights[name] for name, mean in expected.items()}
        averages.append(expected)
    trainer, same = trainer_of(tmp_path / "average", adapters, ema_decay=DECAY, eval_strategy="steps", eval_steps=2), Weights()
    trainer.add_callback(same)
    trainer.train()
    for name, weight in weights_of(trainer.model).items():
        assert torch.allclose(weight, expected[name], atol=1e-7), name
        assert torch.equal(same.after[-1][name], seen.after[-1][name]), f"{name}: training itself has changed"
        assert not torch.allclose(weight, seen.after[-1][name], atol=1e-4), name
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    with torch.no_grad():
        for loss, average in zip(losses, (averages[1], averages[3]), strict=True):
            for name, parameter in plain.model.named_parameters():
                parameter.copy_(average.get(name, parameter))
            assert plain.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-6)
    stored = load_file(tmp_path / f"average/checkpoint-4/{'adapter_model' if adapters else 'model'}.safetensors")
    name = next(name for name in stored if "q_proj" in name)
    (inside,) = (other for other in expected if other.replace(".default", "") == name)
    assert torch.allclose(stored[name], expected[inside], atol=1e-7)


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_a_resumed_average_is_that_of_the_uninterrupted_training(tmp_path, adapters):
    whole = trainer_of(tmp_path / "a", adapters, ema_decay=DECAY)
    whole.train()
    resumed = trainer_of(tmp_path / "b", adapters, ema_decay=DECAY)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    expected, found = weights_of(whole.model), weights_of(resumed.model)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    done = trainer_of(tmp_path / "c", adapters, ema_decay=DECAY)
    done.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))
    assert all(torch.equal(weight, expected[name]) for name, weight in weights_of(done.model).items())


def test_the_best_average_is_what_training_leaves(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.5}
    trainer = trainer_of(tmp_path, ema_decay=DECAY, **settings)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2"), "the last one is the best, which shows nothing"
    stored = load_file(tmp_path / "checkpoint-2/model.safetensors")
    assert all(torch.equal(weight, stored[name]) for name, weight in weights_of(trainer.model).items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_an_average_that_cannot_be_is_refused(tmp_path):
    trainer_of(tmp_path).train()
    with pytest.raises(ValueError, match=r"ema_decay: .*checkpoint-2 has no trained.safetensors, for it was trained without"):
        trainer_of(tmp_path, ema_decay=DECAY).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match=r"ema_decay: 1.0 must be at least 0 and below 1"):
        arguments(tmp_path, ema_decay=1.0)
    accelerator = SimpleNamespace(state=SimpleNamespace(), is_fsdp2=True)
    args = SimpleNamespace(n_gpu=1, ema_decay=DECAY, load_best_model_at_end=True)
    trainer = SimpleNamespace(args=args, accelerator=accelerator, is_deepspeed_enabled=False)
    with pytest.raises(ValueError, match=r"load_best_model_at_end: with FSDP it loads weights that ema_decay has not"):
        prepare_engine(trainer)
    accelerator = SimpleNamespace(state=SimpleNamespace(), is_fsdp2=False)
    args = SimpleNamespace(n_gpu=1, ema_decay=DECAY)
    trainer = SimpleNamespace(args=args, accelerator=accelerator, is_deepspeed_enabled=True)
    with pytest.raises(ValueError, match=r"ema_decay: not with DeepSpeed"):
        prepare_engine(trainer)
