"""Exports for other runtimes: GGUF files read by Transformers' own reader and by llama.cpp, MLX folders; and what is refused.

llama.cpp and mlx-lm are optional: pip install 'hf_minitron[gguf,mlx]'.
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from datasets import Dataset
from test_publish import card
from tiny_tokenizers import ALL, TEXTS
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_minitron.__main__ import main
from hf_minitron.data.mixture import Source
from hf_minitron.evaluation.text import perplexity
from hf_minitron.export import export as exporting
from hf_minitron.export.compare import compare_exports, export_rows
from hf_minitron.export.export import check_export, export_model, file_name, importance_of
from hf_minitron.export.gguf_model import write_gguf
from hf_minitron.export.gguf_tokenizer import SPLITS, tokenizer_metadata
from hf_minitron.export.layouts import GGUF_TYPES, LAYOUTS
from hf_minitron.export.llama_cpp import LlamaCpp
from hf_minitron.export.mlx import Mlx, bits_of
from hf_minitron.export.texts import BLOCK, Texts, read_blocks
from hf_minitron.hub.publish import files_to_push
from hf_minitron.modeling import PrunedConfig, PrunedForCausalLM
from hf_minitron.run import made_by
from hf_minitron.stages import publish

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
llama_cpp = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
mlx = pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed")

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "vocab_size": 720, "max_position_embeddings": 128,
}  # fmt: skip
CHANGES = {
    **dict.fromkeys(("nemotron", "olmo2", "olmo3", "phi3"), {"head_dim": 16}),
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "gemma3_text": {"query_pre_attn_scalar": 8, "tie_word_embeddings": True},
    "qwen3_moe": {"mlp_only_layers": []},
    "smollm3": {"no_rope_layers": [1, 1, 1, 0]},
}
ROPE = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
TOKENIZER = ALL["byte_level"]
TEXT = "The compiler makes it: x = 3 + 14, don't you see?\n\n  café 你好 123 4567 "
IDS = TOKENIZER(TEXT * 2)["input_ids"]


def made(model_type="llama", **changes):
    return tiny.model(model_type, torch.float32, **{**SIZES, **CHANGES.get(model_type, {}), **changes})


def saved(folder, model=None, tokenizer=TOKENIZER):
    """A model folder with a tokenizer that GGUF files hold."""
    model = model or made()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def with_chat(tokenizer):
    changed = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **tokenizer.special_tokens_map)
    changed.chat_template = CHAT
    return changed


@llama_cpp
def test_qwen2_with_all_its_heads_is_qwen2(tmp_path):
    model = saved(tmp_path, made("qwen2", head_dim=16))
    measured = in_llama_cpp(tmp_path, model)
    assert fields(tmp_path / "model.gguf")["general.architecture"] == "qwen2"
    assert measured["files"]["F16"]["teacher_kl"] < 1e-4


def in_llama_cpp(folder, model):
    """What llama.cpp computes of a folder's model, as a file of 16 bits, beside what Transformers does."""
    path, tokenizer = folder / "model.gguf", AutoTokenizer.from_pretrained(folder)  # Qwen2's class splits words its own way
    write_gguf(folder, path, "tiny")
    return compare_exports(model, tokenizer, [IDS], {"F16": lambda: LlamaCpp(path, len(IDS))})


def pruned(model_type="llama", heads=(4, 2, 0, 4), kv_heads=(2, 1, 0, 2), ffn=(96, 64, 32, 0), **changes):
    stock = tiny.config(model_type, **{**SIZES, **changes})
    sizes = {"layer_num_attention_heads": heads, "layer_num_key_value_heads": kv_heads, "layer_intermediate_size": ffn}
    torch.manual_seed(0)
    model = PrunedForCausalLM(PrunedConfig.from_stock(stock, **{name: list(values) for name, values in sizes.items()})).eval()
    tiny.shake(model)
    return model


