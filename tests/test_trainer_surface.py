"""The surface of transformers' Trainer: every field and parameter works as there, is ours, or is refused by name.

What works as there is compared with the Trainer itself: the same student, data and settings, cross-entropy alone.
"""

import dataclasses
import inspect
import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import EarlyStoppingCallback, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils.quantization_config import QuantizationMethod

from hf_minitron import DistillationArguments, DistillationTrainer
from hf_minitron.distillation.batch import collate

LENGTHS = (4, 12, 7, 9, 5, 11, 8, 6)
ROWS = Dataset.from_dict({"input_ids": [tiny.blocks(1, n, seed=n)["input_ids"][0].tolist() for n in LENGTHS]})
MEASURED = ROWS.add_column("tokens", list(LENGTHS))
SMALL = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 32, "dtype": torch.float32}
COMMON = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05, "optim": "sgd", "bf16": False,
          "use_cpu": True, "logging_steps": 1, "lr_scheduler_type": "constant", "report_to": "none", "disable_tqdm": True,
          "save_strategy": "no"}  # fmt: skip
EVALUATE = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}

# Settings of the Trainer that are compared with it, in groups: one run of each.
CASES = {
    "plain": {},
    "optimizer": {"optim": "rmsprop", "optim_args": "momentum=0.5,eps=0.1", "weight_decay": 0.1},
    "adam": {"optim": "adamw_torch", "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-2, "max_steps": 2},
    "schedule": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0}, "warmup_steps": 1},
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.1}, **EVALUATE},
    "accumulation": {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05, "average_tokens_across_devices": False},
    "epochs": {"max_steps": -1, "num_train_epochs": 1.5, "per_device_train_batch_size": 3, "dataloader_drop_last": True},
    "smoothing": {"label_smoothing_factor": 0.3, **EVALUATE},
    "neftune": {"neftune_noise_alpha": 8.0},
    "checkpointing": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "checkpointing, old name": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager", "max_steps": 2},
    "grouped": {"train_sampling_strategy": "group_by_length", "length_column_name": "tokens", "remove_unused_columns": False,
                **EVALUATE},
    "rebalanced": {"train_sampling_strategy": "batch_rebalance"},
    "workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 1,
                "dataloader_pin_memory": False, "dataloader_multiprocessing_context": "fork", "dataloader_in_order": False,
                "max_steps": 2},
    "data": {"data_seed": 7, "accelerator_config": {"use_seedable_sampler": True, "even_batches": False}, "seed": 5},
    "evaluation": {"eval_strategy": "epoch", "eval_delay": 1, "eval_on_start": True, "max_steps": -1, "num_train_epochs": 2,
                   "per_device_eval_batch_size": 3, "do_eval": True, "prediction_loss_only": True},
    "logging": {"logging_strategy": "steps", "logging_steps": 2, "logging_first_step": True, "log_level": "error",
                "log_level_replica": "error", "log_on_each_node": False, "include_num_input_tokens_seen": "non_padding"},
    "saving": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "save_on_each_node": True},
    "weights only": {"save_strategy": "epoch", "save_only_model": True, "max_steps": -1, "num_train_epochs": 2},
    "best": {"save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "loss",
             "greater_is_better": True, **EVALUATE},
    "deterministic": {"full_determinism": True, "tf32": False},
    "bf16": {"bf16": True, **EVALUATE},
    "evaluated in bf16": {"bf16_full_eval": True, **EVALUATE},
    "evaluated in fp16": {"fp16_full_eval": True, **EVALUATE},
    "memory": {"torch_empty_cache_steps": 1, "skip_memory_metrics": False, "use_cache": True, "debug": "underflow_overflow"},
    "restored": {"ignore_data_skip": True, "restore_callback_states_from_checkpoint": True, "save_strategy": "steps",
                 "save_steps": 2},
}  # fmt: skip
LOOSE = {"bf16": 0.02, "evaluated in bf16": 0.02, "evaluated in fp16": 0.02}  # sums in another order
DIFFERENT = {"grouped", "data", "evaluation", "logging", "neftune"}  # must not do what "plain" does

