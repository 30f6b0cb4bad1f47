"""The card from facts, and pushing with the real client to a server on 127.0.0.1."""

import base64
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml

from hf_minitron.evaluation.report import Report
from hf_minitron.evaluation.significance import compare_paired
from hf_minitron.hub.card import comparison_rows, markdown_table, measured, write_card
from hf_minitron.hub.publish import push
from hf_minitron.shape import Shape


def report():
    def model(parameters, value):
        acc = {"value": 0.25, "stderr": 0.05, "samples": 80}
        return {"parameters": parameters, "perplexity": {"value": value, "stderr": 0.34}, "tasks": {"task": {"acc": acc}}}

    models = {"teacher": model(2_000_000, 11.0), "pruned": model(1_500_000, 57.0), "distilled": model(1_500_000, 16.0)}
    case = {"batch_size": 1, "prompt": 128, "prefill": {"value": 900.0}, "decode": {"value": 20.0}}
    speed = {name: [case] for name in ("teacher", "distilled")}
    return Report(models, {"sha256": "ab" * 32, "tokens": 4096, "blocks": 8}, speed)


def card(measured=None, **facts):
    history = [{"loss": 2.0, "step": 1}, {"loss": 1.0, "step": 9}, {"train_runtime": 60.0, "step": 9}]
    before = Shape(tiny.SIZES)
    known = {"name": "me/small", "base_model": "owner/big", "pictures": {"loss": "loss.png"}} | facts
    log = {"tokens": 1234, "history": history}
    return write_card(
        measured or report(), before, before.cut_to({"ffn": 8}), {"seed": 5}, "hf-minitron run r.yaml", log, known
    )


def test_the_card_holds_the_facts():
    text = str(card(license="apache-2.0"))
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["base_model"] == "owner/big" and metadata["base_model_relation"] == "finetune"
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert metadata["license"] == "apache-2.0" and "knowledge-distillation" in metadata["tags"]
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.25
    for fact in ("16.00 ± 0.34", "57.00 ± 0.34", "0.250 ± 0.050", "| ffn | 72 | **8** |", "1,234 tokens in 9 steps", "seed: 5",
                 "hf-minitron run r.yaml", "](loss.png)", "2407.14679"):  # fmt: skip
        assert fact in text, fact
    assert "shapes.png" not in text


def test_the_card_says_what_is_better_and_what_cannot_be_told():
    assert "95 % interval" not in str(card()) and "Bits per byte" not in str(card())
    values = np.stack([np.arange(60) % 2, np.ones(60)], axis=1)
    worse, same = compare_paired(values * [0, 1], values), compare_paired(values, np.roll(values, 2, axis=0))
    heading = {"model": "distilled", "baseline": "teacher", "task": "task"}
    comparisons = [
        heading | asdict(found) | {"metric": name, "difference": found.difference}
        | {"sentence": found.sentence("distilled", "teacher", name)}
        for name, found in (("acc", worse), ("f1", same))
    ]  # fmt: skip
    found = replace(report(), comparisons=comparisons, text={**report().text, "bytes": 12345})
    rows = comparison_rows(found)
    assert rows[1][0] == "task acc" and rows[1][1] == "-0.50" and rows[1][3] == "< 0.001" and rows[1][-1] == "worse"
    assert rows[2][1:4] == ["+0.000", "+0.000 to +0.000", "1"] and rows[2][-1] == "not distinguishable"
    text = str(card(found))
    assert all(c["sentence"] in text for c in comparisons) and "12,345 bytes" in text and "| worse |" in text.replace("  ", "")


def test_a_licence_is_never_guessed():
    assert "license" not in yaml.safe_load(str(card()).split("---")[1])


@pytest.mark.parametrize(
    ("value", "stderr", "text"), [(16.68, 1.13, "16.7 ± 1.1"), (0.2266, 0.0242, "0.227 ± 0.024"), (891.2, 181, "891 ± 181")]
)
def test_values_are_written_to_the_precision_of_their_error(value, stderr, text):
    assert measured({"value": value, "stderr": stderr}) == text


def test_tables_are_aligned():
    assert markdown_table([["a", "bb"], ["ccc", "1"]]).splitlines() == ["| a   | bb |", "| --- | -: |", "| ccc |  1 |"]


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as creating a repository and committing to it needs."""

    def log_message(self, *args):
        pass

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        host = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer({"url": f"{host}/me/small"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            self.answer({"files": [{"path": f["path"], "uploadMode": mode[f["path"].endswith(".safetensors")],
                                    "shouldIgnore": False} for f in files]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{**o, "actions": {"upload": {"href": f"{host}/lfs/{o['oid']}", "header": {}}}} for o in objects]
            self.answer({"transfer": "basic", "objects": actions})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[line["value"]["path"]] = self.server.objects[line["value"]["oid"]]
            self.answer(
                {"commitUrl": f"{host}/me/small/commit/1", "commitOid": "1", "commitMessage": "", "pullRequestUrl": None}
            )
        else:
            self.answer({}, 200)

    def do_PUT(self):
        self.server.objects[self.path.rsplit("/", 1)[1]] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer({})

    def do_GET(self):
        self.answer({"id": "me/small", "sha": "0" * 40, "siblings": []})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.files, server.objects = None, {}, {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def folder(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    for name in ("README.md", "report.json", "plan.json", "recipe.yaml"):
        (tmp_path / name).write_text(f"{name}\n")
    return tmp_path


@pytest.mark.parametrize("private", [True, False])
def test_push_is_private_unless_told_and_complete(hub, folder, private):
    token = "hf_averysecrettoken"
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": token,
                   "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}  # fmt: skip
    code = f"from hf_minitron.hub.publish import push; from pathlib import Path; print(push(Path({str(folder)!r}), 'me/small'"
    code += ")" if private else ", private=False)"
    done = subprocess.run([sys.executable, "-c", code + ")"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # the Hub's visibility is a string or a flag, depending on the client's version
    assert (hub.created.get("private", hub.created.get("visibility") == "private")) is private
    expected = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert {name: content for name, content in hub.files.items() if name != ".gitattributes"} == expected
    assert token not in done.stdout + done.stderr and not any(token.encode() in content for content in hub.files.values())


def test_an_incomplete_folder_is_not_pushed(folder):
    (folder / "report.json").unlink()
    for path in Path(folder).glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match=r"lacks report.json, \*.safetensors"):
        push(folder, "me/small")
