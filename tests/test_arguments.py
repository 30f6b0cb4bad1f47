"""Training arguments that cannot work are refused when they are made: in Python, and in the check of a recipe's stage."""

import dataclasses
import json
import math
import typing
from types import NoneType

import pytest
import tiny
import yaml
from transformers import HfArgumentParser

from hf_minitron import DistillationArguments, DistillationTrainer
from hf_minitron.__main__ import main
from hf_minitron.distillation.adapters import check_lora
from hf_minitron.distillation.batch import collate
from hf_minitron.distillation.teachers import check_attention
from hf_minitron.recipe import bind, load_recipe
from hf_minitron.run import RecipeError
from hf_minitron.stages.every import STAGES

NUMBERS = {
    field.name: set(typing.get_args(field.type) or (field.type,)) - {NoneType}
    for field in dataclasses.fields(DistillationArguments)
    if set(typing.get_args(field.type) or (field.type,)) <= {int, float, NoneType}
}
AT_LEAST_ONE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "eval_accumulation_steps",
    "save_total_limit", "chunk_size", "top_k",
)  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_number_is_refused(name, tmp_path):
    values = [math.nan, math.inf, -math.inf, True, "1", 10**400]
    for value in [*values, 1.5] if NUMBERS[name] == {int} else values:
        with pytest.raises(ValueError, match=f"^{name}: .* is not a (whole|finite) number$"):
            DistillationArguments(str(tmp_path), **{name: value})


