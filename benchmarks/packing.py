"""Text to packed sequences: tokens a second and memory, beside the packing of before; and what it takes to go on at a step.

    python benchmarks/packing.py --text data/text/c4_1.jsonl

Both ways read the same documents, repeated until there are enough for all cores, each in a process of its own, by turns. The
packing of before handed 64 documents at a time to the tokenizer in one process and kept all sequences in memory. Tokens a
second are of the clock, and, as other programs may run, of the processor time of all processes, times eight. Memory is the
largest RssAnon of the process over what it had before (of one that starts others: without theirs).

The last figure is the processor time until the batch after 10, 1,000 and 100,000 steps of eight rows is there, from synthetic
sequences, with the Trainer's way of skipping.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import figure
import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from watch import Peak, anonymous_bytes

from hf_minitron import load_text, token_blocks

BLOCK = 512
STEPS, ROWS = (10, 1_000, 100_000), 8


def pack_before(documents: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Pack as was done before: one process, numbers of four bytes, all in memory."""
    blocks, tokens = [], np.empty(0, np.int32)
    for rows in documents.iter(64):
        ids = tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
        tokens = np.concatenate([tokens, *(np.asarray([*row, tokenizer.eos_token_id], np.int32) for row in ids)])
        number = len(tokens) // BLOCK
        blocks += [{"input_ids": tokens[i * BLOCK : (i + 1) * BLOCK]} for i in range(number)]
        tokens = tokens[number * BLOCK :]
    return Dataset.from_dict({"input_ids": [block["input_ids"] for block in blocks]}).with_format("torch")


def measure(how: str, args: argparse.Namespace) -> dict[str, float]:
    """Pack in this process, and return tokens, seconds, processor seconds and bytes."""
    tokenizer, documents = AutoTokenizer.from_pretrained(args.model), load_text(str(args.text))
    documents = concatenate_datasets([documents] * -(-args.documents // len(documents)))
    before, peak, begin = anonymous_bytes(), Peak(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        now = how == "now"
        blocks = token_blocks(documents, tokenizer, BLOCK, folder=Path(folder)) if now else pack_before(documents, tokenizer)
        seconds = time.perf_counter() - begin
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        sizes = {"tokens": len(blocks) * BLOCK, "bytes": peak.stop() - before}
    return sizes | {"seconds": seconds, "processor": sum(one.ru_utime + one.ru_stime for one in used)}


def resume() -> list[float]:
    """Return the processor seconds until the next batch is there, after every number of steps."""
    import torch
    from accelerate import Accelerator, skip_first_batches
    from torch.utils.data import DataLoader

    from hf_minitron.data.shards import tables_of, write_blocks

    rows, found = np.zeros((ROWS * (STEPS[-1] + 1), 16), np.uint16), []
    with tempfile.TemporaryDirectory() as folder:
        blocks = write_blocks(Path(folder), tables_of([{"input_ids": rows}]))
        for step in STEPS:
            torch.manual_seed(0)
            loader = Accelerator(cpu=True).prepare(DataLoader(blocks, ROWS, shuffle=True))
            begin = time.process_time()
            next(iter(skip_first_batches(loader, step)))
            found.append(time.process_time() - begin)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default=str(Path("~/.cache/hf_minitron/SmolLM2-135M-Instruct").expanduser()))
    parser.add_argument("--documents", type=int, default=24_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the figure for the README")
    parser.add_argument("--how", choices=("before", "now"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.how:
        print(json.dumps(measure(args.how, args)))
        return
    command = [sys.executable, __file__, "--text", args.text, "--model", args.model, "--documents", str(args.documents)]
    runs: dict[str, list[dict]] = {"before": [], "now": []}
    load = os.getloadavg()[0]
    for _ in range(args.rounds):
        for how, found in runs.items():
            made = subprocess.run([*command, "--how", how], check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(made.stdout))
    clock, processor = ({how: max(run["tokens"] / run[kind] for run in found) for how, found in runs.items()}
                        for kind in ("seconds", "processor"))  # fmt: skip
    memory = {how: min(run["bytes"] / run["tokens"] for run in found) for how, found in runs.items()}
    cores, times = len(os.sched_getaffinity(0)), resume()
    result = "; ".join([
        f"{clock['now'] / clock['before']:.2f} times the tokens a second of before on {cores} cores "
        f"({clock['now'] / 1e6:.2f} and {clock['before'] / 1e6:.2f} million by the clock, load {load:.1f} before it began)",
        f"{processor['now'] * 8 / 1e6:.1f} million a second on eight cores, by processor time "
        f"({processor['before'] * 8 / 1e6:.1f} before, if it had used them)",
        f"{memory['now']:.1f} bytes of memory a token, {memory['before']:.1f} before",
        f"the batch after {', '.join(f'{step:,}' for step in STEPS)} steps after {', '.join(f'{s:.2f}' for s in times)} s",
    ])  # fmt: skip
    print(result)
    figure.save(args.json, f"{runs['now'][0]['tokens']:,} tokens of text packed", "benchmarks/packing.py", result)


if __name__ == "__main__":
    main()
