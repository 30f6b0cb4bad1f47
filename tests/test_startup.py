"""What the command imports before it answers, and what its help lists without importing anything."""

import json
import subprocess
import sys

import keys_table
import pytest
import transformers
import yaml

from hf_minitron.__main__ import main

# Seconds of processor time each, or what brings them along.
SLOW = {"torch", "transformers", "numpy", "scipy", "matplotlib", "peft", "datasets", "accelerate", "pandas", "lm_eval"}
IMPORTED = """
import sys
from hf_minitron.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as exit:
    code = exit.code
print("imported", code, *sys.modules)
"""


def imported(*argv):
    """Exit code of a command in a process of its own, and the modules it imported."""
    found = subprocess.run([sys.executable, "-c", IMPORTED, *map(str, argv)], capture_output=True, text=True)
    assert found.stdout, found.stderr
    _, code, *modules = found.stdout.splitlines()[-1].split()
    return int(code), set(modules), found.stderr


@pytest.mark.parametrize(
    ("argv", "expected", "message"),
    [
        (["--help"], 0, ""),
        ([], 0, ""),
        (["--version"], 0, ""),
        (["distill", "--help"], 0, ""),
        (["plna", "recipe.yaml"], 1, "'plna' is not a verb; did you mean 'plan'?"),
        (["run", "{recipe}", "--score.tokns", "9"], 1, "Unknown key 'tokns' in score; did you mean 'tokens'?"),
        (["run", "{recipe}", "--distill.learning_rat", "1"], 1, "did you mean 'learning_rate'?"),
        (["plan", "nowhere.yaml"], 1, "nowhere.yaml"),
        (["run", "{recipe}", "--dryrun"], 1, "--dryrun is not an option of run; did you mean --dry-run?"),
        (["init", "owner/model", "--keeps", "50%"], 1, "--keeps is not an option of init; did you mean --keep?"),
    ],
)
def test_help_and_typos_are_answered_before_any_library_is_imported(project, argv, expected, message):
    code, modules, error = imported(*(word.format(recipe=project["path"]) for word in argv))
    assert code == expected
    assert message in error
    assert not modules & SLOW
    assert len(modules) < 300


def test_a_reader_that_leaves_early_is_no_error(project, monkeypatch, capfd):
    def write(args, overrides):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("hf_minitron.planning.plan_text.main", write)
    assert main(["plan", str(project["path"])]) == 1
    assert capfd.readouterr().err == ""


def test_plan_imports_what_a_model_without_weights_needs(project):
    """Nothing but the class of the model, which Transformers cannot build without importing most of torch, and ourselves."""
    code, modules, error = imported("plan", project["path"], "--gpus", "8", "--gpu-memory", "80GB")
    assert code == 0, error
    unneeded = {"peft", "datasets", "pandas", "matplotlib", "lm_eval", "transformers.trainer", "transformers.training_args"}
    assert not modules & unneeded
    least = "import sys; import transformers.models.llama.modeling_llama, transformers.models.auto; print(*sys.modules)"
    needed = subprocess.run([sys.executable, "-c", least], capture_output=True, text=True).stdout.split()
    more = {name for name in modules.difference(needed) if not name.startswith("hf_minitron")}
    assert len(more) <= 20, sorted(more)


def test_nonuniform_models_are_known_whichever_package_is_imported_first():
    code = "; ".join(
        [
            "from transformers import AutoConfig, AutoModelForCausalLM",
            "config = AutoConfig.for_model('minitron_pruned')",
            "from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING as known",
            "print(known[type(config)].__name__)",
        ]
    )
    found = subprocess.run([sys.executable, "-c", f"import hf_minitron; {code}"], capture_output=True, text=True)
    assert found.stdout.strip() == "PrunedForCausalLM", found.stderr


def test_the_help_lists_what_sections_hold():
    written = json.loads(keys_table.FILE.read_text())
    if written["transformers"] != transformers.__version__:
        pytest.skip("written with another version of transformers")
    assert written == json.loads(json.dumps(keys_table.table())), "python tests/keys_table.py"


def test_help_shows_type_default_and_allowed_values(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    said = capsys.readouterr().out
    assert "distill.learning_rate    Peak learning rate (2408.11796, table 4). (a number; default 0.0001)" in said
    assert '(text: no, steps, epoch; default "no")' in said


def test_a_recipe_that_is_no_file_is_told(tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "x", "scor": {}}))
    assert main(["plan", str(path)]) == 1
    assert "Unknown key 'scor' in recipe; did you mean 'score'?" in capsys.readouterr().err
