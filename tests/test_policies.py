"""What the code promises about itself: import order, sizes, names, the README's tree."""

import ast
import re
from pathlib import Path

import pytest
import torch

import hf_minitron

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_minitron"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = sorted(PACKAGE.rglob("*.py"))
ORDER = """
modeling.layer_schemas modeling.configuration_pruned modeling.modeling_pruned
errors yaml_text
axes shape plan probe architecture.llama architecture.gpt architecture.moe architecture.roles architecture.family
architecture.config architecture.outline architecture.binding architecture.architecture architecture.student
formats texts data vocabulary mixture memory environment head
side_files model_kinds model_files inputs statistics checkpoint tensors saving
pruning.reconstruction pruning.compensate pruning.effects pruning.rotate pruning.prune
pruning.export
pruning.allocate pruning.nonuniform pruning.search importance.moments
importance.activation importance.baselines importance.metrics
importance.routed importance.taps importance.streamed importance.calibrate importance.residuals
distillation.losses.tokens distillation.losses.chunked importance.without importance.removal
distillation.losses.states distillation.batch distillation.checks distillation.stopping distillation.reduction
distillation.signals distillation.losses.output distillation.records distillation.teacher distillation.documents
distillation.states distillation.config distillation.cached distillation.teachers hub.training_card distillation.trainer
distillation.cache distillation.adapters distillation.synthesis
evaluation.metrics.top1_match.top1_match evaluation.metrics.teacher_kl.teacher_kl
evaluation.significance evaluation.report evaluation.wording evaluation.text_metrics evaluation.text
evaluation.task_results evaluation.task_data evaluation.tasks evaluation.task_files evaluation.compare evaluation.speed
hub.card hub.plots hub.page hub.retry hub.publish run stage execute
hub.facts recipe
stages.resuming stages.validation stages.training stages.trained stages.correct stages.synthesize stages.score stages.prune
stages.distill stages.cache stages.evaluate stages.search stages.select stages.publish stages.every chain estimate __main__
""".split()


def name_of(path):
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def test_the_order_is_complete():
    assert sorted(ORDER) == sorted(name_of(path) for path in MODULES if path.name != "__init__.py")


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__init__.py"], ids=name_of)
def test_a_module_imports_only_from_above(path):
    above = ORDER[: ORDER.index(name_of(path))]
    for module, name in imports(ast.parse(path.read_text())):
        if module == "hf_minitron" and name is not None and (name in above or f"{name}" in {m.split(".")[0] for m in above}):
            continue
        if module.startswith("hf_minitron."):
            found = module.removeprefix("hf_minitron.")
            assert found in above or f"{found}.{name}" in above, f"{name_of(path)} imports {module}, which stands below it"


@pytest.mark.parametrize("name", ["axes", "shape", "plan"])
def test_the_vocabulary_needs_torch_numpy_and_the_standard_library_only(name):
    import sys

    allowed = {"torch", "numpy", "safetensors", "hf_minitron", *sys.stdlib_module_names}
    found = {module.split(".")[0] for module, _ in imports(ast.parse((PACKAGE / f"{name}.py").read_text()))}
    assert found <= allowed


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_sizes_and_docstrings(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300 and path.stem not in ("utils", "helpers", "common")
    assert not re.search(r"torch\.load\(|\bpickle\b|trust_remote_code=True", text)
    tree = ast.parse(text)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in [*tree.body, *(member for owner in classes for member in owner.body)]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"


@pytest.mark.parametrize("path", [path for path in MODULES if path != PACKAGE / "probe.py"], ids=name_of)
def test_only_the_probe_puts_hooks_on_modules(path):
    assert not re.search(r"\.register_\w*hook\(|\.forward = |register_module_\w*hook", path.read_text()), path


def test_public_names_are_few_and_explained():
    assert len(hf_minitron.__all__) <= 20
    for name in hf_minitron.__all__:
        assert getattr(hf_minitron, name).__doc__ and name in README, name


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
