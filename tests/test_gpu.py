"""On a GPU everything gives what it gives on a CPU: `pytest -m gpu`, the first part of benchmarks/gpu.sh.

`HF_MINITRON_REHEARSAL=1` runs what can be run without one on the CPU, against itself.
"""

import gc
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_distillation import CONSTANT, RAGGED
from transformers.utils import enable_tf32

import hf_minitron
from hf_minitron import DistillationArguments, DistillationTrainer, calibrate
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.data.packing import token_blocks
from hf_minitron.distillation.batch import collate
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.losses.tokens import CROSS_ENTROPY, TOKEN_LOSSES
from hf_minitron.distillation.states import STATE_LOSSES
from hf_minitron.evaluation.text import perplexity
from hf_minitron.importance.sequential import sequential_least_squares
from hf_minitron.plan import make_plan
from hf_minitron.pruning.prune import prune_checkpoint, prune_model

REHEARSAL = bool(os.environ.get("HF_MINITRON_REHEARSAL"))
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPU.type == "cpu" and not REHEARSAL, reason="there is no GPU"),
]
needs_cuda = pytest.mark.skipif(GPU.type == "cpu", reason="there is no GPU")
STUDENT = {"seed": 1, "hidden_size": 24, "intermediate_size": 50}
# Families whose modules differ most: routed experts, Conv1D, latent attention, soft caps, fused projections, sinks.
FAMILIES = ("llama", "mixtral", "deepseek_v3", "gpt2", "gpt_neox", "gemma2", "phi3", "gpt_oss", "qwen2_moe")


@pytest.fixture(autouse=True)
def float32_is_float32():
    """Transformers switches TF32 on with torch_compile, for all of the process."""
    enable_tf32(False)
    yield


