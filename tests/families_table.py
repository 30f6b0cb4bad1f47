"""Writes the tables of docs/families.md: `python tests/families_table.py`. The tests compare the page with what it gives."""

import re
import sys
from pathlib import Path

import tiny
import tiny_vision
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.family import FAMILIES
from hf_minitron.architecture.nonuniform import sizes_in_lists
from hf_minitron.architecture.refused import MISSING
from hf_minitron.head import check_head
from hf_minitron.shape import CUTTABLE

# What a class needs whose default config it refuses itself.
WITHOUT = dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0)
NEEDED = {"gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **WITHOUT}}}
PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"


def works(model_type):
    """Whether a type of Transformers' mapping, or the one that its class belongs to, has a table."""
    return CONFIG_MAPPING[model_type].model_type in {*FAMILIES, *tiny_vision.SETTINGS}


def has_one_matrix(architecture):
    """Whether a model's head is one matrix, as distillation and perplexity need it."""
    try:
        check_head(architecture.config)
    except ValueError:
        return False
    return True


def working(inexact, corrected):
    """Return the table of the types that can be pruned.

    Args:
        inexact: Model type and axis to the measured error of a cut, relative to the largest logit.
        corrected: What is left of it once norms are corrected, of some.
    """
    rows = ["| model type | axes | inexact cuts | distilled | nonuniform | rotation |", "|" + " --- |" * 6]
    for model_type in sorted(FAMILIES):
        architecture = Architecture.of(tiny.config(model_type))
        family, sizes = architecture.family, architecture.shape.sizes
        others = {**family.fixed, **architecture.shape.coupled, "vocab": "every model type has it"}
        axes = [axis for axis in CUTTABLE if sizes.get(axis, 1) > 1 and axis not in others]
        axes += [f"{axis} (with {leader})" for axis, leader in architecture.shape.coupled.items()]
        leaders = {axis: architecture.shape.coupled.get(axis, axis) for axis in family.inexact}
        left = {axis: f", {corrected[model_type, axis]:.2f} corrected" for axis in leaders if (model_type, axis) in corrected}
        errors = {axis: f"{inexact[model_type, leader]:.2f}{left.get(axis, '')}" for axis, leader in leaders.items()}
        said = [f"{axis}: {why} ({errors[axis]})" for axis, why in family.inexact.items()]
        said += [f"{axis} where {key}: {why}" for axis, (key, why) in family.inexact_if.items()]
        differ = ", ".join(sizes_in_lists(architecture.config, family.config_keys)) or "yes"
        ticks = [architecture.not_nonuniform or differ, "yes" if architecture.supports("rotation") else ""]
        taught = "yes" if has_one_matrix(architecture) else ""
        rows.append(f"| {' | '.join([model_type, ', '.join(axes), '; '.join(said), taught, *ticks])} |")
    return "\n".join(rows)


def refusals():
    """Return the other types of the mapping, with what is said of each."""
    found = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if not works(model_type):
            try:
                config = tiny.config(model_type)
            except Exception:  # its class refuses these sizes
                config = CONFIG_MAPPING[model_type](**NEEDED.get(model_type, {}))
            try:
                Architecture.of(config)
            except ValueError as error:
                found[model_type] = str(error)
    return found


def refused():
    """Return the list of the other types of the mapping, by what they are."""
    kinds, reasons = {"encoder-decoders": [], "models of more than text": []}, []
    for model_type, why in sorted(refusals().items()):
        if model_type in MISSING:
            reasons.append(f"- {model_type}: {MISSING[model_type]}")
        else:
            kinds["encoder-decoders" if "an encoder and a decoder" in why else "models of more than text"].append(model_type)
    return "\n".join([*(f"- {kind}: {', '.join(types)}" for kind, types in kinds.items()), *reasons])


def part(page, name):
    """Return the text between a page's two marks of a name."""
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", page, flags=re.DOTALL)[1]


if __name__ == "__main__":
    sys.path.insert(0, str(PAGE.parent.parent))
    from test_families import CORRECTED, INEXACT

    page = PAGE.read_text()
    for name, text in (("working", working(INEXACT, CORRECTED)), ("refused", refused())):
        page = page.replace(f"<!-- {name} -->\n{part(page, name)}\n", f"<!-- {name} -->\n{text}\n")
    PAGE.write_text(page)
