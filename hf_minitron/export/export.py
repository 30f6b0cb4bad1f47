"""Exports of a model folder for other runtimes, GGUF files and MLX: each is loaded where that can be, and compared."""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from hf_minitron.architecture.vision import TOWERS
from hf_minitron.checkpoint.checkpoint import best_device, load_model
from hf_minitron.export.compare import Runtime, compare_exports
from hf_minitron.export.gguf_model import gguf_names, layout_of, quantizable, write_gguf
from hf_minitron.export.layouts import FORMATS, GGUF_TYPES, MLX, NONUNIFORM_TYPES
from hf_minitron.export.llama_cpp import LlamaCpp, quantize
from hf_minitron.export.mlx import Mlx, bits_of, check_mlx, write_mlx
from hf_minitron.export.texts import Texts
from hf_minitron.modeling.configuration_pruned import PrunedConfig
from hf_minitron.probe import Visit, probe
from hf_minitron.pruning.export import export as export_stock

PACKAGES = {"gguf": ("gguf", "gguf"), "llama_cpp": ("llama-cpp-python", "gguf"), "mlx_lm": ("mlx-lm", "mlx")}
FACTS = "export.json"


def check_export(config: PreTrainedConfig, formats: Sequence[str], types: Sequence[str] = GGUF_TYPES) -> None:
    """Refuse what cannot be exported, from the config alone.

    Args:
        config (`PreTrainedConfig`): The model's.
        formats (`Sequence[str]`): Any of `FORMATS`.
        types (`Sequence[str]`, *optional*): Of GGUF files, any of `GGUF_TYPES`.

    Raises:
        ValueError: for an unknown format or type, a package that is not installed, and what a runtime cannot hold.
    """
    for what, values, allowed in (("format", formats, FORMATS), ("type of GGUF file", types, GGUF_TYPES)):
        if wrong := [value for value in values if value not in allowed]:
            raise ValueError(f"{wrong[0]!r} is not a {what}: {', '.join(allowed)}")
    if "gguf" in formats:
        if not types:
            raise ValueError(f"no type of GGUF file is named: {', '.join(GGUF_TYPES)}")
        _require("gguf", "GGUF files")
        held = _held(config, "gguf")
        layout_of(held)
        quantized = [kind for kind in types if kind != "F16"]
        if quantized and (reason := quantizable(held)):
            raise ValueError(f"{', '.join(quantized)}: {reason}, or take F16 alone")
        if "Q4_K_M" in types:
            _require("llama_cpp", "Q4_K_M, which llama.cpp quantizes to,")
    if "mlx" in formats:
        _require("mlx_lm", "the export for MLX")
        check_mlx(_held(config, "mlx"))


