"""Nonuniform models: the same numbers as stock classes, and everything that transformers and its friends do with a model."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import tiny
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    Qwen3Config,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_minitron.modeling import PrunedConfig, PrunedForCausalLM, PrunedModel
from hf_minitron.pruning.export import export
from hf_minitron.shape import ShapeError

# A stock class of every kind of layer, and those with something of their own outside of the layers.
STOCK = ("arcee", "cohere", "cwm", "exaone", "gemma", "gemma2", "gemma3_text", "glm4", "granite", "internlm3", "iquestcoder",
         "llama", "ministral", "mistral", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3",
         "starcoder2")  # fmt: skip
# Transformers renamed `past_key_values` to `cache`.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
BIASES = {"attention_bias": True, "mlp_bias": True}
SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
VARIANTS = {
    **{model_type: (model_type, {}) for model_type in STOCK},
    "llama, biases": ("llama", BIASES),
    "llama, llama3 rope": ("llama", {"rope_parameters": SCALED}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, dynamic rope": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 8}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "mistral, sliding": ("mistral", {"sliding_window": 5}),
    "ministral, mixed": ("ministral", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "qwen2, mixed": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "smollm3, mixed": ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "no_rope_layers": [1, 0, 1, 0]}),
}
# The first layer has no attention, the second no MLP; groups of 2, 1 and 4 query heads.
LISTS = {
    "layer_num_attention_heads": [0, 4, 2, 4],
    "layer_num_key_value_heads": [0, 2, 2, 1],
    "layer_intermediate_size": [72, 0, 30, 51],
}
PROMPT = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(1))
PADDED = torch.ones(2, 9, dtype=torch.long).index_put((torch.tensor([0, 0]), torch.tensor([0, 1])), torch.tensor(0))


def stock_config(variant="llama", **changes):
    model_type, own = VARIANTS[variant]
    own = {"num_hidden_layers": 4} | ({"no_rope_layers": [1, 0, 1, 1]} if model_type == "smollm3" else {}) | own
    return tiny.config(model_type, **own, **changes)


def randomize(model, seed=0):
    """Weights so large that a mistake shows, norms and biases that are not neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.dim() > 1 else 0.3))
            parameter.add_(1.0 if "norm" in name else 0.0)
    return model.eval()


def pruned(variant="llama", lists=LISTS, attention="sdpa", **changes):
    config = PrunedConfig.from_stock(stock_config(variant, **changes), **lists)
    model = randomize(PrunedForCausalLM(config))
    model.set_attn_implementation(attention)
    return model


def logits(model, **kwargs):
    with torch.no_grad():
        return model(PROMPT, attention_mask=PADDED, **kwargs).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_uniform_one_equals_the_stock_model_to_the_bit(variant, attention):
    if (variant, attention) == ("gemma2", "sdpa"):
        pytest.skip("its stock class has no sdpa: it caps the logits of attention")
    stock = randomize(AutoModelForCausalLM.from_config(stock_config(variant), attn_implementation=attention))
    model = PrunedForCausalLM(PrunedConfig.from_stock(stock.config)).eval()
    model.load_state_dict(stock.state_dict())
    model.set_attn_implementation(attention)
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(stock))
    assert torch.equal(model(PROMPT, labels=PROMPT).loss, stock(PROMPT, labels=PROMPT).loss)
    assert torch.equal(logits(model, logits_to_keep=2), logits(stock, logits_to_keep=2))


def test_absent_halves_have_no_parameters_and_the_config_tells_the_largest():
    model = pruned()
    names = [name for name, _ in model.named_parameters()]
    assert not [name for name in names if "layers.0" in name and ("attn" in name or "input_layernorm" in name)]
    assert not [name for name in names if "layers.1" in name and ("mlp" in name or "post_attention" in name)]
    sizes = (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.intermediate_size)
    assert sizes == (4, 2, 72)
    assert getattr(model.config, "head_dim", None) == 6
    assert [layer.num_key_value_heads for layer in model.config.per_layer_config] == [2, 2, 2, 1]
    assert [layer.skip for layer in model.config.per_layer_config] == [["attention"], ["mlp"], [], []]
    outputs = model(PROMPT, output_hidden_states=True)
    assert len(outputs.hidden_states) == 5
    model.set_attn_implementation("eager")
    assert [a.shape[1] for a in model(PROMPT, output_attentions=True).attentions] == [4, 2, 4]


