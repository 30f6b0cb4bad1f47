"""Recipes bind, plan and have a README; accelerate reads its configs; every script runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from accelerate.commands import launch as launching
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import launch as launch_environments
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from datasets import Dataset
from test_accelerate import launch, script
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from hf_minitron import DistillationArguments, DistillationTrainer
from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.outline import outline
from hf_minitron.architecture.student import student_config
from hf_minitron.chain import placeholder_models, with_placeholders
from hf_minitron.checkpoint.checkpoint import TensorSpec, write_sparse_checkpoint
from hf_minitron.command import check_stages, own_stages, plan_text
from hf_minitron.data.formats import text_files
from hf_minitron.distillation.cache import write_cache
from hf_minitron.evaluation.tasks import task_manager
from hf_minitron.modeling import PrunedConfig, PrunedForCausalLM
from hf_minitron.plan import Plan
from hf_minitron.pruning.nonuniform import layer_parameters
from hf_minitron.recipe import bind, load_recipe
from hf_minitron.recipe_file import TOP_LEVEL
from hf_minitron.stages import prune
from hf_minitron.stages.every import STAGES
from hf_minitron.stages.training import sources_of

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "recipes"
CONFIGS = Path(__file__).resolve().parent / "configs"  # of public models: facts to plan with where there is no Hub
ENGINES = {path.stem: path for path in (FOLDER / "accelerate").glob("*.yaml")}
RECIPES = sorted(path for path in FOLDER.glob("*/*.yaml") if path.parent.name != "accelerate")
NAMES = sorted({path.parent.name for path in RECIPES})
SECTIONS = {name: stage.args for name, stage in STAGES.items()}
# Billions of parameters before and after, as their sources print them: 2408.11796, table 3; 2407.14679, table 10.
PUBLISHED = {
    "llama-3.1-8b-width-4.5b": ["8.0", "4.5"],
    "llama-3.1-8b-depth-4.5b": ["8.0", "4.5"],
    "mistral-nemo-12b-8b": ["12.2", "8.4"],
    "nemotron-4-15b-8b-4b": ["15.6", "8.3", "4.2"],
    "qwen3-8b-6b": ["8.2", "5.9"],
    "qwen3-30b-a3b-23b": ["30.5", "23.3"],
}
sys.path.insert(0, str(FOLDER))


def identity(path):
    return f"{path.parent.name}-{path.stem}"


def facts(name):
    """The table of a recipe's README: what it says about itself."""
    rows = re.findall(r"^\| ([a-z][^|]*) \| (.*) \|$", (FOLDER / name / "README.md").read_text(), re.MULTILINE)
    return dict(rows)


def bound(path, model=None):
    """A recipe's run, its model one that is here, and the arguments of its sections."""
    recipe = yaml.safe_load(path.read_text())
    named = (
        recipe["distill"].get("teacher") or recipe["model"]
    )  # a later model of a chain has the teacher's config in most things
    run = load_recipe(path, {"model": str(model or CONFIGS / Path(named).name)}, SECTIONS)
    return run, {name: bind(run, name, SECTIONS[name]) for name in run.recipe.keys() & STAGES.keys()}


def count_on_meta(config):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())


# What there is


def test_everything_is_there():
    wanted = {
        "llama-3.3-70b-49b",
        "smollm2-135m-width",
        "smollm2-135m-chain",
        "smollm2-135m-instruct",
        "smollm2-1.7b-nonuniform",
        "smollm3-3b-lora",
        "qwen3-4b-cached",
    }
    assert set(NAMES) == wanted | PUBLISHED.keys()
    assert len(RECIPES) == 15
    assert set(ENGINES) == {"single", "ddp", "fsdp2", "fsdp2-nodes", "zero3"}
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SCRIPTS, "prepare_offline"}
    listed = (FOLDER / "README.md").read_text()
    assert [name for name in NAMES if f"| [{name}]({name}/README.md) |" not in listed] == []


