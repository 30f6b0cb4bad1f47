"""What guards a run: files that count, inputs looked at before any slow step, faults that are told in one line."""

import yaml

from hf_minitron.evaluation.task_files import task_files

TASK = {
    "dataset_path": "json",
    "doc_to_text": "{{context}}",
    "output_type": "loglikelihood",
    "test_split": "test",
}


def write_task(folder, name="own", **changes):
    """Write a task of one's own, with everything that a task can be made of."""
    folder.mkdir(exist_ok=True)
    (folder / "data [1].jsonl").write_text('{"context": "w1", "word": "w2"}\n')
    (folder / "base.yaml").write_text(
        yaml.safe_dump(TASK | {"dataset_kwargs": {"data_files": {"test": str(folder / "data [1].jsonl")}}})
    )
    (folder / "words.py").write_text("import more\n\ndef process(docs):\n    return docs\n")
    (folder / "more.py").write_text("X = 1\n")
    text = yaml.safe_dump({"include": "base.yaml", "task": name, "doc_to_target": " {{word}}", **changes})
    (folder / f"{name}.yaml").write_text(text + "process_docs: !function words.process\n")
    return folder / f"{name}.yaml"


def test_a_task_is_its_files_and_nothing_that_lies_beside_them(tmp_path):
    path = write_task(tmp_path / "tasks")
    (tmp_path / "tasks/group.yaml").write_text(yaml.safe_dump({"group": "every", "task": ["own"]}))
    (tmp_path / "tasks/other.txt").write_text("not the task's")
    names = {"own.yaml", "base.yaml", "words.py", "more.py", "data [1].jsonl"}
    section = {"include_path": str(tmp_path / "tasks")}
    assert set(task_files(["own"], section)) == names
    assert set(task_files([str(path)], {})) == names
    assert set(task_files(["every"], section)) == names | {"group.yaml"}
    assert task_files(["piqa", "none", 7], section) == task_files("own", section) == task_files(["own"], {}) == {}
