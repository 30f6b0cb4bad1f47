"""Every example in the documentation runs: Python blocks of the Markdown pages, `>>>` in the package, command lines.

The README's Python example is run once, with a small stand-in for its teacher in the Hub's cache. Its names are what the other
examples start from, as the README says. A new example is found by itself.
"""

import ast
import doctest
import importlib
import io
import itertools
import json
import re
import shlex
import sys
import textwrap
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import tiny
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, HfArgumentParser

from hf_minitron.__main__ import parser
from hf_minitron.architecture.family import FAMILIES
from hf_minitron.recipe import bind, load_recipe
from hf_minitron.recipe_file import read_overrides
from hf_minitron.stages.every import STAGES

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "recipes").rglob("*.md"))
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SECTIONS = {name: stage.args for name, stage in STAGES.items()}


def blocks_of(path, language):
    """The fenced blocks of a page in one language, each with its first line."""
    text = path.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start(3)) + 1, m[3]) for m in FENCE.finditer(text) if m[2] == language]


def strings_of(path):
    """The strings of a module, docstrings and others, each with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


PYTHON = [path for path in PAGES if blocks_of(path, "python")]
DOCSTRINGS = [
    pytest.param(path, line, text, id=f"{path.relative_to(ROOT / 'hf_minitron')}:{line}")
    for path in sorted((ROOT / "hf_minitron").rglob("*.py"))
    for line, text in strings_of(path)
    if ">>> " in text
]


def put_in_cache(cache, repository, model):
    """Put a model where `from_pretrained` finds what it has downloaded."""
    entry, commit = cache / f"models--{repository.replace('/', '--')}", "0" * 40
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(commit)
    model.save_pretrained(entry / "snapshots" / commit)
    tiny.tokenizer().save_pretrained(entry / "snapshots" / commit)


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """The names that the README's first example leaves behind, run in a clone's folder with some text in it."""
    folder = tmp_path_factory.mktemp("examples")
    smol = {"hidden": 576, "ffn": 1536, "heads": 9, "kv_heads": 3, "head_dim": 64, "layers": 4}
    sizes = {key: smol[axis] for axis, key in FAMILIES["llama"].config_keys.items() if axis in smol}
    put_in_cache(folder / "hub", "HuggingFaceTB/SmolLM2-135M-Instruct", tiny.model("llama", torch.float32, **sizes))
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
    both = {"text_config": {**text, "head_dim": 8, "num_key_value_heads": 1}, "vision_config": {**vision, "patch_size": 14}}
    gemma = AutoConfig.for_model("gemma3", **both, image_token_index=98, boi_token_index=97, eoi_token_index=96)
    put_in_cache(folder / "hub", "google/gemma-3-4b-pt", AutoModelForImageTextToText.from_config(gemma))
    for name, column in (("train.jsonl", "text"), ("code.jsonl", "content")):
        (folder / name).write_text("".join(json.dumps({column: document}) + "\n" for document in tiny.text(30, 0)))
    (folder / "hf_minitron").symlink_to(ROOT / "hf_minitron")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
        patch.chdir(folder)
        known = dict(FAMILIES)
        names = {}
        with redirect_stdout(io.StringIO()):
            run(PAGES[0], names)
        yield names
        FAMILIES.clear()
        FAMILIES.update(known)


def run(page, names):
    """Run the Python blocks of a page, one after another; an error names the page and its line."""
    for line, block in blocks_of(page, "python"):
        exec(compile("\n" * (line - 1) + block, str(page), "exec"), names)


def test_the_readme_makes_a_smaller_stock_model(readme):
    student = AutoModelForCausalLM.from_pretrained("out")
    assert (student.config.hidden_size, student.config.intermediate_size) == (512, 1024)
    assert student.num_parameters() < readme["teacher"].num_parameters()
    assert Path("out/tokenizer.json").is_file()
    assert readme["args"].losses == {"hellinger": 1.0, "forward_kl": 0.25}


@pytest.mark.parametrize("page", PYTHON[1:], ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page, readme):
    names = dict(readme)
    run(page, names)
    if page.name == "families.md":
        assert names["text"].config.model_type == "gemma3_text"
        assert type(names["smaller"]) is type(names["whole"])


class Parser(doctest.DocTestParser):
    """doctest, for examples inside of Markdown fences."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"^ *```\w*$", "", string, flags=re.MULTILINE), name)


def failures(text, names, name="example", line=1):
    """What doctest says of the examples in a text; nothing when all are as written."""
    test = Parser().get_doctest(textwrap.dedent(text), dict(names), name, name, line - 1)
    assert test.examples
    report = io.StringIO()
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(test, out=report.write)
    return report.getvalue()


@pytest.mark.parametrize(("path", "line", "text"), DOCSTRINGS)
def test_an_example_of_the_package_runs(path, line, text, readme):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    said = failures(text, readme | vars(module), str(path), line)
    assert not said, said


def test_an_example_that_is_not_true_fails():
    assert not failures("```python\n>>> 1 + 1\n2\n```", {})
    assert "ZeroDivisionError" in failures("```python\n>>> 1 / 0\n```", {})
    assert "Expected:\n    3" in failures("```python\n>>> 1 + 1\n3\n```", {})
    assert "NameError" in failures(">>> not_defined_anywhere", {})


def test_examples_are_found():
    assert {path.name for path in PYTHON} >= {"README.md", "families.md", "pruning.md"}
    assert len(DOCSTRINGS) >= 28
    assert len(COMMANDS) >= 40


# Command lines


def commands_of(path):
    """The command lines of a page, in its bash blocks and whole ones between backticks, or of the strings of a module."""
    if path.suffix == ".py":
        for _, text in strings_of(path):
            found = re.finditer(
                r"^ +(?:hf-minitron|accelerate launch|python recipes/) ?\S+(?: +--\S+| \S+)*", text, re.MULTILINE
            )
            yield from (match[0] for match in found)
        return
    for _, block in blocks_of(path, "bash"):
        yield from block.replace("\\\n", " ").splitlines()
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    yield from re.findall(r"`((?:hf-minitron|accelerate launch -m|python|make) [^`]+)`", " ".join(text.split()))


COMMANDS = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)}")
    for path in [*PAGES, *sorted((ROOT / "recipes").glob("*.py")), ROOT / "hf_minitron" / "__main__.py"]
    for command in commands_of(path)
    for part in command.split("&&")
    if (words := shlex.split(part, comments=True))
]
OTHERS = {"git", "cd", "hf", "pip", "vllm", "llama-cli", "ollama", ".venv/bin/python"}  # not ours


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_line_of_a_page_is_one(words, project):
    program, *rest = itertools.dropwhile(re.compile(r"[A-Z_]+=").match, words)  # behind variables of the environment
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "hf-minitron":
        check_verb(rest, project)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        args = launch_command_parser().parse_args(rest[1:])
        assert not args.config_file or (ROOT / args.config_file).is_file()
        if args.module:
            assert args.training_script == "hf_minitron"
            check_verb(args.training_script_args, project)
        else:
            check_script(args.training_script, args.training_script_args)
    elif program == "python":
        check_script(rest[0], rest[1:])
    else:
        assert program in OTHERS


