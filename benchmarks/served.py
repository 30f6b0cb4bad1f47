"""What a served teacher's cache is, beside that of the same teacher live: its tokens, their log-probabilities, its time.

    vllm serve ~/.cache/hf_minitron/SmolLM2-135M-Instruct --dtype float32 --max-logprobs 20
    python benchmarks/served.py http://127.0.0.1:8000/v1 ../shared/data/text/c4_2.jsonl

The same blocks are read from the server and by the model in float32. The first number is the share of positions' likeliest
tokens that both name; the next are of the log-probabilities of those; the last is the server's time over the live teacher's.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import figure
import requests
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer

from hf_minitron import load_text, token_blocks
from hf_minitron.distillation.batch import collate
from hf_minitron.distillation.cache import write_cache
from hf_minitron.distillation.cached import CachedTeacher


def main() -> None:
    """Fill both caches and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", help="its address, which ends in /v1")
    parser.add_argument("text")
    parser.add_argument("--model", default="~/.cache/hf_minitron/SmolLM2-135M-Instruct")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=254)
    parser.add_argument("-k", type=int, default=20)
    parser.add_argument("--json", type=Path, help="leave the figure for the README here")
    args = parser.parse_args()
    model = Path(args.model).expanduser()
    blocks = blocks_of(args.text, model, args.blocks, args.block_size)
    with tempfile.TemporaryDirectory() as folder:
        caches, seconds = served_and_live(args.server, model, blocks, args.k, Path(folder))
    tokens, result = len(blocks) * (args.block_size - 1), text_of(*agreement(*caches))
    print(f"{tokens:,} tokens, k {args.k}: {result}; {seconds[0] / seconds[1]:.2f} of the live teacher's time")
    (served,) = requests.get(f"{args.server}/models", timeout=60).json()["data"]
    what = f"a teacher's cache from a server ({served['owned_by']}), beside that of the same teacher here"
    figure.save(args.json, what, f"benchmarks/served.py -k {args.k}", f"{tokens:,} tokens: {result}")


def blocks_of(text: str, model: Path, count: int, length: int) -> Dataset:
    """Return the first blocks of a text."""
    return token_blocks(load_text(text), AutoTokenizer.from_pretrained(model), length, max_tokens=count * length)


def served_and_live(
    server: str, model: Path, blocks: Dataset, k: int, out: Path
) -> tuple[list[tuple[Tensor, ...]], list[float]]:
    """Write the cache of a server's teacher and that of the same teacher here, both in float32.

    Args:
        server (`str`): Its address.
        model (`Path`): The teacher's folder.
        blocks (`Dataset`): What both read.
        k (`int`): How many tokens are kept at each place.
        out (`Path`): A folder for both caches.

    Returns:
        `tuple`: Of each cache the ids of tokens and their log-probabilities, both of shape `(rows, tokens, k)`; the seconds
            that each took.
    """
    how: dict[str, Any] = {"method": {"top_k": k}, "dtype": "float32", "batch_size": len(blocks) // 2}
    batch, caches, seconds = collate([blocks[row] for row in range(len(blocks))]), [], []
    for name, teacher in (("served", {"server": server}), ("live", {"init_kwargs": {"dtype": "float32"}})):
        begun = time.monotonic()
        write_cache(model, blocks, out / name, **teacher, **how)
        seconds.append(time.monotonic() - begun)
        ids, logp = CachedTeacher(out / name).columns(batch).values()  # nothing follows the last token; the rest's mass is last
        caches.append((ids[:, :-1], logp.view(torch.float32)[:, :-1, : ids.shape[-1]]))
    return caches, seconds


def agreement(served: tuple[Tensor, ...], live: tuple[Tensor, ...]) -> tuple[float, Tensor, Tensor]:
    """Return the share of the tokens that two caches both name, and the log-probabilities of those in each.

    A place may name the same tokens in another order, where two are as likely.
    """
    both = served[0][..., :, None] == live[0][..., None, :]
    named = both.any(-1)
    return named.float().mean().item(), served[1][named], (both * live[1][..., None, :]).sum(-1)[named]


def text_of(named: float, ours: Tensor, theirs: Tensor) -> str:
    """Say how far two caches agree."""
    apart = (ours - theirs).abs()
    return (
        f"{named:.1%} of the tokens are named by both, their log-probabilities differ by {apart.mean():.0e} in the mean and "
        f"{apart.max():.0e} at most"
    )


if __name__ == "__main__":
    main()