# Every field of TrainingArguments: a case above, a test, or what is refused with which words.
AS_THERE = {field: case for case, fields in CASES.items() for field in fields if field not in EVALUATE} | {
    **dict.fromkeys(EVALUATE, "smoothing"),
    **dict.fromkeys(("output_dir", "max_steps", "per_device_train_batch_size", "learning_rate", "optim"), "plain"),
    **dict.fromkeys(("lr_scheduler_type", "logging_steps", "report_to", "disable_tqdm"), "plain"),
    "lr_scheduler_kwargs": "schedule", "warmup_steps": "schedule", "seed": "data", "save_steps": "saving",
    "torch_compile_mode": "test_engine_settings_reach_accelerate", "optim_target_modules": "test_low_rank_optimizers",
    "use_liger_kernel": "test_liger_patches_the_student_and_not_the_loss",
    "liger_kernel_config": "test_liger_patches_the_student_and_not_the_loss",
    "auto_find_batch_size": "test_a_batch_that_does_not_fit_is_halved",
    "eval_do_concat_batches": "test_predictions_in_pieces",
    "fp16": "tests/test_losses.py", "enable_jit_checkpoint": "test_a_checkpoint_just_in_time",
}  # fmt: skip
for _test, _fields in {
    "test_predictions_and_metrics": "eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics",
    "test_engine_settings_reach_accelerate": "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers "
    "ddp_static_graph ddp_backend ddp_timeout",
    "test_what_the_trainer_only_hands_on": "run_name project trackio_space_id trackio_bucket_id trackio_static_space_id "
    "do_train do_predict resume_from_checkpoint local_rank",
    # pushes to a Hub, and several processes
    "tests/test_publish.py": "push_to_hub hub_model_id hub_private_repo hub_strategy hub_always_push hub_revision",
    "tests/test_recipes.py": "fsdp fsdp_config deepspeed",
}.items():
    AS_THERE |= dict.fromkeys(_fields.split(), _test)
OURS = {
    "bf16",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "use_cpu",
    "logging_nan_inf_filter",
    "greater_is_better",
}
REFUSED = {
    "hub_token": ("hf_x", "hub_token: the Trainer would write it into every checkpoint"),
    "label_names": (["targets"], "label_names: losses read `labels`"),
    "parallelism_config": (type("Parallel", (), {"tp_size": 2})(), "parallelism_config: .*'tp_size': 2.* no tensor"),
}
PARAMETERS = {
    "as in Trainer": {
        "model", "data_collator", "train_dataset", "eval_dataset", "processing_class", "model_init", "compute_metrics",
        "callbacks", "optimizers", "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics"},
    "ours": {"args", "teacher_model"},
    "refused": {"compute_loss_func"},
}  # fmt: skip


def test_every_field_and_parameter_is_in_the_table():
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    listed = AS_THERE.keys() | OURS | REFUSED.keys()
    assert fields - listed == set(), "transformers has fields that nobody has looked at"
    assert listed - fields == set(), "fields that transformers does not have"
    parameters = inspect.signature(Trainer.__init__).parameters.keys() - {"self"}
    assert parameters | {"teacher_model"} == set().union(*PARAMETERS.values())
    for where in AS_THERE.values():
        assert where in CASES or where in globals() or where.startswith("tests/"), where