def fields(path):
    """The metadata of a GGUF file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def test_transformers_reads_what_was_written(tmp_path):
    model = saved(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", "tiny")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        difference = model(torch.tensor([IDS])).logits - again(torch.tensor([IDS])).logits
    assert difference.abs().max() < 0.02
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert read(TEXT, add_special_tokens=False)["input_ids"] == TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]
    assert not list(tmp_path.glob("*.tmp"))


def test_a_file_says_what_the_config_and_the_tokenizer_say_and_no_path(tmp_path):
    saved(tmp_path / "secret", pruned(), with_chat(TOKENIZER))
    path = tmp_path / "model.gguf"
    write_gguf(tmp_path / "secret", path, "tiny", "Q8_0")
    found = fields(path)
    assert found["general.architecture"] == "deci"
    assert found["deci.attention.head_count"] == [4, 2, 0, 4]
    assert found["deci.attention.head_count_kv"] == [2, 1, 0, 2]
    assert found["deci.feed_forward_length"] == [96, 64, 32, 32]  # the last, of zeros, keeps the layer's attention
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.chat_template"] == CHAT
    assert found["general.name"] == "tiny"
    assert len(found["tokenizer.ggml.tokens"]) == SIZES["vocab_size"]
    assert str(tmp_path).encode() not in path.read_bytes()
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert types["blk.0.attn_q.weight"] == "Q8_0"
    assert types["blk.0.attn_output.weight"] == "Q8_0"
    assert types["blk.1.attn_output.weight"] == "F16"  # 16 channels
    assert types["output_norm.weight"] == "F32"


def test_an_interrupted_file_has_no_name(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setattr(gguf.quants, "quantize", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path, tmp_path / "model.gguf", "tiny")
    assert not list(tmp_path.glob("*.gguf*"))


@llama_cpp
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_llama_cpp_computes_what_transformers_does(model_type, tmp_path):
    model = saved(tmp_path, made(model_type))
    measured = in_llama_cpp(tmp_path, model)
    assert measured["files"]["F16"]["teacher_kl"] < (1e-3 if "moe" in model_type else 1e-4)  # 16 bits choose other experts
    assert measured["files"]["F16"]["perplexity"] == pytest.approx(measured["perplexity"], rel=0.01)


@llama_cpp
@pytest.mark.parametrize("kind", ROPE)
def test_rotary_embeddings_of_long_contexts_are_those_of_transformers(kind, tmp_path):
    model = saved(tmp_path, made(rope_parameters=ROPE[kind]))
    measured = in_llama_cpp(tmp_path, model)
    assert measured["files"]["F16"]["teacher_kl"] < 1e-4


@llama_cpp
@pytest.mark.parametrize(("model_type", "architecture"), [("llama", "deci"), ("qwen2", "deci"), ("qwen3", "qwen3")])
def test_nonuniform_models_keep_their_sizes_where_llama_cpp_has_them_and_are_padded_else(model_type, architecture, tmp_path):
    saved(tmp_path / "pruned", pruned(model_type))
    facts = export_model(tmp_path / "pruned", tmp_path / "out", "tiny", Texts("text", [IDS]), ["gguf"], ["F16"])
    assert facts["files"][0]["teacher_kl"] < 1e-4
    assert fields(tmp_path / "out" / "tiny-F16.gguf")["general.architecture"] == architecture


def split_tokenizer(pattern):
    """A byte-level tokenizer that splits words as a pattern of tokenizer.json says."""
    made = Tokenizer(models.BPE(ignore_merges=False))
    split = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(split), decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS * 2,
        trainers.BpeTrainer(vocab_size=700, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def digits_tokenizer():
    made = split_tokenizer("x").backend_tokenizer
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "gpt-2": lambda: TOKENIZER,
    "default": lambda: ALL["byte_fallback"],
    "smollm": digits_tokenizer,
    **{name: lambda pattern=pattern: split_tokenizer(pattern) for pattern, name in SPLITS.items()},
}


@llama_cpp
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_makes_the_tokens_that_transformers_does(name, tmp_path):
    tokenizer = TOKENIZERS[name]()
    saved(tmp_path, made(num_hidden_layers=1), tokenizer)
    write_gguf(tmp_path, tmp_path / "model.gguf", "tiny")
    assert fields(tmp_path / "model.gguf")["tokenizer.ggml.pre"] in (name, "dbrx")
    loaded = LlamaCpp(tmp_path / "model.gguf", 16)
    words = "I'LL don't 12345 x_1 HTTPServer camelCase naïve ÄÖ привет 你好 (a+b)/c //x\n\n\t y   z !!\n"
    for text in (words, TEXT, *TEXTS[3:6]):
        assert loaded.tokenize(text) == tokenizer(text)["input_ids"], text


@llama_cpp
def test_all_types_are_measured_and_quantizing_costs_what_it_should(tmp_path):
    saved(tmp_path / "model", made(hidden_size=256, intermediate_size=256, head_dim=64), with_chat(TOKENIZER))
    texts = Texts("held-out text", [IDS, IDS[::-1]], [IDS])
    facts = export_model(tmp_path / "model", tmp_path / "out", "tiny", texts, ["gguf"])
    by_type = {file["type"]: file for file in facts["files"]}
    assert list(by_type) == list(GGUF_TYPES)
    assert [by_type[kind]["file"] for kind in GGUF_TYPES] == [f"tiny-{kind}.gguf" for kind in GGUF_TYPES]
    kl = [by_type[kind]["teacher_kl"] for kind in GGUF_TYPES]
    assert kl == sorted(kl)
    sizes = [by_type[kind]["bytes"] for kind in GGUF_TYPES]
    assert sizes == sorted(sizes, reverse=True)
    assert facts["calibration_tokens"] == len(IDS)
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == facts
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"export.json", *(file["file"] for file in facts["files"])}


@llama_cpp
def test_the_importance_matrix_is_used(tmp_path):
    from hf_minitron.export.llama_cpp import quantize

    model = saved(tmp_path, made(hidden_size=256, intermediate_size=256, head_dim=64))
    write_gguf(tmp_path, tmp_path / "half.gguf", "tiny")
    importance = importance_of(model, [IDS])
    assert importance["blk.0.ffn_down.weight"].shape == (256,)
    quantize(tmp_path / "half.gguf", tmp_path / "plain.gguf", "Q4_K_M")
    quantize(tmp_path / "half.gguf", tmp_path / "better.gguf", "Q4_K_M", importance)
    assert (tmp_path / "plain.gguf").read_bytes() != (tmp_path / "better.gguf").read_bytes()


def test_the_importance_of_a_matrix_is_the_mean_square_of_what_it_reads():
    model = made(num_hidden_layers=1)
    with torch.no_grad():
        normed = model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor([IDS])))
    expected = normed[0].square().mean(0)
    torch.testing.assert_close(torch.from_numpy(importance_of(model, [IDS])["blk.0.attn_q.weight"]), expected)


@llama_cpp
def test_a_file_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    model = saved(tmp_path / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.neg_().mul_(3)
    monkeypatch.setattr(exporting, "load_model", lambda *args: model)
    with pytest.raises(ValueError, match="F16: what llama.cpp .* predicts is .* nats per token from what Transformers does"):
        export_model(tmp_path / "model", tmp_path / "out", "tiny", Texts("text", [IDS]), ["gguf"], ["F16"])
    assert not list((tmp_path / "out").iterdir())


@mlx
@pytest.mark.parametrize("model", [made, pruned])
def test_mlx_computes_what_transformers_does(model, tmp_path):
    saved(tmp_path / "model", model(), with_chat(TOKENIZER))
    facts = export_model(tmp_path / "model", tmp_path / "out", "tiny", Texts("text", [IDS]), ["mlx"])
    (file,) = facts["files"]
    assert (file["file"], file["type"]) == ("mlx", "MLX 8-bit")
    assert file["teacher_kl"] < 0.01
    assert json.loads((tmp_path / "out" / "mlx" / "config.json").read_text())["quantization"]["bits"] == 8
    for path in (tmp_path / "out" / "mlx").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_a_small_model_takes_eight_bits_for_mlx():
    assert [bits_of(parameters) for parameters in (135_000_000, 999_999_999, 1_235_814_400)] == [8, 8, 4]


@mlx
def test_a_slow_runtime_is_compared_on_fewer_tokens_and_the_table_says_so(tmp_path, monkeypatch):
    model = saved(tmp_path)
    monkeypatch.setattr("hf_minitron.export.mlx.CPU_TOKENS", 16)
    measured = compare_exports(model, TOKENIZER, [IDS, IDS], {"MLX 4-bit": lambda: Mlx(tmp_path)})
    slow = Mlx(tmp_path).most_tokens is not None
    assert measured["files"]["MLX 4-bit"]["tokens"] == (15 if slow else measured["tokens"])
    file = {"file": "mlx", "bytes": 1, **measured["files"]["MLX 4-bit"]}
    assert export_rows({**measured, "files": [file]})[-1][-1].endswith(", 15 tokens") == slow


class Same:
    """A runtime that computes what a model does."""

    version = "the same"

    def __init__(self, model, most_tokens=None):
        self.model, self.most_tokens, self.tokenize, self.close = (
            model,
            most_tokens,
            lambda text: TOKENIZER(text)["input_ids"],
            int,
        )

    def logits(self, tokens):
        return self.model(torch.tensor([list(tokens)])).logits[0].numpy()


def test_a_file_is_scored_where_evaluate_scores():
    """So that one model has one perplexity: of chats on the answers alone, which a slow runtime need not reach at once."""
    model = made()
    labels = [[-100] * len(IDS), [-100] * 30 + IDS[30:35] + [-100] * (len(IDS) - 35)]
    files = {"F16": lambda: Same(model), "Q8_0": lambda: Same(model, 8)}
    measured = compare_exports(model, TOKENIZER, [IDS, IDS], files, labels)
    expected = perplexity(model, Dataset.from_dict({"input_ids": [IDS, IDS], "labels": labels})).value
    assert measured["perplexity"] == measured["files"]["F16"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert (measured["tokens"], measured["answers"]) == (5, True)
    assert [file["tokens"] for file in measured["files"].values()] == [5, 4]
    assert measured["files"]["Q8_0"]["teacher_kl"] == pytest.approx(0, abs=1e-6)
    whole = compare_exports(model, TOKENIZER, [IDS, IDS], files)
    assert (whole["tokens"], whole["answers"]) == (2 * len(IDS) - 2, False)
    assert whole["perplexity"] == pytest.approx(perplexity(model, Dataset.from_dict({"input_ids": [IDS]})).value, rel=1e-5)
    with pytest.raises(ValueError, match="tokens of the held-out text is predicted"):
        compare_exports(model, TOKENIZER, [IDS], files, labels[:1])


@mlx
def test_mlx_loads_a_stock_student_as_it_is(tmp_path):
    model = saved(tmp_path)
    measured = compare_exports(model, TOKENIZER, [IDS], {"F16": lambda: Mlx(tmp_path)})
    assert measured["files"]["F16"]["teacher_kl"] < 1e-4


@pytest.mark.parametrize(
    ("config", "formats", "types", "message"),
    [
        ({"model_type": "bloom", "head_dim": None}, ["gguf"], ["F16"], "of type 'bloom'; of arcee"),
        ({"hidden_size": 40}, ["gguf"], ["F16", "Q8_0"], "Q8_0: hidden: 40 does not divide by 32"),
        ({"hidden_act": "gelu"}, ["gguf"], ["F16"], "hidden_act is 'gelu', and llama.cpp's 'llama' has 'silu' only"),
        ({"rope_parameters": {**ROPE["linear"], "rope_type": "dynamic"}}, ["gguf"], ["F16"], "rope_type 'dynamic'"),
        ({"model_type": "gemma2", "query_pre_attn_scalar": 9}, ["gguf"], ["F16"], "query_pre_attn_scalar is 9"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1, 1]}, ["gguf"], ["F16"], "so drop no layers"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [1]}, ["gguf"], ["F16"], "with and without experts alternate"),
        ({"model_type": "phi3"}, ["gguf"], ["F16"], "heads are 32 wide together and hidden is 64"),
        ({}, ["gguf"], ["Q2_K"], "'Q2_K' is not a type of GGUF file: F16, Q8_0, Q4_K_M"),
        ({}, ["gguf"], [], "no type of GGUF file is named"),
        ({}, ["onnx"], ["F16"], "'onnx' is not a format: gguf, mlx"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(config, formats, types, message):
    changes = {**SIZES, **config}
    with pytest.raises(ValueError, match=message) as error:
        check_export(tiny.config(changes.pop("model_type", "llama"), **changes), formats, types)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("module", "formats", "message"),
    [
        ("gguf", ["gguf"], r"GGUF files need gguf, which is not installed: pip install 'hf_minitron\[gguf\]'"),
        ("llama_cpp", ["gguf"], r"Q4_K_M, which llama.cpp quantizes to, need llama-cpp-python"),
        ("mlx_lm", ["mlx"], r"the export for MLX need mlx-lm, which is not installed: pip install 'hf_minitron\[mlx\]'"),
    ],
)
def test_a_runtime_that_is_not_installed_is_named(module, formats, message, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found(name))
    with pytest.raises(ValueError, match=message):
        check_export(tiny.config(**SIZES), formats)


def test_without_llama_cpp_files_are_written_and_not_measured(tmp_path, monkeypatch):
    saved(tmp_path / "model")
    monkeypatch.setattr(exporting, "_is_installed", lambda name: name == "gguf")
    facts = export_model(tmp_path / "model", tmp_path / "out", "tiny", Texts("text", [IDS]), ["gguf"], ["F16", "Q8_0"])
    assert [sorted(file) for file in facts["files"]] == [["bytes", "file", "type"]] * 2


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (tiny.tokenizer(), "the tokenizer is WordLevel"),
        (ALL["unigram"], "the tokenizer is Unigram"),
        (ALL["characters"], "the tokenizer is BPE without bytes"),
        (split_tokenizer("[a-z]+|."), "llama.cpp's name for this tokenizer's split of words is not known"),
    ],
    ids=["words", "unigram", "characters", "split"],
)
def test_tokenizers_that_a_gguf_file_does_not_hold_are_refused(tokenizer, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_metadata(tokenizer, 1000)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused():
    with pytest.raises(ValueError, match="the tokenizer has a token .*, and the model 300 of them"):
        tokenizer_metadata(TOKENIZER, 300)


@pytest.mark.parametrize(
    ("model", "name"), [("owner/my model@main", "my-model"), ("/home/me/runs/small", "small"), ("me/x-0.5B", "x-0.5B")]
)
def test_files_are_named_by_the_last_part_alone(model, name):
    assert file_name(model) == name


def test_the_command_exports_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(Path("small"), pruned())
    assert main(["export", "small", "--to", "gguf", "stock", "--types", "F16", "--tokens", "128"]) == 0
    assert "small-F16.gguf" in capsys.readouterr().out
    assert {path.name for path in Path("export").iterdir()} == {"export.json", "small-F16.gguf", "stock"}
    assert AutoModelForCausalLM.from_pretrained("export/stock").config.model_type == "llama"


@pytest.mark.parametrize(
    ("tokens", "positions", "expected"), [(128, 2048, (1, 128)), (1024, 2048, (2, 512)), (128, 64, (2, 64)), (2, 2048, (1, 2))]
)
def test_as_many_tokens_as_are_asked_for_are_read(tmp_path, monkeypatch, tokens, positions, expected):
    found = []
    monkeypatch.setattr("hf_minitron.export.command.export_model", lambda *args: found.append(args[3]) or {"tokens": 0})
    monkeypatch.setattr("hf_minitron.export.command.facts_text", str)
    saved(tmp_path, made(max_position_embeddings=positions))
    options = ["--types", "F16", "--tokens", str(tokens), "--output", str(tmp_path / "out")]
    assert main(["export", str(tmp_path), "--to", "gguf", *options]) == 0
    for blocks in (found[0].held_out, found[0].calibration):
        assert (len(blocks), len(blocks[0])) == expected


@pytest.mark.parametrize("tokens", ["1", "0", "-5"])
def test_too_few_tokens_are_refused_by_their_option(tmp_path, capsys, tokens):
    saved(tmp_path / "small")
    assert main(["export", str(tmp_path / "small"), "--to", "gguf", "--tokens", tokens]) == 1
    assert f"tokens: {tokens} must be at least 2, of which one is predicted" in capsys.readouterr().err


def test_the_command_refuses_in_one_line_before_it_begins(tmp_path, capsys):
    saved(tmp_path / "small", made(hidden_size=40))
    assert main(["export", str(tmp_path / "small"), "--to", "gguf", "--output", str(tmp_path / "out")]) == 1
    assert "hidden: 40 does not divide by 32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The run and its card


@pytest.fixture
def recipe(tmp_path):
    """A recipe that exports, of a teacher that GGUF files hold."""
    words = tiny.make_project(tmp_path, made(vocab_size=720))
    with_chat(TOKENIZER).save_pretrained(tmp_path / "teacher")
    found = {**words["recipe"], "run": str(tmp_path / "runs" / "small one"), "prune": {"target": {"ffn": 64}}}
    found["evaluate"] = {**found["evaluate"], "tasks": [], "speed": False}
    found["publish"] = {"export": ["gguf"], "gguf_types": ["F16", "Q8_0"]}
    words["path"].write_text(yaml.safe_dump(found))
    return words["path"]


@pytest.mark.slow
def test_publish_exports_beside_the_model(recipe, tmp_path):
    assert main(["run", str(recipe)]) == 0
    folder = tmp_path / "runs" / "small one" / "publish" / "model"
    facts = json.loads((folder / "export.json").read_text())
    assert [file["file"] for file in facts["files"]] == ["small-one-F16.gguf", "small-one-Q8_0.gguf"]
    assert {"small-one-F16.gguf", "small-one-Q8_0.gguf", "export.json"} <= files_to_push(folder).keys()
    text = (folder / "README.md").read_text()
    assert "| small-one-F16.gguf" in text
    assert ("llama-cli -m small-one-Q8_0.gguf" in text) == ("runtime" in facts["files"][0])


def test_publish_exports_on_the_first_blocks_of_the_recipes_texts(whole, monkeypatch):
    """Those of a calibration text of several sources by their shares; no more than these are made into tokens."""
    read = []
    monkeypatch.setattr(publish, "read_blocks", lambda *args: read.append(args[3]) or read_blocks(*args))
    monkeypatch.setattr(publish, "EXPORT_TOKENS", 64)
    run, student = made_by(str(whole / "run/publish/model")), whole / "run/distill/student"
    calibration, held_out = run.section("score")["text"], run.section("evaluate")["text"]
    tokenizer = AutoTokenizer.from_pretrained(student)
    rows = {name: read_blocks([Source(name)], tokenizer, 16, 256, run.seed)[0] for name in (calibration, held_out)}
    texts = publish._texts(run, student)
    assert (texts.calibration, texts.held_out) == (rows[calibration][:4], rows[held_out][:4])
    score = {**run.section("score"), "text": {calibration: 0.75, held_out: 0.25}}
    texts = publish._texts(replace(run, recipe={**run.recipe, "score": score}), student)
    assert [ids for ids in texts.calibration if ids in rows[held_out]] == rows[held_out][:1]
    assert [ids for ids in texts.calibration if ids in rows[calibration]] == rows[calibration][:3]
    assert set(read) == {64}
    score = {**score, "text": {calibration: 0.95, held_out: 0.05}}
    texts = publish._texts(replace(run, recipe={**run.recipe, "score": score}), student)
    assert texts.calibration == rows[calibration][:4]
    assert read[-1] == 11 * 16, "up to the first block of the other source"


def test_a_text_is_read_in_blocks_of_what_a_model_takes(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS * 40))
    sources = [Source(str(tmp_path / "a.txt"))]
    for given in (sources, []):
        assert {len(ids) for ids in read_blocks(given, TOKENIZER, 128, 1024)[0]} == {128}
        assert {len(ids) for ids in read_blocks(given, TOKENIZER, 4096, 1024)[0]} == {BLOCK}
    assert read_blocks(sources, TOKENIZER, 128, 1024)[0] == read_blocks(sources, TOKENIZER, 128, 2048)[0][:8]


def test_a_size_that_cannot_be_quantized_is_refused_before_the_run_begins(recipe, tmp_path, capsys):
    assert main(["run", str(recipe), "--prune.target.hidden", "40"]) == 1
    assert "export: Q8_0: hidden: 40 does not divide by 32" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "small one" / "score").exists()


@pytest.mark.parametrize(("load", "where"), [("me/small", "-hf me/small:Q8_0"), (".", "-m small-Q8_0.gguf")])
def test_the_card_shows_how_to_load_what_was_loaded(load, where):
    measured = {"runtime": "llama.cpp", "perplexity": 11.0, "teacher_kl": 1e-3, "top1_match": 0.99, "tokens": 4088}
    files = [{"file": f"small-{kind}.gguf", "type": kind, "bytes": 10**8, **measured} for kind in ("F16", "Q8_0")]
    export = {"text": "held-out text", "perplexity": 11.0, "tokens": 4088, "files": files}
    shown = str(card(export=export, load=load))
    assert f"llama-cli {where} -p" in shown
    assert "mlx" not in shown
    assert "\n\n```\n" not in shown, "no code ends with an empty line"
    assert "4,088 tokens" in shown
    for file in files:
        del file["runtime"]
    assert "llama-cli" not in str(card(export=export, load=load))
    both = {**export, "files": [*files, {**measured, "file": "mlx", "type": "MLX 4-bit", "bytes": 10**8}]}
    assert "mlx_lm.generate --model mlx" in str(card(export=both, load=load))
    assert "not loaded yet" in str(card(export=both, load=load))