@pytest.mark.parametrize("path", RECIPES, ids=identity)
def test_every_section_binds(path):
    found = set(yaml.safe_load(path.read_text()))
    needed = {name for name, stage in STAGES.items() if stage.in_run and not stage.optional}
    assert {"model", "run", "seed", *needed} <= found <= {*TOP_LEVEL, *STAGES}
    _, sections = bound(path)
    texts = [args.text for args in sections.values() if isinstance(getattr(args, "text", None), str)]
    if "135m" not in path.parent.name:  # looked up on the Hub, not from here
        known = {"NeelNanda/c4-10k", "HuggingFaceFW/fineweb-edu", "OptimalScale/ClimbMix", "Salesforce/wikitext"}
        assert {text.partition(":")[0] for text in texts} <= known
        assert not any(map(text_files, texts))
    assert len(texts) >= 3
    assert sources_of(sections["distill"])


@pytest.mark.parametrize("name", NAMES)
def test_its_readme_says_how_where_and_what_to_expect(name):
    text, table = (FOLDER / name / "README.md").read_text(), facts(name)
    files = " ".join(f"recipes/{name}/{path.name}" for path in RECIPES if path.parent.name == name)
    (engine,) = re.findall(
        rf"^accelerate launch --config_file recipes/accelerate/([\w-]+)\.yaml -m hf_minitron run {files}$", text, re.M
    )
    assert any(key.startswith("expected") for key in table)
    assert table["source"]
    assert table["run by us"]
    gpus = re.match(r"(\d+|one) GPUs? of \d+ GB", table["hardware"])
    number = 1 if gpus is None or gpus[1] == "one" else int(gpus[1])
    assert ("no GPU" in table["hardware"]) == (gpus is None)
    assert load_config_from_file(str(ENGINES[engine])).num_processes == number
    (tokens,) = (value for key, value in table.items() if key.startswith("tokens"))
    for path in (path for path in RECIPES if path.parent.name == name):
        args = bound(path)[1]["distill"]
        rows = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps * number
        unit = {"k": 1e3, "M": 1e6, "B": 1e9}[tokens.split()[1]]
        assert f"{rows * args.block_size / unit:.1f}" == tokens.split()[0]


def test_no_measured_number_is_claimed_for_what_was_not_run():
    run = {f"smollm2-135m-{name}" for name in ("width", "instruct", "chain")}
    for name in NAMES:
        assert ("not run yet" in facts(name)["run by us"]) == (name not in run)


# What they make


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_held_by_a_class_and_of_the_size_they_say(name, tmp_path):
    """On the meta device; a later recipe of a chain prunes what the one before will have made."""
    model, sizes = None, []
    for path in (path for path in RECIPES if path.parent.name == name):
        run, sections = bound(path, model)
        args, config = sections["prune"], AutoConfig.from_pretrained(run.model)
        architecture = Architecture.of(config)
        before, after, rows = prune.shapes(args, run.model)
        said = next(value for key, value in facts(name).items() if key in ("parameters", f"parameters, `{path.name}`"))
        said = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]+", said)]
        student = student_config(architecture, Plan(before, after, {"layers": list(range(after["layers"]))}))
        counts = [count_on_meta(config), count_on_meta(student)]
        if args.nonuniform is not None:
            prune.check_nonuniform(args, run)
            layers = layer_parameters(architecture, before.sizes) * before["layers"]
            counts[1] += int(args.nonuniform * layers) - layers
        else:
            text = plan_text(run.recipe)
            assert all(f" {count:,} |" in text for count in said)
            assert args.target
        assert said == counts
        sizes += counts[len(sizes) > 0 :]
        model = tmp_path / path.stem
        student.save_pretrained(model)
    if name in PUBLISHED:
        assert [f"{size / 1e9:.1f}" for size in sizes] == PUBLISHED[name]


def write_holes(folder):
    """Write shards with holes in place of the weights of a folder's config; small ones, for they are mapped into memory."""
    shapes, files = outline(AutoConfig.from_pretrained(folder)).parameters, {}
    for number, start in enumerate(range(0, len(shapes), 40)):
        names = [*shapes][start : start + 40]
        write_sparse_checkpoint(folder, {name: TensorSpec("BF16", shapes[name]) for name in names})
        files |= dict.fromkeys(names, f"model-{number}.safetensors")
        (folder / "model.safetensors").rename(folder / files[names[0]])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