def test_only_public_methods_of_the_trainer_are_overridden():
    """What it does in private may move with any version of transformers."""
    ours = {name for name in vars(DistillationTrainer) if hasattr(Trainer, name) and not name.startswith("__")}
    assert not [name for name in ours if name.startswith("_")]
    for name in ours:
        theirs, mine = (inspect.signature(getattr(kind, name)).parameters for kind in (Trainer, DistillationTrainer))
        assert list(mine) == list(theirs) or "kwargs" in mine, name
    source = inspect.getsource(DistillationTrainer)
    private = {name for name in re.findall(r"(?:self|super\(\))\.(_\w+)", source) if not name.startswith("__")}
    state = vars(made(Trainer, Path("unused"), {})).keys() | vars(Trainer).keys()
    assert not private & state, "private names of the Trainer"


def test_no_parameter_is_hidden():
    kinds = {parameter.kind for parameter in inspect.signature(DistillationTrainer.__init__).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_a_trainer_leaves_the_process_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_minitron.memory.ctypes.CDLL", lambda name: 1 / 0)
    before = torch.get_num_threads(), [signal.getsignal(number) for number in signal.valid_signals()]
    trainer = made(DistillationTrainer, tmp_path, {"max_steps": 1})
    trainer.train()
    assert (torch.get_num_threads(), [signal.getsignal(number) for number in signal.valid_signals()]) == before


def test_a_batch_without_targets_costs_nothing(tmp_path):
    args = DistillationArguments(str(tmp_path), **COMMON, losses={"forward_kl": 1.0, "block": 0.5}, layer_pairs={2: 0})
    trainer = DistillationTrainer(student(), tiny.model(dtype=torch.float32), args)
    rows = [{"input_ids": [3, 4, 5], "labels": [-100] * 3}]
    assert trainer.compute_loss(trainer.model, collate(rows)) == 0


def student(**changes):
    return tiny.model(seed=1, **(SMALL | changes)).train()


def made(kind, folder, settings, **kwargs):
    """A Trainer, or one of ours that learns from labels."""
    settings = {"output_dir": str(folder / kind.__name__), **COMMON, **settings}
    kwargs = {"train_dataset": ROWS, "eval_dataset": ROWS.select(range(5)), **kwargs}
    model = {} if "model_init" in kwargs else {"model": student()}
    if kind is Trainer:
        return Trainer(args=TrainingArguments(**settings), **{"data_collator": collate, **kwargs}, **model)
    return DistillationTrainer(args=DistillationArguments(**settings, losses={"cross_entropy": 1.0}), **kwargs, **model)


def logged(trainer):
    """The log without times and memory, and without the parts that ours names."""
    measured = re.compile("runtime|per_second|preparation_time|_mem_|^tokens$|^cross_entropy$|^eval_cross_entropy$")
    return [{key: value for key, value in entry.items() if not measured.search(key)} for entry in trainer.state.log_history]


def assert_alike(theirs, ours, tolerance=2e-5):
    assert len(ours.state.log_history) == len(theirs.state.log_history) > 0
    for mine, other in zip(logged(ours), logged(theirs), strict=True):
        assert mine.keys() == other.keys()
        for key, value in other.items():
            assert mine[key] == pytest.approx(value, rel=tolerance * 10, abs=tolerance), (key, mine, other)
    for (name, a), b in zip(theirs.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=tolerance), name
    assert ours.state.num_input_tokens_seen == theirs.state.num_input_tokens_seen
    assert ours.state.best_global_step == theirs.state.best_global_step
    assert ours.model.config.use_cache is True  # what is saved keeps the model's own; every call says that it is off
    folders = [sorted(p.relative_to(t.args.output_dir).as_posix() for p in _files(t)) for t in (theirs, ours)]
    assert folders[0] == folders[1]


def _files(trainer):
    return Path(trainer.args.output_dir).rglob("*")


@pytest.fixture
def plain_threads():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "compiled")) for case in CASES])
@pytest.mark.filterwarnings("ignore")
def test_a_setting_does_what_it_does_in_the_trainer(case, tmp_path, plain_threads):
    if case == "grouped":
        data = {"train_dataset": MEASURED, "eval_dataset": MEASURED.select(range(5)), "data_collator": grouped}
    else:
        data = {}
    trainers = []
    for kind in (Trainer, DistillationTrainer):
        trainers.append(made(kind, tmp_path, CASES[case], **data))
        trainers[-1].train()
    assert_alike(*trainers, LOOSE.get(case, 2e-5))
    if case in DIFFERENT:
        plain = made(Trainer, tmp_path / "plain", {})
        plain.train()
        assert logged(plain) != logged(trainers[0]), "the case shows nothing"