def trainer_on(device, folder, teacher=None, student=None, dtype=torch.float64, **changes):
    values = {"bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no"}
    values |= {"max_steps": 3, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential", **CONSTANT}
    args = DistillationArguments(str(folder), use_cpu=device.type == "cpu", **(values | changes))
    student = tiny.model(dtype=dtype, **STUDENT) if student is None else student
    return DistillationTrainer(student, teacher or tiny.model(dtype=dtype), args, train_dataset=RAGGED)


def trained(device, folder, **changes):
    """Return the logged losses and gradient norms of a short training, and the weights after it."""
    trainer = trainer_on(device, folder, **changes)
    trainer.train()
    assert next(trainer.model.parameters()).device.type == device.type
    names = ("loss", "grad_norm", *trainer.args.losses)
    history = [entry[name] for entry in trainer.state.log_history for name in names if name in entry]
    return history, {name: parameter.detach().cpu() for name, parameter in trainer.model.named_parameters()}


def assert_alike(tmp_path, tolerance=2e-5, **changes):  # norms and rotary embeddings are float32 in every dtype
    (expected, weights), (found, own) = (trained(torch.device(d), tmp_path / d, **changes) for d in ("cpu", GPU.type))
    assert len(expected) >= 6
    assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
    worst = max((own[name] - weight).abs().max().item() for name, weight in weights.items())
    assert worst <= CONSTANT["learning_rate"] / 10, worst  # Adam makes steps of equal size of the smallest gradients


@pytest.mark.parametrize("loss", [*TOKEN_LOSSES, CROSS_ENTROPY, *STATE_LOSSES])
def test_every_loss(tmp_path, loss):
    weights = {"forward_kl": 1.0, loss: 0.5}
    assert_alike(tmp_path, losses=weights, layer_pairs="uniform")


@pytest.mark.parametrize("method", [{"random": 20}, {"top_k": 9}, {"top_k": 99}])
def test_every_cache(tmp_path, method):
    write_cache(tiny.model(dtype=torch.float64), RAGGED, tmp_path / "cache", method, batch_size=2)
    assert_alike(tmp_path, teacher=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2},
        {"activation_checkpointing": True},
        {"temperature": 2.0, "losses": {"forward_kl": 0.7, CROSS_ENTROPY: 0.3}},
        {"top_k": 7},
        {"chunk_size": 3},
        {"label_smoothing_factor": 0.1, "losses": {CROSS_ENTROPY: 1.0}},
        {"balance": "static", "losses": {"forward_kl": 1.0, "block": 2.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_setting(tmp_path, changes):
    if "activation_checkpointing" in changes and "activation_checkpointing" not in DistillationArguments.__dataclass_fields__:
        changes = {"gradient_checkpointing": True}
    assert_alike(tmp_path, **changes)


def test_an_adapter(tmp_path):
    def student():
        torch.manual_seed(3)
        base = tiny.model(**STUDENT)
        made = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
        return made.double()

    histories = [trained(torch.device(d), tmp_path / d, student=student())[0] for d in ("cpu", GPU.type)]
    assert histories[1] == pytest.approx(histories[0], rel=2e-5)


def test_mixed_precision_is_near_float32(tmp_path):
    expected, _ = trained(torch.device("cpu"), tmp_path / "a", dtype=torch.float32)
    found, _ = trained(GPU, tmp_path / "b", dtype=torch.float32, bf16=True)
    assert found == pytest.approx(expected, rel=0.05)


@needs_cuda
@pytest.mark.parametrize("changes", [{"fp16": True}, {"torch_compile": True, "bf16": True}], ids=["fp16", "compiled"])
def test_what_only_gpus_do_is_near_float32(tmp_path, changes):
    expected, _ = trained(torch.device("cpu"), tmp_path / "a", dtype=torch.float32)
    found, _ = trained(GPU, tmp_path / "b", dtype=torch.float32, **changes)
    assert found[0] == pytest.approx(expected[0], rel=0.05)
    assert found[-1] == pytest.approx(expected[-1], rel=0.2)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_scores_and_students(tmp_path, model_type):
    """Resident and streamed scores, and students with corrections in memory and on disk, which are made on the GPU."""
    teacher = tiny.model(model_type, dtype=torch.float32)
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
    expected = calibrate(teacher, tiny.blocks(), moments=True)
    streamed = calibrate(tmp_path / "teacher", tiny.blocks(), moments=True, device=GPU, save_to=tmp_path / "statistics")
    resident = calibrate(tiny.model(model_type, dtype=torch.float32).to(GPU), tiny.blocks(), moments=True)
    for statistics in (resident, streamed):
        for axis, score in expected.scores.items():
            assert torch.allclose(statistics.scores[axis].cpu(), score, rtol=1e-3, atol=1e-5, equal_nan=True), axis
        for name, moment in expected.moments.items():
            assert torch.allclose(statistics.moments[name].cpu(), moment, rtol=1e-3, atol=1e-4), name
    shape = Architecture.of(teacher.config).shape
    plan = make_plan(expected.scores, shape, shape.cut_to(tiny.target(shape)))
    corrected = prune_model(teacher, plan, expected).state_dict()
    on_gpu = prune_model(tiny.model(model_type, dtype=torch.float32).to(GPU), plan, expected).state_dict()
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", statistics=streamed)
    on_disk = type(teacher).from_pretrained(tmp_path / "student").state_dict()
    for name, value in corrected.items():
        assert torch.allclose(on_gpu[name].cpu(), value, rtol=1e-2, atol=1e-3), name
        if name in on_disk:
            assert torch.allclose(on_disk[name], value, rtol=1e-2, atol=1e-3), name


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sequential_fits(model_type):
    """In float32, and with weights of bfloat16, whose products a GPU makes in TF32."""
    teacher = tiny.model(model_type, dtype=torch.float32)
    shape, blocks = Architecture.of(teacher.config).shape, tiny.blocks(60)
    statistics = calibrate(teacher, blocks, moments=True)
    plan = make_plan(statistics.scores, shape, shape.cut_to(tiny.target(shape)))
    for dtype, tolerance in ((torch.float32, 1e-2), (torch.bfloat16, 5e-2)):
        students = [prune_model(teacher.to(dtype), plan, statistics) for _ in range(2)]
        for device, student in zip(("cpu", GPU), students, strict=True):
            sequential_least_squares(teacher, student, plan, blocks, device=device)
        expected, found = (student.state_dict() for student in students)
        for name, value in expected.items():
            distance = (found[name].cpu() - value).float().norm() / value.float().norm().clamp(min=1e-6)
            assert distance < tolerance, (name, dtype, distance)


def test_perplexity():
    model = tiny.model(dtype=torch.float32)
    expected = perplexity(model, tiny.blocks(), chunk_size=5).value
    assert perplexity(model.to(GPU), tiny.blocks(), chunk_size=5).value == pytest.approx(expected, rel=1e-5)


ATTENTION = [
    "eager",
    pytest.param("flex_attention", marks=needs_cuda),
    pytest.param(
        "flash_attention_2",
        marks=pytest.mark.skipif(not importlib.util.find_spec("flash_attn"), reason="flash-attn is not installed"),
    ),
]


@pytest.mark.parametrize("attention", ATTENTION)
def test_attention_of_packed_sequences(attention):
    """Documents do not see each other, whatever computes attention: bf16, real head sizes."""
    sizes = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    model = tiny.model(dtype=torch.float32, **sizes).to(GPU, torch.bfloat16)
    documents = Dataset.from_dict({"text": [f"w{n} " * n for n in (30, 50, 48)]})
    blocks = token_blocks(documents, tiny.tokenizer(), 64, cross_documents=False).with_format("torch")
    batch = {name: value.to(GPU) for name, value in collate(list(blocks)).items() if name != "labels"}
    assert (batch["position_ids"] == 0).sum() > len(blocks), "no packed sequence holds two documents"
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        model.set_attn_implementation(attention)
        found = model(**batch, use_cache=False).logits
        alone = model(input_ids=batch["input_ids"], use_cache=False).logits
    spread = expected.float().std()
    assert (found - expected).float().abs().mean() < 0.02 * spread
    assert (alone - expected).float().abs().mean() > 0.05 * spread


@needs_cuda
@pytest.mark.parametrize("teacher", ["live", "cached", "states"])
def test_a_micro_batch_waits_for_the_gpu_once_at_most(tmp_path, teacher):
    """Our code does: one look for targets a micro-batch, one flag a step. What Transformers does is its own."""
    changes, steps, micro = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "max_steps": 2}, 2, 8
    if teacher == "cached":
        write_cache(tiny.model(), RAGGED, tmp_path / "cache", {"top_k": 9}, batch_size=2)
        changes["teacher"] = str(tmp_path / "cache")
    if teacher == "states":
        changes |= {"losses": {"forward_kl": 1.0, "block": 1.0, "query_key": 1.0}, "layer_pairs": "uniform"}
    trainer = trainer_on(GPU, tmp_path, **changes)
    trainer.train()  # what is made once
    trainer = trainer_on(GPU, tmp_path, **{**changes, "logging_steps": 100})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        trainer.train()
        torch.cuda.set_sync_debug_mode("default")
    root = str(Path(hf_minitron.__file__).parent)
    ours = [w for w in seen if "synchroniz" in str(w.message) and w.filename.startswith(root)]
    lines = {f"{Path(w.filename).name}:{w.lineno}" for w in ours}
    assert len(ours) <= micro + steps, (len(ours), lines)
    print(teacher, len(ours), "of ours;", sum("synchroniz" in str(w.message) for w in seen), "in all;", sorted(lines))


@needs_cuda
def test_full_logits_never_exist(tmp_path):
    """A live step of 16,384 tokens and 49,152 entries needs less than one table of their logits in float32."""
    sizes = {"vocab_size": 49_152, "hidden_size": 64, "head_dim": 16, "max_position_embeddings": 1024}
    student, teacher = (tiny.model(dtype=torch.float32, seed=seed, tie_word_embeddings=True, **sizes) for seed in (1, 0))
    trainer = trainer_on(GPU, tmp_path, teacher=teacher, student=student, bf16=True)
    batch = collate([{"input_ids": row} for row in torch.randint(0, 49_152, (16, 1024), device=GPU)])
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.compute_loss(trainer.model.train(), batch).backward()
    assert torch.cuda.max_memory_allocated() - before < 16 * 1024 * 49_152 * 4


SHARDED = """
import json, sys
sys.path.insert(0, {tests!r})
import test_gpu, torch
from pathlib import Path
history, _ = test_gpu.trained(torch.device({device!r}), Path(sys.argv[1]), dtype=torch.float32)
Path(sys.argv[1] + ".json").write_text(json.dumps(history))
"""


@needs_cuda
def test_fsdp2_of_accelerate_equals_plain_training(tmp_path):
    """One process, sharded by accelerate itself on nccl: the engine that a run on eight GPUs uses."""
    expected, _ = trained(GPU, tmp_path / "plain", dtype=torch.float32)
    script = tmp_path / "script.py"
    script.write_text(SHARDED.format(tests=str(Path(tiny.__file__).parent), device="cuda"))
    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    settings |= {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", str(script)]
    done = subprocess.run(
        [*launcher, str(tmp_path / "sharded")], capture_output=True, text=True, env={**os.environ, **settings}, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "sharded.json").read_text())
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed")
def test_a_whole_run(project, tmp_path):
    """Score, prune, cache, distill, evaluate and publish by the command: on a GPU in bf16."""
    from hf_minitron.__main__ import main

    recipe = {**project["recipe"], "run": str(tmp_path / "run"), "cache": {"method": "top_k", "k": 8}}
    recipe["score"] = {**recipe["score"], "sublayers": True}
    recipe["distill"] = {**recipe["distill"], "bf16": GPU.type == "cuda"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "recipe.yaml")]) == 0
    card = (tmp_path / "run/publish/model/README.md").read_text()
    assert GPU.type == "cpu" or torch.cuda.get_device_name() in card