BAD = {
    **{name: [0, -1] for name in AT_LEAST_ONE},
    **{name: [0.0, -1.0] for name in ("learning_rate", "num_train_epochs", "temperature", "logging_steps", "save_steps")},
    **{name: [-0.1] for name in ("weight_decay", "max_grad_norm", "adam_epsilon", "eval_delay")},
    "max_steps": [0, -2], "warmup_steps": [-1, 1.5], "beta": [-0.1, 1.1], "label_smoothing_factor": [-0.1, 1.1],
    "adam_beta1": [1.0, -0.1], "adam_beta2": [1.0], "neftune_noise_alpha": [0.0], "seed": [-1], "dataloader_num_workers": [-1],
    "eval_steps": [-1, 0],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_numbers_out_of_bounds_are_refused(name, tmp_path):
    for value in BAD[name]:
        with pytest.raises(ValueError, match=f"^{name}: {value} must be "):
            DistillationArguments(str(tmp_path), losses={"cross_entropy": 1.0}, **{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"forward_kl": math.nan}}, "losses: the weight of forward_kl: nan is not a finite number"),
        ({"losses": {"forward_kl": math.inf}}, "losses: the weight of forward_kl: inf is not a finite number"),
        ({"losses": {"forward_kl": True}}, "losses: the weight of forward_kl: True is not"),
        ({"losses": {"forward_kl": "1"}}, "losses: the weight of forward_kl: '1' is not"),
        ({"losses": ["forward_kl"]}, r"losses: \['forward_kl'\] is not a table of weights"),
        ({"losses": {}}, "losses: {} must have at least one positive weight"),
        ({"losses": None}, "losses: None must have at least one positive weight"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: 0.1 smooths labels, which only cross_entropy reads"),
        ({"layer_pairs": {}}, "layer_pairs: {} is no table"),
        ({"layer_pairs": None}, "layer_pairs: None is no table"),
        ({"layer_pairs": {2: 1.5}}, "layer_pairs: {2: 1.5} is no table"),
        ({"layer_pairs": {2: True}}, "layer_pairs: {2: True} is no table"),
        ({"layer_pairs": {-1: 0}}, "layer_pairs: {-1: 0} is no table"),
        ({"layer_pairs": [2, 1]}, r"layer_pairs: \[2, 1\] is no table"),
        ({"report_to": "wandb"}, "report_to: wandb is not installed; install it, or set report_to: none"),
        ({"report_to": ["tensorboard"]}, "report_to: tensorboard is not installed"),
        ({"report_to": "wandbb"}, "report_to: 'wandbb' is none of none, all, azure_ml, .*wandb"),
        ({"optim": "adamw"}, "optim: 'adamw' is none of adamw_torch, "),
        ({"optim": "adamw_8bit"}, "optim: adamw_8bit: You need to install `bitsandbytes`"),
        ({"optim": "lomo"}, "optim: lomo: You need to install `lomo_optim`"),
        ({"optim": "schedule_free_adamw"}, "optim: schedule_free_adamw: You need to install"),
        ({"optim_args": "momentum=0.9"}, "optim_args: momentum has no effect with adamw_torch_fused"),
        ({"optim": "sgd", "optim_args": "momentum=0.9,alpha=1"}, "optim_args: alpha has no effect with sgd"),
        ({"optim": "sgd", "optim_args": "momentum"}, "optim_args: 'momentum' is not of the form key=value,key=value"),
        ({"optim": "sgd", "optim_args": "momentum=fast"}, "optim: sgd, optim_args: 'momentum=fast': could not convert"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "optim: sgd, optim_args: 'momentum=-1': Invalid momentum value"),
        ({"optim": "sgd", "optim_args": "momentum=nan"}, "optim_args: 'momentum=nan' makes nan of a number of sgd"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type: 'cosin' is none of linear, cosine, "),
        ({"lr_scheduler_kwargs": {"min_lr": 0.1, "min_lr_rate": 0.1}}, "lr_scheduler_kwargs: .* do not fit .*: Only"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}, "do not fit linear: "),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs: {'a': 1} has no effect"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "warmup_steps: 3 has no effect with constant"),
        ({"lr_scheduler_kwargs": {"min_lr_rate": "low"}}, "lr_scheduler_kwargs: {'min_lr_rate': 'low'} do not fit"),
        ({"lr_scheduler_kwargs": {"min_lr_rate": math.nan}}, "make a learning rate that is NaN, infinite or negative"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "do not fit warmup_stable_decay: .*num_decay_steps"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "reduce_lr_on_plateau requires an eval strategy"),
        ({"lr_scheduler_kwargs": [1]}, r"lr_scheduler_kwargs: \[1\] is not a table"),
        ({"eval_strategy": "stpes"}, "eval_strategy: 'stpes' is none of no, steps, epoch"),
        ({"save_strategy": False}, "save_strategy: False is none of no, steps, epoch, best; put no in quotes"),
        ({"train_sampling_strategy": "sorted"}, "train_sampling_strategy: 'sorted' is none of random, sequential"),
        ({"log_level": "loud"}, "log_level: 'loud' is none of "),
        ({"include_for_metrics": ["logits"]}, "include_for_metrics: 'logits' is none of loss, inputs"),
        ({"dataloader_multiprocessing_context": "thread"}, "dataloader_multiprocessing_context: 'thread' is none of fork"),
        ({"deepspeed": "nowhere.json"}, "deepspeed: no file at 'nowhere.json'"),
        ({"fsdp": "full_shard", "fsdp_config": "nowhere.json"}, "fsdp_config: no file at 'nowhere.json'"),
        ({"accelerator_config": "nowhere.json"}, "accelerator_config: no file at 'nowhere.json'"),
        ({"accelerator_config": {"split": True}}, "training arguments: .*unexpected keyword argument 'split'"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}}, "gradient_accumulation_kwargs: num_"),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "training arguments: .*[dD]eep[sS]peed"),
        ({"fsdp": "full_shard"}, "fsdp: needs several processes: accelerate launch"),
        ({"fsdp_config": {"version": 2}}, "fsdp_config: .* has no effect without fsdp: true; leave it out"),
        ({"fp16": True, "use_cpu": True}, "fp16: a CPU has none; use bf16"),
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"bf16": "yes"}, "bf16: 'yes' is neither true nor false"),
        ({"debug": "tpu_metrics_debug"}, "debug: tpu_metrics_debug needs torch_xla"),
        ({"debug": "everything"}, "training arguments: everything is not a valid DebugOption"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "requires the save and eval strategy to match"),
        ({"dataloader_prefetch_factor": 2}, "--dataloader_prefetch_factor can only be set when"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        DistillationArguments(str(tmp_path), **changes)
    assert len(str(caught.value).splitlines()) == 1


def test_refused_deepspeed_settings_leave_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="training arguments") as kept:
        DistillationArguments(str(tmp_path), deepspeed={"zero_optimization": {"stage": 3}})
    assert tiny.model().num_parameters(), kept  # made while the error is still there


def test_a_config_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "fsdp.json").write_text("{version: 2}")
    with pytest.raises(ValueError, match=r"fsdp_config: .*fsdp.json is not JSON: Expecting property name"):
        DistillationArguments(str(tmp_path), fsdp="full_shard", fsdp_config=str(tmp_path / "fsdp.json"))


