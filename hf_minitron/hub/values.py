"""Pushing what was measured or chosen, rather than a model: statistics, a report, a plan.

It stands here and not in a method of each, since they know nothing of the Hub.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub.utils import validate_repo_id

from hf_minitron.evaluation.report import Report
from hf_minitron.hub.facts import public
from hf_minitron.hub.publish import check_no_token, client
from hf_minitron.hub.retry import retry
from hf_minitron.plan import Plan
from hf_minitron.statistics import Statistics

# What a value that saves itself as one file is called.
FILES = {Report: "report.json", Plan: "plan.json"}


def push_to_hub(value: Statistics | Report | Plan, repo_id: str, private: bool = True, revision: str | None = None) -> str:
    """Upload statistics, a report or a plan to a dataset repository, as its `save` writes it; return its address.

    `load` reads it again from what `huggingface_hub.snapshot_download(repo_id, repo_type="dataset")` fetches. Paths of this
    machine are shortened.

    Args:
        value (`Statistics`, `Report` or `Plan`): What was measured, or what is kept.
        repo_id (`str`): `owner/name`; made when it is missing.
        private (`bool`, *optional*, defaults to `True`): Visibility of a repository that is made.
        revision (`str`, *optional*): A branch that exists; main when left out.

    Raises:
        ValueError: for any other value, without login or permission, and for an access token in a text.
        OSError: when the Hub cannot be reached, or fails.

    Example:

    ```python
    >>> push_to_hub(statistics, "me/smollm2-statistics")  # doctest: +SKIP
    'https://huggingface.co/datasets/me/smollm2-statistics'
    ```
    """
    if not isinstance(value, Statistics | Report | Plan):
        raise ValueError(f"push_to_hub: {type(value).__name__} is none of Statistics, Report and Plan; models push themselves")
    validate_repo_id(repo_id)
    api = client()
    if isinstance(value, Statistics):
        value = replace(value, text=public(value.text), provenance=public(value.provenance))
    elif isinstance(value, Report):
        value = replace(value, models=public(value.models))
    with TemporaryDirectory() as name:
        folder = Path(name)
        value.save(folder / FILES.get(type(value), ""))
        check_no_token({path.name: path for path in folder.rglob("*") if path.is_file()})
        retry(lambda: api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True), repo_id)
        retry(
            lambda: api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                repo_type="dataset",
                revision=revision,
                commit_message=f"Upload a {type(value).__name__} of hf_minitron",
            ),
            repo_id,
        )
    return f"{api.endpoint}/datasets/{repo_id}" + (f"/tree/{revision}" if revision else "")