LARGE = [name for name in NAMES if "135m" not in name]  # whose texts and tasks need not be here
LARGE[1:] = [pytest.param(name, marks=pytest.mark.slow) for name in LARGE[1:]]


@pytest.mark.parametrize("name", LARGE)
def test_all_checks_before_the_first_step_pass(name, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**13))  # ten terabytes
    for module in ("data.texts", "data.mixture", "stages.evaluate"):  # of the Hub
        text = Dataset.from_dict({"text": ["w1 " * 9000]})
        monkeypatch.setattr(f"hf_minitron.{module}.load_text", lambda *args, text=text, **how: text)
    monkeypatch.setattr("hf_minitron.evaluation.tasks.check_data", lambda *args: None)  # tests/test_real_input.py has it
    made, teacher = {}, tmp_path / "teacher"
    for path in (path for path in RECIPES if path.parent.name == name):
        several = "tensor_parallel" in path.read_text()  # which needs several processes, and there is one
        run = load_recipe(path, {"evaluate.tensor_parallel": False} if several else {}, SECTIONS)
        if not made:
            made = {Path(run.model).resolve(): shutil.copytree(CONFIGS / Path(run.model).name, teacher)}
            tiny.tokenizer().save_pretrained(teacher)
            write_holes(teacher)
        ahead = with_placeholders(run, made)
        assert ahead.model != run.model
        assert own_stages(run).keys() == run.recipe.keys() & STAGES.keys()
        check_stages(ahead, list(own_stages(run)), None)
        moments = run.section("score").get("moments", True)
        assert run.section("prune").get("corrections") == (None if moments else [])  # nothing is measured in vain
        if len(list(path.parent.glob("*.yaml"))) > 1:
            made |= placeholder_models(run, ahead, tmp_path / path.stem)
            (tmp_path / path.stem / "model.safetensors").unlink()
            write_holes(tmp_path / path.stem)


CHAINS = ["nemotron-4-15b-8b-4b", "smollm2-135m-chain"]


@pytest.mark.parametrize("name", CHAINS)
def test_the_second_round_prunes_the_first_s_student_and_learns_from_the_original(name):
    first, second = (yaml.safe_load((FOLDER / name / f"{number}.yaml").read_text()) for number in ("first", "second"))
    assert second["model"] == f"{first['run']}/publish/model"
    assert second["distill"]["teacher"] == first["model"]


# accelerate


def environment(engine, monkeypatch):
    """What `accelerate launch` sets for its processes, set here."""
    args = launching.launch_command_parser().parse_args(["--config_file", str(ENGINES[engine]), "script.py"])
    args, config, _ = launching._validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
        made = launch_environments.prepare_deepspeed_cmd_env(args)[1]
    elif args.use_fsdp or args.multi_gpu:
        made = launch_environments.prepare_multi_gpu_env(args)
    else:
        made = launch_environments.prepare_simple_launcher_cmd_env(args)[1]
    for key, value in made.items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    return args


