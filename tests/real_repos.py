"""Data sets and models as they lie on the Hub: real names, files, columns and configs, with a few rows and tiny weights.

Layouts are those of the repositories' file lists and cards; configs of models come from `configs/`, their sizes cut.
"""

import gzip
import json
import random
from pathlib import Path

import torch
import yaml
from datasets import ClassLabel, Dataset, Features, List, Value
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

CONFIGS = Path(__file__).resolve().parent / "configs"
VOCABULARY = 320
# A recipe's model: what hidden, ffn and layers are divided by, and what else is cut.
CUTS = {
    "Llama-3.1-8B": (64, 128, 8, {"num_attention_heads": 4}),
    "Llama-3.3-70B-Instruct": (128, 256, 40, {"num_attention_heads": 4, "head_dim": 16}),
    "Mistral-Nemo-Base-2407": (64, 32, 20, {"num_attention_heads": 4, "head_dim": 16}),
    "nemotron-4-15b": (64, 128, 16, {"num_attention_heads": 12, "head_dim": 8}),
    "SmolLM2-135M-Instruct": (1, 16, 15, {}),
    "SmolLM2-1.7B": (32, 64, 8, {"num_attention_heads": 4}),
    "SmolLM3-3B-Base": (32, 64, 4, {"num_attention_heads": 4, "pad_token_id": 2}),
    "Qwen3-4B-Base": (32, 64, 18, {"num_attention_heads": 4, "head_dim": 16}),
    "Qwen3-8B": (64, 128, 6, {"num_attention_heads": 4, "head_dim": 16}),
    "Qwen3-30B-A3B-Base": (32, 64, 24, {"num_attention_heads": 4, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
                                        "moe_intermediate_size": 24}),
}  # fmt: skip
SIZES = {"hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "experts": "num_experts",
         "ffn": "intermediate_size"}  # fmt: skip
# Beside the weights: the licence, signs of the tokenizer, and files that Transformers does not read.
CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BESIDE = {
    "Llama-3.1-8B": ("llama3.1", ["<|begin_of_text|>", "<|end_of_text|>"], ["original/consolidated.00.pth", "original/a.json"]),
    "Llama-3.3-70B-Instruct": ("llama3.3", ["<|begin_of_text|>", "<|eot_id|>"], ["original/consolidated.00.pth"]),
    "Mistral-Nemo-Base-2407": ("apache-2.0", ["<s>", "</s>"], ["consolidated.safetensors", "tekken.json", "params.json"]),
    "nemotron-4-15b": ("other", ["<s>", "</s>"], ["tokenizer.nemo"]),
    "SmolLM2-135M-Instruct": ("apache-2.0", CHAT, ["onnx/model.onnx", "runs/events.out"]),
}  # fmt: skip
QWEN = ("apache-2.0", CHAT, ["pytorch_model.bin"])
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NOUNS = "river teacher molecule planet engine forest number language winter market music animal bridge letter".split()
VERBS = "follows explains carries measures crosses becomes holds changes learns moves builds answers".split()


def sentence(rng):
    one, other, third = rng.sample(NOUNS, 3)
    return f"The {one} {rng.choice(VERBS)} a {other} and the {third} {rng.choice(VERBS)} the other."