def export_model(
    source: Path, out: Path, name: str, texts: Texts, formats: Sequence[str] = FORMATS, types: Sequence[str] = GGUF_TYPES
) -> dict[str, Any]:
    """Write a model folder for other runtimes, load each file in the runtime that it is for, and compare it with the model.

    A nonuniform model keeps its sizes in GGUF files where llama.cpp computes its kind so; else it is padded with zeros first.
    A file whose runtime is not installed is written and not measured.

    Args:
        source (`Path`): A folder that `save_pretrained` wrote.
        out (`Path`): Where to write `<name>-<type>.gguf`, `mlx/` and `export.json`; nothing is there before all is right.
        name (`str`): What the files call the model; no path.
        texts (`Texts`): What they are measured on.
        formats (`Sequence[str]`, *optional*): Any of `FORMATS`.
        types (`Sequence[str]`, *optional*): Of GGUF files, any of `GGUF_TYPES`.

    Returns:
        `dict`: What `export.json` holds: `name`, `text`, the `tokens` that were scored, whether those of `answers` alone, the
            model's `perplexity`, and `files`, each with `file`, `type`, `bytes`, and, where it was loaded, `runtime`,
            `perplexity`, `teacher_kl` and `top1_match`.

    Raises:
        ValueError: as `check_export`; when a file does not compute what the model does.

    Example:

    ```python
    >>> texts = Texts("held-out text", held_out=[tokenizer("a few words of some text")["input_ids"]])
    >>> facts = export_model(Path("out"), Path("exports"), "my-model", texts, ["gguf"], ["F16"])  # doctest: +SKIP
    ```
    """
    config = AutoConfig.from_pretrained(source)
    check_export(config, formats, types)
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out, prefix="unfinished-") as folder:
        scratch = Path(folder)
        model = load_model(source, torch.float32, best_device())
        folders = {format: _held_folder(source, config, format, scratch) for format in formats}
        paths: dict[str, Path] = {}
        if "gguf" in formats:
            paths |= _write_ggufs(folders["gguf"], model, name, types, texts, scratch)
        if "mlx" in formats:
            bits = bits_of(model.num_parameters())
            paths |= {f"MLX {bits}-bit": scratch / MLX}
            write_mlx(folders["mlx"], scratch / MLX, AutoConfig.from_pretrained(folders["mlx"]), bits)
        tokenizer, files = AutoTokenizer.from_pretrained(source), _loaders(paths, texts)
        measured = compare_exports(model, tokenizer, texts.held_out, files, texts.labels)
        facts = {"name": name, "text": texts.name, **measured}
        facts["files"] = [
            {"file": path.name, "type": kind, "bytes": _size(path), **measured["files"].get(kind, {})}
            for kind, path in paths.items()
        ]
        facts["calibration_tokens"] = sum(map(len, texts.calibration)) if "Q4_K_M" in paths else 0
        for path in paths.values():
            _put(path, out / path.name)
    (out / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return facts


def file_name(model: str) -> str:
    """Return what files of a model are called: the last part of its id or path, without what no file name takes."""
    return re.sub(r"[^\w.-]+", "-", Path(model.partition("@")[0]).resolve().name)


def _write_ggufs(
    folder: Path, model: PreTrainedModel, name: str, types: Sequence[str], texts: Texts, scratch: Path
) -> dict[str, Path]:
    """Write the GGUF files of a folder; return them by type."""
    paths = {kind: scratch / f"{name}-{kind}.gguf" for kind in types}
    half = paths.get("F16", scratch / "half.gguf")
    if {"F16", "Q4_K_M"} & paths.keys():
        write_gguf(folder, half, name)
    if "Q8_0" in paths:
        write_gguf(folder, paths["Q8_0"], name, "Q8_0")
    if "Q4_K_M" in paths:
        own = model if folder.parent != scratch else load_model(folder, torch.float32, best_device())
        quantize(half, paths["Q4_K_M"], "Q4_K_M", importance_of(own, texts.calibration))
    return paths


def _loaders(paths: Mapping[str, Path], texts: Texts) -> dict[str, Callable[[], Runtime]]:
    """Return what loads each file whose runtime is installed."""
    context = max(map(len, texts.held_out))
    mlx = {kind: partial(Mlx, path) for kind, path in paths.items() if path.name == MLX}
    ggufs = {kind: partial(LlamaCpp, path, context) for kind, path in paths.items() if path.name != MLX}
    return (ggufs if _is_installed("llama_cpp") else {}) | mlx


@torch.inference_mode()
def importance_of(model: PreTrainedModel, blocks: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Return the importance matrix of a model: the mean square of every number that its matrices are multiplied by.

    Args:
        model (`PreTrainedModel`): The model.
        blocks (`Sequence[Sequence[int]]`): Token ids of calibration text.

    Returns:
        `dict[str, np.ndarray]`: By the names that matrices have in GGUF files.
    """
    names, totals, tokens = gguf_names(model.config), {}, sum(map(len, blocks))

    def add(name: str) -> Callable[[Visit], None]:
        def observe(visit: Visit) -> None:
            totals[name] = totals.get(name, 0) + visit.input.float().flatten(0, -2).square().sum(0)

        return observe

    linear = {module: names(f"{module}.weight") for module, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    with probe(model, before=[(module, add(name)) for module, name in linear.items() if name]):
        for ids in blocks:
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    return {name: (total / tokens).cpu().numpy() for name, total in totals.items()}


def _held(config: PreTrainedConfig, format: str) -> PreTrainedConfig:
    """Return the config of what a format holds: the text model of a vision-language model, a padded one of a nonuniform one."""
    if config.model_type in TOWERS:
        return config.get_text_config()
    return config.to_stock() if _is_padded(config, format) else config


def _is_padded(config: PreTrainedConfig, format: str) -> bool:
    return isinstance(config, PrunedConfig) and not (format == "gguf" and config.stock_model_type in NONUNIFORM_TYPES)


def _held_folder(source: Path, config: PreTrainedConfig, format: str, scratch: Path) -> Path:
    """Return the folder that a format is made of: the source, or a stock checkpoint made of it."""
    if config.model_type not in TOWERS and not _is_padded(config, format):
        return source
    folder = scratch / "stock"
    if not folder.exists():
        export_stock(source, folder)
    return folder


def _put(path: Path, target: Path) -> None:
    if target.is_dir():
        shutil.rmtree(target)
    path.rename(target)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _require(module: str, what: str) -> None:
    package, extra = PACKAGES[module]
    if not _is_installed(module):
        raise ValueError(f"{what} need {package}, which is not installed: pip install 'hf_minitron[{extra}]'")
