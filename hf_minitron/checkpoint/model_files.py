"""Where a model lies and which of its files are its weights: a folder, or a repository of the Hub at a revision."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from tqdm.auto import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from hf_minitron.checkpoint.download_bars import NoBar, WeightsBar
from hf_minitron.checkpoint.model_kinds import GGUF, check_config, read_config
from hf_minitron.checkpoint.side_files import SIDE_FILES

# Arguments of `from_pretrained` that say which files are meant; the others say how they are loaded.
WHICH = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")
HOW = (
    "dtype", "torch_dtype", "variant", "attn_implementation", "experts_implementation", "device_map", "max_memory",
    "offload_folder", "low_cpu_mem_usage", "quantization_config", "tp_plan", "key_mapping",
)  # fmt: skip
HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
# Weights that are not read: pattern to what they are and what to do.
OTHER_WEIGHTS = {
    "consolidated*.safetensors": "Mistral's own format; take the repository's weights in Transformers' format",
    "model.*.safetensors": "a variant; name it in teacher_model_init_kwargs: {variant: ...}, or rename it to model.safetensors",
    "*.safetensors": "none of them by a name that Transformers loads; rename the file, or write its index",
    "pytorch_model*.bin": "pickled; load it with from_pretrained(..., use_safetensors=False) and save_pretrained it",
    "*.gguf": GGUF,
    "*.pth": "pickled, in its makers' own format; take the repository in Transformers' format",
}


class HiddenToken(str):
    """An access token that no log, repr, copy or saved file shows."""

    def __repr__(self) -> str:
        return "'<token>'"

    def __reduce__(self):
        return str, ("<token>",)


def with_hidden_token(kwargs: Any) -> Any:
    """Return arguments of `from_pretrained` whose token is used and not shown."""
    if isinstance(kwargs, dict) and isinstance(kwargs.get("token"), str):
        return {**kwargs, "token": HiddenToken(kwargs["token"])}
    return kwargs


@dataclass(frozen=True)
class Weights:
    """The files of a model's weights.

    Args:
        files (`tuple[Path, ...]`): One, or the shards.
        index (`Mapping[str, str]`, *optional*): Of shards: name of a tensor to the file that holds it.
        source (`Path`): What decided: the file itself, or the index.
    """

    files: tuple[Path, ...]
    index: Mapping[str, str] | None
    source: Path


def pinned(model: str | Path) -> tuple[str, str | None]:
    """Split `owner/name@revision` into its id and its revision; a folder is a folder, whatever its name holds."""
    text = str(model)
    name, at, revision = text.partition("@")
    if not at or Path(text).expanduser().exists() or not HUB_ID.fullmatch(name):
        return text, None
    if not revision:
        raise ValueError(f"{text!r} names no revision: write {name}@ with a branch, a tag or a commit, or {name} alone")
    return name, revision


def is_hub_id(model: str | Path) -> bool:
    """Return whether a model is named by its id on the Hub, with or without a revision, rather than by a folder."""
    return not Path(model).expanduser().exists() and bool(HUB_ID.fullmatch(pinned(model)[0]))


def revision_of(folder: Path) -> str | None:
    """Return the commit that a resolved folder is of; `None` for one that is not of the Hub."""
    places = [path.name for path in (folder, *folder.parents) if path.parent.name == "snapshots"]
    return places[0] if places and re.fullmatch("[0-9a-f]{40}", places[0]) else None


def split_kwargs(kwargs: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments of `from_pretrained` into those that say which files are meant, and the others; refuse unknown ones."""
    if not isinstance(kwargs, Mapping | None):
        raise ValueError(f"teacher_model_init_kwargs: {kwargs!r} is not a table, such as {{revision: main}}")
    given = dict(kwargs or {})
    for key, value in given.items():
        if key not in (*WHICH, *HOW):
            near = difflib.get_close_matches(str(key), [*WHICH, *HOW], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([*WHICH, *HOW])}"
            raise ValueError(f"teacher_model_init_kwargs: {key!r} is not taken; {hint}")
        if key in ("revision", "subfolder", "cache_dir", "variant") and not isinstance(value, str | Path | None):
            raise ValueError(f"teacher_model_init_kwargs: {key} is {value!r}, not text; put it in quotes")
        if key in ("dtype", "torch_dtype") and not _is_dtype(value):
            raise ValueError(f"teacher_model_init_kwargs: {key} is {value!r}, not auto, bfloat16, float16 or float32")
    if "torch_dtype" in given:
        given = {"dtype": given.pop("torch_dtype"), **given}
    return {key: given[key] for key in WHICH if given.get(key) is not None}, {k: v for k, v in given.items() if k not in WHICH}


def _is_dtype(value: Any) -> bool:
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    return value == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)