def grouped(rows):
    return collate(rows, ["tokens"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_setting_is_named(name, tmp_path):
    value, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"^{message}"):
        DistillationArguments(str(tmp_path), **{name: value})


# Ours


def test_defaults_that_are_ours(tmp_path):
    args = DistillationArguments(str(tmp_path))
    assert (args.learning_rate, args.lr_scheduler_type, args.lr_scheduler_kwargs) == (
        1e-4,
        "cosine_with_min_lr",
        {"min_lr_rate": 0.1},
    )
    assert DistillationArguments(str(tmp_path), lr_scheduler_type="linear").lr_scheduler_kwargs is None
    assert args.use_cpu is not torch.accelerator.is_available()
    assert isinstance(args.bf16, bool)
    assert DistillationArguments(str(tmp_path), metric_for_best_model="eval_forward_kl").greater_is_better is False


def test_no_arguments_are_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = DistillationTrainer(student(), student(), train_dataset=ROWS)
    assert trainer.args == DistillationArguments("tmp_trainer")


def test_plain_arguments_keep_their_values(tmp_path):
    plain = TrainingArguments(str(tmp_path), **COMMON | {"max_steps": 2, "accelerator_config": {"even_batches": False}})
    trainer = DistillationTrainer(student(), student(vocab_size=99), plain, train_dataset=ROWS)
    for field in dataclasses.fields(TrainingArguments):
        assert getattr(trainer.args, field.name) == getattr(plain, field.name), field.name
    assert trainer.args.losses == {"forward_kl": 1.0}
    assert trainer.train().global_step == 2
    with pytest.raises(ValueError, match="args: Seq2SeqTrainingArguments has generation_config, which has no effect here"):
        DistillationTrainer(student(), None, Seq2SeqTrainingArguments(str(tmp_path)))
    with pytest.raises(ValueError, match="args: dict is neither DistillationArguments nor TrainingArguments"):
        DistillationTrainer(student(), None, {})


def test_a_loss_function_is_refused_before_the_teacher_is_looked_for(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func: the loss is made chunk by chunk.*losses={my_loss: 1.0}"):
        DistillationTrainer(student(), "nowhere", DistillationArguments(str(tmp_path)), compute_loss_func=lambda *a, **k: 0)


def test_from_pretrained_s_arguments_want_a_name(tmp_path):
    args = DistillationArguments(str(tmp_path), bf16=False, teacher_model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="teacher_model_init_kwargs: teacher_model is loaded already"):
        DistillationTrainer(student(), student(), args)


# Prediction


def accuracy(prediction, compute_result=None):
    """Metrics of logits, in one piece or batch by batch."""
    logits, labels = (torch.as_tensor(part) for part in (prediction.predictions, prediction.label_ids))
    assert logits.shape == (*labels.shape, 99)
    right = (logits.argmax(-1)[:, :-1] == labels[:, 1:]).float()
    more = {f"{name}_there": float(getattr(prediction, name) is not None) for name in ("inputs", "losses")}
    return {"right": right.mean().item(), "logits": logits.abs().mean().item()} | more


SETTINGS = [{}, {"include_for_metrics": ["inputs", "loss"], "eval_accumulation_steps": 1}, {"batch_eval_metrics": True},
            {"eval_use_gather_object": True}]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_predictions_and_metrics(settings, tmp_path):
    found = []
    for kind in (Trainer, DistillationTrainer):
        trainer = made(kind, tmp_path, {"per_device_eval_batch_size": 2, **settings}, compute_metrics=accuracy)
        metrics = trainer.evaluate()
        output = trainer.predict(ROWS)
        found.append((metrics, output))
    (theirs, expected), (ours, output) = found
    for key, value in theirs.items():
        if not re.search("runtime|per_second|time", key):
            assert ours[key] == pytest.approx(value, rel=1e-4), key
    assert ours["eval_right"] > 0 or ours["eval_logits"] > 0
    assert output.predictions.shape == (8, 12, 99)
    assert output.predictions == pytest.approx(expected.predictions, rel=1e-4, abs=1e-4)
    assert (output.label_ids == expected.label_ids).all()
    assert output.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-4)


def test_predictions_in_pieces(tmp_path):
    outputs = [made(kind, tmp_path, {"eval_do_concat_batches": False, "per_device_eval_batch_size": 4}).predict(ROWS)
               for kind in (Trainer, DistillationTrainer)]  # fmt: skip
    for theirs, ours in zip(*(output.predictions for output in outputs), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)


def test_logits_are_preprocessed(tmp_path):
    def most_likely(logits, labels):
        assert logits.shape[:2] == labels.shape
        return logits.argmax(-1)

    trainer = made(DistillationTrainer, tmp_path, {}, preprocess_logits_for_metrics=most_likely)
    whole = made(DistillationTrainer, tmp_path, {}).predict(ROWS)
    assert (trainer.predict(ROWS).predictions == whole.predictions.argmax(-1)).all()


def test_evaluation_without_metrics_makes_no_logits(tmp_path):
    trainer, widths = made(DistillationTrainer, tmp_path, {}), []
    trainer.model.lm_head.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    trainer.evaluate()
    assert widths == [0]
    trainer.predict(ROWS)
    assert widths[1:] == [12]


def test_several_evaluation_sets(tmp_path):
    parts = {"short": ROWS.select([0, 4]), "long": ROWS.select([1, 5])}
    trainer = made(DistillationTrainer, tmp_path, {}, eval_dataset=parts)
    found = trainer.evaluate()
    for name, part in parts.items():
        assert found[f"eval_{name}_cross_entropy"] == pytest.approx(trainer.evaluate(part)["eval_cross_entropy"])


def test_a_dataset_without_labels_is_predicted(tmp_path):
    def unlabelled(rows):
        return {name: value for name, value in collate(rows).items() if name != "labels"}

    found = [made(kind, tmp_path, {}, data_collator=unlabelled).predict(ROWS) for kind in (Trainer, DistillationTrainer)]
    assert found[1].predictions == pytest.approx(found[0].predictions, abs=1e-5)
    assert found[1].label_ids is None
    with pytest.raises(
        ValueError, match="data_collator: it makes input_ids, attention_mask; a batch needs input_ids and labels"
    ):
        made(DistillationTrainer, tmp_path, {}, data_collator=unlabelled).train()


# Parameters


def test_model_init_begins_anew(tmp_path):
    def fresh():
        return student()

    trainer = made(DistillationTrainer, tmp_path, {}, model_init=fresh)
    first = trainer.train()
    weights = [parameter.clone() for parameter in trainer.model.parameters()]
    assert trainer.train().training_loss == first.training_loss
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.model.parameters(), strict=True))
    theirs = made(Trainer, tmp_path, {}, model_init=fresh)
    theirs.train()
    assert_alike(theirs, trainer)
    with pytest.raises(RuntimeError, match="requires either a `model` or `model_init`"):
        DistillationTrainer(args=DistillationArguments(str(tmp_path), losses={"cross_entropy": 1}))


