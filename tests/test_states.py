"""Losses on states: what the taps read, against hidden states asked for by name; projections, balance, resuming."""

import math
import os
import signal

import pytest
import tiny
import torch
from test_distillation import CONSTANT, RAGGED, arguments, trainer_for
from transformers import TrainerCallback

from hf_minitron.distillation.states import STATE_LOSSES, StateLosses, layer_pairs
from hf_minitron.distillation.stopping import StopOnSigterm
from hf_minitron.distillation.trainer import PROJECTIONS, DistillationTrainer, collate

SMALL = {"num_hidden_layers": 2, "hidden_size": 24}
LAST_NORM = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm", "opt": "decoder.final_layer_norm", "phi": "final_layernorm"}
LAYERS = {"gpt2": "h", "opt": "decoder.layers"}
FIRST_NORM = {"gpt2": "ln_1", "opt": "self_attn_layer_norm"}
MLP_NORM = {"gpt2": "ln_2", "opt": "final_layer_norm", "gemma3_text": "pre_feedforward_layernorm", "phi": "input_layernorm"}


def split(model, model_type, layer, normed):
    """Queries, keys and values of a layer, as the class's own attention makes them: (batch, seq, heads, head_dim)."""
    attention = layer.attn if model_type == "gpt2" else layer.attention if model_type == "gpt_neox" else layer.self_attn
    heads, groups = 4, 4 if model_type in ("gpt2", "gpt_neox", "opt") else 2
    dim = model.config.hidden_size // 4 if model_type in ("gpt2", "gpt_neox", "opt") else model.config.head_dim
    if model_type == "gpt2":
        q, k, v = attention.c_attn(normed).split(model.config.hidden_size, 2)
    elif model_type == "gpt_neox":
        return attention.query_key_value(normed).view(*normed.shape[:2], heads, 3 * dim).chunk(3, -1)
    elif model_type == "phi3":
        fused = attention.qkv_proj(normed)
        q, k, v = fused.tensor_split([heads * dim, (heads + groups) * dim], -1)
    else:
        q, k, v = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    return (part.view(*normed.shape[:2], -1, dim) for part in (q, k, v))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt", "phi", "phi3", "qwen2_moe", "gemma3_text"])
def test_taps_read_what_the_model_computes(model_type):
    dtype = torch.float32 if model_type == "qwen2_moe" else torch.float64  # experts know no float64
    model, ids = tiny.model(model_type, dtype), tiny.blocks(2)["input_ids"][:]
    states = StateLosses(model, model, STATE_LOSSES, "uniform")
    with states.tapped() as (seen, _):
        model(input_ids=ids)
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    base = model.base_model
    layers = base.get_submodule(LAYERS.get(model_type, "layers"))
    norms = [getattr(layer, FIRST_NORM.get(model_type, "input_layernorm")) for layer in layers]
    normed = [norm(state) for norm, state in zip(norms, hidden, strict=False)]
    after = [*normed[1:], hidden[-1]]  # the class gives the last states behind the last norm
    for (place, _), expected in zip(states.pairs["block"], after, strict=True):
        assert torch.allclose(seen[place[0][0]], expected, atol=1e-12 if dtype == torch.float64 else 1e-5)
    ((embedding, _),) = states.pairs["embedding"]
    assert torch.equal(seen[embedding[0][0]], normed[0])
    given = []
    for layer in layers:
        norm = getattr(layer, MLP_NORM.get(model_type, "post_attention_layernorm"))
        norm.register_forward_hook(lambda module, args, output: given.append(output))
    model(input_ids=ids)
    for (place, _), expected in zip(states.pairs["mlp_input"], given[:3], strict=True):
        assert torch.equal(seen[place[0][0]], expected)
    parts = split(model, model_type, layers[1], normed[1])
    from hf_minitron.distillation.states import _heads

    for name, expected in zip(("query_query", "key_key", "value_value"), parts, strict=True):
        module, dim, part = states.pairs[name][1][0][0]
        assert torch.equal(_heads(seen[module], dim, part, states._sizes[0]), expected), name


