"""On-policy distillation: what the student writes, that only this is learnt, and what the result does not depend on."""

import json

import numpy as np
import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from test_accelerate import launch, script
from test_distillation import CONSTANT, arguments, full_loss
from transformers.trainer_utils import get_last_checkpoint

from hf_minitron.__main__ import main
from hf_minitron.architecture.config import positions_of
from hf_minitron.data.packing import token_blocks
from hf_minitron.distillation.batch import collate
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.engine import prepare_engine
from hf_minitron.distillation.on_policy import complete, prompts_of
from hf_minitron.distillation.trainer import DistillationTrainer

NEW = {"lmbda": 1.0, "max_new_tokens": 4}
TEXT = Dataset.from_dict(
    {"input_ids": [tiny.blocks(1, n, seed=n)["input_ids"][0].tolist() for n in (9, 12, 7, 9, 8, 11, 8, 6)]}
)


def rngs(count, seed=0):
    return [np.random.default_rng([seed, row]) for row in range(count)]


def trainer_of(folder, student=None, teacher=None, data=TEXT, **changes):
    values = {"max_steps": 3, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"} | CONSTANT | NEW
    student = student or tiny.model(seed=1, hidden_size=24)
    return DistillationTrainer(student, teacher or tiny.model(), arguments(folder, **values | changes), train_dataset=data)


def history(trainer, *names):
    return [tuple(entry[name] for name in ("loss", *names)) for entry in trainer.state.log_history if "loss" in entry]


def batches_of(trainer, step=0):
    trainer.state.global_step = step
    rows = [TEXT[i] for i in range(4)]
    return next(iter(trainer._batches([trainer.data_collator(rows)])))


# Prompts


def test_a_text_is_a_prompt_but_for_its_end():
    batch = collate([TEXT[0], TEXT[1]])
    assert prompts_of(batch, rngs(2), 4) == {0: TEXT[0]["input_ids"][:-4], 1: TEXT[1]["input_ids"][:-4]}
    assert prompts_of(batch, rngs(2), 100) == {0: TEXT[0]["input_ids"][:1], 1: TEXT[1]["input_ids"][:1]}


def test_a_bos_token_or_the_start_of_a_document_is_no_prompt_of_its_own():
    ids = list(range(10, 22))
    opened = collate([{"input_ids": ids, "labels": [-100, *ids[1:5], -100, *ids[6:]]}])
    assert prompts_of(opened, rngs(1), 4) == {0: ids[:-4]}
    masked = collate([{"input_ids": ids, "position_ids": [*range(5), *range(7)]}])
    assert prompts_of(masked, rngs(1), 4) == {0: ids[5:-4]}, "a prompt begins with its document"


def test_the_prompt_of_a_chat_ends_where_an_answer_begins():
    ids = list(range(10, 26))
    learnt = [*[0] * 3, *[1] * 3, *[0] * 4, *[1] * 3, *[0] * 3]  # answers begin at 3 and at 10
    row = {"input_ids": ids, "labels": [token if one else -100 for token, one in zip(ids, learnt, strict=True)]}
    drawn = [prompts_of(collate([row]), rngs(1, seed), 4)[0] for seed in range(12)]
    assert {len(prompt) for prompt in drawn} == {3, 10}
    assert all(prompt == ids[: len(prompt)] for prompt in drawn)
    roomy = [prompts_of(collate([row]), rngs(1, seed), 10)[0] for seed in range(12)]
    assert {len(prompt) for prompt in roomy} == {3}, "only there is room for ten tokens"
    apart = row | {"position_ids": [*range(7), *range(9)]}
    drawn = [prompts_of(collate([apart]), rngs(1, seed), 4)[0] for seed in range(12)]
    assert {tuple(prompt) for prompt in drawn} == {tuple(ids[7:10])}, "of the first document the beginning may be missing"
    drawn = [prompts_of(collate([apart]), rngs(1, seed), 10)[0] for seed in range(12)]
    assert {tuple(prompt) for prompt in drawn} == {tuple(ids[:3])}


TEMPLATE = (
    "{% for m in messages %}{{ ('w3 w5 ' if m['role'] == 'user' else 'w4 w6 ') + m['content'] + ' w2 ' }}{% endfor %}"
    "{% if add_generation_prompt %}w4 w6 {% endif %}"
)


def test_the_prompts_of_packed_chats_are_those_that_the_template_writes():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    turns = [(f"w{n} w{n + 1}", "w50 w51 w52 w53"[: 3 + 4 * (n % 4)]) for n in range(10, 40)]
    roles = [[{"role": "user", "content": said}, {"role": "assistant", "content": answer}] for said, answer in turns]
    documents = Dataset.from_list([{"messages": messages} for messages in roles])
    blocks = token_blocks(documents, tokenizer, 32, cross_documents=False)
    prompts = prompts_of(collate([*blocks]), rngs(len(blocks)), 6)
    asked = [tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False) for messages in roles]
    assert len(prompts) == len(blocks)
    assert {tokenizer.decode(prompt) for prompt in prompts.values()} <= {text.strip() for text in asked}
    assert len({tuple(prompt) for prompt in prompts.values()}) == len(blocks)


