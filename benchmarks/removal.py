"""What measuring the removal of every single layer costs, in one run: with the states before the layer kept, against running
every layer that is left.

    python benchmarks/removal.py     # the demo's teacher and text, fp32

Both measure the rise of perplexity, and must find the same. They take turns; the ratio is the median of the turns' ratios, of
processor time, which other work on the machine disturbs less. The output head runs once per removal either way.
"""

import argparse
import statistics
import time
from pathlib import Path

import figure
import torch
from transformers import AutoTokenizer

from hf_minitron import load_text, token_blocks
from hf_minitron.checkpoint.checkpoint import load_model
from hf_minitron.evaluation.text import perplexity
from hf_minitron.importance.removal import removal_costs
from hf_minitron.importance.without import layer_names, without_layers

CACHE = "~/.cache/hf_minitron"


def main() -> None:
    """Compare, print, and write the README's figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=f"{CACHE}/SmolLM2-135M-Instruct")
    parser.add_argument("--text", default=f"{CACHE}/stdlib/calibration.jsonl")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    model, tokenizer = load_model(args.model, torch.float32), AutoTokenizer.from_pretrained(Path(args.model).expanduser())
    blocks = token_blocks(load_text(args.text), tokenizer, args.block_size, args.tokens, seed=0)
    layers = [model.get_submodule(name) for name in layer_names(model)]

    def every_layer() -> torch.Tensor:
        """Run the whole model, then all that is left without each layer."""
        costs = [perplexity(model, blocks).value]
        for layer in range(len(layers)):
            with without_layers(model, [layer]):
                costs.append(perplexity(model, blocks).value)
        return torch.tensor(costs[1:]) - costs[0]

    ways = {"kept states": lambda: removal_costs(model, blocks, "perplexity"), "every layer": every_layer}
    seconds, forwards, costs = {name: [] for name in ways}, dict.fromkeys(ways, 0), {}
    kind = type(layers[0])
    plain, now = kind.forward, ""

    def counted(*inputs, **kwargs):
        forwards[now] += 1
        return plain(*inputs, **kwargs)

    kind.forward = counted  # what stands in for a removed layer is not counted: it is the layer's own attribute
    for _ in range(args.rounds):
        for now, work in ways.items():
            start = time.process_time()
            with torch.inference_mode():
                costs[now] = work()
            seconds[now].append(time.process_time() - start)
    for name in ways:
        print(f"{name}: {statistics.median(seconds[name]):6.1f} s, {forwards[name] // args.rounds} layer forwards")
    ratio = statistics.median(kept / every for kept, every in zip(*seconds.values(), strict=True))
    work = forwards["kept states"] / forwards["every layer"]
    apart = ((costs["kept states"] - costs["every layer"]).abs() / costs["every layer"].abs()).max()
    result = (
        f"{ratio:.2f} of the processor time, {work:.2f} of the layer forwards of running every layer left; "
        f"costs within {apart:.0e}"
    )
    what = f"removing each of {len(layers)} layers with the states before it kept, float32"
    print(f"{what}: {result}")
    figure.save(args.json, what, "benchmarks/removal.py", result)


if __name__ == "__main__":
    main()
