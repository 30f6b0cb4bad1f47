"""Scores against a hand-written reference, and what they do not depend on."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import tiny
import torch
from accelerate import PartialState
from datasets import Dataset
from tiny import SIZES
from transformers import AutoConfig, AutoModelForCausalLM

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.data.packing import text_hash
from hf_minitron.importance.calibrate import calibrate
from hf_minitron.importance.footprint import moment_bytes, scoring_bytes
from hf_minitron.statistics import Statistics

CONFIGS = Path(__file__).resolve().parent / "configs"


def reference(model, rows):
    """The papers' formulas, one row at a time, from recorded inputs and outputs of modules."""
    architecture = Architecture.of(model.config)
    shape, taps = architecture.shape, {axis: architecture.taps(axis) for axis in architecture.tapped}
    seen, hooks = {}, []
    for name, module in model.named_modules():

        def record(module, args, kwargs, output, name=name):
            state = args[0] if args else kwargs.get("hidden_states")
            seen.setdefault(name, []).append((args, state, output[0] if isinstance(output, tuple) else output))

        hooks.append(module.register_forward_hook(record, with_kwargs=True))
    for row in rows:
        with torch.no_grad():
            model(input_ids=row[None], use_cache=False)
    for hook in hooks:
        hook.remove()

    def score(samples):
        return torch.stack([x.abs().mean(0) for x in samples]).square().sum(0).sqrt()

    def inputs(name):
        return [state.reshape(len(row), -1) for row, (_, state, _) in zip(rows, seen[name], strict=True)]

    def outputs(name):
        return [output.reshape(len(row), -1) for row, (*_, output) in zip(rows, seen[name], strict=True)]

    expected = {"hidden": sum(score(outputs(name)) for _, name in taps["hidden"])}
    for axis in ("ffn", "dense_ffn", "shared_ffn"):
        if axis in taps and not taps[axis][0][1].endswith(".experts"):
            expected[axis] = {layer: score(inputs(name)) for layer, name in taps[axis]}
    for axis in ("heads", "ssm_heads", "conv_channels"):
        if axis in taps:
            heads = {n: [x.view(len(x), shape[axis], -1).norm(dim=-1) for x in inputs(name)] for n, name in taps[axis]}
            expected[axis] = {layer: score(samples) for layer, samples in heads.items()}
    expected["layers"] = {}
    for layer, name in taps["layers"]:
        changes = [1 - torch.nn.functional.cosine_similarity(before, after, dim=-1) for _, before, after in seen[name]]
        expected["layers"][layer] = torch.cat(changes, 1).mean()
    for axis, place in (("ffn", 0), ("experts", 1)):
        if axis in taps and taps[axis][0][1].endswith(".experts"):
            modules = dict(model.named_modules())
            expected[axis] = {n: routed(modules[name], [args for args, *_ in seen[name]])[place] for n, name in taps[axis]}
    for axis, by_layer in expected.items():
        if axis != "hidden":
            absent = torch.full_like(next(iter(by_layer.values())), torch.nan)
            expected[axis] = torch.stack([by_layer.get(layer, absent) for layer in range(shape["layers"])])
    return expected


def routed(experts, calls):
    """What every expert of a layer does with each of its tokens, token by token."""
    means, outputs = [], [[] for _ in range(experts.num_experts)]
    for states, chosen, weights in calls:
        inner = [torch.zeros(len(states), experts.down_proj.shape[1 if experts.is_transposed else 2])
                 for _ in range(experts.num_experts)]  # fmt: skip
        for token, state in enumerate(states):
            for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                down = experts.down_proj[expert]
                up = experts.gate_up_proj[expert] if experts.has_gate else experts.up_proj[expert]
                if not experts.has_gate:  # nemotron_h
                    mid = (up @ state).relu().square()
                    out = down @ mid
                elif experts.is_transposed:  # gpt_oss
                    both = state @ up + experts.gate_up_proj_bias[expert]
                    gate, linear = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
                    mid = (linear + 1) * gate * torch.sigmoid(1.702 * gate)
                    out = mid @ down + experts.down_proj_bias[expert]
                else:
                    gate, linear = (up @ state).chunk(2)
                    mid = torch.nn.functional.silu(gate) * linear
                    out = down @ mid
                inner[expert][token] = mid.detach()
                outputs[expert].append(float(weight * out.norm()))
        means.append(torch.stack([x.abs().mean(0) for x in inner]))
    seen = torch.tensor([sum(norms) / len(norms) if norms else 0.0 for norms in outputs])
    return torch.stack(means).square().sum(0).sqrt(), seen


