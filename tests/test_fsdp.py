"""accelerate's own FSDP2 path gives one process's losses and weights, on two CPU processes that it takes for accelerators."""

import json
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_accelerate import launch, script
from test_distillation import CONSTANT, RAGGED, arguments
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_minitron import DistillationTrainer

pytestmark = pytest.mark.slow

TIED, STATES = {"tie_word_embeddings": True}, {"losses": {"forward_kl": 1.0, "block": 0.5, "query_key": 0.1}}
# What a training changes: sizes of both models, arguments, and whether adapters are trained.
CASES = {
    "plain": ({}, {}, False),
    "tied": (TIED, {}, False),
    "accumulated": ({}, {"gradient_accumulation_steps": 2}, False),
    "tied, accumulated": (TIED, {"gradient_accumulation_steps": 2}, False),
    "states, checkpointed": ({}, STATES | {"layer_pairs": "uniform", "gradient_checkpointing": True}, False),
    "lora": ({}, {"gradient_accumulation_steps": 2}, True),
    "tied, lora": (TIED, {}, True),
    "evaluated": ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}, False),
    "labels": ({}, {"losses": {"cross_entropy": 1.0}}, False),
}  # fmt: skip
FSDP = {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}


class Gradients(TrainerCallback):
    """Looks at the gradients of a micro-batch that is not the last of its step."""

    def on_substep_end(self, args, state, control, model, **kwargs):
        own = [parameter.grad for parameter in model.parameters()]
        self.sharded = all(isinstance(gradient, DTensor) for gradient in own)
        if self.sharded:
            numbers = torch.cat([gradient.to_local().flatten() for gradient in own])
            self.dtype, self.precise = str(numbers.dtype), (numbers != numbers.bfloat16()).float().mean().item()


def trained(case, folder, batch, callbacks=None, dtype=torch.float64, **changes):
    """Train as a case says, on so many rows a process; return what was logged, and the weights after it."""
    sizes, settings, adapters = CASES[case]
    values = {"max_steps": 3, "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    values |= {"train_sampling_strategy": "sequential", **CONSTANT, **settings, **changes}
    student = tiny.model(seed=1, hidden_size=24, dtype=dtype, **sizes)
    if adapters:
        torch.manual_seed(3)
        student = get_peft_model(student, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        student = student.double()
    data = {"train_dataset": RAGGED, "eval_dataset": RAGGED.select(range(4))}
    trainer = DistillationTrainer(
        student, tiny.model(dtype=dtype, **sizes), arguments(folder, **values), callbacks=callbacks, **data
    )
    trainer.train()
    names = ("loss", "grad_norm", "eval_loss", *trainer.args.losses)
    history = [[entry[name] for name in names if name in entry] for entry in trainer.state.log_history[:-1]]
    return history, trainer.accelerator.get_state_dict(trainer.model_wrapped)


SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import gloo
gloo.present_as_accelerators()
import test_fsdp, torch
for number, case in enumerate(test_fsdp.CASES):
    history, state = test_fsdp.trained(case, f"{{sys.argv[1]}}/{{number}}", 1, **test_fsdp.FSDP)
    if torch.distributed.get_rank() == 0:
        test_fsdp.keep(f"{{sys.argv[1]}}/{{case}}", history, state)
seen = test_fsdp.Gradients()
history, _ = test_fsdp.trained(
    "accumulated", f"{{sys.argv[1]}}/bf16", 1, [seen], torch.float32, bf16=True, **test_fsdp.FSDP
)
if torch.distributed.get_rank() == 0:
    open(f"{{sys.argv[1]}}/bf16.json", "w").write(json.dumps({{**vars(seen), "history": history}}))
torch.distributed.destroy_process_group()
"""


def keep(path, history, state):
    """Write what `trained` has returned."""
    Path(f"{path}.json").write_text(json.dumps(history))
    save_file({name: value.contiguous().clone() for name, value in state.items()}, f"{path}.safetensors")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Every case, trained by two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    launch(2, script(folder, SCRIPT), folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_fsdp2_of_accelerate_equals_one_process(sharded, tmp_path, case):
    history, state = trained(case, tmp_path, 2)
    found = json.loads((sharded / f"{case}.json").read_text())
    assert len(found) >= 3
    for own, expected in zip(found, history, strict=True):
        assert own == pytest.approx(expected, rel=1e-6)
    weights = load_file(sharded / f"{case}.safetensors")
    assert weights.keys() == state.keys()
    for name, value in state.items():
        assert torch.allclose(weights[name], value, atol=1e-8), name


def test_gradients_are_reduced_in_float32_and_stay_sharded(sharded, tmp_path):
    """Of every micro-batch: waiting for the last one would keep the gradients of the whole model on every process."""
    seen = json.loads((sharded / "bf16.json").read_text())
    assert seen["sharded"]
    assert seen["dtype"] == "torch.float32"
    assert seen["precise"] > 0.3, "bfloat16 would hold them"
    history, _ = trained("accumulated", tmp_path, 2)
    assert seen["history"][0] == pytest.approx(history[0], rel=0.05)
