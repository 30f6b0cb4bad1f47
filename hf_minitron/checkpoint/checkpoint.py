"""Checkpoints on disk: safetensors shards read lazily and written as a stream, folders complete or absent."""

import errno
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from hf_minitron.architecture.config import auto_class
from hf_minitron.checkpoint import quantized
from hf_minitron.checkpoint.model_files import resolve, split_kwargs, weights_of
from hf_minitron.checkpoint.model_kinds import read_config
from hf_minitron.checkpoint.tensor_spec import DTYPES, NAMES, TensorSpec
from hf_minitron.waiting import by_every_process

T = TypeVar("T")


class DiskFullError(ValueError):
    """The disk cannot hold what is to be written."""


def stored_dtype(specs: Iterable[TensorSpec]) -> torch.dtype:
    """Return the dtype of most of the numbers of a checkpoint: what its config says, so that `dtype="auto"` means it."""
    sizes = Counter()
    for spec in specs:
        if DTYPES[spec.dtype].is_floating_point:
            sizes[DTYPES[spec.dtype]] += torch.Size(spec.shape).numel()
    return max(sizes, key=sizes.get, default=torch.float32)


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor; refuse NaN and infinity in it."""
    if tensor.is_floating_point() and tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
        raise ValueError(f"{name!r} holds NaN or infinity; the checkpoint is damaged")
    return tensor


class Checkpoint:
    """The tensors of a model folder: their specs from the headers, their data one at a time, dequantized from fp8 or mxfp4.

    Args:
        folder (`Path`): A folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.
        variant (`str`, *optional*): Which weights, as for `from_pretrained`.

    Raises:
        ValueError: as `weights_of`; when a shard is truncated or unreadable, lacks a tensor that the index promises or holds
            another's, or holds what cannot be computed with.
    """

    def __init__(self, folder: str | Path, variant: str | None = None):
        self.folder = Path(folder)
        weights = weights_of(self.folder, variant)
        self._file_of: dict[str, Path] = {}
        self.specs: dict[str, TensorSpec] = {}
        for file in weights.files:
            self._read_header(file)
        absent = [name for name in weights.index or () if name not in self.specs]
        if absent:
            raise ValueError(f"{weights.source} promises {absent[0]!r} in {weights.index[absent[0]]}, which does not hold it: "
                             "it is the index of another save; take index and shards from the same one")  # fmt: skip
        self._quantized = quantized.weights_in(read_config(self.folder), self.specs)
        for name, weight in self._quantized.items():
            del self.specs[weight.numbers], self.specs[weight.scales]
            self.specs[name] = TensorSpec(NAMES[weight.dtype], weight.shape)
        self._check_dtypes()

    def read(self, name: str) -> Tensor:
        """Return one tensor, mapped from its file: its bytes are read when they are looked at; or dequantized."""
        return self._quantized[name].read(self._stored) if name in self._quantized else self._stored(name)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put other values of the same dtype and shape in a tensor's place in its file."""
        spec = self.specs[name]
        assert (DTYPES[spec.dtype], spec.shape) == (tensor.dtype, tuple(tensor.shape)), f"{name} is {spec}"
        with self._file_of[name].open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            start, _ = json.loads(file.read(size))[name]["data_offsets"]
            file.seek(8 + size + start)
            file.write(check_finite(name, tensor).contiguous().flatten().view(torch.uint8).numpy())

    def _stored(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    if name in self.specs:
                        raise ValueError(f"{path} and {self._file_of[name].name} both hold {name!r}: they are of different "
                                         "saves; delete what is left of the other")  # fmt: skip
                    spec = file.get_slice(name)
                    self.specs[name] = TensorSpec(spec.get_dtype(), tuple(spec.get_shape()))
                    self._file_of[name] = path
        except SafetensorError as error:
            raise ValueError(f"Shard {path} is truncated or damaged ({path.stat().st_size:,} bytes; {error}); "
                             "download it again") from error  # fmt: skip

    def _check_dtypes(self) -> None:
        for name, spec in self.specs.items():
            if spec.dtype not in DTYPES:
                raise ValueError(f"{name!r} in {self._file_of[name]} is stored as {spec.dtype}; save the model as bfloat16, "
                                 "float16 or float32 first, or name the checkpoint that it was made from")  # fmt: skip


def write_tensors(
    folder: Path, specs: Mapping[str, TensorSpec], tensors: Iterable[tuple[str, Iterable[Tensor]]], max_shard_bytes: int
) -> None:
    """Write tensors to safetensors shards as they come, never holding more than a piece of one.

    The safetensors library can only write a file whose tensors are all in memory; the format itself (a length, a JSON
    header with offsets, raw data) can be streamed once all specs are known.

    Args:
        folder (`Path`): An existing folder.
        specs (`Mapping[str, TensorSpec]`): What will be written, in order.
        tensors (`Iterable[tuple[str, Iterable[Tensor]]]`): The tensors in the same order, each in consecutive pieces.
        max_shard_bytes (`int`): A new file is begun before this many bytes of data are exceeded.

    Raises:
        ValueError: for NaN or infinity.
        DiskFullError: when the disk becomes full, with the bytes that are still needed.
    """
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, spec in specs.items():
        filled = sum(s.num_bytes for s in shards[-1].values())
        if shards[-1] and filled + spec.num_bytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = spec
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    pieces = ((name, check_finite(name, piece).contiguous()) for name, parts in tensors for piece in parts if piece.numel())
    with closing(_ahead(pieces)) as stream:
        _write_shards(folder, dict(zip(names, shards, strict=True)), stream)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(spec.num_bytes for spec in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_shards(folder: Path, shards: Mapping[str, Mapping[str, TensorSpec]], stream: Iterator[tuple[str, Tensor]]) -> None:
    """Write each shard's file from a stream of pieces."""
    left = sum(spec.num_bytes for shard in shards.values() for spec in shard.values())
    for file_name, shard in shards.items():
        try:
            with (folder / file_name).open("wb") as file:
                file.write(_header(shard))
                for expected, spec in shard.items():
                    written = 0
                    while written < spec.num_bytes:
                        name, piece = next(stream, (None, torch.empty(0)))
                        found = (name, piece.dtype)
                        assert found == (expected, DTYPES[spec.dtype]), f"{found} came instead of {expected} {spec}"
                        written += file.write(piece.flatten().view(torch.uint8).numpy())
                    assert written == spec.num_bytes, f"{written} bytes of {expected} came instead of {spec.num_bytes}"
                    left -= written
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DiskFullError(f"The disk became full while {folder / file_name} was written: {left:,} bytes more are "
                                "needed. Free some and start again") from error  # fmt: skip


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield items; the next is made while the caller is busy with the last, in a thread that computes by itself.

    Threads that helped it would wait for work by spinning, on the cores that are reading and writing.
    """
    nothing, threads = object(), torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=_one_thread) as pool:
        pool.submit(int).result()
        torch.set_num_threads(threads)  # the worker has its own number, but threads that begin later would take it over
        coming = pool.submit(next, items, nothing)
        while (item := coming.result()) is not nothing:
            coming = pool.submit(next, items, nothing)
            yield item


def _one_thread() -> None:
    """Let the thread that calls compute without others; later calls of it would take over the process's number otherwise."""
    torch.get_num_threads()  # takes it over now
    torch.set_num_threads(1)


def _header(shard: Mapping[str, TensorSpec]) -> bytes:
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, spec in shard.items():
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, offset + spec.num_bytes]}
        offset += spec.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_sparse_checkpoint(folder: Path, specs: Mapping[str, TensorSpec]) -> None:
    """Write `model.safetensors` with a hole in place of its data: names and shapes are real, and it takes next to no disk."""
    with (folder / "model.safetensors").open("wb") as file:
        file.write(_header(specs))
        file.truncate(file.tell() + sum(spec.num_bytes for spec in specs.values()))