@pytest.mark.parametrize("way", ["model", "model_init", "one model_init", "adapter"])
@pytest.mark.parametrize("trains", [True, False])
def test_nothing_that_training_sets_reaches_the_saved_config(way, trains, tmp_path):
    def fresh():
        model = student(attn_implementation="sdpa", use_cache=True)
        model.generation_config.temperature = 0.6  # without sampling: transformers loads that, and does not save it
        return model

    one = fresh()
    student(attn_implementation="sdpa", use_cache=True).save_pretrained(tmp_path / "expected")
    given = {"model_init": fresh, "one model_init": lambda: one}
    tuned = get_peft_model(one, LoraConfig(r=2, target_modules="all-linear")) if way == "adapter" else one
    kwargs = {"model_init": given[way]} if way in given else {"model": tuned}
    args = DistillationArguments(str(tmp_path), **COMMON, losses={"cross_entropy": 1.0}, gradient_checkpointing=True)
    trainer = DistillationTrainer(args=args, train_dataset=ROWS, **kwargs)
    if trains:
        trainer.train()
    if way == "adapter":
        trainer.model.merge_and_unload().save_pretrained(tmp_path / "saved")
    else:
        trainer.save_model(tmp_path / "saved")
    expected, saved = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("expected", "saved"))
    assert {key: saved[key] for key in expected} == expected
    assert saved.keys() - expected.keys() <= {"rope_theta", "rope_scaling", "torch_dtype"}, "what transformers 4 reads"


