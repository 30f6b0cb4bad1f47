"""Pushing a finished folder to the Hub with the real client, so that a reader sees all of a model or nothing of it.

The whole folder is one commit. `HfApi.upload_folder` makes several of a large folder where Xet is installed, and a reader could
meet a card and a config without weights; `HfApi.create_commit` makes one. Both send a blob that has arrived only once, so a
push that was cut off goes on where it was.
"""

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelInfo, get_token
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects, validate_repo_id

from hf_minitron.distillation.training_card import TAGS
from hf_minitron.errors import TOKEN
from hf_minitron.export.layouts import GGUF_TYPES, MLX
from hf_minitron.hub.retry import retry, scrub, status_of
from hf_minitron.tables import markdown_table

REQUIRED = ("README.md", "config.json", "report.json", "plan.json", "recipe.yaml")
INDEX = "model.safetensors.index.json"
# The Hub's hard limits (https://huggingface.co/docs/hub/storage-limits, section "Explanations")
MAX_FILE_BYTES, MAX_FILES_PER_FOLDER = 500 * 10**9, 10_000
BINARY = (".safetensors", ".bin", ".gguf", ".png", ".jpg", ".parquet", ".model")
SLUG = re.compile(r"[\w.-]+/[\w.-]+-[0-9a-f]{24}")  # a collection: its owner, its title and its id
WEIGHTS = ("config.json", "*.safetensors", "*.bin", "*.gguf")  # one of these makes a repository one that holds a model
RESULTS = ".eval_results/"  # of the old model, which the new one has not reached
# What a loader reads: of what a repository held before, none of it may stay beside the new model.
EXPORTS = tuple(f"*-{kind}.gguf" for kind in GGUF_TYPES)
LOADED = ("*.safetensors", *EXPORTS, "*.bin", "*.json", "*.py", "*.model", "*.jinja", "merges.txt", "vocab.txt")


@dataclass(frozen=True)
class Target:
    """Where a model is pushed to, and how.

    Args:
        repo_id (`str`): `owner/name`.
        private (`bool`, *optional*, defaults to `True`): Visibility of what does not exist yet: repository, collection.
        revision (`str`, *optional*): A branch, made from main when it is missing; main when left out.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead of changing main.
        collection (`str`, *optional*): Slug of a collection, or the title of one of the owner's, made when it is missing.
        overwrite (`bool`, *optional*, defaults to `False`): Replace a model of other provenance.

    Raises:
        ValueError: for a `repo_id` that is none, and for options that do not go together.
    """

    repo_id: str
    private: bool = True
    revision: str | None = None
    create_pr: bool = False
    collection: str | None = None
    overwrite: bool = False

    def __post_init__(self):
        if self.repo_id.count("/") != 1:
            raise ValueError(f"repo_id: {self.repo_id!r} is not owner/name")
        validate_repo_id(self.repo_id)
        if self.create_pr and self.revision is not None:
            raise ValueError(f"revision: {self.revision!r} and create_pr: true: a pull request goes to main; leave one out")
        if self.create_pr and self.collection is not None:
            raise ValueError("collection and create_pr: true: there may be no model to show yet; add it once it is merged")