def test_pairs_of_layers():
    assert layer_pairs("last-2", 30, 15) == [(27, 12)]
    assert layer_pairs("uniform", 5, 3) == [(1, 0), (3, 1), (4, 2)]
    assert layer_pairs("uniform", 4, 4) == [(i, i) for i in range(4)]
    assert layer_pairs("plan", 5, 3, [0, 3, 4]) == [(0, 0), (3, 1), (4, 2)]
    assert layer_pairs({4: 2, "1": 0}, 5, 3) == [(4, 2), (1, 0)]
    with pytest.raises(ValueError, match="the pair 5, 2 is not in a teacher of 5 layers and a student of 3"):
        layer_pairs({5: 2}, 5, 3)
    with pytest.raises(ValueError, match="the pair 2, -1"):
        layer_pairs("last-2", 5, 2)
    with pytest.raises(ValueError, match=r"plan needs the student's plan.json"):
        layer_pairs("plan", 5, 3)


def train(tmp_path, resume=None, **changes):
    student = tiny.model(seed=1, **SMALL)
    values = {"losses": {"forward_kl": 1.0, "block": 0.7, "embedding": 0.3, "query_key": 0.2}, "max_steps": 4}
    values |= {"layer_pairs": "uniform", "balance": "static", "train_sampling_strategy": "sequential"}
    trainer = trainer_for(tmp_path, student, tiny.model(), **(CONSTANT | values | changes))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def test_parts_are_logged_by_name_and_add_up(tmp_path):
    _, history = train(tmp_path)
    for entry in history:
        parts = entry["forward_kl"] + 0.7 * entry["block"] + 0.3 * entry["embedding"] + 0.2 * entry["query_key"]
        assert entry["loss"] == pytest.approx(parts, rel=1e-5)
    assert history[-1]["block"] < history[0]["block"]
    assert history[-1]["embedding"] < history[0]["embedding"]


def test_parts_are_logged_in_evaluation(tmp_path):
    """Whatever the batches: the mean over tokens."""
    found = []
    for batch in (1, 3, 8):
        losses = {"forward_kl": 1.0, "block": 0.7}
        student = tiny.model(seed=1, **SMALL)
        changes = {"losses": losses, "per_device_eval_batch_size": batch, "layer_pairs": "uniform", "balance": "static"}
        trainer = DistillationTrainer(student, tiny.model(), arguments(tmp_path, **changes), eval_dataset=RAGGED)
        found.append(trainer.evaluate())
    for other in found[1:]:
        assert other["eval_block"] == pytest.approx(found[0]["eval_block"], rel=1e-6)
        assert other["eval_forward_kl"] == pytest.approx(found[0]["eval_forward_kl"], rel=1e-6)


def test_the_balance_scales_states_to_the_rest(tmp_path):
    _, history = train(tmp_path, balance="minitron", losses={"forward_kl": 1.0, "block": 0.7})
    for entry in history:
        assert entry["loss"] == pytest.approx(2 * entry["forward_kl"], rel=1e-5)
        assert abs(entry["block"] - entry["forward_kl"]) > 1e-3