def test_model_init_with_losses_on_states(tmp_path):
    args = DistillationArguments(str(tmp_path), **COMMON, losses={"forward_kl": 1.0, "block": 0.5}, layer_pairs={2: 0})
    teacher = tiny.model(dtype=torch.float32)
    trainer = DistillationTrainer(None, teacher, args, model_init=lambda: student(), train_dataset=ROWS)
    histories = []
    for _ in range(2):
        trainer.train()
        histories.append([entry["block"] for entry in trainer.state.log_history if "block" in entry])
    assert histories[0] == histories[1]
    assert len(histories[0]) == 3


def test_optimizers_callbacks_and_a_collator_of_one_s_own(tmp_path):
    class Count(TrainerCallback):
        steps = 0

        def on_step_end(self, *args, **kwargs):
            self.steps += 1

    def short(rows):
        return collate([{"input_ids": row["input_ids"][:4]} for row in rows])

    trainers = []
    for kind in (Trainer, DistillationTrainer):
        count, chosen = Count(), {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9})}
        trainers.append(made(kind, tmp_path / "a", {}, callbacks=[count], data_collator=short, **chosen))
        trainers[-1].train()
        assert count.steps == 3
        assert trainers[-1].data_collator is short
    assert_alike(*trainers)
    trainers = []
    for kind in (Trainer, DistillationTrainer):
        set_seed(0)
        model = student()
        optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        trainer = made(kind, tmp_path / "b", {}, optimizers=(optimizer, schedule))
        trainer.model = trainer.model_wrapped = trainer.callback_handler.model = model
        trainers.append(trainer)
        if kind is DistillationTrainer:
            trainer._watch(model)
        trainer.train()
        assert trainer.state.log_history[1]["learning_rate"] == pytest.approx(0.05)
    assert_alike(*trainers)


def test_early_stopping_by_a_callback(tmp_path):
    settings = {**EVALUATE, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "learning_rate": 30.0}
    stopped = made(DistillationTrainer, tmp_path, {**settings, "max_steps": 9}, callbacks=[EarlyStoppingCallback(1)])
    stopped.train()
    assert stopped.state.global_step < 9
    assert stopped.evaluate()["eval_loss"] == pytest.approx(stopped.state.best_metric)


def test_a_class_of_models_without_loss_arguments_accumulates_as_others(tmp_path):
    """Its forward takes no keywords, from which the Trainer concludes that tokens need not be counted."""
    histories = []
    for accepts in (True, False):
        model = student()
        model.accepts_loss_kwargs = accepts
        args = DistillationArguments(
            str(tmp_path), **COMMON | {"gradient_accumulation_steps": 2}, losses={"cross_entropy": 1.0}
        )
        trainer = DistillationTrainer(model, None, args, train_dataset=ROWS)
        trainer.train()
        histories.append([entry.get("loss") for entry in trainer.state.log_history])
    assert histories[0] == histories[1]