@pytest.mark.parametrize("variant", ["llama, tied", "qwen3"])
def test_save_and_load(variant, tmp_path):
    model = pruned(variant)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = tiny.load_complete(tmp_path)
    assert isinstance(loaded, PrunedForCausalLM)
    assert type(loaded).__name__ == "PrunedForCausalLM", "the class of the stock type has its name, as remote code"
    assert loaded.config.to_json_string() == model.config.to_json_string()
    assert torch.equal(logits(loaded), logits(model))
    assert isinstance(AutoModel.from_pretrained(tmp_path), PrunedModel)
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert written["num_attention_heads"] == 4
    assert written["layer_num_attention_heads"] == [0, 4, 2, 4]
    assert AutoConfig.from_pretrained(tmp_path).layer_sizes == LISTS


def test_remote_code_needs_transformers_only(tmp_path):
    model = pruned("qwen3")
    model.config.save_pretrained(tmp_path / "config")
    assert {path.name for path in (tmp_path / "config").glob("*.py")} == {
        "configuration_pruned.py", "layer_schemas.py", "modeling_pruned.py"
    }  # fmt: skip
    model.save_pretrained(tmp_path / "model")
    torch.save(logits(model), tmp_path / "logits.pt")
    code = """
import sys, torch
sys.modules["hf_minitron"] = None  # any import of it fails
from transformers import AutoModel, AutoModelForCausalLM
folder, prompt, mask = sys.argv[1] + "/model", *(torch.tensor(eval(text)) for text in sys.argv[2:])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert torch.equal(model(prompt, attention_mask=mask).logits, torch.load(sys.argv[1] + "/logits.pt"))
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__ == "PrunedModel"
assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape == (2, 12)
model.save_pretrained(sys.argv[1] + "/again")
again = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/again", trust_remote_code=True)
assert torch.equal(again(prompt, attention_mask=mask).logits, model(prompt, attention_mask=mask).logits)
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError:
    print("refused", type(model).__module__)
"""
    command = [sys.executable, "-I", "-c", code, str(tmp_path), str(PROMPT.tolist()), str(PADDED.tolist())]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused transformers_modules"), done.stderr