def test_arguments_that_work_are_taken(tmp_path):
    for changes in (
        {"optim": "rmsprop", "optim_args": "momentum=0, alpha=0.99"},  # its defaults, and read all the same
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}, "max_steps": 50},
        {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 0.1},
        {"lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"layer_pairs": '{"2": 1}', "losses": '{"forward_kl": 1, "block": 0.5}'},  # from a command line
        {"report_to": "all"},
        {"max_grad_norm": 0.0, "save_steps": 0.1, "logging_steps": 0.5},
    ):
        assert DistillationArguments(str(tmp_path), **changes).output_dir


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": "8"}, "lora: r: '8' is not a whole number"),
        ({"r": True}, "lora: r: True is not a whole number"),
        ({"r": -1}, "lora: .*should be a positive integer"),
        ({"lora_alpha": math.nan}, "lora: lora_alpha: nan is not a whole number"),
        ({"lora_dropout": 2.0}, "lora: dropout probability has to be between 0 and 1"),
        ({"use_dora": 1}, "lora: use_dora: 1 is neither true nor false"),
        ({"target_modules": 3}, "lora: "),
        ({"bias": "some"}, "lora: "),
        ({"init_lora_weights": "foo"}, "lora: "),
        ({"layers_to_transform": [99]}, "lora: "),
        ({"modules_to_save": ["nothing"], "target_modules": []}, "lora: "),
        ({"inference_mode": True}, "lora: inference_mode is set for you; leave it out"),
        ({"task_type": "CAUSAL_LM"}, "lora: task_type is set for you"),
        ({"rank": 8}, "lora: 'rank' is no field of peft.LoraConfig; did you mean 'r'"),
    ],
)
def test_lora_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        check_lora(settings, tiny.config())
    assert len(str(caught.value).splitlines()) == 1


# Recipes

RESERVED = {
    "seed": [0, 42, 7], "output_dir": ["elsewhere"], "resume_from_checkpoint": ["checkpoint-2"], "save_only_model": [True],
    "push_to_hub": [True], "hub_model_id": ["me/small"], "do_train": [True], "do_eval": [True], "do_predict": [True],
}  # fmt: skip