def close(found, expected):
    return torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_scores_equal_the_formulas(model_type):
    model = tiny.model(model_type, dtype=torch.float32)
    blocks = tiny.blocks()
    expected = reference(model, blocks["input_ids"][:])
    before = [t.clone() for t in model.state_dict().values()]
    for batch_size in (1, 4):
        scores = calibrate(model, blocks, batch_size)
        assert set(scores.scores) == set(expected)
        for axis, values in expected.items():
            assert scores.scores[axis].dtype == torch.float32
            assert close(scores.scores[axis], values), axis
    assert all(torch.equal(old, new) for old, new in zip(before, model.state_dict().values(), strict=True))
    assert model.config._experts_implementation != "hf_minitron"
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("model_type", "state_bytes"),
    [*((model_type, 0) for model_type in tiny.MODEL_TYPES), ("llama", 8_000), ("gpt2", 8_000), ("llama", 10**9)],
)
def test_layer_by_layer_equals_resident(model_type, state_bytes, tmp_path):
    model = tiny.model(model_type, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    resident = calibrate(model, tiny.blocks())
    streamed = calibrate(tmp_path, tiny.blocks(), state_bytes=state_bytes)
    assert set(streamed.scores) == set(resident.scores)
    for axis, values in resident.scores.items():
        assert torch.allclose(streamed.scores[axis], values, rtol=1e-4, atol=0, equal_nan=True), axis


def test_what_a_class_keeps_in_float32_stays_so_layer_by_layer(tmp_path):
    """DeepSeek chooses experts by biases that bfloat16 would round."""
    model = tiny.model("deepseek_v3", dtype=torch.float32)
    model.to(torch.bfloat16)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias = 14 + 0.05 * torch.rand(8, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path)
    resident = calibrate(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16), tiny.blocks())
    for axis, values in calibrate(tmp_path, tiny.blocks(), dtype=torch.bfloat16).scores.items():
        assert torch.allclose(values, resident.scores[axis], rtol=1e-4, atol=0, equal_nan=True), axis


def test_layers_that_depend_on_their_number_are_not_streamed(tmp_path):
    tiny.model("gpt2", dtype=torch.float32, scale_attn_by_inverse_layer_idx=True).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be scored layer by layer: .*Load the whole model"):
        calibrate(tmp_path, tiny.blocks())


def test_a_model_on_several_devices(tmp_path):
    """As device_map="auto" leaves a model that is too large: some layers on one device, some to be fetched from disk."""
    model = tiny.model(dtype=torch.float32)
    model.save_pretrained(tmp_path / "m")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.layers.2": "cpu", "model.norm": "cpu", "lm_head": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "m", device_map=places, offload_folder=tmp_path / "offload")
    assert spread.model.layers[1].mlp.up_proj.weight.device.type == "meta"
    for axis, values in calibrate(model, tiny.blocks()).scores.items():
        assert close(calibrate(spread, tiny.blocks()).scores[axis], values), axis


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize("streamed", [False, True])
def test_padding_counts_for_nothing(model_type, streamed, tmp_path):
    model = tiny.model(model_type, dtype=torch.float32)
    rows = [tiny.blocks(1, length, seed=length)["input_ids"][0] for length in (5, 12, 9)]
    padded = {
        "input_ids": [torch.cat([row, row.new_full((12 - len(row),), 7)]).tolist() for row in rows],
        "attention_mask": [[1] * len(row) + [0] * (12 - len(row)) for row in rows],
    }
    model.save_pretrained(tmp_path)
    scores = calibrate(tmp_path if streamed else model, Dataset.from_dict(padded).with_format("torch"), batch_size=3)
    for axis, values in reference(model, rows).items():
        assert close(scores.scores[axis], values), axis
    assert scores.text["tokens"] == 26


