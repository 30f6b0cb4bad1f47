"""model_cards/: every card is what the code makes of the facts beside it."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hf_minitron import Report
from hf_minitron.stages.publish import render

CARDS = sorted(path for path in (Path(__file__).resolve().parent.parent / "model_cards").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_a_card_is_rendered_again_to_the_byte(folder):
    text = (folder / "README.md").read_bytes().decode("utf-8")
    assert str(render(folder)) == text, "if the template has changed: python benchmarks/keep_cards.py --again"
    for picture in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (folder / picture).is_file(), picture


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_its_numbers_are_those_of_its_facts(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "card")
    report, log = Report.load(folder / "report.json"), json.loads((folder / "log.json").read_text())
    old = report.entry("distilled", "perplexity")
    new = replace(old, value=12345.67, stderr=1.23, interval=None)
    replace(report, entries=[new if entry == old else entry for entry in report.entries]).save(tmp_path / "card/report.json")
    (tmp_path / "card/log.json").write_text(json.dumps(log | dict.fromkeys(("tokens", "packed_tokens"), 987_654_321)))
    changed = str(render(tmp_path / "card"))
    assert "12,345.7 ± 1.2" in changed
    assert "987,654,321 tokens in" in changed


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_what_is_not_folded_is_read_in_minutes(folder):
    text = (folder / "README.md").read_text().split("---", 2)[2]
    shown = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL)
    assert len(shown.split()) < 900
    headings = re.findall(r"^## (.*)$", shown, re.MULTILINE)
    assert headings[:4] == ["Use", "Quality", "Intended use and limits", "What was cut"]
    assert headings[4:] == ["Training", "Reproduce", "License", "Citation"]


def test_what_guessing_reaches_is_known_of_tasks_with_choices():
    found = {e.task: e.chance for folder in CARDS for e in Report.load(folder / "report.json").entries if "acc" in e.metric}
    assert found == {"local_arc_easy": 0.25, "local_piqa": 0.5, "local_lambada": None, "stdlib_last_word": None}


def test_there_are_cards_and_they_are_small():
    assert CARDS
    for folder in CARDS:
        assert sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000, folder.name