def check_verb(words, project):
    """The verb exists, its recipe too or it is a name for the reader's own, and every override is a key of some section."""
    if words[0] == "<stage>":
        words = ["score", *words[1:]]
    if "--help" in words or len(words) == 1:
        assert words[0] in {"init", "run", "plan", "report", *STAGES}
        return
    args, rest = parser().parse_known_args(words)
    overrides = read_overrides(rest)
    if args.verb in ("init", "export") or args.verb == "plan" and args.recipe.suffix != ".yaml":  # of a model
        assert not overrides
        return
    for recipe in args.recipe if isinstance(args.recipe, list) else [args.recipe]:
        own = "/" not in str(recipe)
        assert own or (ROOT / recipe).is_file(), f"no {recipe}"
        bound = load_recipe(project["path"] if own else ROOT / recipe, overrides, SECTIONS)
        for section in {key.partition(".")[0] for key in overrides} & SECTIONS.keys():
            bind(bound, section, SECTIONS[section])


def check_script(path, options):
    """The script exists and takes the options."""
    assert (ROOT / path).is_file()
    if options:
        text = (ROOT / path).read_text()
        if "class ScriptArguments" in text:
            sys.path.insert(0, str((ROOT / path).parent))
            script = importlib.import_module(Path(path).stem)
            HfArgumentParser((script.ScriptArguments, script.DistillationArguments)).parse_args_into_dataclasses(options)
        else:  # it may need a package that is not installed
            known = re.findall(r'add_argument\("(--[\w-]+)"', text)
            assert {option for option in options if option.startswith("--")} <= set(known)
