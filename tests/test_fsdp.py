"""accelerate's own FSDP2 path gives one process's losses and weights, on two CPU processes that it takes for accelerators."""

import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_accelerate import launch, script
from test_distillation import CONSTANT, RAGGED, arguments
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_minitron import DistillationTrainer
from hf_minitron.__main__ import main
from hf_minitron.checkpoint.checkpoint import load_model
from hf_minitron.distillation.engine import sharded_loading
from hf_minitron.modeling import PrunedConfig, PrunedForCausalLM

pytestmark = pytest.mark.slow

TIED, TWICE, LORA, LOADED = {"tie_word_embeddings": True}, {"gradient_accumulation_steps": 2}, {"lora": True}, {"loaded": True}
STATES = {"losses": {"forward_kl": 1.0, "block": 0.5, "query_key": 0.1}, "layer_pairs": "uniform"}
AVERAGED = {"ema_decay": 0.2}
SAVED = {"save_strategy": "steps", "save_steps": 2}
# What a training changes: sizes of both models, and arguments; and whether adapters are trained, models loaded from folders,
# which each process does by itself, and training interrupted.
CASES = {
    "plain": ({}, {}, {}),
    "tied": (TIED, {}, {}),
    "accumulated": ({}, TWICE, {}),
    "tied, accumulated": (TIED, TWICE, {}),
    "states, checkpointed": ({}, STATES | {"gradient_checkpointing": True}, {}),
    "lora": ({}, TWICE, LORA),
    "tied, lora": (TIED, {}, LORA),
    "evaluated": ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}, {}),
    "labels": ({}, {"losses": {"cross_entropy": 1.0}}, {}),
    "resumed": ({}, SAVED, {"interrupted": True}),
    "averaged": (TIED, AVERAGED | {"eval_strategy": "steps", "eval_steps": 1}, {}),
    "averaged, resumed": ({}, SAVED | AVERAGED, {"interrupted": True}),
    "loaded": ({}, TWICE, LOADED),
    "tied, loaded": (TIED | {"vocab_size": 100}, {}, LOADED),
    "states, loaded": ({}, STATES, LOADED),
    "loaded, resumed": ({}, SAVED, LOADED | {"interrupted": True}),
    "experts, loaded": ({"model_type": "mixtral"}, {}, LOADED | {"dtype": torch.float32}),  # as they need
    "other names, loaded": ({"model_type": "gpt_neox"}, {}, LOADED),
    "nonuniform, loaded": ({"nonuniform": True}, {}, LOADED),
}
FSDP = {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}


class Gradients(TrainerCallback):
    """Looks at the gradients of a micro-batch that is not the last of its step."""

    def on_substep_end(self, args, state, control, model, **kwargs):
        own = [parameter.grad for parameter in model.parameters()]
        self.sharded = all(isinstance(gradient, DTensor) for gradient in own)
        if self.sharded:
            numbers = torch.cat([gradient.to_local().flatten() for gradient in own])
            self.dtype, self.precise = str(numbers.dtype), (numbers != numbers.bfloat16()).float().mean().item()


class Interrupts(TrainerCallback):
    """Stops training after two steps."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 2


def student_of(sizes, dtype):
    if "nonuniform" in sizes:
        torch.manual_seed(2)
        layers = {"layer_num_attention_heads": [4, 2, 4], "layer_intermediate_size": [72, 0, 40]}
        return PrunedForCausalLM(PrunedConfig.from_stock(tiny.config(), **layers)).to(dtype)
    return tiny.model(seed=1, dtype=dtype, **({} if "model_type" in sizes else {"hidden_size": 24}), **sizes)


def stored(model, folder):
    """Save a model once for all processes, before any arguments tell Transformers how models are sharded."""
    several = torch.distributed.is_initialized()
    if not several or torch.distributed.get_rank() == 0:
        model.save_pretrained(folder)
    if several:
        torch.distributed.barrier()
    return folder


def loaded(folder, args, dtype, trained):
    """Return a model as the command would: from its folder, by every process."""
    sharding = sharded_loading(args, AutoConfig.from_pretrained(folder), trained)
    assert (sharding is not None) == bool(args.fsdp)
    return load_model(folder, dtype, distributed_config=sharding)


def trainer_of(case, folder, batch, dtype, callbacks, **changes):
    unset_hf_deepspeed_config()  # of a case before
    sizes, settings, how = CASES[case]
    values = {"max_steps": 3, "per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
    student, teacher = student_of(sizes, dtype), tiny.model(dtype=dtype, **({} if "nonuniform" in sizes else sizes))
    if "loaded" in how:
        student, teacher = stored(student, folder / "student"), stored(teacher, folder / "teacher")
    args = arguments(folder, **values, train_sampling_strategy="sequential", **CONSTANT, **settings, **changes)
    if "loaded" in how:
        student, teacher = loaded(student, args, dtype, trained=True).train(), loaded(teacher, args, dtype, trained=False)
        assert isinstance(student, FSDPModule) == bool(args.fsdp)
    if "lora" in how:
        torch.manual_seed(3)
        student = get_peft_model(student, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        student = student.to(dtype)
    data = {"train_dataset": RAGGED, "eval_dataset": RAGGED.select(range(4))}
    return DistillationTrainer(student, teacher, args, callbacks=callbacks, **data)


def trained(case, folder, batch, callbacks=None, dtype=None, **changes):
    """Train as a case says, on so many rows a process; return what was logged, and the weights after it."""
    dtype = dtype or CASES[case][2].get("dtype", torch.float64)
    interrupted = "interrupted" in CASES[case][2]
    if interrupted:
        trainer_of(case, folder, batch, dtype, [Interrupts()], **changes).train()
    trainer = trainer_of(case, folder, batch, dtype, callbacks, **changes)
    trainer.train(resume_from_checkpoint=interrupted)
    assert trainer.state.global_step == 3
    names = ("loss", "grad_norm", "eval_loss", *trainer.args.losses)
    history = [[entry[name] for name in names if name in entry] for entry in trainer.state.log_history[:-1]]
    return history, trainer.accelerator.get_state_dict(trainer.model_wrapped)


SCRIPT = """
import json, os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import gloo
gloo.present_as_accelerators()
import test_fsdp, torch
from hf_minitron.checkpoint.checkpoint import load_model
out = Path(sys.argv[1])
for number, case in enumerate(test_fsdp.CASES):
    history, state = test_fsdp.trained(case, out / str(number), 1, **test_fsdp.FSDP)
    if torch.distributed.get_rank() == 0:
        test_fsdp.keep(out / case, history, state)