@pytest.mark.parametrize("stage", ["distill", "correct"])
@pytest.mark.parametrize("name", RESERVED)
def test_what_a_run_decides_is_refused_in_a_section(project, stage, name):
    for value in RESERVED[name]:
        changes = {f"{stage}.{name}": value} | {f"{stage}.text": "text.jsonl"}
        run = load_recipe(project["path"], changes, {name: stage.args for name, stage in STAGES.items()})
        with pytest.raises(RecipeError, match=f"{stage}: {name}: {value!r}, but "):
            bind(run, stage, STAGES[stage].args)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"distill.learning_rate": ".nan"}, "distill.learning_rate: nan is not a number"),
        ({"distill.learning_rate": "-1"}, "learning_rate: -1.0 must be above zero"),
        ({"distill.learning_rate": ".inf"}, "distill.learning_rate: inf is not a number"),
        ({"distill.learning_rate": "'1e-4'"}, "distill.learning_rate: '1e-4' is not a number"),
        ({"distill.learning_rate": "true"}, "distill.learning_rate: true is not a number"),
        ({"distill.gradient_accumulation_steps": "0"}, "gradient_accumulation_steps: 0 must be at least 1"),
        ({"distill.per_device_train_batch_size": "-1"}, "per_device_train_batch_size: -1 must be at least 1"),
        ({"distill.max_steps": "0"}, "max_steps: 0 must be at least 1, or -1 to count epochs"),
        ({"distill.warmup_steps": "6"}, "warmup_steps: 6 are not fewer than max_steps: 6"),
        ({"distill.report_to": "wandb"}, "report_to: wandb is not installed"),
        ({"distill.losses": "{forward_kl: .nan}"}, "losses: the weight of forward_kl: nan"),
        ({"distill.losses": "{forward_kl: 1, block: 1}", "distill.layer_pairs": "{7: 1}"}, "the pair 7, 1 is not in"),
        ({"distill.losses": "{forward_kl: 1, block: 1}", "distill.layer_pairs": "{2: 3}"}, "a student of 3; layers count"),
        (
            {"distill.losses": "{forward_kl: 1, block: 1}", "prune.target": "{layers: 2}", "distill.layer_pairs": "{2: 2}"},
            "the pair 2, 2 is not in a teacher of 3 layers and a student of 2",
        ),
        (
            {"distill.losses": "{forward_kl: 1, block: 1}", "prune.target": "{layers: 2}"},  # last-2: the third from the end
            "the pair 0, -1 is not in a teacher of 3 layers and a student of 2",
        ),
        ({"distill.lr_scheduler_kwargs": "{min_rate: 1}"}, "lr_scheduler_kwargs: {'min_rate': 1} do not fit"),
        ({"distill.optim": "galore_adamw"}, "optim_target_modules: galore_adamw needs the names"),
        ({"distill.lora": "{r: .nan}"}, "lora: r: nan is not a whole number"),
        ({"distill.eval_strategy": "steps"}, "eval_strategy: steps and eval_text: '' do not go together"),
        ({"distill.eval_text": "text.jsonl"}, "eval_strategy: no and eval_text: 'text.jsonl' do not go together"),
        ({"distill.early_stopping_patience": "2"}, "early_stopping_patience needs an evaluation"),
        ({"distill.load_best_model_at_end": "true", "distill.save_strategy": "'no'"}, "load_best_model_at_end needs"),
        ({"distill.save_strategy": "best"}, "save_strategy needs an evaluation"),
        ({"correct.temperature": "2.0", "correct.text": "train.jsonl"}, "temperature: 2.0 has no effect, for nobody teaches"),
    ],
)  # fmt: skip
def test_recipes_are_refused_before_slow_work(project, tmp_path, capsys, override, message):
    words = [word for key, value in override.items() for word in (f"--{key}", value)]
    assert main(["run", str(project["path"]), "--run", str(tmp_path / "run"), *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def evaluated(project, **changes):
    """Settings of a section that evaluates, on text that is there."""
    return {
        "eval_strategy": "steps", "eval_steps": 2, "eval_text": str(project["folder"] / "held_out.jsonl"), "eval_tokens": 128,
        "save_steps": 2, "max_steps": 6, "load_best_model_at_end": True, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_text": "./nowhere.jsonl"}, "No text at './nowhere.jsonl'"),
        ({"eval_text": "synthesized"}, "text: synthesized is what the teacher writes"),
        ({"eval_tokens": 0}, "distill.eval_tokens: 0 must be at least 1"),
        ({"early_stopping_patience": 0}, "distill.early_stopping_patience: 0 must be at least 1"),
        ({"early_stopping_patience": 1, "load_best_model_at_end": False}, "early_stopping_patience: 1 needs load_best_model"),
        ({"metric_for_best_model": "accuracy"}, "metric_for_best_model: 'accuracy' is none of loss, forward_kl"),
        ({"save_steps": 3}, "saving steps to be a round multiple"),
    ],
)
def test_evaluations_that_cannot_work_are_refused(project, tmp_path, capsys, changes, message):
    settings = evaluated(project, **changes)
    words = [word for key, value in settings.items() for word in (f"--distill.{key}", json.dumps(value))]
    assert main(["run", str(project["path"]), "--run", str(tmp_path / "run"), *words]) == 1
    assert message in capsys.readouterr().err


def test_a_parser_of_the_command_line_changes_no_check():
    """HfArgumentParser writes other types into the fields of a dataclass."""
    HfArgumentParser(DistillationArguments)
    assert DistillationArguments("out", report_to="none").include_num_input_tokens_seen == "no"


@pytest.mark.parametrize("key", ["prune.corrections", "evaluate.tasks", "publish.datasets", "distill.report_to"])
@pytest.mark.parametrize("item", ["[1]", "{a: 1}"])
def test_a_list_within_a_list_is_refused(project, key, item, capsys):
    assert main(["run", str(project["path"]), f"--{key}", f"[x, {item}]"]) == 1
    assert f"error: {key}: {yaml.safe_load(item)!r} is no item of its list" in capsys.readouterr().err


def test_attention_is_chosen_for_both_models(tmp_path):
    losses = []
    for name in (None, "sdpa", "eager"):
        args = DistillationArguments(str(tmp_path), bf16=False, report_to="none", attn_implementation=name)
        trainer = DistillationTrainer(tiny.model(seed=1), tiny.model(), args, train_dataset=tiny.blocks())
        used = {model.config._attn_implementation for model in (trainer.model, trainer.teacher.model)}
        assert used == {name or "sdpa"}
        losses.append(trainer.compute_loss(trainer.model, collate(list(tiny.blocks()))).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("flash", None, "attn_implementation: 'flash' cannot be had"),
        ("flash_attention_2", None, "attn_implementation: 'flash_attention_2' cannot be had .*FlashAttention2"),
        ("sdpa", {"attn_implementation": "eager"}, "attn_implementation: teacher_model_init_kwargs has one too"),
    ],
)
def test_attention_that_cannot_be_had_is_refused(tmp_path, name, kwargs, message):
    with pytest.raises(ValueError, match=message) as refused:
        settings = {"attn_implementation": name, "teacher_model_init_kwargs": kwargs, "report_to": "none"}
        args = DistillationArguments(str(tmp_path), bf16=False, **settings)
        check_attention(tiny.config(), args.attn_implementation)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="attn_implementation: 'flex_attention' is not for"):
        check_attention(tiny.config("bloom"), "flex_attention")
    with pytest.raises(ValueError, match="attn_implementation: flex_attention has no backward pass on a CPU"):
        DistillationArguments("out", use_cpu=True, attn_implementation="flex_attention")