@pytest.mark.parametrize("variant", ["llama", "qwen2, mixed", "smollm3, mixed"])
def test_generation_with_every_cache(variant):
    model = pruned(variant)
    given = {"attention_mask": PADDED, "max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    without = model.generate(PROMPT, use_cache=False, **given)
    assert torch.equal(model.generate(PROMPT, **given), without)
    assert torch.equal(model.generate(PROMPT, **{CACHE: DynamicCache(config=model.config)}, **given), without)
    static = StaticCache(config=model.config, max_cache_len=16)
    assert torch.equal(model.generate(PROMPT, **{CACHE: static}, disable_compile=True, **given), without)
    assert [getattr(layer, "num_heads", 0) for layer in static.layers] == [0, 2, 2, 1]
    beams = model.generate(PROMPT, num_beams=3, use_cache=False, **given)
    assert torch.equal(model.generate(PROMPT, num_beams=3, **given), beams)


def test_the_next_token_knows_its_position_without_being_told():
    model = pruned()
    with torch.no_grad():
        first = model(PROMPT[:, :5], use_cache=True)
        assert first[CACHE].get_seq_length() == 5
        second = model(PROMPT[:, 5:], **{CACHE: first[CACHE]})
        torch.testing.assert_close(second.logits, model(PROMPT).logits[:, 5:], rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # compiled, for every layer
def test_flex_attention():
    flex = pruned(attention="flex_attention", head_dim=16)
    torch.testing.assert_close(logits(flex)[1], logits(pruned(head_dim=16))[1], rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients():
    def gradients(model):
        model.train()(PROMPT, labels=PROMPT).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, saving = pruned(), pruned()
    saving.gradient_checkpointing_enable()
    expected, found = gradients(plain), gradients(saving)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_compiles_in_one_graph():
    model = pruned("qwen3")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for use_cache in (False, True):
            found = compiled(PROMPT, use_cache=use_cache).logits
            torch.testing.assert_close(found, model(PROMPT).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiles_with_inductor():
    model = pruned()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True)(PROMPT).logits
        torch.testing.assert_close(found, model(PROMPT).logits, rtol=1e-4, atol=1e-4)


def test_peft_trains_an_adapter():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(pruned(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], r=2))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(2):
        loss = model(input_ids=PROMPT, labels=PROMPT).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]


def test_trainer_trains_and_saves_code(tmp_path):
    blocks = tiny.blocks()
    blocks = blocks.add_column("labels", blocks["input_ids"][:].tolist())
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, gradient_checkpointing=True
    )
    trainer = Trainer(pruned(), arguments, train_dataset=blocks.with_format("torch"))
    trainer.train()
    trainer.save_model(str(tmp_path / "trained"))
    assert (tmp_path / "trained" / "modeling_pruned.py").is_file()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "trained")), logits(trainer.model.eval()))


def test_fsdp2_wraps_every_layer(tmp_path):
    plain, sharded = pruned(), pruned()
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for part in (*sharded.model.layers, sharded):
            fully_shard(part, mesh=mesh)
        losses = [model(PROMPT, labels=PROMPT).loss for model in (plain, sharded)]
        for loss in losses:
            loss.backward()
        assert torch.equal(*losses)
        for (name, one), other in zip(plain.named_parameters(), sharded.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad.full_tensor()), name
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "variant",
    [
        *(kind for kind in STOCK if not kind.startswith("olmo")),
        "llama, biases",
        "llama, tied",
        "mistral, sliding",
        "ministral, mixed",
        "qwen2, mixed",
    ],
)
def test_export_pads_to_a_stock_model_with_equal_logits(variant, tmp_path):
    model = pruned(variant, attention="eager")
    model.save_pretrained(tmp_path / "pruned")
    tiny.tokenizer().save_pretrained(tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "padded", max_shard_bytes=20_000)
    stock = tiny.load_complete(tmp_path / "padded")
    assert not list((tmp_path / "padded").glob("*.py"))
    assert (tmp_path / "padded" / "tokenizer.json").is_file()
    assert "auto_map" not in stock.config.to_dict()
    assert (stock.config.num_key_value_heads, stock.config.num_attention_heads, stock.config.intermediate_size) == (2, 8, 72)
    assert stock.config.model_type == VARIANTS[variant][0]
    assert stock.config.architectures == [type(stock).__name__]
    stock.set_attn_implementation("eager")
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)


def test_export_takes_mistral_where_llama_refuses_the_shape(tmp_path):
    lists = {**LISTS, "layer_num_attention_heads": [0, 6, 6, 3], "layer_num_key_value_heads": [0, 2, 1, 1]}
    model = pruned(lists=lists)
    model.save_pretrained(tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "padded")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "padded")
    assert stock.config.model_type == "mistral"
    assert stock.config.num_attention_heads == 12
    torch.testing.assert_close(logits(stock), logits(model), rtol=1e-5, atol=1e-5)