# What needs more than one run


class Full(torch.nn.Module):
    """Memory for one row."""

    def forward(self, module, args, kwargs):
        if module.training and kwargs["input_ids"].shape[0] > 1:
            raise RuntimeError("CUDA out of memory.")


def test_a_batch_that_does_not_fit_is_halved(tmp_path):
    trainers = []
    for kind in (Trainer, DistillationTrainer):
        trainers.append(made(kind, tmp_path, {"auto_find_batch_size": True, "per_device_train_batch_size": 4}))
        trainers[-1].model.register_forward_pre_hook(Full().forward, with_kwargs=True)
        trainers[-1].train()
    assert_alike(*trainers)
    assert trainers[1].state.train_batch_size == 1
    for entry in trainers[1].state.log_history[:3]:
        assert entry["cross_entropy"] == pytest.approx(entry["loss"], rel=1e-5)


def test_engine_settings_reach_accelerate(tmp_path):
    settings = {"ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 7, "ddp_broadcast_buffers": False, "ddp_timeout": 99,
                "ddp_static_graph": True, "torch_compile_mode": "default", "torch_compile_backend": "aot_eager"}  # fmt: skip
    theirs, ours = (made(kind, tmp_path, settings).accelerator for kind in (Trainer, DistillationTrainer))
    assert vars(ours.ddp_handler) == vars(theirs.ddp_handler)
    assert ours.ddp_handler.bucket_cap_mb == 7
    assert ours.state.dynamo_plugin.to_dict() == theirs.state.dynamo_plugin.to_dict()
    assert DistillationArguments(str(tmp_path), ddp_timeout=99).ddp_timeout_delta.total_seconds() == 99
    for kind in (TrainingArguments, DistillationArguments):  # one process has no group
        with pytest.raises(ValueError, match="Default process group has not been initialized"):
            kind(str(tmp_path), ddp_backend="gloo", use_cpu=True)


def test_a_checkpoint_just_in_time(tmp_path, monkeypatch):
    """SIGTERM is heeded where it is asked for, by the Trainer itself; projections are part of the checkpoint."""
    monkeypatch.setattr("threading.Timer", lambda seconds, act: SimpleNamespace(start=act))  # no grace before it acts

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    DistillationArguments(str(tmp_path))
    args = DistillationArguments(str(tmp_path), **COMMON, losses={"forward_kl": 1.0, "block": 0.5}, layer_pairs={2: 0},
                                 enable_jit_checkpoint=True)  # fmt: skip
    trainer = DistillationTrainer(student(), tiny.model(dtype=torch.float32), args, train_dataset=ROWS, callbacks=[Kill()])
    trainer.train()
    assert signal.getsignal(signal.SIGTERM) == before
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert trainer.state.global_step < 3
    assert (checkpoint / "projections.safetensors").is_file()


def test_low_rank_optimizers(tmp_path):
    """They have packages of their own; what can be known without is refused."""
    with pytest.raises(ValueError, match="optim: galore_adamw: You need to install `galore_torch`"):
        DistillationArguments(str(tmp_path), optim="galore_adamw", optim_target_modules=["q_proj"])
    with pytest.raises(ValueError, match="optim_target_modules: galore_adamw needs the names"):
        DistillationArguments(str(tmp_path), optim="galore_adamw")
    with pytest.raises(ValueError, match=r"optim_target_modules: \['q_proj'\] has no effect with sgd"):
        DistillationArguments(str(tmp_path), optim="sgd", optim_target_modules=["q_proj"])