def resolve(model: str | Path, weights: bool = True, variant: str | None = None, **which: Any) -> Path:
    """Return the local folder of a model: itself, or the snapshot of a Hub id.

    Args:
        model (`str` or `Path`): A folder, `owner/name` or `owner/name@revision`.
        weights (`bool`, *optional*, defaults to `True`): Whether weights are fetched, or only small files.
        variant (`str`, *optional*): Which weights, as for `from_pretrained`.
        **which: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`, as for `from_pretrained`.

    Raises:
        ValueError: when there is no such model, or it is not a plain causal language model, with what it is.
    """
    subfolder = which.pop("subfolder", None) or ""
    if not is_hub_id(model):
        if which.get("revision") is not None:
            raise ValueError(f"revision: {which['revision']!r}, but {model} is a folder, which has none; leave it out")
        folder = Path(model).expanduser() / subfolder
    else:
        folder = _snapshot(str(model), subfolder, weights, variant, which)
    check_config(folder, str(model))
    return folder


def _snapshot(model: str, subfolder: str, weights: bool, variant: str | None, which: dict[str, Any]) -> Path:
    """Fetch small files, then the weights that they call for, and no others; return the folder."""
    repo_id, revision = pinned(model)
    if revision is not None and which.get("revision") not in (None, revision):
        raise ValueError(f"revision: {which['revision']!r}, but the model is {model!r}; name one of the two")
    which |= {"revision": revision or which.get("revision")}
    prefix = f"{subfolder}/" if subfolder else ""

    def fetch(*patterns: str, bar: type[tqdm] = WeightsBar) -> Path:
        wanted = {"allow_patterns": [prefix + pattern for pattern in patterns], "ignore_patterns": [f"{prefix}*/*"]}
        snapshot = snapshot_download(repo_id, **wanted, **which, tqdm_class=bar)
        which["revision"] = revision_of(Path(snapshot)) or which["revision"]  # a branch may move between two calls
        return Path(snapshot) / subfolder

    try:
        folder = fetch("*.json", *SIDE_FILES, bar=NoBar)
        single, index = weight_names(variant)
        if weights and not (fetch(single) / single).is_file() and (folder / index).is_file():
            fetch(*sorted(set(_read_index(folder / index).values())))
    except GatedRepoError as error:
        raise ValueError(f"{repo_id} is gated: ask for access at https://huggingface.co/{repo_id} and log in with `hf auth "
                         "login`, or set HF_TOKEN") from error  # fmt: skip
    except RepositoryNotFoundError as error:
        raise ValueError(f"No model at {repo_id!r}: no folder, and the Hub has none that you may see; check its name, and log "
                         "in if it is private (`hf auth login`, or HF_TOKEN)") from error  # fmt: skip
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no revision {which['revision']!r}: name a branch, a tag or a commit of it") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(f"No model at {model!r}: no folder, not in the cache, and the Hub is not reached; check the name, the "
                         "connection, HF_HUB_OFFLINE and local_files_only") from error  # fmt: skip
    return folder


def weight_names(variant: str | None = None) -> tuple[str, str]:
    """Return the names of a model's one file of weights and of the index of its shards."""
    if variant is None:
        return SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME
    return f"model.{variant}.safetensors", f"model.safetensors.index.{variant}.json"


def weights_of(folder: Path, variant: str | None = None) -> Weights:
    """Return the files that `from_pretrained` loads from a folder, in its order: the one file, else the shards of the index.

    Raises:
        ValueError: when there are none, with what there is; when the index is of another sharding, or a shard is missing.
    """
    single, index = (folder / name for name in weight_names(variant))
    explicit = read_config(folder).get("transformers_weights")
    if explicit is not None:
        single, index = (folder / explicit, folder / explicit) if explicit.endswith(".json") else (folder / explicit, index)
    if single.is_file() and single != index:
        return Weights((single,), None, single)
    if not index.is_file():
        raise ValueError(_no_weights(folder, single, index))
    shards = _read_index(index)
    files = tuple(folder / name for name in sorted(set(shards.values())))
    missing = [path.name for path in files if not path.is_file()]
    others = sorted(path.name for path in folder.glob("*.safetensors") if path not in files)
    if missing and others:
        raise ValueError(f"{index} is of another sharding: it names {missing[0]}, and there is {others[0]} instead; take index "
                         "and shards from the same save, or delete what is left of the other")  # fmt: skip
    if missing:
        raise ValueError(f"Shard {missing[0]} is missing from {folder}; download the checkpoint again")
    return Weights(files, shards, index)


def _read_index(path: Path) -> dict[str, str]:
    """Return an index: name of a tensor to its file, which lies beside it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(found.values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: it has no weight_map ({error}); download it again") from error
    wrong = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if wrong or not names:
        raise ValueError(f"{path} names {wrong[0] if wrong else 'no file'!r}, not a file beside it; download it again")
    return found


def _no_weights(folder: Path, single: Path, index: Path) -> str:
    """Say which weights there are instead."""
    said = f"{folder} has neither {single.name} nor {index.name}"
    for pattern, what in OTHER_WEIGHTS.items():
        if files := sorted(folder.glob(pattern)):
            return f"{said}, but {files[0].name}: {what}"
    return said