@contextmanager
def complete_or_absent(folder: Path) -> Iterator[Path]:
    """Yield `<folder>.tmp` to write into and rename it to `folder` at the end, so that no half-written folder has its name."""
    unfinished = folder.with_name(folder.name + ".tmp")
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if folder.exists():
        shutil.rmtree(folder)
    unfinished.rename(folder)


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Refuse to begin when the disk cannot hold what is about to be written.

    Args:
        folder (`Path`): Where it will be written; need not exist yet.
        num_bytes (`int`): How much.
        what (`str`): Its name in the message.

    Raises:
        DiskFullError: with the bytes that are needed and those that are free.
    """
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if num_bytes > free:
        raise DiskFullError(f"No disk space for {what}: {num_bytes:,} bytes needed, {free:,} free at {existing}. Free some")


def best_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """Return bfloat16 where the processor multiplies it natively, else float32."""
    kind = torch.device(device).type
    if kind == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif kind == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        native = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_tile"))
    else:  # an older torch
        native = kind == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def best_device() -> torch.device:
    """Return the accelerator when there is one, else the CPU."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def load_model(
    model: str | Path,
    dtype: torch.dtype | str,
    device: torch.device | str = "cpu",
    distributed_config: DistributedConfig | None = None,
    **kwargs,
) -> PreTrainedModel:
    """Load a causal language model for inference; refuse a checkpoint that lacks parameters.

    Args:
        model (`str` or `Path`): A folder or a Hub id, with `@revision` where not the newest is meant. Safetensors only, and no
            remote code.
        dtype (`torch.dtype` or `str`): What the weights are loaded as.
        device (`torch.device` or `str`): Where they go; `"auto"` spreads them over all devices.
        distributed_config (`DistributedConfig`, *optional*): How processes share the model, of which each reads its shard only.
        **kwargs: Arguments of `from_pretrained`: those of `model_files.WHICH` and `HOW`.
    """
    which, how = split_kwargs(kwargs)
    folder = resolve(model, variant=how.get("variant"), **which)
    Checkpoint(folder, how.get("variant"))  # a missing or truncated shard is named before any weight is loaded
    how = {"dtype": dtype, **({"device_map": "auto"} if str(device) == "auto" else {}), **how}
    how |= {"use_safetensors": True, "distributed_config": distributed_config}
    kind = auto_class(AutoConfig.from_pretrained(folder))
    with by_every_process():
        loaded, info = kind.from_pretrained(folder, output_loading_info=True, **how)
    if info["missing_keys"]:
        raise ValueError(f"The checkpoint {folder} lacks {sorted(info['missing_keys'])[0]!r} "
                         f"({len(info['missing_keys'])} tensors in all)")  # fmt: skip
    if distributed_config is None:
        return (loaded if "device_map" in how else loaded.to(device)).eval()
    loaded._is_distributed_loading_by_transformers = False  # accelerate trains and saves it, as if it had sharded it
    del loaded.config.distributed_config
    return loaded.eval()