def test_liger_patches_the_student_and_not_the_loss(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="use_liger_kernel: pip install liger-kernel first"):
        DistillationArguments(str(tmp_path), use_liger_kernel=True)
    with pytest.raises(ValueError, match="liger_kernel_config: the chunked loss takes the place"):
        DistillationArguments(str(tmp_path), liger_kernel_config={"fused_linear_cross_entropy": True})
    monkeypatch.setattr("hf_minitron.distillation.checks.is_liger_kernel_available", lambda: True)
    patched = []
    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", lambda model, config: patched.append((model, config)))
    settings = {"use_liger_kernel": True, "liger_kernel_config": {"rms_norm": True}, **EVALUATE}
    trainer = made(DistillationTrainer, tmp_path, settings)
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: kwargs.pop("skip_logits", None) and 1 / 0, with_kwargs=True
    )
    trainer.train()
    assert patched == [(trainer.model, {"rms_norm": True})]
    assert trainer.state.log_history[1]["eval_loss"] > 0


def test_what_the_trainer_only_hands_on(tmp_path):
    settings = {"run_name": "r", "project": "p", "trackio_space_id": "s", "trackio_bucket_id": "b", "do_train": True,
                "trackio_static_space_id": "t", "do_predict": True, "resume_from_checkpoint": "x", "local_rank": 0}  # fmt: skip
    seen = {}

    class Tracker(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.update({name: getattr(args, name) for name in settings})

    made(DistillationTrainer, tmp_path, settings, callbacks=[Tracker()]).train()
    assert seen == settings


def test_a_nan_loss_is_no_average_of_others(tmp_path):
    """Whatever `logging_nan_inf_filter` says: training stops."""
    model = student()
    with torch.no_grad():
        model.model.norm.weight[0] = math.nan
    args = DistillationArguments(str(tmp_path), **COMMON, losses={"cross_entropy": 1.0}, logging_nan_inf_filter=True)
    with pytest.raises(ValueError, match=r"NaN or Inf loss at step 1 \(cross_entropy\)"):
        DistillationTrainer(model, None, args, train_dataset=ROWS).train()


def test_what_the_loss_does_not_know_about_a_model_is_refused(tmp_path, monkeypatch):
    args = DistillationArguments(str(tmp_path), **COMMON, losses={"cross_entropy": 1.0})
    mixture = tiny.model("qwen2_moe", dtype=torch.float32, output_router_logits=True)
    with pytest.raises(ValueError, match="model: output_router_logits adds a loss that is none of `losses`"):
        DistillationTrainer(mixture, None, args)
    quantized = student()
    quantized.lm_head.weight = torch.nn.Parameter(torch.zeros(99, 12, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="The output head is quantized.*leave it out of the quantization"):
        DistillationTrainer(quantized, None, args)
    spread = student()
    monkeypatch.setattr(type(spread), "is_distributed_loading_by_transformers", True)
    with pytest.raises(ValueError, match="model: sharded by from_pretrained"):
        DistillationTrainer(spread, None, args)


def test_a_quantized_teacher_stays_where_it_is(tmp_path, monkeypatch):
    """bitsandbytes puts it on its device, and refuses to move it."""
    teacher = student()
    teacher.quantization_method = QuantizationMethod.BITS_AND_BYTES
    monkeypatch.setattr(teacher, "to", lambda *args, **kwargs: 1 / 0)
    trainer = DistillationTrainer(student(), teacher, DistillationArguments(str(tmp_path), **COMMON), train_dataset=ROWS)
    assert trainer.train().global_step == 3


def test_full_determinism_keeps_state_losses_alive(tmp_path, plain_threads):
    args = DistillationArguments(
        str(tmp_path),
        **COMMON,
        losses={"forward_kl": 1.0, "block": 0.5, "query_key": 0.1},
        layer_pairs={2: 0},
        full_determinism=True,
    )
    trainer = DistillationTrainer(student(), tiny.model(dtype=torch.float32), args, train_dataset=ROWS)
    assert trainer.train().global_step == 3