seen = test_fsdp.Gradients()
history, _ = test_fsdp.trained("accumulated", out / "bf16", 1, [seen], torch.float32, bf16=True, **test_fsdp.FSDP)
if torch.distributed.get_rank() == 0:
    (out / "bf16.json").write_text(json.dumps({{**vars(seen), "history": history}}))
os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")  # what `accelerate config` suggests
weights = load_model(next(out.glob("*/teacher")), torch.float64).state_dict()
torch.save(weights, out / f"weights-{{torch.distributed.get_rank()}}.pt")
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
    loss, weight = (1e-4, 1e-3) if "dtype" in CASES[case][2] else (1e-6, 1e-8)
    for own, expected in zip(found, history, strict=True):
        assert own == pytest.approx(expected, rel=loss)
    weights = load_file(sharded / f"{case}.safetensors")
    assert weights.keys() == state.keys()
    for name, value in state.items():
        assert torch.allclose(weights[name], value, atol=weight), name


def test_gradients_are_reduced_in_float32_and_stay_sharded(sharded, tmp_path):
    """Of every micro-batch: waiting for the last one would keep the gradients of the whole model on every process."""
    seen = json.loads((sharded / "bf16.json").read_text())
    assert seen["sharded"]
    assert seen["dtype"] == "torch.float32"
    assert seen["precise"] > 0.3, "bfloat16 would hold them"
    history, _ = trained("accumulated", tmp_path, 2)
    assert seen["history"][0] == pytest.approx(history[0], rel=0.05)


def test_every_process_loads_weights_that_nobody_shards(sharded):
    """As scores need them: accelerate leaves them to the first process, and the others would score zeros."""
    one, two = (torch.load(sharded / f"weights-{rank}.pt") for rank in (0, 1))
    assert any(weight.abs().max() > 0 for weight in one.values())
    assert all(torch.equal(two[name], weight) for name, weight in one.items())


COMMAND = """
import os, sys
os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP")
os.environ.update(FSDP_STATE_DICT_TYPE="FULL_STATE_DICT", FSDP_CPU_RAM_EFFICIENT_LOADING="true")  # as `accelerate launch` does
sys.path.insert(0, {tests!r})
import gloo
gloo.present_as_accelerators()
from hf_minitron.command import run_stages
from hf_minitron.recipe import load_recipe
from hf_minitron.stages.every import STAGES
from pathlib import Path
from hf_minitron.stages import trained
from torch.distributed.fsdp import FSDPModule
load = trained.load_model


def load_shard(*args, **kwargs):
    model = load(*args, **kwargs)
    assert isinstance(model, FSDPModule)
    return model


trained.load_model = load_shard
sections = {{name: stage.args for name, stage in STAGES.items()}}
run_stages(load_recipe(Path(sys.argv[1]), {{}}, sections), ["score", "prune", "distill"])
"""


def test_the_command_trains_and_saves_a_sharded_student(project, tmp_path):
    """Each process loads its shard of both models, and the first one saves the whole student."""
    students = []
    for processes, batch in ((1, 2), (2, 1)):
        run, recipe = tmp_path / str(processes), tmp_path / f"{processes}.yaml"
        distill = {**project["recipe"]["distill"], "per_device_train_batch_size": batch, "max_steps": 3}
        recipe.write_text(yaml.safe_dump({**project["recipe"], "run": str(run), "distill": distill}))
        if processes == 2:
            launch(2, script(tmp_path, COMMAND), recipe)
        else:
            for stage in ("score", "prune", "distill"):
                assert main([stage, str(recipe)]) == 0
        students.append(load_file(run / "distill/student/model.safetensors"))
    one, two = students
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert two[name].dtype == weight.dtype
        assert torch.allclose(two[name], weight, atol=1e-4), name
