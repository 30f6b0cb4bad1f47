"""What `make demo` has made: .ci/run runs it to its end, then these tests on its folder. Needs nothing but that folder."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file

from hf_minitron import Report
from hf_minitron.evaluation.wording import quality_rows
from hf_minitron.tables import markdown_table

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "runs/smollm2-135m-width"
MODEL = RUN / "publish/model"
pytestmark = pytest.mark.demo

LOADED = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("Return a new list that", return_tensors="pt").input_ids
written = model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
print(json.dumps({"ours": "hf_minitron" in sys.modules, "parameters": model.num_parameters(), "wrong": [
    *info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]], "text": tokenizer.decode(written[0])}))
"""


@pytest.fixture(scope="module")
def report():
    return Report.load(RUN / "evaluate/report.json")


def test_three_models_are_measured(report):
    assert list(report.models) == ["teacher", "pruned", "distilled"]
    assert report.models["teacher"]["parameters"] == 134_515_008
    assert report.models["distilled"]["parameters"] == report.models["pruned"]["parameters"] < 105e6


def test_the_student_has_learnt(report):
    """By far more than chance, on text that nobody trained on."""
    found = {(c.task, c.metric): c for c in report.against("pruned", "distilled")}
    learnt = found["held-out text", "perplexity"]
    teacher, pruned, distilled = (report.value(name, "perplexity") for name in report.models)
    assert learnt.p < 0.001
    assert teacher < distilled < 0.85 * pruned


def test_plain_transformers_loads_the_student(report):
    """In a fresh process that does not have hf_minitron."""
    done = subprocess.run([sys.executable, "-c", LOADED, str(MODEL)], cwd=MODEL, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ours"] is False
    assert found["parameters"] == report.models["distilled"]["parameters"]
    assert found["wrong"] == []
    assert found["text"].startswith("Return a new list that ")


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_its_weights_can_be_quantized(kind):
    """llama.cpp's formats store 32 weights of a row together; its own Python package packs them."""
    kind, sizes = getattr(GGMLQuantizationType, kind), []
    for name, tensor in load_file(MODEL / "model.safetensors").items():
        if tensor.dim() == 2:
            weights = tensor[:64].float().numpy()
            packed = quantize(weights, kind)
            sizes.append(packed.nbytes / weights.nbytes)
            assert abs(dequantize(packed, kind) - weights).max() <= abs(weights).max() / 7, name
    assert len(sizes) == 30 * 7 + 1
    assert max(sizes) < 0.3


def test_the_card_is_made_of_the_report(report):
    card = (MODEL / "README.md").read_text()
    size = f"{report.models['distilled']['parameters'] / 1e6:.1f} M parameters"
    assert f"{size}, pruned from" in card
    assert re.search(rf"\| \*\*Size\*\* \| {size}, .* MB in bfloat16 \|", card)
    row, again = (line for line in card.splitlines() if line.startswith("| perplexity ") and "(" in line)  # above, and folded
    assert again.split("|")[2:5] == row.split("|")[2:5]
    shown = [float(cell.split("(")[0]) for cell in row.split("|")[2:5]]
    assert shown == pytest.approx([report.value(name, "perplexity") for name in report.models], rel=0.02)
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert metadata["license"] == "apache-2.0"
    assert str(Path.home()) not in card
    assert (RUN / "report.html").stat().st_size > 10_000


def test_the_time_that_was_promised_is_kept():
    """Not on a busy machine, so it is said and not asserted, but for what must never be: an hour for ten minutes."""
    seconds = sum(json.loads(path.read_text())["seconds"] for path in RUN.glob("*/done.json"))
    recipe = yaml.safe_load((RUN / "recipe.yaml").read_text())
    print(f"\n{seconds / 60:.1f} minutes for {recipe['minutes']} promised ({seconds / 60 / recipe['minutes']:.2f} times)")
    assert seconds / 60 < 6 * recipe["minutes"]


def outline(page):
    """Return the headings of a page and of its tables: what does not depend on the machine."""
    lines = page.splitlines()
    tables = [re.sub(" +", " ", line) for line, rule in zip(lines, lines[1:], strict=False) if re.match(r"\| *-", rule)]
    return [line for line in lines if line.startswith("#")] + tables


def test_the_readme_comes_from_this_code(report):
    block = (ROOT / "README.md").read_text().split("<!-- demo:begin -->")[1].split("<!-- demo:end -->")[0]
    names, sizes, *metrics = zip(*quality_rows(report), strict=True)  # the README's table has a row for each
    assert outline(markdown_table([names, sizes]))[0] in outline(block)
    assert " | ".join(sizes) in re.sub(" +", " ", block)
    assert [row[0] for row in metrics if f"| {row[0]} " not in block] == []


def test_the_kept_card_comes_from_this_code():
    kept = (ROOT / "model_cards/smollm2-135m-width/README.md").read_text()
    assert outline(kept) == outline((MODEL / "README.md").read_text())
