"""Real models made tiny, with pairwise different sizes so that a transposed row cannot pass."""

import json
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SIZES = {"layers": 3, "hidden": 40, "ffn": 72, "heads": 4, "kv_heads": 2, "head_dim": 6, "vocab": 99}
MODEL_TYPES = ("arcee", "llama", "ministral", "mistral", "qwen2", "qwen3", "smollm3")
WORDS = [f"w{i}" for i in range(SIZES["vocab"] - 3)]


def config(model_type="llama", **changes):
    values = {
        "num_hidden_layers": SIZES["layers"],
        "hidden_size": SIZES["hidden"],
        "intermediate_size": SIZES["ffn"],
        "num_attention_heads": SIZES["heads"],
        "num_key_value_heads": SIZES["kv_heads"],
        "head_dim": SIZES["head_dim"],
        "vocab_size": SIZES["vocab"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(model_type, **(values | changes))


def model(model_type="llama", dtype=torch.float64, seed=0, **changes):
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(model_type, **changes)).to(dtype).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # norms of ones and biases of zeros would hide mistakes
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(4)
    return made


def blocks(rows=6, length=12, seed=0):
    ids = torch.randint(3, SIZES["vocab"], (rows, length), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch")


def tokenizer(words=WORDS):
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def text(documents, seed):
    ids = torch.randint(0, len(WORDS), (documents, 40), generator=torch.Generator().manual_seed(seed))
    return [" ".join(WORDS[i] for i in row) for row in ids]


def make_project(folder: Path) -> dict:
    made = model(dtype=torch.float32)
    made.save_pretrained(folder / "teacher", max_shard_size="40KB")
    tokenizer().save_pretrained(folder / "teacher")
    for seed, part in enumerate(("train", "calibration", "held_out")):
        rows = [json.dumps({"text": document}) for document in text(30, seed)]
        (folder / f"{part}.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "tasks").mkdir()
    items = [json.dumps({"context": d.rsplit(" ", 1)[0], "word": d.rsplit(" ", 1)[1]}) for d in text(8, 9)]
    (folder / "tasks" / "tiny.jsonl").write_text("\n".join(items) + "\n")
    task = {
        "task": "tiny_last_word",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "tasks" / "tiny.jsonl")}},
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{context}}",
        "doc_to_target": " {{word}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "tasks" / "tiny.yaml").write_text(yaml.safe_dump(task))
    recipe = {
        "model": str(folder / "teacher"),
        "run": str(folder / "run"),
        "score": {"text": str(folder / "calibration.jsonl"), "tokens": 256, "block_size": 16},
        "prune": {"target": {"hidden": 24, "ffn": 48}},
        "distill": {
            "text": str(folder / "train.jsonl"),
            "block_size": 16,
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.003,
            "save_steps": 2,
            "save_total_limit": 2,
            "logging_steps": 1,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
        },
        "evaluate": {
            "text": str(folder / "held_out.jsonl"),
            "tokens": 256,
            "block_size": 16,
            "tasks": ["tiny_last_word"],
            "include_path": str(folder / "tasks"),
        },
        "publish": {"base_model": "owner/teacher", "license": "apache-2.0"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return {"folder": folder, "recipe": recipe, "path": folder / "recipe.yaml"}
