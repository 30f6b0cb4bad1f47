"""What `hf-minitron plan` counts beside what training takes, and what it says of a machine."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    NemotronConfig,
    Phi3Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hf_minitron.__main__ import main, memory_size
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.planning.cost_text import _hours, cost_text
from hf_minitron.planning.costs import CHECKPOINTING, Machine, costs
from hf_minitron.planning.resources import Training, activation_bytes, saved_bytes, training_memory

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "tests" / "configs"
sys.path.insert(0, str(ROOT / "benchmarks"))

SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 2, "vocab_size": 500, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GPT2 = {"n_embd": 128, "n_layer": 3, "n_head": 8, "vocab_size": 500, "resid_pdrop": 0, "attn_pdrop": 0, "embd_pdrop": 0}
MOE = SIZES | {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "gemma2": Gemma2Config(**SIZES, head_dim=16),
    "phi3": Phi3Config(**SIZES),
    "gpt2": GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2),
    "nemotron": NemotronConfig(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**MOE),
    "mixtral": MixtralConfig(**SIZES | {"num_local_experts": 4, "intermediate_size": 128}),
}


def kept(config, mixed):
    """Bytes that autograd keeps of 2 x 128 tokens, but for weights and their 16-bit copies."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    weights, tensors = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, config.vocab_size, (2, 128))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", enabled=mixed):
        model.base_model(input_ids=ids, use_cache=False)
    outside = ("embed", "wte", "wpe")
    # stacked experts have three dimensions: autocast leaves their products in float32
    matrices = [p for name, p in model.base_model.named_parameters() if p.dim() == 2 and not any(o in name for o in outside)]
    copies = 2 * sum(p.numel() for p in matrices) if mixed else 0
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()) - copies


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_what_autograd_keeps_is_counted_without_data(name, mixed):
    found, _ = activation_bytes(Architecture.of(MODELS[name]), 2, 128, mixed)
    assert found == pytest.approx(kept(MODELS[name], mixed), rel=0.01)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_it_is_near_when_counted_from_the_rows(name):
    """Of models whose code looks at values, such as Mamba's loop."""
    found = 2 * 128 * saved_bytes(Architecture.of(MODELS[name]), False)
    assert found == pytest.approx(kept(MODELS[name], False), rel=0.15)


def test_autocast_copies_no_experts():
    parts = training_memory(Architecture.of(MODELS["qwen3_moe"]), Training(2, 128))
    model = AutoModelForCausalLM.from_config(MODELS["qwen3_moe"])
    assert parts["16-bit copies"] == 2 * sum(p.numel() for p in model.parameters() if p.dim() < 3)


def test_a_step_takes_what_an_h100_has_measured():
    """benchmarks/kd_step.py --shape llama-3.2-1b --batch 8 --seq 2048: 32.3 GB over weights and gradients."""
    config = LlamaConfig(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64,
                         intermediate_size=4096, vocab_size=128_256, tie_word_embeddings=True)  # fmt: skip
    parts = training_memory(Architecture.of(config), Training(8, 2048, accumulation=4), teacher=1)
    found = sum(parts[name] for name in ("16-bit copies", "activations", "head"))
    assert found == pytest.approx(32.3e9, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["float32", "checkpointing", "mixture", "mixture, bf16"])
def test_training_takes_what_is_counted(case):
    plan_memory = pytest.importorskip("plan_memory")
    assert plan_memory.in_a_process(case)["ratio"] == pytest.approx(1, abs=0.15)


def recipe(name, **distill):
    content = yaml.safe_load((ROOT / "recipes" / name / "recipe.yaml").read_text())
    content["model"] = str(CONFIGS / Path(content["model"]).name)
    return content | {"distill": content["distill"] | distill}


def test_70b_to_49b_fits_64_gpus():
    machine, content = Machine(64, 80e9), recipe("llama-3.3-70b-49b")
    found = {cost.stage: cost for cost in costs(content, machine)}
    assert [name for name, cost in found.items() if cost.gpu_bytes > 80e9] == []
    assert found["score"].note == "layer by layer"
    assert found["distill"].note == "FSDP2"
    assert found["distill"].tokens == 4140 * 64 * 4 * 8192
    readme = (ROOT / "recipes/llama-3.3-70b-49b/README.md").read_text()
    assert f"{found['distill'].gpu_bytes / 1e9:.0f} GB of each in distillation" in readme
    assert f"About {machine.hours(sum(cost.flops for cost in found.values())):.0f} hours" in readme
    said = cost_text(content, machine)
    assert "Every stage fits into 80 GB." in said
    assert "at 26% of 989 TFLOP/s each" in said