@pytest.mark.parametrize(
    ("engine", "kind", "number"),
    [
        ("single", "NO", 1),
        ("ddp", "MULTI_GPU", 8),
        ("fsdp2", "FSDP", 8),
        ("fsdp2-nodes", "FSDP", 64),
        ("zero3", "DEEPSPEED", 8),
    ],
)
def test_accelerate_reads_its_configs(engine, kind, number, monkeypatch):
    config = load_config_from_file(str(ENGINES[engine]))  # refuses unknown keys
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == DistributedType(kind)
    known = {action.dest for action in launching.launch_command_parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= known  # it is silent about others
    args = environment(engine, monkeypatch)
    assert (args.use_fsdp, args.use_deepspeed, args.multi_gpu) == (kind == "FSDP", kind == "DEEPSPEED", kind == "MULTI_GPU")
    assert args.num_processes == number
    assert args.mixed_precision == os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert f"--config_file recipes/accelerate/{engine}.yaml " in ENGINES[engine].read_text()


def test_fsdp2_shards_one_decoder_layer_at_a_time(monkeypatch):
    environment("fsdp2", monkeypatch)
    plugin, nonuniform = (
        FullyShardedDataParallelPlugin(),
        PrunedConfig.from_stock(tiny.config(), layer_intermediate_size=[72, 0, 40]),
    )
    assert (plugin.fsdp_version, plugin.reshard_after_forward, plugin.activation_checkpointing) == (2, True, False)
    assert plugin.cpu_ram_efficient_loading is False
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    for model in (tiny.model(), tiny.model("qwen3_moe"), tiny.model("smollm3"), PrunedForCausalLM(nonuniform)):
        plugin = FullyShardedDataParallelPlugin()
        plugin.set_auto_wrap_policy(model)
        wraps = fsdp2_prepare_auto_wrap_policy(plugin, model)
        assert [module for module in model.modules() if wraps(module)] == list(model.model.layers)


def test_zero3_takes_batch_accumulation_and_clipping_from_the_recipe(monkeypatch):
    environment("zero3", monkeypatch)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 3
    assert plugin.zero3_save_16bit_model is True
    assert plugin.zero3_init_flag is True
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage3_gather_16bit_weights_on_model_save"] is True
    assert zero["offload_optimizer"]["device"] == "none"
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION"):  # the arguments' own plugin needs DeepSpeed
        monkeypatch.delenv(name)
    _, sections = bound(FOLDER / "llama-3.1-8b-width-4.5b/recipe.yaml")
    methods = {name: value for name, value in vars(HfTrainerDeepSpeedConfig).items() if name != "__init__"}
    config = type("Config", (HfDeepSpeedConfig,), methods)(plugin.deepspeed_config)  # its own base class needs DeepSpeed
    config.mismatches = []
    config.trainer_config_process(sections["distill"])  # as the Trainer does, before it prepares student and teacher
    assert not [key for key, value in config.config.items() if value == "auto"]
    wanted = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 144, "gradient_clipping": 1.0}
    assert {key: config.config[key] for key in wanted} == wanted


SHARDED = """
import json, os, sys
sys.path.insert(0, {tests!r})
import tiny, torch
from types import SimpleNamespace
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from test_distillation import RAGGED
from hf_minitron import DistillationArguments, DistillationTrainer
from hf_minitron.distillation.teacher import LiveTeacher
from hf_minitron.distillation.trainer import collate
from hf_minitron.modeling import PrunedConfig, PrunedForCausalLM
state, out, history = PartialState(cpu=True), sys.argv[1], {{}}
nonuniform = dict(layer_num_attention_heads=[4, 2, 4], layer_intermediate_size=[72, 0, 40])
for kind, tied in (("stock", True), ("stock", False), ("nonuniform", False)):
    student = tiny.model(seed=1, hidden_size=24, tie_word_embeddings=tied).train()
    if kind == "nonuniform":
        torch.manual_seed(2)
        student = PrunedForCausalLM(PrunedConfig.from_stock(tiny.config(), **nonuniform)).double().train()
    teacher = tiny.model(tie_word_embeddings=tied)
    if state.num_processes > 1:  # as accelerate does it on GPUs, teacher first; on a CPU it leaves FSDP off
        settings = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin())
        accelerator = SimpleNamespace(state=settings, is_fsdp2=True, mixed_precision="no", is_main_process=True)
        live = LiveTeacher(teacher, state.device)
        live.shard(accelerator)
        student, teacher = fsdp2_prepare_model(accelerator, student), live.model
    args = DistillationArguments(out, bf16=False, report_to="none")
    trainer = DistillationTrainer(student, teacher, args)
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=2e-3), []
    for start in (0, 2, 0, 2):
        rows = [RAGGED[start], RAGGED[start + 1]]
        count = torch.tensor(sum(len(row["input_ids"]) - 1 for row in rows))
        own = [rows[state.process_index]] if state.num_processes > 1 else rows
        loss = trainer.compute_loss(student, collate(own), num_items_in_batch=count)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(trainer.accelerator.reduce(loss.detach(), "mean").item())
    history[f"{{kind}} {{tied}}"] = losses
if state.is_main_process:
    open(out + ".json", "w").write(json.dumps(history))
"""