def test_export_refuses_what_no_stock_class_holds(tmp_path):
    pruned("olmo2", {"layer_num_attention_heads": [4, 4, 4, 2]}).save_pretrained(tmp_path / "olmo2")
    with pytest.raises(ShapeError, match="heads cannot be padded in a model of olmo2: queries and keys are normalised"):
        export(tmp_path / "olmo2", tmp_path / "padded")
    lists = {**LISTS, "layer_num_attention_heads": [0, 6, 6, 3], "layer_num_key_value_heads": [0, 2, 1, 1]}
    pruned("llama, biases", lists).save_pretrained(tmp_path / "biases")
    with pytest.raises(ShapeError, match=r"2 KV heads with 6 query heads each.*not a multiple.*MistralConfig makes no"):
        export(tmp_path / "biases", tmp_path / "padded")
    pruned().save_pretrained(tmp_path / "unknown")
    config = json.loads((tmp_path / "unknown" / "config.json").read_text()) | {"stock_model_type": None}
    (tmp_path / "unknown" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="stock_model_type is None, which is no model type of transformers"):
        export(tmp_path / "unknown", tmp_path / "padded")
    tiny.model().save_pretrained(tmp_path / "stock")
    with pytest.raises(
        ValueError, match="holds a 'llama', which is a stock model already; export takes nonuniform ones, and vision"
    ):
        export(tmp_path / "stock", tmp_path / "padded")
    assert not (tmp_path / "padded").exists()


def test_converters_come_back():
    stock = stock_config()
    config = PrunedConfig.from_stock(stock, **LISTS)
    native = json.loads(json.dumps(config.to_per_layer_config()))
    assert native["0"] == {"skip": ["attention"]}
    assert native["1"] == {"skip": ["mlp"]}
    assert native["3"] == {"num_key_value_heads": 1, "intermediate_size": 51}
    assert PrunedConfig.from_per_layer_config(stock, native).layer_sizes == LISTS
    lists = {**LISTS, "layer_num_attention_heads": [0, 4, 4, 4]}
    blocks = PrunedConfig.from_stock(stock, **lists).to_block_configs()
    assert blocks[0]["attention"] == {"no_op": True}
    assert blocks[3]["attention"]["n_heads_in_group"] == 4
    assert PrunedConfig.from_block_configs(stock, blocks).layer_sizes == lists
    older = [{"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"ffn_mult": 10.0, "no_op": False}}] * 4
    assert PrunedConfig.from_block_configs(stock, older).layer_intermediate_size == [512] * 4  # 266, up to a multiple of 256
    lists = {**LISTS, "layer_num_key_value_heads": [0, 2, 2, 2]}
    layer_lists = PrunedConfig.from_stock(stock, **lists).to_layer_lists()
    assert layer_lists == {"layer_head_num": [0, 4, 2, 4], "layer_inter_size": [72, 0, 30, 51]}
    assert PrunedConfig.from_layer_lists(stock, **layer_lists).layer_sizes == lists
    assert PrunedConfig.from_stock(stock, layer_num_attention_heads=[4, 2, 2, 0]).layer_num_key_value_heads == [2, 2, 2, 0]
    multi_head = stock_config(num_key_value_heads=4)
    assert PrunedConfig.from_layer_lists(multi_head, [4, 3, 2, 1], [72] * 4).layer_num_key_value_heads == [4, 3, 2, 1]


def test_transformers_takes_our_per_layer_config():
    stock = stock_config("qwen3")
    config = PrunedConfig.from_stock(stock, **{**LISTS, "layer_intermediate_size": [72, 40, 30, 51]})
    native = Qwen3Config(**{**stock.to_dict(), "per_layer_config": config.to_per_layer_config()})
    assert [layer.intermediate_size for layer in native.per_layer_config] == [72, 40, 30, 51]
    assert native.per_layer_config[0].skip == ["attention"]


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("layer_intermediate_size has 3 entries; it needs one for each of 4", {"layer_intermediate_size": [72] * 3}),
        ("Layer 1 has 3 attention heads and 2 KV heads", {**LISTS, "layer_num_attention_heads": [0, 3, 2, 4]}),
        ("Layer 0 has 0 attention heads and 2 KV heads", {**LISTS, "layer_num_key_value_heads": [2, 2, 2, 1]}),
        ("must hold integers, 0 where a layer lacks this sublayer: \\[72, -1,", {"layer_intermediate_size": [72, -1, 72, 72]}),
        ("num_attention_heads is 8, but the largest of layer_num_attention_heads is 4", {**LISTS, "num_attention_heads": 8}),
    ],
)
def test_configs_that_do_not_fit_are_refused(message, changes):
    with pytest.raises(ValueError, match=message):
        PrunedConfig.from_stock(stock_config(), **changes)


