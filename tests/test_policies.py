"""What the code promises about itself: import order, sizes, names, the README's tree."""

import ast
import graphlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import hf_minitron
from hf_minitron.stages.every import STAGES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_minitron"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(PACKAGE.rglob("*.py"))
# Modules and packages of the first level: each imports only what stands before it.
ORDER = """
registration modeling errors tables json_files yaml_text known_names recipe_file axes sizes costs shape ranking plan
probe architecture memory environment waiting data checkpoint inputs statistics head run stage execute pruning importance
distillation evaluation terminal export hub recipe stages planning chain command __main__
""".split()


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def ours(path):
    """The modules of the package that a module imports."""
    for module, name in imports(ast.parse(path.read_text())):
        if module == "hf_minitron" and name is not None:
            yield name
        elif module.startswith("hf_minitron."):
            yield module.removeprefix("hf_minitron.")


def test_the_order_is_complete():
    assert sorted(ORDER) == sorted({name_of(path).split(".")[0] for path in MODULES} - {"__init__"})


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__init__.py"], ids=name_of)
def test_a_package_imports_only_what_stands_before_it(path):
    own = name_of(path).split(".")[0]
    before = [*ORDER[: ORDER.index(own) + 1], "__version__", *hf_minitron.__all__]
    wrong = [found for found in ours(path) if found.split(".")[0] not in before]
    assert not wrong, f"{name_of(path)} imports {wrong}, which stand below it"