def test_statistics_survive_their_folder(tmp_path):
    blocks = tiny.blocks()
    measured = calibrate(tiny.model(), blocks, moments=True)
    measured.save(tmp_path / "s")
    loaded = Statistics.load(tmp_path / "s")
    for table in ("scores", "moments"):
        before, after = getattr(measured, table), getattr(loaded, table)
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], values) for name, values in before.items()), table
    assert (loaded.text, loaded.provenance) == (measured.text, measured.provenance)
    assert loaded.text == {"sha256": text_hash(blocks), "tokens": 72, "blocks": 6}
    assert loaded.provenance["versions"].keys() == {"hf_minitron", "transformers", "torch"}
    assert loaded.provenance["metrics"]["ffn"] == "l2_mean"
    loaded.save(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").rglob("*")} == {path.name for path in (tmp_path / "s").rglob("*")}


def test_fewer_blocks_than_processes_are_refused(monkeypatch):
    monkeypatch.setitem(vars(PartialState()), "num_processes", 8)
    with pytest.raises(ValueError, match="6 calibration blocks for 8 processes"):
        calibrate(tiny.model(), tiny.blocks())


@pytest.mark.parametrize(("name", "gigabytes"), [("Qwen3-4B-Base", 24), ("nemotron-4-15b", 80)])
def test_one_layers_moments_fit_where_all_layers_do_not(name, gigabytes):
    """Counted on the meta device: 524,288 tokens in batches of 4 x 512, bf16 weights, and the issue's sizes of cards."""
    architecture = Architecture.of(AutoConfig.from_pretrained(CONFIGS / name))
    whole, layer = (
        scoring_bytes(architecture, torch.bfloat16, 2048, moments=True, layer_by_layer=way) for way in (False, True)
    )
    assert whole > gigabytes * 1e9, "all moments at once do not fit"
    assert layer < 0.5 * gigabytes * 1e9, "those of a layer do, with room to spare"


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "qwen2_moe", "deepseek_v3", "opt"])
def test_bytes_of_a_pass_are_those_of_its_tensors(model_type, tmp_path):
    model, dtype = tiny.model(model_type, dtype=torch.float32), torch.float32
    architecture = Architecture.of(model.config)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(b.nbytes for name, b in model.named_buffers() if name in architecture.parameters)
    moments = [moment.nbytes for moment in calibrate(model, tiny.blocks(), moments=True).moments.values() if moment.dim() == 2]
    assert sum(map(sum, moment_bytes(architecture).values())) == sum(moments)
    assert scoring_bytes(architecture, dtype) == pytest.approx(weights + buffers, abs=8 * SIZES["hidden"])
    more = scoring_bytes(architecture, dtype, moments=True) - scoring_bytes(architecture, dtype)
    assert more == sum(moments) + max(moments)
    layers = {name: t.nbytes for name, t in model.named_parameters() if architecture.parameters[name].layer is not None}
    saved = scoring_bytes(architecture, dtype) - scoring_bytes(architecture, dtype, layer_by_layer=True)
    assert saved >= sum(layers.values()) / 3 - max(layers.values()), "a layer and the next one remain of three"


def test_states_that_no_disk_can_hold_are_refused(tmp_path, monkeypatch):
    tiny.model(dtype=torch.float32).save_pretrained(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    with pytest.raises(ValueError, match=r"states between layers beyond state_bytes: 11,420 bytes needed, 1,000 free"):
        calibrate(tmp_path, tiny.blocks(), state_bytes=100)


def test_a_weight_of_a_streamed_layer_that_is_not_a_number_is_named(tmp_path):
    model = tiny.model(dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' holds NaN"):
        calibrate(tmp_path, tiny.blocks())


def test_a_weight_that_is_not_a_number_is_named():
    model = tiny.model()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' holds NaN"):
        calibrate(model, tiny.blocks())


def test_an_activation_that_overflows_is_named():
    model = tiny.model(dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1e38)
    with pytest.raises(ValueError, match=r"activations at 'model.layers.1.mlp.down_proj' \(ffn\).*float32"):
        calibrate(model, tiny.blocks())
