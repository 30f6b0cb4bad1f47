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
import torch
from datasets import Dataset
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
    model, found, seconds = Path(args.model).expanduser(), {}, {}
    blocks = blocks_of(args.text, model, args.blocks, args.block_size)
    how: dict[str, Any] = {"method": {"top_k": args.k}, "dtype": "float32", "batch_size": args.blocks // 2}
    with tempfile.TemporaryDirectory() as folder:
        for name, of in (("served", {"server": args.server}), ("live", {"init_kwargs": {"dtype": "float32"}})):
            begun = time.monotonic()
            tokens = write_cache(model, blocks, Path(folder, name), **of, **how)["tokens"]
            seconds[name] = time.monotonic() - begun
            found[name] = columns(CachedTeacher(Path(folder, name)), blocks)
    result = text_of(*found["served"], *found["live"], seconds["served"] / seconds["live"])
    print(f"{tokens:,} tokens, k {args.k}: {result}; {tokens / seconds['served']:.0f} tokens/s")
    figure.save(args.json, "a served teacher's cache", f"benchmarks/served.py -k {args.k}", result)


def blocks_of(text: str, model: Path, count: int, length: int) -> Dataset:
    """Return the first blocks of a text."""
    return token_blocks(load_text(text), AutoTokenizer.from_pretrained(model), length, max_tokens=count * length)


def columns(teacher: CachedTeacher, blocks: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and log-probabilities, both of shape `(rows, tokens, k)`."""
    ids, logp = teacher.columns(collate([blocks[row] for row in range(len(blocks))])).values()
    return ids, logp.view(torch.float32)


def text_of(ids: torch.Tensor, logp: torch.Tensor, live_ids: torch.Tensor, live_logp: torch.Tensor, ratio: float) -> str:
    """Say how far both agree; positions may name the same tokens in another order."""
    both = ids[..., :, None] == live_ids[..., None, :]
    apart = (logp[..., :, None] - live_logp[..., None, :])[both].abs()
    named, mean, most = both.any(-1).float().mean(), apart.mean(), apart.max()
    return (f"{named:.1%} of the tokens are named by both, their log-probabilities differ by {mean:.4f} in the mean and "
            f"{most:.3f} at most, {ratio:.2f} of the live teacher's time")  # fmt: skip


if __name__ == "__main__":
    main()