def passages(count, seed, sentences=12):
    rng = random.Random(seed)
    return [" ".join(sentence(rng) for _ in range(rng.randint(sentences // 2, sentences))) for _ in range(count)]


def write_parquet(path, rows, features=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(path)


def write_card(folder, **metadata):
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n# A data set\n")


def one_config(name, **paths):
    return {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in paths.items()]}


# Data sets: each writes its repository into a folder


def fineweb_edu(folder):
    shards = ["sample/10BT/000_00000", "sample/10BT/001_00000", "sample/100BT/000_00000",
              "data/CC-MAIN-2013-20/train-00000-of-00014", "data/CC-MAIN-2024-10/train-00000-of-00020"]  # fmt: skip
    for number, shard in enumerate(shards):
        rows = [
            {"text": text, "id": f"<urn:uuid:{number:08x}-{i:04x}>", "dump": "CC-MAIN-2013-20", "url": f"http://example.org/{i}",
             "file_path": f"s3://commoncrawl/crawl-data/CC-MAIN-2013-20/{number}.warc.gz", "language": "en",
             "language_score": 0.97, "token_count": len(text.split()), "score": 2.7 + i / 100, "int_score": 3}
            for i, text in enumerate(passages(40, number))
        ]  # fmt: skip
        write_parquet(folder / f"{shard}.parquet", rows)
    parts = {"default": "data/*/*", "sample-10BT": "sample/10BT/*", "sample-100BT": "sample/100BT/*",
             "CC-MAIN-2024-10": "data/CC-MAIN-2024-10/*"}  # fmt: skip
    configs = [one_config(name, train=path) for name, path in parts.items()]
    write_card(folder, license="odc-by", task_categories=["text-generation"], language=["en"], configs=configs)


def c4(folder):
    for number, part in enumerate(["train.00000-of-01024", "train.00001-of-01024", "validation.00000-of-00008"]):
        rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.org/{i}"}
                for i, text in enumerate(passages(30, 10 + number))]  # fmt: skip
        (folder / "en").mkdir(exist_ok=True)
        (folder / f"en/c4-{part}.json.gz").write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    configs = [one_config("en", train="en/c4-train.*.json.gz", validation="en/c4-validation.*.json.gz")]
    write_card(folder, license="odc-by", configs=configs)


def c4_10k(folder):
    features = {"text": Value("string"), "timestamp": Value("timestamp[us]"), "url": Value("string")}
    rows = [{"text": text, "timestamp": 1_556_197_074_000_000, "url": f"https://example.org/{i}"}
            for i, text in enumerate(passages(80, 20))]  # fmt: skip
    write_parquet(folder / "data/train-00000-of-00001-f6f21d3dc6d657fc.parquet", rows, Features(features))
    info = [{"name": name, "dtype": value.dtype} for name, value in features.items()]
    splits = [{"name": "train", "num_bytes": 21970889, "num_examples": 80}]
    write_card(folder, dataset_info={"features": info, "splits": splits, "download_size": 13645542, "dataset_size": 21970889})


def wikitext(folder):
    configs = []
    for name in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
        for number, split in enumerate(("test", "train", "validation")):
            lines = []
            for i, text in enumerate(passages(20, 30 + number)):
                lines += ["", f" = {NOUNS[i % len(NOUNS)].title()} = \n", "", f" {text} \n".replace(",", " @,@ ")]
            write_parquet(folder / name / f"{split}-00000-of-00001.parquet", [{"text": line} for line in lines])
        configs.append(one_config(name, **{split: f"{name}/{split}-*" for split in ("test", "train", "validation")}))
    write_card(folder, license=["cc-by-sa-3.0", "gfdl"], configs=configs)


def climbmix(folder):
    for number in range(3):
        rows = [{"text": text, "cluster_id": 1 + i % 20} for i, text in enumerate(passages(30, 40 + number))]
        (folder / f"part_{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_card(folder, license="cc-by-nc-4.0", task_categories=["text-generation"], language=["en"])


def ultrachat(folder):
    turns = List({"content": Value("string"), "role": Value("string")})
    features = Features({"prompt": Value("string"), "prompt_id": Value("string"), "messages": turns})
    for number, split in enumerate(("train_sft", "test_sft")):
        rows = [
            {"prompt": text, "prompt_id": f"{i:064x}",
             "messages": [{"content": text, "role": "user"}, {"content": text[::-1], "role": "assistant"}]}
            for i, text in enumerate(passages(10, 50 + number))
        ]  # fmt: skip
        write_parquet(folder / f"data/{split}-00000-of-00001-a3ecf92756993583.parquet", rows, features)
    splits = {split: f"data/{split}-*" for split in ("train_sft", "test_sft")}
    write_card(folder, language=["en"], license="mit", configs=[one_config("default", **splits)])


def winogrande(folder):
    for split in ("train", "validation", "test"):
        rng = random.Random(split)
        rows = [{"sentence": f"The {one} followed the {other} because the _ was slow.", "option1": one, "option2": other,
                 "answer": "" if split == "test" else rng.choice("12")}
                for one, other in (rng.sample(NOUNS, 2) for _ in range(8))]  # fmt: skip
        write_parquet(folder / f"winogrande_xl/{split}-00000-of-00001.parquet", rows)
    splits = {split: f"winogrande_xl/{split}-*" for split in ("train", "validation", "test")}
    write_card(folder, configs=[one_config("winogrande_xl", **splits)])


def gsm8k(folder):
    for split in ("train", "test"):
        rng = random.Random(split)
        rows = [{"question": f"Ann has {a} pens and buys {b}. How many now?", "answer": f"<<{a}+{b}={a + b}>>\n#### {a + b}"}
                for a, b in ((rng.randint(1, 9), rng.randint(1, 9)) for _ in range(8))]  # fmt: skip
        write_parquet(folder / f"main/{split}-00000-of-00001.parquet", rows)
    write_card(folder, license=["mit"], configs=[one_config("main", train="main/train-*", test="main/test-*")])


def arc(folder):
    for split in ("train", "validation", "test"):
        rng = random.Random(split)
        rows = [{"id": f"Mercury_{i}", "question": f"What {rng.choice(VERBS)} the {rng.choice(NOUNS)}?",
                 "choices": {"text": rng.sample(NOUNS, 4), "label": list("ABCD")}, "answerKey": rng.choice("ABCD")}
                for i in range(8)]  # fmt: skip
        write_parquet(folder / f"ARC-Easy/{split}-00000-of-00001.parquet", rows)
    splits = {split: f"ARC-Easy/{split}-*" for split in ("train", "validation", "test")}
    write_card(folder, license=["cc-by-sa-4.0"], configs=[one_config("ARC-Easy", **splits)])


def piqa(folder):
    features = Features({**dict.fromkeys(("goal", "sol1", "sol2"), Value("string")), "label": ClassLabel(names=["0", "1"])})
    for split in ("train", "validation", "test"):
        rng = random.Random(split)
        rows = [{"goal": f"How to reach the {rng.choice(NOUNS)}?", "sol1": sentence(rng), "sol2": sentence(rng), "label": i % 2}
                for i in range(8)]  # fmt: skip
        write_parquet(folder / f"piqa_{split}.parquet", rows, features)  # and no card


KWARGS = ("num_highlights", "relation", "num_words", "num_placeholders", "num_bullets", "keywords", "language", "end_phrase")


def ifeval(folder):
    """Rows of prompts with their instructions; every instruction has all arguments, most of them null."""
    asked = [
        ("Write about a river without commas.", {"punctuation:no_comma": {}}),
        ("Write at least three words about a bridge, without commas.",
         {"length_constraints:number_words": {"num_words": 3, "relation": "at least"}, "punctuation:no_comma": {}}),
        ("Write about an engine with the word planet, in no capital letters, and without commas.",
         {"keywords:existence": {"keywords": ["planet"]}, "change_case:english_lowercase": {}, "punctuation:no_comma": {}}),
    ]  # fmt: skip
    rows = [
        {"key": 1000 + number, "prompt": prompt, "instruction_id_list": list(instructions),
         "kwargs": [dict.fromkeys(KWARGS) | kwargs for kwargs in instructions.values()]}
        for number, (prompt, instructions) in enumerate(asked)
    ]  # fmt: skip
    (folder / "ifeval_input_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_card(folder, license="apache-2.0", task_categories=["text-generation"], language=["en"], pretty_name="IFEval")


DATASETS = {
    "HuggingFaceFW/fineweb-edu": fineweb_edu, "allenai/c4": c4, "NeelNanda/c4-10k": c4_10k, "Salesforce/wikitext": wikitext,
    "OptimalScale/ClimbMix": climbmix, "HuggingFaceH4/ultrachat_200k": ultrachat, "allenai/winogrande": winogrande,
    "openai/gsm8k": gsm8k, "allenai/ai2_arc": arc, "baber/piqa": piqa,
    "google/IFEval": ifeval,
}  # fmt: skip

# Models


def write_tokenizer(folder, signs):
    """A byte-level BPE with its real files: tokenizer.json, vocab.json, merges.txt, and both configs."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8, special_tokens=signs, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(passages(40, 99), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    begin, ends = ({}, {"eos_token": signs[0]}) if signs == CHAT else ({"bos_token": signs[0]}, {"eos_token": signs[1]})
    added = {tokenizer.token_to_id(sign): {"content": sign, "lstrip": False, "normalized": False, "rstrip": False,
                                           "single_word": False, "special": True} for sign in signs}  # fmt: skip
    config = {"added_tokens_decoder": added, "clean_up_tokenization_spaces": False, "model_max_length": 131072, **begin, **ends,
              "tokenizer_class": "PreTrainedTokenizerFast"}  # fmt: skip
    if signs == CHAT:
        config |= {"chat_template": CHATML, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(begin | ends))
    return {f"{name.removesuffix('_token')}_token_id": tokenizer.token_to_id(sign) for name, sign in (begin | ends).items()}


def tiny_config(name, ids):
    """A real config with its sizes divided; heads and head sizes so that they still fit."""
    config = json.loads((CONFIGS / name / "config.json").read_text())
    *divisors, cuts = CUTS[name]
    layers = config["num_hidden_layers"] // divisors[2]
    config |= {key: value[:layers] for key, value in config.items() if isinstance(value, list)}
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers")
    config |= {key: config[key] // divisor for key, divisor in zip(keys, divisors, strict=True)} | cuts
    config["vocab_size"] = VOCABULARY  # more rows than the tokenizer has tokens, as in real models
    if "num_attention_heads" in cuts:
        grouped = (
            config["num_key_value_heads"] < json.loads((CONFIGS / name / "config.json").read_text())["num_attention_heads"]
        )
        config["num_key_value_heads"] = 2 if grouped else config["num_attention_heads"]
    return {**config, **dict.fromkeys(("bos_token_id", "eos_token_id")), **ids}


def write_model(folder, name):
    """A model's repository: config, sharded weights, tokenizer, generation config, card, and what else lies there."""
    folder.mkdir(parents=True)
    licence, signs, beside = BESIDE.get(name, QWEN)
    (folder / "config.json").write_text(json.dumps(tiny_config(name, write_tokenizer(folder, signs)), indent=2))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).to(torch.bfloat16)
    own = (folder / "config.json").read_text()
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9)
    model.save_pretrained(folder, max_shard_size="200KB" if "135M" not in name else "1GB")
    (folder / "config.json").write_text(own)  # as its authors wrote it
    for path in beside:
        (folder / path).parent.mkdir(exist_ok=True)
        if path.endswith(".safetensors"):
            save_file({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, folder / path)
        else:
            (folder / path).write_bytes(b"{}" if path.endswith(".json") else b"not for Transformers")
    card = {"license": licence, "language": ["en"], "library_name": "transformers", "pipeline_tag": "text-generation"}
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n# {name}\n")
    (folder / "LICENSE").write_text("A licence.\n")


def scaled(name, target):
    """A recipe's target for the real model, at the sizes of the tiny one."""
    real = json.loads((CONFIGS / name / "config.json").read_text())
    tiny = tiny_config(name, {})
    return {axis: size * tiny[SIZES[axis]] // real[SIZES[axis]] for axis, size in target.items()}