def test_no_modules_of_a_package_import_each_other_in_a_circle():
    graph = {name_of(path): set(ours(path)) for path in MODULES if path.name != "__init__.py"}
    tuple(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("name", ["axes", "sizes", "shape", "ranking", "plan"])
def test_the_vocabulary_needs_torch_numpy_and_the_standard_library_only(name):
    import sys

    allowed = {"torch", "numpy", "safetensors", "hf_minitron", *sys.stdlib_module_names}
    found = {module.split(".")[0] for module, _ in imports(ast.parse((PACKAGE / f"{name}.py").read_text()))}
    assert found <= allowed


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_sizes_and_docstrings(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert path.stem not in ("utils", "helpers", "common")
    assert not re.search(r"torch\.load\(|\bpickle\b|trust_remote_code=True", text)
    tree = ast.parse(text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in [*tree.body, *(member for owner in classes for member in owner.body)]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


COMMAND = "stages recipe recipe_file run execute planning chain command __main__".split()


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path).split(".")[0] not in COMMAND], ids=name_of)
def test_a_library_does_not_tell_python_users_to_edit_a_recipe(path):
    """Keys of a recipe, options of the command and its verbs are named by the command; of a call, arguments are."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = [node for node in ast.walk(tree) if isinstance(getattr(node, "value", None), str) and id(node) not in docstrings]
    told = rf"\b({'|'.join(STAGES)})\.[a-z]\w+|(?<![\w-])--[a-z]|\bhf-minitron \w"
    allowed = r"(cache|report|recipe)\.(json|yaml|html)|evaluate\.load|hf auth login --force|accelerate launch --num_processes"
    wrong = [text.value for text in texts if re.search(told, re.sub(allowed, "", text.value))]
    assert not wrong, f"{name_of(path)} names what only the command has"


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "probe.py"], ids=name_of)
def test_only_the_probe_puts_hooks_on_modules(path):
    assert not re.search(r"\.register_\w*hook\(|\.forward = |register_module_\w*hook", path.read_text()), path


SCRIPTS = sorted(path for folder in ("benchmarks", "recipes", "docs", "tests") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_script_imports_of_the_package_is_there(path):
    """Benchmarks run for hours and seldom; a name that was changed stops them only then."""
    for module, name in imports(ast.parse(path.read_text())):
        if module and module.split(".")[0] == "hf_minitron":
            found = importlib.import_module(module)
            assert name is None or hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), (module, name)


def test_public_names_are_few_and_explained():
    assert len(hf_minitron.__all__) <= 20
    for name in hf_minitron.__all__:
        assert getattr(hf_minitron, name).__doc__, name
        assert name in README, name


def test_type_checkers_see_every_public_name():
    """As they read the package: names imported for them alone, and a list of strings."""
    (block,) = (node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    seen = {name: module.removeprefix("hf_minitron.") for module, name in imports(block)}
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    assert seen == hf_minitron._HOME
    assert sorted(seen) == sorted(hf_minitron.__all__)


def test_the_readme_is_read_in_five_minutes():
    shown = re.sub(r"<details.*?</details>|```.*?```|<!--.*?-->", "", README, flags=re.DOTALL)
    assert len(re.findall(r"\w[\w'-]*", shown)) < 1_700


def test_the_readme_tree_is_the_real_one():
    (tree,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    listed = []
    for line in tree.splitlines():
        path = line.split()[0]
        listed.append(f"hf_minitron/{path}" if line.startswith("  ") else path)
    assert not [path for path in listed if not (ROOT / path).exists()]
    real = {path.relative_to(ROOT).as_posix() + ("/" if path.is_dir() else "") for path in PACKAGE.iterdir()}
    real = {path for path in real if not path.endswith(("__pycache__/", "__init__.py", "py.typed"))}
    assert real <= set(listed), real - set(listed)


def test_a_process_of_the_suite_has_one_thread():
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.stem)
def test_an_assertion_claims_one_thing(path):
    """So that a failure says which."""
    both = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.BoolOp) and isinstance(node.test.op, ast.And)
    ]
    assert not both, f"{path.name}: `assert a and b` in lines {both}; write two"


def test_whatever_is_no_python_is_in_the_wheel():
    patterns = json.loads(re.search(r"^hf_minitron = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1])
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    other = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert other <= packed, other - packed


# Private names of other libraries


def private(name):
    return name.startswith("_") and not name.startswith("__")


def of_this_file(tree):
    """Names that a module defines or sets itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def used(tree):
    """Private names that a module reads or sets on anything, imports, or names in getattr and its like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not node.module.startswith("hf_minitron"):
            yield from (*node.module.split("."), *(alias.name for alias in node.names))
        elif isinstance(node, ast.Import):
            yield from (part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            yield from (argument.value for argument in node.args if isinstance(getattr(argument, "value", None), str))


def overridden(path):
    """Private names of other libraries' classes that a class of ours defines anew."""
    module = importlib.import_module(f"hf_minitron.{name_of(path)}")
    for kind in vars(module).values():
        if isinstance(kind, type) and kind.__module__ == module.__name__:
            bases = [
                base for base in kind.__mro__[1:] if base.__module__.split(".")[0] not in ("hf_minitron", "builtins", "abc")
            ]
            defined = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            defined |= {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
            yield from (name for name in vars(kind) if name in defined and any(name in vars(base) for base in bases))


def test_private_names_of_others_are_listed_with_a_test():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Private names of other libraries")[1].split("\n## ")[0]
    listed, source = set(), "".join(path.read_text() for path in MODULES)
    for row in re.findall(r"^\| (`.*)$", section, re.MULTILINE):
        names, _, tests = row.strip("| ").split(" | ")
        names = [name.rpartition(".")[2] for name in re.findall("`(.*?)`", names)]
        listed |= {name for name in names if private(name)}
        assert [name for name in names if not re.search(rf"\b{name}\b", source)] == [], "listed, but not used"
        (test,) = re.findall("`(.*?)`", tests)
        assert (ROOT / "tests" / test).is_file(), test
    found = set()
    for path in (path for path in MODULES if path.name not in ("__init__.py", "__main__.py")):
        tree = ast.parse(path.read_text())
        names = set(used(tree)) - set(of_this_file(tree)) | set(overridden(path))
        found |= {name for name in names if private(name)}
    assert sorted(found - listed) == [], "list them in CONTRIBUTING.md, or use a public way"
    assert sorted(listed - found) == [], "listed, but no longer used"