@pytest.mark.parametrize("changes", [{"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
                                     {"per_device_train_batch_size": 4, "chunk_size": 3}])  # fmt: skip
def test_accumulation_chunks_and_recomputing_change_nothing(tmp_path, changes):
    expected, history = train(tmp_path, per_device_train_batch_size=4)
    trainer, found = train(tmp_path, **changes, gradient_checkpointing=True)
    assert [e["loss"] for e in found] == pytest.approx([e["loss"] for e in history], abs=1e-6)
    for (name, a), b in zip(expected.model.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    for a, b in zip(expected._states.parameters(), trainer._states.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_projections_train_are_resumed_and_stay_out_of_the_student(tmp_path):
    common = {"save_strategy": "steps", "save_steps": 2}
    expected, history = train(tmp_path / "a", **common)
    start = StateLosses(tiny.model(**SMALL), tiny.model(), ("block", "embedding"), "uniform").projections
    after = expected._states.projections
    assert after["block"].weight.shape == (40, 24)
    assert all(not torch.equal(a, b) for a, b in zip(start.parameters(), after.parameters(), strict=True))
    again, tail = train(tmp_path / "b", resume=str(tmp_path / "a/checkpoint-2"), **common)
    assert [e["loss"] for e in tail] == [e["loss"] for e in history]
    for module in ("model", "_states"):
        pairs = zip(getattr(expected, module).parameters(), getattr(again, module).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    saved = type(expected.model).from_pretrained(tmp_path / "a/checkpoint-4", output_loading_info=True)[1]
    assert not saved["unexpected_keys"]
    assert not saved["missing_keys"]
    assert (tmp_path / "a/checkpoint-4" / PROJECTIONS).is_file()


def test_equal_widths_need_no_projection(tmp_path):
    student = tiny.model(seed=1, num_hidden_layers=2)
    losses = {"forward_kl": 1.0, "block": 1.0, "mlp_input": 1.0}
    trainer = trainer_for(tmp_path, student, tiny.model(), losses=losses, layer_pairs={2: 1}, max_steps=1)
    trainer.train()
    assert not list(trainer._states.parameters())


def test_what_states_cannot_do_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"block is not for olmo2, whose layers do not all give it; it has query_query"):
        trainer_for(tmp_path, tiny.model("olmo2"), tiny.model("olmo2"), losses={"forward_kl": 1, "block": 1})
    for changes, message in [
        ({"layer_pairs": "first"}, "layer_pairs: 'first' is none of last-2, uniform, plan"),
        ({"state_distance": "l1"}, "state_distance: 'l1' is none of cosine, mse"),
        ({"balance": "even"}, "balance: 'even' is none of static, minitron"),
        ({"losses": {"block": 1}}, "losses: block are all on states"),
        ({"losses": {"forward_kl": 1, "block": 1}, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
    ]:
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **changes)


class At(TrainerCallback):
    """Do something at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


def test_sigterm_writes_a_checkpoint_and_resuming_from_it_equals_the_uninterrupted_run(tmp_path):
    expected, history = train(tmp_path / "a")
    student, before = tiny.model(seed=1, **SMALL), signal.getsignal(signal.SIGTERM)
    values = {"losses": expected.args.losses, "layer_pairs": "uniform", "balance": "static", "max_steps": 4}
    trainer = trainer_for(tmp_path / "b", student, tiny.model(), train_sampling_strategy="sequential", **(CONSTANT | values))
    trainer.add_callback(At(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert signal.getsignal(signal.SIGTERM) == before, "a trainer changes the process"
    stop = StopOnSigterm()
    trainer.add_callback(stop)
    with stop:
        trainer.train()
    assert stop.stopped
    assert trainer.state.global_step == 2
    assert signal.getsignal(signal.SIGTERM) == before
    again, tail = train(tmp_path / "b", resume=str(tmp_path / "b/checkpoint-2"))
    assert [e["loss"] for e in tail] == [e["loss"] for e in history]
    assert all(torch.equal(a, b) for a, b in zip(expected.model.parameters(), again.model.parameters(), strict=True))


def test_a_nan_loss_stops_with_the_last_good_checkpoint(tmp_path):
    student = tiny.model(seed=1, **SMALL)
    values = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "losses": {"forward_kl": 1.0, "cross_entropy": 0.0}}
    trainer = trainer_for(tmp_path, student, tiny.model(), **(CONSTANT | values))

    def spoil():
        with torch.no_grad():
            student.model.norm.weight[3] = math.nan
        trainer._save_checkpoint(student, None)  # with the damage in it: not a good one

    trainer.add_callback(At(2, spoil))
    with pytest.raises(ValueError, match=r"NaN or Inf loss at step 3 \(forward_kl, cross_entropy\).*checkpoint-1\. Use a "):
        trainer.train()


def test_padding_changes_no_loss_on_states(tmp_path):
    student, losses = tiny.model(seed=1, **SMALL), {"forward_kl": 1.0, "block": 1.0, "query_query": 1.0}
    trainer = trainer_for(tmp_path, student, tiny.model(), losses=losses, layer_pairs="uniform", balance="static")
    rows = [RAGGED[i] for i in range(4)]
    tokens = torch.tensor([len(row["input_ids"]) - 1 for row in rows])
    alone = torch.stack([trainer.compute_loss(student, collate([row])) for row in rows])
    together = trainer.compute_loss(student, collate(rows))
    assert torch.allclose(together, (alone * tokens).sum() / tokens.sum(), atol=1e-6)