def test_a_sequential_fit_reads_its_tokens_again_and_holds_a_layers_states_of_them():
    """docs/pruning.md says about 200 kB a token for an 8B model in bfloat16."""
    content = recipe("llama-3.1-8b-width-4.5b")

    def prune_cost(tokens, **section):
        changed = content | {"prune": content["prune"] | section, "score": content["score"] | {"tokens": tokens}}
        return next(cost for cost in costs(changed, Machine()) if cost.stage == "prune")

    plain, whole, few = prune_cost(262_144), prune_cost(262_144, sequential=True), prune_cost(16_384, sequential=True)
    assert (plain.tokens, whole.tokens, few.tokens) == (0, 65_536, 16_384)
    assert prune_cost(262_144, sequential=True, sequential_tokens=4_096).tokens == 4_096
    assert (whole.gpu_bytes - plain.gpu_bytes) / 65_536 == pytest.approx(200e3, rel=0.3)
    assert whole.flops == pytest.approx(4 * few.flops)
    content["prune"] |= {"sequential": True}
    content["score"] |= {"tokens": 262_144}
    assert "prune needs " in (said := cost_text(content, Machine(gpu_bytes=16e9)))
    assert "lower prune.sequential_tokens" in said


def test_fewer_tokens_are_counted_where_a_config_names_late_ones():
    """Llama's end token is one of the last 256: which tokens stay is known after scoring only."""
    content = recipe("llama-3.1-8b-width-4.5b")
    content["prune"] = {"target": {"vocab": 32_768}}
    disk = {cost.stage: cost.disk for cost in costs(content, Machine())}
    assert disk["publish"] == 2 * (8_030_261_248 - 2 * (128_256 - 32_768) * 4096)


@pytest.mark.parametrize(("flops", "hours"), [(1e11, "< 0.01"), (1e16, "0.011"), (1e18, "1.1"), (2e21, "2,161")])
def test_hours_are_decimals(flops, hours):
    assert _hours(flops, Machine()) == hours


def test_what_does_not_fit_is_said_with_what_to_change():
    content = recipe("llama-3.1-8b-width-4.5b", per_device_train_batch_size=4, gradient_checkpointing=False)
    said = cost_text(content, Machine(8, 80e9))
    (advice,) = re.findall(r"distill needs [\d.]+ GB of 80: set (.*): ([\d.]+) GB", said)
    assert f"distill.{CHECKPOINTING}: true" in advice[0]
    assert float(advice[1]) <= 80
    content["distill"] |= {"gradient_checkpointing": True, "per_device_train_batch_size": 64}
    assert "checkpointing" not in re.search(r"distill needs .*", cost_text(content, Machine(8, 80e9)))[0], "it has that already"
    alone = cost_text(content, Machine(1, 24e9))
    assert re.search(r"take \d+ GPUs", alone)


def test_parts_follow_the_settings():
    architecture = Architecture.of(MODELS["llama"])
    whole = training_memory(architecture, Training(2, 128, 2))
    small = training_memory(architecture, Training(2, 128, 2, optimizer="adamw_bnb_8bit"))
    assert whole["optimizer"] == 4 * small["optimizer"]
    assert "teacher" not in whole
    sharded = training_memory(architecture, Training(2, 128, 2, devices=4, sharded=True), teacher=400)
    assert sharded["teacher"] == 100
    assert sharded["weights"] == whole["weights"] // 4
    replicated = training_memory(architecture, Training(2, 128, 2, devices=4))
    assert replicated["DDP's buckets"] == whole["gradients"]
    again = training_memory(architecture, Training(2, 128, 2, checkpointing=True))
    assert again["activations"] < whole["activations"]