def test_a_row_of_which_nothing_is_learnt_asks_for_nothing():
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}, {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]
    assert prompts_of(collate(rows), rngs(2), 2) == {1: [5, 6]}


def test_a_column_that_belongs_to_the_data_is_refused():
    with pytest.raises(ValueError, match=r"^lmbda: the batch has token_type_ids, which says nothing of what the student"):
        prompts_of({**collate([TEXT[0]]), "token_type_ids": torch.zeros(1, 9)}, rngs(1), 4)


# Completions


def test_sampling_follows_the_student_s_probabilities():
    model, prompt, draws = tiny.model(), [5, 6, 7], 3000
    logits = model(torch.tensor([prompt])).logits[0, -1]
    for temperature in (1.0, 0.5):
        found = [new[0] for new in complete(model, None, [prompt] * draws, rngs(draws), 1, temperature)]
        share = torch.bincount(torch.tensor(found), minlength=99) / draws
        assert (share - (logits / temperature).softmax(-1)).abs().max() < 0.04, temperature
    assert {new[0] for new in complete(model, None, [prompt] * 3, rngs(3), 1, 0)} == {int(logits.argmax())}


def test_a_completion_does_not_depend_on_its_batch_nor_on_the_mode_or_settings_of_the_student():
    model = tiny.model(attention_dropout=0.5).train()
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, top_k=1)
    own, prompts = model.generation_config, [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    together = complete(model, tiny.tokenizer(), prompts, rngs(3), 6)
    alone = [
        complete(tiny.model(), tiny.tokenizer(), [prompt], [rng], 6)[0] for prompt, rng in zip(prompts, rngs(3), strict=True)
    ]
    assert together == alone
    assert model.training
    assert model.generation_config is own
    assert len({tuple(new) for new in together}) == 3


def test_a_completion_ends_with_the_end_token():
    model = tiny.model()
    (first, *_) = complete(model, None, [[5, 6, 7]], rngs(1), 6)[0]
    model.generation_config.eos_token_id = [first, 98]
    assert complete(model, None, [[5, 6, 7]], rngs(1), 6) == [[first]]


def test_sampling_uses_the_kv_cache(monkeypatch):
    model, widths = tiny.model(), []
    model.config.use_cache = False  # as the Trainer leaves it with gradient checkpointing
    forward = type(model).forward

    def counted(self, input_ids=None, **more):
        widths.append(input_ids.shape[1])
        return forward(self, input_ids=input_ids, **more)

    monkeypatch.setattr(type(model), "forward", counted)
    complete(model, None, [[5, 6, 7]], rngs(1), 3)
    assert widths == [3, 1, 1]


# Training


def test_the_loss_is_that_of_the_sampled_tokens_alone(tmp_path):
    trainer = trainer_of(tmp_path, losses={"forward_kl": 1.0})
    batch = batches_of(trainer)
    prompts = [row["input_ids"][:-4] for row in (TEXT[i] for i in range(4))]
    for row, prompt in enumerate(prompts):
        assert batch["input_ids"][row, : len(prompt)].tolist() == prompt
        learnt = (batch["labels"][row] != -100).nonzero().flatten().tolist()
        assert learnt == list(range(len(prompt), learnt[-1] + 1))
        assert 1 <= len(learnt) <= 4
    expected = full_loss(trainer.model, trainer.teacher.model, batch, trainer.args.losses)
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected.item(), abs=1e-10)
    assert batches_of(trainer, 1)["input_ids"].tolist() != batch["input_ids"].tolist(), "another step, other draws"


def test_accumulation_and_gradient_checkpointing_change_nothing(tmp_path):
    expected = trainer_of(tmp_path)
    expected.train()
    assert len({loss for loss, *_ in history(expected)}) == 3
    for changes in ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, {"gradient_checkpointing": True}):
        trainer = trainer_of(tmp_path, **changes)
        trainer.train()
        assert history(trainer, "completions") == [pytest.approx(row, abs=1e-6) for row in history(expected, "completions")]
        for (name, a), b in zip(expected.model.named_parameters(), trainer.model.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-9), name


def test_lmbda_is_the_share_of_steps_and_the_log_says_what_was_sampled(tmp_path):
    trainer = trainer_of(tmp_path, lmbda=0.5, max_steps=12, sampling_temperature=0.7)
    trainer.train()
    sampled = [completions for _, completions, _ in history(trainer, "completions", "completion_length")]
    assert set(sampled) == {0, 4}
    assert 3 <= sampled.count(4) <= 9
    assert all(bool(count) == (1 <= length <= 4) for _, count, length in history(trainer, "completions", "completion_length"))
    off = trainer_of(tmp_path, lmbda=0.0, max_new_tokens=None, max_steps=12)
    off.train()
    assert history(trainer, "tokens")[-1][1] == history(off, "tokens")[-1][1], "the text that is read, whatever is sampled"