@pytest.mark.slow
def test_models_sharded_as_fsdp2_says_learn_as_in_one_process(tmp_path, monkeypatch):
    """By accelerate's own function, whose units torch's `fully_shard` in test_accelerate.py need not be."""
    environment("fsdp2", monkeypatch)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # of what the Trainer would make of it on a CPU
    histories = []
    for processes in (1, 2):
        launch(processes, script(tmp_path, SHARDED), tmp_path / "out")
        histories.append(json.loads((tmp_path / "out.json").read_text()))
    one, two = histories
    assert len(one) == 3
    for name, losses in one.items():
        assert two[name] == pytest.approx(losses, rel=1e-4)
        assert losses[2] < losses[0]
        assert losses[3] < losses[1]


# The demonstrations' texts


def test_the_chats_of_the_instruct_recipe_are_about_other_things_than_its_prompts():
    folder = FOLDER / "smollm2-135m-instruct"
    prompts, chats = ([json.loads(line) for line in (folder / name).read_text().splitlines()]
                      for name in ("prompts.jsonl", "held_out.jsonl"))  # fmt: skip
    asked = {chat["messages"][0]["content"] for chat in chats}
    assert all([turn["role"] for turn in chat["messages"]] == ["user", "assistant"] for chat in chats)
    assert len(asked) == len(chats) == 32
    assert not asked & {prompt["text"] for prompt in prompts}
    sizes = yaml.safe_load((folder / "recipe.yaml").read_text())["prune"]["target"]
    assert [name for name, size in sizes.items() if size % 256] == []


def test_offline_text_is_split_by_module(tmp_path, monkeypatch):
    import prepare_offline

    texts = [(f"module{i % 25}", f"text {i} " + "some words that make a passage of prose " * 6 + "end.") for i in range(50)]
    monkeypatch.setattr(prepare_offline, "documents", lambda: iter(texts))
    prepare_offline.prepare_text(tmp_path / "stdlib")
    parts = {}
    for part in ("train", "calibration", "held_out"):
        parts[part] = [json.loads(line) for line in (tmp_path / f"stdlib/{part}.jsonl").read_text().splitlines()]
    modules = [{row["module"] for row in rows} for rows in parts.values()]
    assert all(modules)
    assert sum(map(len, modules)) == len(set.union(*modules)) == 25
    assert "stdlib_last_word" in task_manager(tmp_path / "stdlib/tasks", ["stdlib_last_word"]).all_tasks
    assert prepare_offline.part_of("_pydecimal") == prepare_offline.part_of("decimal")


def test_last_words_do_not_overlap():
    import prepare_offline

    text = " ".join(f"word{i}" for i in range(25)) + " stop. " + " ".join(f"next{i}" for i in range(30)) + " halt."
    items = list(prepare_offline.last_words(text))
    assert [item["word"] for item in items] == ["stop", "halt"]
    assert items[1]["context"].startswith("next0")


# Scripts

SMALL = ["--block_size", 16, "--calibration_tokens", 64, "--max_steps", 2, "--bf16", "false", "--report_to", "none"]
SCRIPTS = {
    "width": [["--hidden", 24, "--ffn", 48]],
    "depth": [["--layers", 2, "--losses", '{"forward_kl": 1, "block": 1, "embedding": 1}', "--layer_pairs", "uniform"]],
    "cached_teacher": [["--ffn", 48, "--tokens", 640, "--draws", 4]],
    "custom_loss": [["--ffn", 48], ["--ffn", 48, "--tokens", 640, "--cache_top_k", 7]],
    "sdg": [["--ffn", 48, "--documents", 12, "--document_tokens", 20, "--min_tokens", 4]],
}


