"""What MLX does, through mlx-lm, which is optional: converting and quantizing a model folder, reading one."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig

from hf_minitron.checkpoint.checkpoint import complete_or_absent
from hf_minitron.errors import one_line

LARGE = 1_000_000_000  # parameters from which on four bits suffice: SmolLM2-135M in four is 0.9 nats per token from itself
# Scales of eight bits must be finer than bfloat16 (SmolLM2-135M: 0.005 nats per token, not 0.1), but these types compute more
# than float16 holds.
WIDE = ("gemma",)
CPU_TOKENS = 32  # that are compared where there is no Metal: MLX multiplies slowly on other processors
GROUPS = (64, 32)  # numbers that share a scale, the first that the hidden size divides by


def check_mlx(config: PreTrainedConfig) -> None:
    """Refuse a model that mlx-lm has no class for, or whose hidden size fits no group.

    Raises:
        ValueError: with the model type, or the size.
    """
    from mlx_lm.utils import MODEL_REMAPPING

    if find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(config.model_type, config.model_type)}") is None:
        raise ValueError(f"mlx-lm has no class for a model of type {config.model_type!r}")
    if _group(config) is None:
        raise ValueError(f"hidden is {config.hidden_size}, which does not divide by {GROUPS[-1]}, so MLX cannot quantize it")


def bits_of(parameters: int) -> int:
    """Return how many bits a weight of a model of so many parameters takes."""
    return 4 if parameters >= LARGE else 8


def write_mlx(source: Path, target: Path, config: PreTrainedConfig, bits: int) -> None:
    """Write a model folder as mlx-lm converts it, its matrices quantized.

    Args:
        source (`Path`): A folder that `save_pretrained` wrote.
        target (`Path`): The new folder; it has its name only once it is complete.
        config (`PreTrainedConfig`): The model's config.
        bits (`int`): Of a weight.

    Raises:
        ValueError: when mlx-lm does not take it.
    """
    from mlx_lm import convert

    dtype = "float16" if bits == 8 and not config.model_type.startswith(WIDE) else None  # else the one of the config
    with complete_or_absent(target) as folder:
        folder.rmdir()  # it makes it itself
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                convert(str(source), str(folder), quantize=True, q_bits=bits, q_group_size=_group(config), dtype=dtype)
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # of a model that it reads otherwise
            raise ValueError(f"mlx-lm did not convert the model: {one_line(error)}") from error
        (folder / "README.md").unlink(missing_ok=True)  # which names the folder on this machine


def _group(config: PreTrainedConfig) -> int | None:
    return next((size for size in GROUPS if config.hidden_size % size == 0), None)


class Mlx:
    """A model folder, loaded by mlx-lm.

    Args:
        path (`Path`): The folder.
    """

    def __init__(self, path: Path):
        import mlx.core as mx
        import mlx_lm

        self.version = f"MLX (mlx-lm {mlx_lm.__version__})"
        self.model, self.tokenizer = mlx_lm.load(str(path))
        self.most_tokens = CPU_TOKENS if mx.default_device().type == mx.DeviceType.cpu else None

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits after every token, shape `(tokens, vocab)`."""
        import mlx.core as mx

        return np.array(self.model(mx.array([list(tokens)]))[0].astype(mx.float32))

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with those that begin and end it."""
        return list(self.tokenizer.encode(text))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of a chat in the folder's template, up to where the answer begins."""
        return self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)

    def close(self) -> None:
        """Free its memory."""
        del self.model