@pytest.mark.parametrize(("text", "expected"), [("80GB", 80e9), ("24", 24e9), ("2 GiB", 2 * 2**30), (None, None)])
def test_sizes_of_memory(text, expected):
    assert memory_size(text) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "much"], "--gpu-memory: 'much' is not a size such as 80GB or 24GiB"),
        (["--gpus", "0"], "--gpus: 0 is not a whole number from 1 on"),
        (["--utilization", "26"], "--utilization: 26 is not a share between 0 and 1"),
        (["--score.tokens", "many"], "score.tokens: 'many' is not a whole number"),
        (["--gpu-tflops", "nan"], "--gpu-tflops: nan is not a number above zero"),
        (["--gpu-tflops", "inf"], "--gpu-tflops: inf is not a number above zero"),
        (["--distill.optim", "nonsense"], "distill.optim: 'nonsense' is none of adamw_torch, "),
        (["--distill.chunk_size", "0"], "distill.chunk_size: 0 must be at least 1"),
        (["--distill.gradient_checkpointing", "maybe"], "distill.gradient_checkpointing: 'maybe' is not true or false"),
        (["--score.batch_size", "0"], "score.batch_size: 0 must be at least 1"),
        (["--evaluate.tokens", "-1"], "evaluate.tokens: -1 must be at least 1"),
        (["--distill.block_size", "0"], "distill.block_size: 0 must be at least 2"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(project, capsys, options, message):
    assert main(["plan", str(project["path"]), *options]) == 1
    assert message in capsys.readouterr().err


def planned(tmp_path, capsys, **sections):
    """What `plan` prints for a recipe of a published model's config."""
    path = tmp_path / "recipe.yaml"
    recipe = {"model": str(CONFIGS / "Llama-3.2-1B"), "run": str(tmp_path / "run"), "score": {"text": "words.txt"}, **sections}
    path.write_text(yaml.safe_dump(recipe))
    code = main(["plan", str(path)])
    return code, capsys.readouterr()


def test_plan_takes_the_whole_numbers_that_run_takes(tmp_path, capsys):
    code, out = planned(tmp_path, capsys, prune={"target": "60%"}, distill={"block_size": 64.0, "max_steps": 1.0e3})
    assert code == 0, out.err
    code, out = planned(tmp_path, capsys, prune={"target": "60%"}, distill={"block_size": 64.5})
    assert (code, out.err) == (1, "error: distill.block_size: 64.5 is not a whole number\n")


@pytest.mark.parametrize("section, key, values", [
    ("publish", "export", ["gguf", "mlx"]), ("publish", "export", ["mlx"]), ("publish", "export", "gguf,mlx"),
    ("publish", "gguf_types", ["F16", "Q4_K_M"]), ("publish", "gguf_types", []),
])  # fmt: skip
def test_plan_takes_the_lists_that_run_takes(tmp_path, capsys, section, key, values):
    code, out = planned(tmp_path, capsys, prune={"target": "60%"}, **{section: {key: values}})
    assert code == 0, out.err


def test_plan_names_the_item_of_a_list_that_is_no_choice(tmp_path, capsys):
    code, out = planned(tmp_path, capsys, prune={"target": "60%"}, publish={"export": ["gguf", "onnx"]})
    assert code == 1
    assert "publish.export: 'onnx' is none of gguf, mlx" in out.err


@pytest.mark.parametrize("budget", [{"parameters": "60%"}, {"flops": "60%"}])
def test_plan_of_a_search_takes_one_of_its_shapes(tmp_path, capsys, budget):
    code, out = planned(tmp_path, capsys, search={"budget": budget})
    assert code == 0, out.err
    assert re.search(r"search chooses between [\d,]+ shapes near the budget", out.out)
    if "parameters" in budget:
        changed = re.search(r"\| parameters .*\| +-([\d.]+)% \|", out.out)
        assert float(changed[1]) == pytest.approx(40, abs=3)


def test_plan_of_a_search_for_speed_asks_for_a_target(tmp_path, capsys):
    code, out = planned(tmp_path, capsys, search={"budget": {"decode_tokens_per_second": "150%"}})
    assert code == 1
    assert "decode_tokens_per_second is measured when search runs; give prune.target" in out.err


def test_plan_prints_what_every_stage_takes(project, capsys):
    assert main(["plan", str(project["path"]), "--gpus", "2", "--gpu-memory", "24GB"]) == 0
    out = capsys.readouterr().out
    assert [stage for stage in ("score", "prune", "distill", "evaluate", "publish") if f"| {stage} " not in out] == []
    assert "Every stage fits into 24 GB." in out
