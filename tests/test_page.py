"""report.html: the card as one page that fetches nothing, of runs finished and not, as headless Chromium shows it."""

import html
import re
import shutil
import subprocess
import webbrowser

import pytest
from huggingface_hub import ModelCard
from matplotlib import image
from PIL import Image

from hf_minitron.__main__ import main
from hf_minitron.hub.page import write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium")
PICTURES = ("differences.png", "models.png", "shapes.png", "kept.png", "loss.png")  # as they come
MEASURE = """<script>document.title = [document.documentElement.scrollWidth,
  [...document.images].map(image => image.naturalWidth).join(), getComputedStyle(document.body).backgroundColor,
  (window.scrollTo(0, 700), window.scrollY), document.querySelector("aside").getBoundingClientRect().top,
  Math.max(...[...document.querySelectorAll(".wide tr > :first-child")].map(cell => cell.clientHeight)),
  document.querySelector(".wide").scrollWidth - document.querySelector(".wide").clientWidth,
  Math.max(...[...document.querySelectorAll("dd")].map(fact => fact.getBoundingClientRect().right)),
  Math.min(...[...document.querySelectorAll("dd")].map(fact => fact.clientWidth)),
  document.querySelector("aside").clientHeight].join("|")
</script></body>"""


@pytest.fixture(scope="module")
def page(whole):
    return whole / "run/report.html"


def test_the_page_has_what_the_card_has(page, whole):
    text, card = page.read_text(), ModelCard.load(whole / "run/publish/model/README.md").text
    plain = html.unescape(re.sub(r"<[^>]+>", " ", text))
    words = set(re.findall(r"\w+", plain))
    prose = re.sub(r"!\[.*?\]\(.*?\)|\]\(.*?\)|<.*?>|```\w+", " ", card)  # but for names of pictures, addresses and tags
    assert not set(re.findall(r"\w+", prose)) - words
    assert text.count("<table>") == text.count('<div class="wide">') == len(re.findall(r"^\| -", card, re.MULTILINE))
    assert text.count('<img src="data:image/png;base64,') == len(PICTURES) == text.count("<img")


def test_the_summary_has_the_facts_and_leads_to_every_section(page):
    text = page.read_text()
    aside = re.search("<aside>(.*?)</aside>", text)[1]
    assert re.findall("<dt>(.*?)</dt>", aside) == ["Size", "Speed", "Quality kept", "Distillation"]
    anchors = re.findall(r'<h2 id="([^"]+)">', text)
    assert re.findall(r'href="#([^"]+)"', aside) == anchors
    assert len(anchors) == text.count("<h2")


def test_nothing_is_fetched_and_no_script_runs(page):
    text = page.read_text()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    assert not re.search(r"<script|<link|<iframe|@import|url\(|\bon\w+=", text)
    assert all(address.startswith("data:") for address in re.findall(r'\bsrc="([^"]*)', text))


def test_what_a_recipe_holds_cannot_leave_its_place(tmp_path):
    card = ModelCard("---\nmodel_name: a<b>&\n---\n# A\n\n| a |\n| - |\n| `<x>` |\n\n```yaml\nnotes: </code><script>\n```\n")
    write_page(card, tmp_path, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<title>a&lt;b&gt;&amp;</title>" in text
    assert "<code>&lt;x&gt;</code>" in text
    assert "&lt;/code&gt;&lt;script&gt;" in text
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_page_of_a_run_that_is_not_finished_says_so(project, tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    command = ["report", str(project["path"]), "--run", str(tmp_path / "run")]
    assert main(command) == 1
    assert "No run in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    page = tmp_path / "run/report.html"
    for stage, missing, said in (
        ("score", "prune, distill, evaluate, publish", "the run has not been pruned"),
        ("prune", "distill, evaluate, publish", "Not trained yet"),
        ("distill", "evaluate, publish", "Not measured yet"),
        ("evaluate", "publish", "95 % intervals"),
    ):
        assert main([stage, *command[1:]]) == 0
        capsys.readouterr()
        assert main([*command, "--open"]) == 0
        assert capsys.readouterr().out == f"{page}\n"
        assert opened.pop() == page.as_uri()
        text = page.read_text()
        assert "This run is not finished." in text
        assert f"Still to do: {missing}." in text
        assert said in text
        assert "from transformers import" not in text
    assert text.count("<img") == 4
    assert main(["publish", *command[1:]]) == 0
    done = page.read_text()
    page.unlink()
    assert "not finished" not in done
    assert main(command) == 0
    assert page.read_text() == done
    assert main([*command[:2], "--run", str(tmp_path / "run"), "--model", str(tmp_path)]) == 1
    assert "belongs to another run" in capsys.readouterr().err


def shown(page, folder, size, *flags):
    """Return a screenshot of a page."""
    target = folder / "shown.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}/user"]
    command += [f"--screenshot={target}", f"--window-size={size}", *flags, page.as_uri()]
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    return Image.open(target).convert("RGB")


@browser
def test_it_is_readable_in_light_and_dark(page, tmp_path):
    light = shown(page, tmp_path, "900,2400")
    dark = shown(page, tmp_path, "900,2400", "--blink-settings=preferredColorScheme=0")
    for picture, background in ((light, (255, 255, 255)), (dark, (13, 17, 23))):
        assert picture.size == (900, 2400)
        assert picture.getpixel((3, 3)) == background
        count = sum(n for n, color in picture.getcolors(10**6) if color == background)
        assert 0.5 < count / (900 * 2400) < 0.97  # text and pictures are there
        assert any(color == (59, 130, 246) for _, color in picture.getcolors(10**6))  # the bars


@browser
@pytest.mark.parametrize("width", [500, 800, 1100, 1280])  # 500 is the least that a window of Chromium has
def test_nothing_sticks_out_and_all_pictures_are_there(page, tmp_path, width):
    copy = tmp_path / "copy.html"
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page.read_text())[0]
    long = "as the teacher on 2 x AMD EPYC 9654 96-Core Processor,"
    text = page.read_text().replace(policy, "").replace("as the teacher on", long).replace("</body>", MEASURE)
    copy.write_text(text)
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user", "--dump-dom",
               f"--window-size={width},900", copy.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found, pictures, background, scrolled, top, tallest, hidden, right, narrowest, height = re.search(
        r"<title>([^<]*)</title>", done.stdout
    )[1].split("|")
    assert int(found) <= width
    assert int(hidden) == 0, "the box of facts is shown whole"
    assert float(right) <= width, "every fact is in the summary"
    assert int(narrowest) >= 60
    assert width >= 1200 or int(height) < 110, "and the summary leaves room for the rest"
    assert (float(scrolled), float(top)) == (700, 0), "the summary stays in view"
    assert float(tallest) < 120, "no column is so narrow that its words stand letter by letter"
    assert background == "rgb(255, 255, 255)"
    widths = [image.imread(page.parent / "publish/model" / name).shape[1] for name in PICTURES]
    assert pictures == ",".join(map(str, widths))
