"""Sequential least squares: what a pruned model's projections are fitted to, and that memory and disk are alike."""

import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from hf_minitron import Architecture, calibrate, make_plan, prune_model
from hf_minitron.__main__ import main
from hf_minitron.checkpoint.checkpoint import best_device, best_dtype
from hf_minitron.hub.facts import gather
from hf_minitron.importance import sequential
from hf_minitron.importance.sequential import sequential_least_squares
from hf_minitron.importance.streamed import check_streamable
from hf_minitron.plan import Plan
from hf_minitron.probe import last_hidden_states
from hf_minitron.pruning.compensate import DEFAULT_CORRECTIONS
from hf_minitron.pruning.prune import prune_checkpoint
from hf_minitron.pruning.reconstruction import change_of
from hf_minitron.recipe import load_recipe
from hf_minitron.stages.every import STAGES

ALWAYS = ("llama", "gpt2", "qwen3_5_text", "falcon", "llama4_text")
BLOCKS, HELD_OUT = tiny.blocks(60), tiny.blocks(40, seed=5)


def made(model_type="llama", target=None, **changes):
    """A teacher, a plan and its statistics."""
    teacher = tiny.model(model_type, dtype=torch.float32, **changes)
    shape, statistics = Architecture.of(teacher.config).shape, calibrate(teacher, BLOCKS, moments=True)
    after = shape.cut_to(tiny.target(shape) if target is None else target)
    return teacher, make_plan(statistics.scores, shape, after), statistics


def distance(teacher, student):
    """How far a student's logits are from its teacher's on other text, relative to these."""
    ids = HELD_OUT.with_format("torch")[:]["input_ids"]
    with torch.no_grad():
        expected, found = (model(ids).logits.log_softmax(-1) for model in (teacher, student))
    return torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean").item()


def test_a_change_has_no_gradient_left():
    torch.manual_seed(0)
    x = torch.randn(90, 6) @ torch.randn(6, 6)
    lacking = x @ torch.randn(6, 4) + torch.randn(90, 4)
    moment, cross = x.T @ x / 90, lacking.T @ x / 90
    change = change_of(moment, cross, 0.3)
    ridge = 0.3 * moment.diagonal().mean()
    assert (change @ moment - cross + ridge * change).abs().max() < 1e-4
    assert torch.allclose(change_of(moment, cross, 1e-9), torch.linalg.lstsq(x, lacking).solution.T, atol=1e-3)


