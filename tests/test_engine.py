"""What the trainer sets of accelerate's engine, and what weights it trains."""

import logging
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_distillation import CONSTANT, RAGGED, arguments
from transformers import TrainerCallback, training_args

from hf_minitron import DistillationArguments, DistillationTrainer, recipe_file
from hf_minitron.distillation.engine import prepare_engine, trains_whole_only
from hf_minitron.distillation.float32 import PLACES
from hf_minitron.stages import distill


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_trained_in_float32(tmp_path, caplog, dtype):
    """As the same weights loaded in float32 are; in 16 bits a small step would be rounded away."""
    caplog.set_level(logging.WARNING)
    stored, trained = tiny.model(seed=1, dtype=dtype), []
    for student in (stored, tiny.model(seed=1, dtype=dtype).float()):
        values = {"max_steps": 2, "per_device_train_batch_size": 2, **CONSTANT, "learning_rate": 1e-6}
        trainer = DistillationTrainer(student, tiny.model(), arguments(tmp_path, **values), train_dataset=RAGGED)
        trainer.train()
        trained.append(dict(student.named_parameters()))
    assert [record.message for record in caplog.records if "float32" in record.message] == [
        "model: its weights of 16 bits are trained, and saved, in float32; bf16=True computes in bfloat16"
    ]
    for name, weight in trained[0].items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, trained[1][name]), name
        assert not torch.equal(weight, weight.to(dtype)), f"{name} has not moved"


@pytest.mark.parametrize(
    ("sizes", "processes", "whole"),
    [
        ({}, 2, False),
        ({}, 7, True),  # 24 rows of queries: six processes have four each, the last one none
        ({"tie_word_embeddings": True}, 2, True),  # 99 tokens
        ({"tie_word_embeddings": True, "vocab_size": 100}, 2, False),
    ],
)
def test_some_students_are_loaded_whole(sizes, processes, whole):
    assert trains_whole_only(tiny.model(**sizes), processes) == whole


@pytest.mark.parametrize("changes", [{"torch_compile": True, "torch_compile_backend": "eager"}, {"tf32": True}])
def test_tf32_ends_with_the_training_that_asks_for_it(tmp_path, monkeypatch, changes):
    """As on a GPU that has it: Transformers switches it on where the arguments are made, for all of the process."""
    (place, name), seen = PLACES[0], []
    before = getattr(place, name)
    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=2, **changes)
    assert getattr(place, name) == before

    class Looks(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append(getattr(place, name))

    trainer = DistillationTrainer(tiny.model(seed=1), tiny.model(), args, train_dataset=RAGGED, callbacks=[Looks()])
    trainer.train()
    assert seen == ["tf32"]
    assert getattr(place, name) == before


@pytest.mark.skipif(
    "activation_checkpointing" not in DistillationArguments.__dataclass_fields__, reason="an older transformers"
)
def test_activation_kwargs_that_do_nothing_are_refused(tmp_path):
    kwargs = {"activation_checkpointing_kwargs": {"every_n_layers": 2}}
    arguments(tmp_path, activation_checkpointing=True, **kwargs)
    with pytest.raises(
        ValueError, match="activation_checkpointing_kwargs: .* has no effect without activation_checkpointing: true"
    ):
        arguments(tmp_path, **kwargs)
    offload = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"offload": True}}
    with pytest.raises(
        ValueError, match="activation_checkpointing_kwargs: offload keeps activations in host memory, where a CPU"
    ):
        arguments(tmp_path, **offload)


def test_a_recipe_may_ask_for_fsdp():
    """As `TrainingArguments` documents it, whose declared type is text."""
    with pytest.raises(ValueError, match="fsdp: needs several processes: accelerate launch"):
        recipe_file.arguments({"text": "a.jsonl", "max_steps": 1, "fsdp": True}, "distill", distill.Args)


def test_flat_parameters_are_refused():
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    accelerator = SimpleNamespace(state=state, is_fsdp2=False)
    trainer = SimpleNamespace(args=SimpleNamespace(n_gpu=1, ema_decay=None, use_liger_loss=False), accelerator=accelerator)
    with pytest.raises(ValueError, match="fsdp_config: version 1, whose flat parameters .*; set version: 2"):
        prepare_engine(trainer)
