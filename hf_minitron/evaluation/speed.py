"""How fast models are on this machine, and how fast the machine is.

Models take turns inside one run, so that a machine that slows down slows all of them.
"""

import contextlib
import gc
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from hf_minitron.architecture.architecture import Architecture
from hf_minitron.architecture.config import model_of, text_config, with_text
from hf_minitron.architecture.student import student_config
from hf_minitron.memory import give_back_freed_memory
from hf_minitron.plan import Plan, stand_in
from hf_minitron.shape import Shape, ShapeError

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class SpeedSettings:
    """What speed is measured at: every batch size with every prompt length.

    Args:
        batch_sizes (`Sequence[int]`, *optional*, defaults to `(1, 4)`): Sequences at a time.
        prompt (`Sequence[int]`, *optional*, defaults to `(128,)`): Tokens of the prompt.
        new_tokens (`int`, *optional*, defaults to 24): Tokens generated, one after the other, with a KV cache.
        rounds (`int`, *optional*, defaults to 3): Timed turns of each model, after one that warms up and measures memory.
    """

    batch_sizes: Sequence[int] = (1, 4)
    prompt: Sequence[int] = (128,)
    new_tokens: int = 24
    rounds: int = 3

    @classmethod
    def read(cls, value: bool | Mapping) -> "SpeedSettings | None":
        """Read a recipe's `speed:`, true or false or a section.

        Raises:
            ValueError: for an unknown key, or a value that is not a whole number above zero or a list of such.
        """
        if isinstance(value, bool):
            return cls() if value else None
        known = [setting.name for setting in fields(cls)]
        for key, given in value.items():
            if key not in known:
                raise ValueError(f"speed: unknown key {key!r}; known: {', '.join(known)}")
            several = isinstance(getattr(cls, key), tuple)
            numbers = given if several and isinstance(given, list) else [given]
            if not numbers or any(type(number) is not int or number < 1 for number in numbers):
                wanted = "a whole number from 1 on, or a list of such" if several else "a whole number from 1 on"
                raise ValueError(f"speed.{key}: {given!r} is not {wanted}")
        return cls(**{key: tuple(v if isinstance(v, list) else [v]) if key in ("batch_sizes", "prompt") else v
                      for key, v in value.items()})  # fmt: skip

    def within(self, positions: int | None) -> "SpeedSettings":
        """Return the settings with prompts cut to what a model's positions hold."""
        longest = max(1, (positions or math.inf) - self.new_tokens)
        return replace(self, prompt=tuple(dict.fromkeys(int(min(length, longest)) for length in self.prompt)))

    def check(self, positions: int | None, name: str) -> None:
        """Refuse more tokens than a model has positions."""
        longest = max(self.prompt) + self.new_tokens
        if positions is not None and longest > positions:
            raise ValueError(f"speed: prompt {max(self.prompt)} and {self.new_tokens} new_tokens are more than the {positions} "
                             f"positions of {name}; shorten them")  # fmt: skip


@torch.inference_mode()
def measure_speed(models: Mapping[str, PreTrainedModel], settings: SpeedSettings) -> dict[str, list[dict]]:
    """Measure how fast several models read and write, in turn, so that a drift of the machine hits all alike.

    Args:
        models (`Mapping[str, PreTrainedModel]`): The models, all on one device.
        settings (`SpeedSettings`): What to measure.

    Returns:
        `dict[str, list[dict]]`: Name to one entry per `batch_size` and `prompt`: `first_token` in seconds (reading the prompt
        and choosing a token), `prefill` (the prompts' tokens over that time) and `decode` in tokens per second over the whole
        batch, each the median of the rounds as `value` with the `low`est and `high`est; and `peak_bytes`: the weights, and what
        a run adds at its peak (on an accelerator what is allocated, on Linux anonymous memory, `None` elsewhere).
    """
    generator = torch.Generator().manual_seed(0)
    vocab = min(text_config(model.config).vocab_size for model in models.values())
    cases = list(itertools.product(settings.batch_sizes, settings.prompt))
    prompts = {case: torch.randint(0, vocab, case, generator=generator) for case in cases}
    times: dict[tuple, dict[str, list[float]]] = {}
    peaks: dict[tuple, int | None] = {}
    turns = [(turn, case, name) for turn in range(settings.rounds + 1) for case in cases for name in models]
    for turn, case, name in tqdm(turns, desc="Measuring speed", unit="turn"):
        model, size = models[name], math.prod(case)
        ids = prompts[case].to(model.device)
        first, whole = (partial(generate, model, ids, count) for count in (1, 1 + settings.new_tokens))
        if turn == 0:
            peaks[name, case] = _peak_bytes(model, whole)
            continue
        first, whole = seconds_of(first), seconds_of(whole)
        timed = times.setdefault((name, case), {"first_token": [], "prefill": [], "decode": []})
        timed["first_token"].append(first)
        timed["prefill"].append(size / first)
        timed["decode"].append(case[0] * settings.new_tokens / max(whole - first, 1e-9))
    heading = {case: {"batch_size": case[0], "prompt": case[1], "new_tokens": settings.new_tokens} for case in cases}
    return {
        name: [
            heading[case] | {kind: _spread(values) for kind, values in times[name, case].items()}
            | {"peak_bytes": peaks[name, case]}
            for case in cases
        ]
        for name in models
    }  # fmt: skip