def files_to_push(folder: Path) -> dict[str, int]:
    """Return what a push of a folder uploads, after all checks that need no network.

    Args:
        folder (`Path`): What the publish stage has written.

    Returns:
        `dict[str, int]`: Name of every file to its size in bytes.

    Raises:
        ValueError: when card, report, plan, recipe, config or weights are missing, when the Hub would not take a file, when one
            is a link, when a text holds an access token.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    names = list(filter_repo_objects(names, ignore_patterns=DEFAULT_IGNORE_PATTERNS))
    if links := [name for name in names if (folder / name).is_symlink()]:
        raise ValueError(f"{folder / links[0]} is a link, and what it leads to would be published: put a copy in its place")
    missing = [name for name in REQUIRED if name not in names]
    if INDEX in names:
        shards = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        missing += sorted(shards - set(names))
    elif not any("/" not in name for name in fnmatch.filter(names, "*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; run the publish stage again before pushing")
    sizes = {name: (folder / name).stat().st_size for name in names}
    for name, size in sizes.items():
        if size > MAX_FILE_BYTES:
            raise ValueError(f"{name} has {size:,} bytes, and the Hub takes {MAX_FILE_BYTES:,} in a file: save it in smaller "
                             "shards (max_shard_size of save_pretrained)")  # fmt: skip
    parents = [name.rpartition("/")[0] for name in names]
    for parent in set(parents):
        if (count := parents.count(parent)) > MAX_FILES_PER_FOLDER:
            raise ValueError(f"{folder / parent} holds {count:,} files; the Hub takes {MAX_FILES_PER_FOLDER:,} in a folder")
    check_no_token({name: folder / name for name in names})
    return sizes


def check_no_token(files: Mapping[str, Path]) -> None:
    """Refuse an access token or a private key in any text among some files.

    Raises:
        ValueError: naming the file; the token is not shown.
    """
    for name, path in files.items():
        if path.suffix not in BINARY and TOKEN.search(path.read_text(encoding="utf-8", errors="replace")):
            raise ValueError(f"{name} holds an access token (hf_... or another's), which everybody could read: take it out of "
                             "it and of what it was made from, renew it, and use `hf auth login` or HF_TOKEN")  # fmt: skip


def preview(folder: Path, target: Target) -> str:
    """Say what `push` would upload where: a table of files and bytes; nothing is sent.

    Raises:
        ValueError: as `files_to_push`.
    """
    sizes = files_to_push(folder)
    rows = [["file", "bytes"], *([name, f"{size:,}"] for name, size in sizes.items())]
    rows.append([f"{len(sizes)} files", f"{sum(sizes.values()):,}"])
    place = "a pull request to" if target.create_pr else f"{target.revision or 'main'} of"
    return f"{markdown_table(rows)}\nWould go in one commit to {place} {target.repo_id} ({folder}). Nothing was sent."


def push(folder: Path, target: Target) -> str:
    """Upload a publishable folder in one commit and return its address.

    Starting it again after an interruption is safe: blobs that arrived are not sent again, and an unchanged model makes no
    commit. What a loader would read of a model that was there before is deleted in the same commit.

    Args:
        folder (`Path`): What the publish stage has written.
        target (`Target`): Where to.

    Returns:
        `str`: Address of the repository, of its branch or of the pull request.

    Raises:
        ValueError: as `files_to_push`; without login or permission; when the repository holds a model that hf_minitron did not
            make, or made from another base model, unless `overwrite` is set.
        OSError: when the Hub cannot be reached, or fails, or asks for patience longer than is waited for.
    """
    files, api = files_to_push(folder), client()
    commit = retry(lambda: _commit(api, folder, files, target), target.repo_id)
    seen = retry(lambda: api.model_info(target.repo_id, revision=commit.pr_revision or commit.oid), target.repo_id)
    if missing := files.keys() - {file.rfilename for file in seen.siblings}:
        raise OSError(f"{target.repo_id} did not take {', '.join(sorted(missing))}: is there a .gitignore in the repository? "
                      "Do not use what is there now; delete the .gitignore and push again")  # fmt: skip
    address = commit.pr_url or f"{api.endpoint}/{target.repo_id}" + (f"/tree/{target.revision}" if target.revision else "")
    if target.collection is not None:
        retry(lambda: _collect(api, target), target.repo_id, f"The model is at {address}, but not in {target.collection!r}. ")
    return address


def client() -> HfApi:
    """Return the Hub's client; refuse to begin without a token.

    Raises:
        ValueError: when nobody is logged in.
    """
    if get_token() is None:
        raise ValueError("Not logged in to the Hub: run `hf auth login`, or set HF_TOKEN, with a token that may write "
                         "(https://huggingface.co/settings/tokens)")  # fmt: skip
    return HfApi(library_name="hf_minitron")


def _commit(api: HfApi, folder: Path, files: Mapping[str, int], target: Target) -> CommitInfo:
    """Find or make the place, check what it holds, and commit; harmless to repeat, for it looks at the repository first."""
    try:
        held = api.model_info(target.repo_id)
    except RepositoryNotFoundError:
        api.create_repo(target.repo_id, private=target.private, exist_ok=True)
        held = api.model_info(target.repo_id)
    branch = None
    if target.revision is not None:
        try:
            held = api.model_info(target.repo_id, revision=target.revision)
        except RevisionNotFoundError:
            branch = target.revision
    if not target.overwrite:
        _check_provenance(held, ModelCard.load(folder / "README.md").data, target.repo_id)
    if branch is not None:
        api.create_branch(target.repo_id, branch=branch, revision=held.sha, exist_ok=True)
    old = [file.rfilename for file in held.siblings if file.rfilename not in files]
    gone = [name for name in old if name.startswith((RESULTS, f"{MLX}/")) or ("/" not in name and _matches_any(name, LOADED))]
    operations = [CommitOperationDelete(name) for name in gone]
    operations += [CommitOperationAdd(name, folder / name) for name in files]
    try:
        return api.create_commit(
            target.repo_id, operations, commit_message="Upload a model compressed with hf_minitron",
            revision=target.revision, create_pr=target.create_pr, parent_commit=held.sha,
        )  # fmt: skip
    except HTTPError as error:
        if target.create_pr and (status_of(error) or 500) in (500, 502, 504):
            # its answer may be lost, and a second request would be a second pull request
            raise OSError(f"{scrub(error)}\nLook at {api.endpoint}/{target.repo_id}/discussions whether the pull request is "
                          "there before you push again; what has arrived is not sent again") from None  # fmt: skip
        raise


def _check_provenance(held: ModelInfo, card, repo_id: str) -> None:
    """Refuse to replace a model that we did not make from the same base model."""
    if not any(_matches_any(file.rfilename, WEIGHTS) for file in held.siblings):
        return
    tags = (held.card_data and held.card_data.tags) or []
    theirs, ours = _names(held.card_data and held.card_data.base_model), _names(card.base_model)
    if TAGS[0] in tags and theirs == ours:
        return
    what = f"made from {theirs}, and this one is made from {ours}" if TAGS[0] in tags else "that hf_minitron did not make"
    raise ValueError(f"{repo_id} holds a model {what}. Push to another repo_id or revision, or overwrite it")


def _collect(api: HfApi, target: Target) -> None:
    """Put the model into the collection."""
    slug, owner = target.collection, target.repo_id.split("/")[0]
    if not SLUG.fullmatch(slug):
        slugs = [c.slug for c in api.list_collections(owner=owner) if c.title == target.collection]
        slug = slugs[0] if slugs else api.create_collection(slug, namespace=owner, private=target.private, exists_ok=True).slug
    api.add_collection_item(slug, target.repo_id, "model", exists_ok=True)


def _names(base_model: str | list[str] | None) -> str:
    return " and ".join([base_model] if isinstance(base_model, str) else base_model or ["an unknown model"])


def _matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