def test_what_converters_cannot_say_is_refused():
    config = PrunedConfig.from_stock(stock_config(), **LISTS)
    with pytest.raises(ValueError, match="block_configs have one num_attention_heads"):
        config.to_block_configs()
    with pytest.raises(ValueError, match="no room for KV heads that differ by layer"):
        config.to_layer_lists()
    with pytest.raises(ValueError, match="layers 0 to 3 .* it holds \\[9\\]"):
        PrunedConfig.from_per_layer_config(stock_config(), {9: {"intermediate_size": 1}})
    with pytest.raises(ValueError, match="it holds \\['hidden_size'\\]"):
        PrunedConfig.from_per_layer_config(stock_config(), {1: {"hidden_size": 1}})
    with pytest.raises(ValueError, match="Block 0 has replace_with_linear"):
        PrunedConfig.from_block_configs(stock_config(), [{"attention": {"replace_with_linear": True}, "ffn": {}}])
    with pytest.raises(ValueError, match="stock_model_type is 'llama5', which is no model type of transformers"):
        PrunedConfig(stock_model_type="llama5")


def test_transformers_backends_find_what_they_ask_for():
    config = PrunedConfig.from_stock(stock_config("qwen3"), **LISTS)
    assert PrunedModel.is_backend_compatible()
    assert config.auto_map["AutoModel"] == "modeling_pruned.PrunedModel"
    assert config.base_model_tp_plan["layers.*.mlp.down_proj"] == "rowwise"
    assert "layers.*.self_attn.q_norm" in config.base_model_tp_plan
    assert "layers" in config.base_model_pp_plan
    assert "base_model_tp_plan" not in config.to_dict()
    assert PrunedConfig.from_stock(LlamaConfig()).base_model_tp_plan == LlamaConfig.base_model_tp_plan


def test_a_backend_sees_the_heads_of_every_layer_and_its_own_arguments():
    seen = []

    def attend(module, query, key, value, attention_mask, attention_instances=None, **kwargs):
        seen.append((module.layer_idx, query.shape[1], key.shape[1], attention_mask, attention_instances))
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("tests_own", attend)
    config = PrunedConfig.from_stock(stock_config(), **LISTS)
    AutoModel.from_config(config, attn_implementation="tests_own")(PROMPT, attention_instances="given")
    assert seen == [(1, 4, 2, None, "given"), (2, 2, 2, None, "given"), (3, 4, 1, None, "given")]


def test_copies_and_models_without_attention():
    model = pruned("qwen3")
    again = copy.deepcopy(model)
    assert torch.equal(logits(again), logits(model))
    assert pickle.loads(pickle.dumps(model.config)).layer_sizes == LISTS
    lists = {"layer_num_attention_heads": [0] * 4, "layer_num_key_value_heads": [0] * 4, "layer_intermediate_size": [72] * 4}
    alone = pruned("qwen3", lists)
    assert alone.generate(PROMPT, max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (2, 12)


@pytest.mark.parametrize("variant", ["qwen2, mixed", "smollm3", "llama"])
def test_a_config_of_an_older_version_is_read(variant):
    """It had `moe` for the types of layers without attention, and no switch of sliding windows."""
    config = PrunedConfig.from_stock(stock_config(variant), **LISTS)
    written = {key: value for key, value in config.to_dict().items() if key != "use_sliding_window"}
    types = getattr(config, "layer_types", None) or ["full_attention"] * 4
    written["layer_types"] = ["moe", *types[1:]]
    model, older = randomize(PrunedForCausalLM(config)), randomize(PrunedForCausalLM(PrunedConfig.from_dict(written)))
    assert torch.equal(logits(older), logits(model))