@pytest.mark.parametrize("model_type", [
    *ALWAYS, *(pytest.param(other, marks=pytest.mark.slow) for other in tiny.TYPES if other not in ALWAYS)
])  # fmt: skip
@pytest.mark.parametrize("part", [160, sequential.PART])
def test_with_nothing_cut_nothing_changes(model_type, part, monkeypatch):
    """The teacher reads the text in parts, and classes may add to what a projection has given in place (Falcon, Llama 4).

    In one part, a teacher of the same classes gives the very same numbers.
    """
    monkeypatch.setattr(sequential, "PART", part)
    teacher = tiny.model(model_type, dtype=torch.float32)
    architecture = Architecture.of(teacher.config)
    try:
        check_streamable(architecture)
    except ValueError as error:
        pytest.skip(str(error))
    plan = make_plan(calibrate(teacher, BLOCKS).scores, architecture.shape, architecture.shape.cut_to({}))
    student = prune_model(teacher, plan)
    sequential_least_squares(teacher, student, plan, BLOCKS)
    exact = part > 160 and model_type in ("llama", "gpt2", "qwen3_5_text")
    for name, value in teacher.state_dict().items():
        assert torch.allclose(student.state_dict()[name], value, rtol=0, atol=0 if exact else 1e-5), name


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2", "lfm2", "qwen2_moe"])
def test_memory_and_disk_give_the_same(model_type, tmp_path):
    teacher, plan, statistics = made(model_type)
    teacher.save_pretrained(tmp_path / "teacher", max_shard_size="40KB")
    prune_checkpoint(tmp_path / "teacher", plan, tmp_path / "student", 40_000, statistics=statistics)
    corrected = prune_model(teacher, plan, statistics)
    student = prune_model(teacher, plan, statistics)
    sequential_least_squares(teacher, student, plan, BLOCKS)
    sequential_least_squares(tmp_path / "teacher", tmp_path / "student", plan, BLOCKS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    for name, value in student.state_dict().items():
        assert torch.allclose(loaded[name], value, rtol=1e-3, atol=1e-4), name
    assert any(not torch.equal(value, corrected.state_dict()[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("target", [{"hidden": 24, "ffn": 48}, {"heads": 2, "kv_heads": 1}, {"layers": 2}])
def test_a_student_is_nearer_to_its_teacher_on_other_text(target):
    teacher, plan, statistics = made("llama", target)
    student = prune_model(teacher, plan, statistics)
    before = distance(teacher, student)
    sequential_least_squares(teacher, student, plan, BLOCKS)
    assert distance(teacher, student) < 0.95 * before


def test_padding_counts_for_nothing():
    teacher, plan, statistics = made()
    rows = BLOCKS.with_format("torch")[:]["input_ids"]
    students = []
    for filler in (1, 7):
        mask = torch.ones_like(rows)
        mask[:, 10:] = 0
        padded = torch.where(mask > 0, rows, filler)
        blocks = BLOCKS.from_dict({"input_ids": padded.tolist(), "attention_mask": mask.tolist()})
        students.append(prune_model(teacher, plan, statistics))
        sequential_least_squares(teacher, students[-1], plan, blocks)
    for name, value in students[0].state_dict().items():
        assert torch.allclose(students[1].state_dict()[name], value, rtol=1e-4, atol=1e-5), name


def test_the_last_layer_takes_over_what_dropped_layers_behind_it_add():
    teacher, plan, statistics = made("llama", {"layers": 2})
    plan = replace(plan, keep={"layers": [0, 1]})
    student = prune_model(teacher, plan)
    gaps = []
    for _ in range(2):
        with last_hidden_states(teacher) as dense, last_hidden_states(student) as pruned, torch.no_grad():
            ids = HELD_OUT.with_format("torch")[:]["input_ids"]
            teacher(ids), student(ids)
        gaps.append(float((dense[-1] - pruned[-1]).square().mean()))
        sequential_least_squares(teacher, student, plan, BLOCKS)
    assert gaps[1] < 0.9 * gaps[0]


def test_what_it_is_not_for_is_refused_by_name():
    teacher, plan, statistics = made("llama", {"hidden": 24})
    rotated = prune_model(teacher, plan, statistics, ["rotation"])
    turned = replace(plan, rotated=True)
    other = tiny.model("llama", dtype=torch.float32, hidden_size=48)
    fewer = replace(plan, keep={**plan.keep, "vocab": list(range(80))})
    for chosen, match in (
        (fewer, "sequential: not where vocab is cut"),
        (turned, "sequential: not for a rotated student"),
    ):
        with pytest.raises(ValueError, match=match):
            sequential_least_squares(teacher, rotated, chosen, BLOCKS)
    with pytest.raises(ValueError, match="The plan is for a model of shape"):
        sequential_least_squares(other, prune_model(teacher, plan), plan, BLOCKS)


def test_the_stage_fits_what_it_has_pruned(project, tmp_path, capsys):
    train, other = (str(project["folder"] / f"{part}.jsonl") for part in ("train", "calibration"))
    text = ("--score.text", f"{{{train}: 1, {other}: 1}}", "--score.tokens", "2048")

    def run(folder, *more, verb="run"):
        return main([verb, str(project["path"]), "--run", str(folder), *text, *more])

    assert run(tmp_path / "run", verb="score") == 0
    for name in ("again", "few"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    assert run(tmp_path / "run", verb="prune") == 0
    assert run(tmp_path / "again", "--prune.sequential", "true", verb="prune") == 0
    students = [tmp_path / name / "prune/student" for name in ("run", "again")]
    loaded = AutoModelForCausalLM.from_pretrained(students[0]).state_dict()
    plain = {name: value.clone() for name, value in loaded.items()}  # the file is mapped, and rewritten
    plan, blocks = Plan.load(students[0] / "plan.json"), Dataset.from_parquet(str(tmp_path / "run/score/blocks.parquet"))
    dtype = best_dtype(best_device())
    sequential_least_squares(project["folder"] / "teacher", students[0], plan, blocks, dtype=dtype)
    by_hand, fitted = (AutoModelForCausalLM.from_pretrained(student).state_dict() for student in students)
    for name, value in fitted.items():
        assert torch.equal(value, by_hand[name]), name
    assert any(not torch.equal(value, plain[name]) for name, value in fitted.items())
    recipe = load_recipe(
        project["path"], {"run": str(tmp_path / "again"), "prune.sequential": True}, {n: s.args for n, s in STAGES.items()}
    )
    assert gather(recipe)["corrections"] == [*DEFAULT_CORRECTIONS, "sequential"], "what the card says"
    capsys.readouterr()
    assert run(tmp_path / "bad", "--prune.sequential", "true", "--prune.corrections", "[rotation]") == 1
    assert "prune: sequential: not for a rotated student" in capsys.readouterr().err
    assert run(tmp_path / "few", "--prune.sequential", "true", "--prune.sequential_tokens", "600", verb="prune") == 0
    few = AutoModelForCausalLM.from_pretrained(tmp_path / "few/prune/student").state_dict()
    assert any(not torch.equal(value, few[name]) for name, value in fitted.items())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "sequential_tokens: 4096 has no effect without sequential: true"),
        (["--prune.sequential", "true"], "sequential_tokens: 4096 are more than score.tokens: 2048, which it reads again"),
    ],
)
def test_tokens_for_it_are_those_that_were_scored(project, tmp_path, capsys, more, words):
    changes = ["--run", str(tmp_path / "run"), "--score.tokens", "2048", "--prune.sequential_tokens", "4096", *more]
    assert main(["run", str(project["path"]), *changes]) == 1
    assert words in capsys.readouterr().err


def test_it_reads_so_many_tokens_of_the_whole_text():
    teacher, plan, statistics = made()
    length = len(BLOCKS[0]["input_ids"])
    students = [prune_model(teacher, plan, statistics) for _ in range(3)]
    sequential_least_squares(teacher, students[0], plan, BLOCKS, tokens=5 * length + 1)
    sequential_least_squares(teacher, students[1], plan, BLOCKS.select([0, 14, 29, 44, 59]))
    sequential_least_squares(teacher, students[2], plan, BLOCKS, tokens=1)
    for name, value in students[0].state_dict().items():
        assert torch.equal(value, students[1].state_dict()[name]), name
    assert any(not torch.equal(value, students[2].state_dict()[name]) for name, value in students[0].state_dict().items())


@pytest.fixture
def tf32():
    """A process in which CUDA's precision was set as `TrainingArguments(tf32=True)` does: then that of all cannot be read."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has no precision by backend")
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    yield
    matmul.fp32_precision = before


def test_products_of_bfloat16_states_lose_nothing_that_counts_and_leave_the_precision_as_it_was(tf32, monkeypatch):
    teacher, plan, statistics = made("llama", {"hidden": 24, "ffn": 48})
    rounded, students = sequential.products_for, []

    def precisions():
        return [backend.fp32_precision for backend in sequential.PRODUCTS]

    before = precisions()
    for products in (rounded, lambda dtype: nullcontext()):
        monkeypatch.setattr(sequential, "products_for", products)
        students.append(prune_model(teacher, plan, statistics))
        sequential_least_squares(teacher, students[-1], plan, BLOCKS, dtype=torch.bfloat16)
        assert precisions() == before
    plain = prune_model(teacher, plan, statistics).state_dict()
    for name, value in students[1].state_dict().items():
        changed = (value - plain[name]).norm()
        assert (students[0].state_dict()[name] - value).norm() <= 0.02 * changed, name
    with rounded(torch.float32):
        assert precisions() == before
    with pytest.raises(KeyboardInterrupt), rounded(torch.bfloat16):
        assert precisions() == ["tf32", "bf16"]
        raise KeyboardInterrupt
    assert precisions() == before
