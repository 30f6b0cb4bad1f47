"""hf_minitron: prune and distill causal language models the Minitron way."""

__version__ = "0.1.0"
