"""correct: a stock teacher that fits the text better, whole or by LoRA; the student learns from it."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from test_distillation import CONSTANT, RAGGED
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from transformers.utils import is_bitsandbytes_available

from hf_minitron import Report
from hf_minitron.__main__ import main
from hf_minitron.distillation.adapters import add_lora, merge_lora
from hf_minitron.distillation.config import DistillationArguments
from hf_minitron.distillation.trainer import DistillationTrainer, collate
from hf_minitron.head import Head

SECTION = {"block_size": 16, "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 0.01, "warmup_steps": 1,
           "save_steps": 2, "logging_steps": 1, "bf16": False, "report_to": "none", "disable_tqdm": True}  # fmt: skip


@pytest.fixture
def recipe(project, tmp_path):
    """Writes a recipe with a `correct:` section, and returns its path."""

    def write(name="recipe", drop=(), **section):
        text = {"text": str(project["folder"] / "train.jsonl")}
        content = {**project["recipe"], "run": str(tmp_path / name), "correct": {**SECTION, **text, **section}}
        content["evaluate"] = {**content["evaluate"], "tasks": [], "speed": False}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if key not in drop}))
        return path

    return write


def trainer_for(tmp_path, model, **changes):
    settings = {"bf16": False, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", **CONSTANT}
    settings |= {"losses": {"cross_entropy": 1.0}, "train_sampling_strategy": "sequential", **changes}
    return DistillationTrainer(model, None, DistillationArguments(str(tmp_path), **settings), train_dataset=RAGGED)


def train(tmp_path, model, **changes):
    trainer = trainer_for(tmp_path, model, max_steps=2, **changes)
    trainer.train()
    return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_is_one_of_sgd_on_full_logits(tmp_path, tied):
    changes = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9, "max_steps": 1, "per_device_train_batch_size": 4}
    ours = tiny.model(tie_word_embeddings=tied)
    trainer = trainer_for(tmp_path, ours, chunk_size=5, **changes)
    trainer.train()
    theirs, batch = tiny.model(tie_word_embeddings=tied), collate([RAGGED[i] for i in range(4)])
    logits, labels = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1], batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    loss.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b - 0.1 * b.grad, atol=1e-9), name
        assert b.grad.abs().max() > 0


def test_accumulation_and_chunks_change_nothing(tmp_path):
    expected, losses = train(tmp_path, tiny.model(), per_device_train_batch_size=4)
    changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "chunk_size": 3}
    found, others = train(tmp_path, tiny.model(), **changes)
    assert others == pytest.approx(losses, abs=1e-9)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_the_logits_of_a_batch_never_exist(tmp_path):
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == 103:
                    self.rows = max(self.rows, tensor.numel() // 103)
            return out

    model, batch = tiny.model(vocab_size=103), collate([RAGGED[i] for i in range(8)])
    trainer = trainer_for(tmp_path, model, chunk_size=8)
    with Largest() as found:
        trainer.training_step(model, dict(batch))
    assert 8 <= found.rows <= tiny.SIZES["hidden"]  # a chunk's; the transposed head is not logits


def test_mixed_precision_reaches_the_head(tmp_path, monkeypatch):
    seen, project = set(), Head.project
    monkeypatch.setattr(Head, "project", lambda head, hidden: seen.add(hidden.dtype) or project(head, hidden))
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        seen.clear()
        train(tmp_path, tiny.model(dtype=torch.float32), bf16=bf16)
        assert seen == {dtype}


def test_lora_changes_its_targets_only_and_merges_into_a_stock_model(tmp_path):
    tiny.model(dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    tuned = add_lora(tiny.model(dtype=torch.float32), {"r": 3, "target_modules": ["q_proj", "up_proj"]})
    trained, _ = train(tmp_path, tuned, per_device_train_batch_size=4)
    trained.save_pretrained(tmp_path / "adapter")
    trained._forward_pre_hooks.clear()  # or it would make no logits
    merged, ids = merge_lora(tmp_path / "teacher", tmp_path / "adapter"), tiny.blocks()["input_ids"][:]
    before, after = tiny.model(dtype=torch.float32).state_dict(), merged.state_dict()
    changed = {name.split(".")[-2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"q_proj", "up_proj"}
    assert before.keys() == after.keys()
    assert torch.allclose(merged(ids).logits, trained.eval()(ids).logits, atol=1e-4)


BASES = [
    "bfloat16",
    pytest.param("nf4", marks=pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")),
]


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"base_dtype": "int3", "lora": {}}, "base_dtype: 'int3' is none of float32, bfloat16, nf4"),
        (
            {"base_dtype": "bfloat16"},
            "base_dtype: bfloat16 is for the frozen base of adapters, and here all weights are",
        ),
        ({"base_dtype": "nf4", "lora": {}}, "base_dtype: nf4 needs a package that is not installed: pip install bitsandbytes"),
    ],
)
def test_a_base_that_cannot_be_is_refused(recipe, monkeypatch, capsys, section, reason):
    monkeypatch.setattr("hf_minitron.distillation.adapters.is_bitsandbytes_available", lambda: False)
    assert main(["correct", str(recipe(**section))]) == 1
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("base", BASES)
def test_adapters_on_a_narrow_base(recipe, monkeypatch, base):
    """It is held as asked, and what is learnt is near that of float32, into whose weights it is merged."""
    held, merged = [], []

    def added(model, settings):
        held.append({module.weight.dtype for name, module in model.named_modules() if name.endswith("_proj")})
        return add_lora(model, settings)

    monkeypatch.setattr("hf_minitron.stages.trained.add_lora", added)
    for name in ("float32", base):
        path = recipe(name, lora={"r": 4}, base_dtype=name, bf16=True)
        assert main(["correct", str(path)]) == 0
        run = Path(yaml.safe_load(path.read_text())["run"])
        merged.append(load_file(run / "correct/teacher/model.safetensors"))
        history = json.loads((run / "correct/log.json").read_text())["history"]
        merged[-1] |= {"loss": torch.tensor([entry["loss"] for entry in history if "loss" in entry])}
    assert held == [{torch.float32}, {{"bfloat16": torch.bfloat16, "nf4": torch.uint8}[base]}]
    one, two = merged
    assert torch.allclose(one.pop("loss"), two.pop("loss"), rtol=0.05)
    assert {name: (value.shape, value.dtype) for name, value in one.items()} == {
        name: (value.shape, value.dtype) for name, value in two.items()
    }
    worst = max((one[name] - two[name]).norm() / one[name].norm() for name in one)
    assert 0 < worst < {"bfloat16": 0.1, "nf4": 0.5}[base]


@pytest.mark.parametrize("lora", [None, pytest.param({"r": 4}, marks=pytest.mark.slow)])
def test_the_student_learns_from_the_corrected_teacher(project, recipe, lora, capsys):
    path = recipe(lora=lora)
    run = path.with_suffix("")
    assert main(["run", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.index("correct: done") < out.index("score: done")
    report = json.loads((run / "evaluate/report.json").read_text())["models"]
    assert list(report) == ["teacher", "corrected", "pruned", "distilled"]
    config = json.loads((run / "correct/teacher/config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not list((run / "correct/teacher").glob("adapter*"))
    assert AutoModelForCausalLM.from_pretrained(run / "correct/teacher").num_parameters() == report["teacher"]["parameters"]
    assert not (run / "correct/checkpoints").exists()
    assert (run / "correct/teacher/tokenizer.json").is_file()
    measured = Report.load(run / "evaluate/report.json")
    assert measured.value("corrected", "perplexity") < measured.value("teacher", "perplexity")
    assert json.loads((run / "correct/log.json").read_text())["tokens"] == 8 * 2 * 16
    # distilled again, as without the section: from the teacher as it was, or from the corrected one by name
    plain = recipe("plain", drop=["correct"])
    students = {"corrected": load_file(run / "distill/student/model.safetensors")}
    for name, teacher in {"original": [], "named": ["--distill.teacher", str(run / "correct/teacher")]}.items():
        for stage in ("score", "prune", "distill"):
            assert main([stage, str(plain), "--run", str(path.parent / name), *teacher]) == 0
        students[name] = load_file(path.parent / name / "distill/student/model.safetensors")
    pruned = [load_file(folder / "prune/student/model.safetensors") for folder in (run, path.parent / "original")]
    assert all(torch.equal(pruned[0][name], pruned[1][name]) for name in pruned[0])
    assert all(torch.equal(students["corrected"][name], students["named"][name]) for name in students["named"])
    assert any(not torch.equal(students["corrected"][name], students["original"][name]) for name in students["named"])


def test_a_student_of_low_rank_additions_is_a_stock_model(recipe):
    path = recipe(drop=["correct"])
    for stage in ("score", "prune", "distill"):
        assert main([stage, str(path), "--distill.lora", "{r: 3, target_modules: [q_proj, up_proj]}"]) == 0
    pruned, student = (
        load_file(path.with_suffix("") / folder / "student/model.safetensors") for folder in ("prune", "distill")
    )
    changed = {name.split(".")[-2] for name in pruned if not torch.equal(pruned[name], student[name])}
    assert pruned.keys() == student.keys()
    assert changed == {"q_proj", "up_proj"}
    history = json.loads((path.with_suffix("") / "distill/log.json").read_text())["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert AutoModelForCausalLM.from_pretrained(path.with_suffix("") / "distill/student").num_parameters() > 0


def test_killed_between_checkpoints_it_ends_as_if_it_had_not_been(recipe, monkeypatch):
    whole, killed = (recipe(name, lora={"r": 2}, max_steps=4) for name in ("whole", "killed"))
    assert main(["correct", str(whole)]) == 0
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("hf_minitron.stages.trained.merge_lora", lambda *args: 1 / 0)
        main(["correct", str(killed)])
    folder = killed.with_suffix("") / "correct.tmp/checkpoints"
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "adapter")
    assert (folder / "checkpoint-2").is_dir()
    assert main(["correct", str(killed)]) == 0
    a, b = (load_file(path.with_suffix("") / "correct/teacher/model.safetensors") for path in (whole, killed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_changed_correction_is_distilled_again(recipe, capsys):
    path = recipe()
    for stage in ("correct", "score", "prune", "distill"):
        assert main([stage, str(path)]) == 0
    assert main(["distill", str(path)]) == 0
    assert "distill: done before" in capsys.readouterr().out
    assert main(["distill", str(path), "--correct.learning_rate", "0.001"]) == 1
    assert "distill needs correct, which was done with other settings" in capsys.readouterr().err
    assert main(["prune", str(path), "--correct.learning_rate", "0.001"]) == 0  # it does not depend on it


def test_candidates_of_a_search_share_the_corrected_teacher(recipe, capsys):
    path = recipe()
    more = ["--search.budget", "{parameters: 70%}", "--search.grid", "{ffn: [32, 40, 48]}", "--search.tolerance", "0.2",
            "--search.top", "1"]  # fmt: skip
    for stage in ("correct", "score", "search"):
        assert main([stage, str(path), *more]) == 0
    (candidate,) = path.with_suffix("").glob("candidates/*/recipe.yaml")
    capsys.readouterr()
    assert main(["correct", str(candidate)]) == 0
    assert "correct: done before, skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("--correct.text", "./nowhere.jsonl"), "No text at './nowhere.jsonl'"),
        (("--correct.text", "''"), "text is missing"),
        (("--correct.warmup_steps", "8"), "warmup_steps: 8 are not fewer than max_steps: 8"),
        (("--correct.lora", "{alpha: 3}"), "'alpha' is no field of peft.LoraConfig; did you mean 'lora_alpha'?"),
        (("--correct.lora", "{target_modules: [c_attn]}"), "lora: Target modules"),
        (("--correct.lora", "{target_modules: [lm_head]}"), "changes the embedding or the output head"),
        (("--correct.lora", "{r: 0}"), "lora: "),
        (("--correct.chunk_size", "0"), "chunk_size: 0 must be at least 1"),
    ],
)
def test_what_cannot_work_is_told_before_slow_work(recipe, capsys, override, message):
    path = recipe()
    assert main(["run", str(path), *override]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "correct" in error
    assert not path.with_suffix("").exists()