def shape_tokens_per_second(
    config: PreTrainedConfig, shape: Shape, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Measure prefill and decoding of a random model of some shape: how fast a student would be, before there is one.

    Args:
        config (`PreTrainedConfig`): The teacher's config.
        shape (`Shape`): The shape to measure, the teacher's or what it can be cut to.
        dtype (`torch.dtype`): The dtype it will run in.
        device (`torch.device`): Where it will run.
    """
    architecture = Architecture.of(config)
    config = student_config(architecture, stand_in(architecture.shape, shape))
    with device:
        model = model_of(config, dtype=dtype).eval()
    (found,) = measure_speed({"": model}, SpeedSettings(batch_sizes=(1,), prompt=(512,)))[""]
    return {kind: found[kind]["value"] for kind in ("prefill", "decode")}


def random_model(config: PreTrainedConfig, dtype: torch.dtype, layers: int = 1, vocab: int | None = 8) -> PreTrainedModel:
    """Make a random model of a config with some layers and few experts: to try things before any weight is read.

    Args:
        config (`PreTrainedConfig`): The config.
        dtype (`torch.dtype`): The dtype of the weights.
        layers (`int`, *optional*, defaults to 1): How many layers; the last ones. All, of narrow ones, where the class cannot
            do with some and `vocab` is given.
        vocab (`int`, *optional*, defaults to 8): Size of the vocabulary; the config's when `None`.
    """
    architecture = Architecture.of(config)
    shape = architecture.shape
    target = {}
    if "experts" in shape.sizes:  # a token meets as many of them, whatever their number
        target["experts"] = min(shape["experts"], 4 * shape["experts_per_token"])
    kept = list(range(shape["layers"] - layers, shape["layers"]))
    try:
        config = student_config(architecture, Plan(shape, shape.cut_to(target).with_layers(kept), {"layers": kept}))
    except ShapeError:
        if vocab is None:  # its sizes count
            raise
        config = _narrow(architecture)
    if vocab is not None:
        tables = [key for key, size in architecture.family.follows.items() if size == "vocab"]
        config = with_text(config, {**dict.fromkeys(("vocab_size", *tables), vocab), "pad_token_id": None})
    return model_of(config, dtype=dtype).eval()


def _narrow(architecture: Architecture) -> PreTrainedConfig:
    """Return the config of a model whose layers cannot be run one at a time, as narrow as it can be."""
    shape = architecture.shape
    narrow = {axis: min(64, shape[axis]) for axis in ("hidden", "ffn") if axis in shape.axes}
    for axes in (("hidden", "ffn"), ("ffn",), ()):
        target = {axis: size for axis, size in narrow.items() if axis in axes and axis not in {**shape.coupled, **shape.fixed}}
        with contextlib.suppress(ShapeError):  # its class may take a head's size to be hidden / heads
            return student_config(architecture, Plan(shape, shape.cut_to(target), {}))
    raise ShapeError(f"No {architecture.config.model_type} can be made of these sizes")


def generate(model: PreTrainedModel, prompt: Tensor, count: int) -> Tensor:
    """Generate exactly `count` tokens after a prompt of shape `(batch, seq)`, greedily."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
    )


def seconds_of(work: Callable[[], object]) -> float:
    """Do some work and return how long it took, on the accelerator too."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"value": statistics.median(values), "low": min(values), "high": max(values)}


def _peak_bytes(model: PreTrainedModel, work: Callable) -> int | None:
    """Run work once; return the model's weights plus the most memory that the work took beside what was there before."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in itertools.chain(model.parameters(), model.buffers()))
    gc.collect()
    if model.device.type == "cpu":
        if not STATUS.is_file():
            work()
            return None
        give_back_freed_memory()  # what an earlier run has freed would be used again, and would not be seen
        before, most, stopped = _anonymous_bytes(), [0], threading.Event()

        def watch() -> None:
            while not stopped.wait(0.005):
                most[0] = max(most[0], _anonymous_bytes())

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            work()
        finally:
            stopped.set()
            watcher.join()
        return weights + max(0, max(most[0], _anonymous_bytes()) - before)
    backend = torch.get_device_module(model.device)
    if not hasattr(backend, "max_memory_allocated"):
        work()
        return None
    backend.reset_peak_memory_stats()
    before = backend.memory_allocated()  # other models' weights are in it
    work()
    backend.synchronize()
    return weights + backend.max_memory_allocated() - before


def _anonymous_bytes() -> int:
    """Return the process's anonymous memory: mapped files, such as weights read in place, are not in it."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024