def start(name, *arguments):
    done = subprocess.run(
        [sys.executable, f"recipes/{name}.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), [(name, more) for name, runs in SCRIPTS.items() for more in runs])
def test_a_script_runs(name, arguments, project, tmp_path):
    folder, out = project["folder"], tmp_path / "out"
    where = ["--output_dir", out, "--model", folder / "teacher", "--text", folder / "train.jsonl", "--logging_steps", 1]
    said = start(name, *where, *SMALL, *arguments)
    config = json.loads((out / "config.json").read_text())
    key, size = ("num_hidden_layers", 2) if name == "depth" else ("intermediate_size", 48)
    assert config[key] == size
    assert (out / "model.safetensors").is_file()
    assert (out / "tokenizer.json").is_file()
    named = {"depth": ["block", "embedding"], "custom_loss": ["hellinger"]}.get(name, [])
    assert said.count("'forward_kl'") == 2
    assert all(said.count(f"'{loss}'") == 2 for loss in named)
    assert (out / "cache/cache.json").is_file() == (name == "cached_teacher" or "--cache_top_k" in arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_explains_itself(name):
    said, text = start(name, "--help"), (FOLDER / f"{name}.py").read_text()
    assert "--model MODEL" in said
    assert "--per_device_train_batch_size" in said
    assert f"recipes/{name}.py --output_dir out " in text
    assert len(text.splitlines()) <= 110  # about a page


# A loss of one's own


@pytest.fixture
def hellinger():
    """The loss of the README, by running its three lines."""
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "hellinger" in block
    )
    assert len([line for line in code.splitlines() if line]) == 3
    scope = {"DistillationArguments": DistillationArguments}
    exec(code, scope)
    assert scope["args"].losses == {"hellinger": 1.0, "forward_kl": 0.25}
    return scope["hellinger"]


def distances(student, teacher, blocks):
    """The loss by its usual formula, half the squared distance of the roots, on full logits."""
    ids = torch.stack([*blocks["input_ids"]])
    with torch.no_grad():
        roots = [model(input_ids=ids).logits[:, :-1].double().softmax(-1).sqrt() for model in (student, teacher)]
    return (roots[0] - roots[1]).square().sum(-1) / 2


@pytest.mark.parametrize("k", [None, 99, 5])
def test_it_works_live_and_cached(hellinger, k, tmp_path):
    student, teacher, blocks = tiny.model(seed=1, dtype=torch.float32), tiny.model(dtype=torch.float32), tiny.blocks()
    expected = distances(student, teacher, blocks).mean()
    source = teacher
    if k is not None:
        source = tmp_path / "cache"
        write_cache(teacher, blocks, source, {"top_k": k}, dtype="float32")
    args = DistillationArguments(str(tmp_path / "out"), losses={hellinger: 1.0}, max_steps=30, learning_rate=0.01, bf16=False,
                                 per_device_train_batch_size=6, logging_steps=1, report_to="none", disable_tqdm=True,
                                 chunk_size=7, save_strategy="no")  # fmt: skip
    trainer = DistillationTrainer(student, source, args, train_dataset=blocks)
    trainer.train()
    first, *_, last = (entry["hellinger"] for entry in trainer.state.log_history if "hellinger" in entry)
    if k == 5:  # the others count as one: a lower bound
        assert 0.01 < first < expected
    else:
        assert first == pytest.approx(expected.item(), rel=1e-4)
    assert last < first / 2
    assert k == 5 or distances(student, teacher, blocks).mean() < expected / 2


def test_a_loss_that_takes_a_mean_is_refused(tmp_path):
    def mean(student_logp, teacher_logp):
        return (student_logp - teacher_logp).abs().mean()

    args = DistillationArguments(str(tmp_path), losses={mean: 1.0}, bf16=False, report_to="none")
    trainer = DistillationTrainer(tiny.model(seed=1), tiny.model(), args, train_dataset=tiny.blocks())
    with pytest.raises(ValueError, match=r"losses: mean gave shape \(\) for 33 tokens, not one number for each"):
        trainer.compute_loss(trainer.model, trainer.data_collator([tiny.blocks()[i] for i in range(3)]))