def test_a_resumed_training_samples_the_same(tmp_path):
    changes = {"lmbda": 0.6, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path / "whole", **changes)
    whole.train()
    first = trainer_of(tmp_path / "whole", **changes)
    first.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert get_last_checkpoint(tmp_path / "whole").endswith("checkpoint-6")
    assert history(first)[-3:] == history(whole)[-3:]
    for (name, a), b in zip(whole.model.named_parameters(), first.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_student_learns_from_its_own_text(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=40, losses={"reverse_kl": 1.0})
    trainer.train()
    losses = [loss for loss, *_ in history(trainer)]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


PROCESSES = """
import sys, json
sys.path.insert(0, {tests!r})
import tiny
from test_on_policy import trainer_of
out, batch = sys.argv[1], int(sys.argv[2])
trainer = trainer_of(out, per_device_train_batch_size=batch)
trainer.train()
if trainer.is_world_process_zero():
    found = [[e[key] for key in ("loss", "completions", "completion_length")] for e in trainer.state.log_history if "loss" in e]
    open(out + ".json", "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    histories = []
    for processes, batch in ((1, 2), (2, 1)):
        launch(processes, script(tmp_path, PROCESSES), tmp_path / f"out-{processes}", batch)
        histories.append(json.loads((tmp_path / f"out-{processes}.json").read_text()))
    one, two = histories
    assert len(one) == 3
    assert two == [pytest.approx(row, rel=1e-6) for row in one]


# What is refused

REFUSED = [
    ({"lmbda": 1.5}, "lmbda: 1.5 must be between 0 and 1"),
    ({"lmbda": 0.5, "max_new_tokens": 0}, "max_new_tokens: 0 must be at least 1"),
    ({"lmbda": 0.5, "sampling_temperature": -1.0}, "sampling_temperature: -1.0 must be zero or more"),
    ({"lmbda": 0.0, "max_new_tokens": 4}, "max_new_tokens: 4 has no effect without lmbda"),
    (
        {"lmbda": 0.0, "max_new_tokens": None, "sampling_temperature": 1.0},
        "sampling_temperature: 1.0 has no effect without lmbda",
    ),
    (
        {"losses": {"forward_kl": 1.0, "cross_entropy": 0.1}},
        "lmbda: 1.0, but cross_entropy would learn what the student writes",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_settings_that_cannot_work_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        arguments(tmp_path, **(NEW | changes))
    assert str(caught.value).startswith(message)


def test_a_cached_teacher_is_refused(tmp_path):
    write_cache(tiny.model(), TEXT, tmp_path / "cache", {"top_k": 9})
    with pytest.raises(ValueError, match=r"^lmbda: 1.0, but a cached teacher has no answer to what the student writes"):
        trainer_of(tmp_path, teacher=tmp_path / "cache")


def test_shards_are_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ValueError, match=r"^lmbda: 1.0, not with FSDP or DeepSpeed, whose shards no process can generate"):
        prepare_engine(trainer)


def test_completions_longer_than_the_model_are_refused(tmp_path):
    positions = positions_of(tiny.model().config)
    with pytest.raises(ValueError, match=rf"^max_new_tokens: {positions} leave no room for a prompt"):
        trainer_of(tmp_path, max_new_tokens=positions)


def recipe_of(project, tmp_path, sections=None, **distill):
    recipe = project["recipe"] | {"run": str(tmp_path / "run")} | (sections or {})
    recipe["distill"] = recipe["distill"] | NEW | distill
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.mark.parametrize(
    ("sections", "distill", "message"),
    [
        ({"cache": {"method": "top_k", "k": 9}}, {}, "lmbda: 1.0, but a cache has no answer to what the student writes"),
        ({}, {"max_new_tokens": 1000}, "max_new_tokens: 1000 leave no room for a prompt in block_size"),
        ({}, {"on_policy": 0.5}, "Unknown key 'on_policy' in distill; did you mean 'lmbda'?"),
        ({"correct": {"lmbda": 0.5}}, {}, "lmbda: 0.5, but cross_entropy would learn what the student writes"),
    ],
)
def test_a_recipe_is_refused_before_the_first_stage(sections, distill, message, project, tmp_path, capsys):
    if "correct" in sections:
        sections["correct"] |= {"text": str(project["folder"] / "train.jsonl"), "max_steps": 200}
    assert main(["run", recipe_of(project, tmp_path, sections, **distill)]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert not (tmp_path / "run/score").exists()


def test_plan_counts_what_sampling_reads(project, tmp_path, capsys):
    said = []
    for lmbda in (0.0, 1.0):
        path = recipe_of(project, tmp_path, lmbda=lmbda, max_new_tokens=4 if lmbda else None)
        assert main(["plan", path]) == 0
        said.append(capsys.readouterr().out)
    rows = [next(line for line in text.splitlines() if line.startswith("| distill")) for text in said]
    flops = [float(row.split("|")[6]) for row in rows]
    assert flops[1] > 1.05 * flops[0]
    assert "sampling" not in said[0]
    assert "sampling takes longer than its FLOPs say" in rows[1]
