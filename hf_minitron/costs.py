"""What a shape costs, counted from the patterns of a family's rows alone: parameters, FLOPs, cache and state."""

import math
from collections.abc import Mapping

from hf_minitron import axes


class Costs:
    """The costs of a `Shape`, whose fields it reads."""

    def num_parameters(self, rows: Mapping[str, str]) -> int:
        """Count the numbers that a model of this shape stores, whose tensors are `rows` (name to pattern); tied ones once."""
        return sum(self._numbers(row, rows[row], self.tensors(row)) for row in rows)

    def flops_per_token(self, rows: Mapping[str, str], context: int = 0) -> int:
        """Count the floating-point operations of the matrix products of one token's forward pass.

        Two per weight of every matrix that the token meets: of the experts those it is sent to, and the output head (for tied
        embeddings, the embedding as head); looking up embeddings is free. To these come the products of a query with the keys
        and of its weights with the values of a context of so many tokens. What a state-space layer does beside its matrices is
        left out.
        """
        dims = {row: [axes.dim_names(dim) for dim in axes.parse(pattern)] for row, pattern in rows.items()}
        # what has a size that no cut changes, or a projector's, belongs to a vision model: no token of text meets it
        dims = {row: names for row, names in dims.items() if names and all(names) and {"projector"} not in names}
        heads = [row for row in dims if "vocab" in dims[row][0] and len(dims[row]) == 2 and "layers" not in dims[row][1]]
        flops = 0
        for row in dims:
            routed = dims[row][0] == {"experts"} and any("ffn" in names for names in dims[row])
            # tied: one matrix, looked up and a head
            looked_up = "positions" in dims[row][0] or row in heads[:-1] or "layers" in dims[row][-1]
            if looked_up or row.endswith("bias") or len(dims[row]) - routed < 2:
                continue
            weights = self._numbers(row, rows[row], self.met(row))
            flops += 2 * (weights * self["experts_per_token"] // self["experts"] if routed else weights)
        if self.head_sizes:
            products = (self._seen_by(kind, context) * self[axis] for kind, axis in self.head_sizes.items())
            return flops + 4 * self["heads"] * sum(products)
        key = self.sizes.get("qk_dim", self.sizes.get("head_dim", 0))
        return flops + 2 * self._seen(context, "heads") * (key + self.sizes.get("v_dim", key))

    def kv_cache_bytes_per_token(self, bytes_per_number: int) -> int:
        """Count the bytes that one token adds to the KV cache of a long text: a key and a value for each KV head of a layer.

        Layers whose attention sees a sliding window add nothing, unless all do: then what a token within it adds is counted.
        Multi-head latent attention keeps a narrow row in place of keys and values, from which both are made (2405.04434,
        section 2.1).
        """
        longest = max(filter(None, self.windows), default=0) if None in self.windows else 0
        return self.cache_bytes(longest + 1, bytes_per_number) - self.cache_bytes(longest, bytes_per_number)

    def cache_bytes(self, context: int, bytes_per_number: int) -> int:
        """Count the bytes of everything that is kept of a text of so many tokens: keys and values, and states."""
        kept = self._seen(context, "kv_heads" if "kv_heads" in self.sizes else "heads") * 2 * self.sizes.get("head_dim", 0)
        if "kv_rank" in self.sizes:
            kept = self._seen(context) * (self["kv_rank"] + self["rope"])
        if self.caches:
            sizes = {kind: axes.dim_size(axes.parse(pattern)[0], self.sizes) for kind, pattern in self.caches.items()}
            kept = sum(self._seen_by(kind, context) * size for kind, size in sizes.items())
        return kept * bytes_per_number + self.state_bytes(bytes_per_number)

    def state_bytes(self, bytes_per_number: int) -> int:
        """Count the bytes of the states of Mamba, linear attention and short convolutions, which do not grow with the text."""
        numbers = (
            self.sizes.get(kind, 0) * axes.dim_size(axes.parse(state)[0], self.sizes) for kind, state in self.states.items()
        )
        return sum(numbers) * bytes_per_number

    def _seen_by(self, kind: str, context: int) -> int:
        """Return how many tokens of a context the attention of the layers of a kind sees together."""
        windows = [self.windows[layer] for layer in self.layer_kinds.get(kind, ())]
        tokens = sum(context if window is None else min(window, context) for window in windows)
        return self.sizes.get(kind, 0) * tokens // max(len(windows), 1)

    def _seen(self, context: int, axis: str | None = None) -> int:
        """Return how many tokens of a context the attention of all layers sees together, by each entry of an axis."""
        each = self.sizes.get(axis, 0) if axis else 1
        windows = self.windows or (None,) * len(self.by_layer.get(axis, ()))
        if not windows:
            return self.sizes.get("attention_layers", self["layers"]) * context * each
        tokens = [context if window is None else min(window, context) for window in windows]
        if axis in self.by_layer:
            tokens, each = [n * size for n, size in zip(tokens, self.by_layer[axis], strict=True)], 1
        elif "attention_layers" in self.sizes:
            return self["attention_layers"] * sum(tokens) * each // sum(window != 0 for window in windows)
        return self["layers"] * sum(tokens) * each // len(windows)

    def tensors(self, row: str) -> int:
        """Count the tensors of a row."""
        kinds = axes.placeholders(row)
        return math.prod(self[axis] for axis in ((" ".join(kinds),) if " ".join(kinds) in self.sizes else kinds))

    def met(self, row: str) -> int:
        """Count how often a token meets a tensor of a row: weights that layers share by each of them."""
        kinds = axes.placeholders(row)
        return self[self.reused[kinds[0]]] if kinds and kinds == tuple(self.reused) else self.tensors(row)

    def _numbers(self, row: str, pattern: str, tensors: int) -> int:
        """Count the numbers of so many tensors of a row; of all where layers differ in size."""
        kinds = axes.placeholders(row)
        if not any(self.by_layer.keys() & axes.dim_names(dim) for dim in axes.parse(pattern)):
            return tensors * math.prod(axes.tensor_shape(pattern, self.sizes))
        every = range(len(next(iter(self.by_layer.values()))))
        counts = (math.prod(axes.tensor_shape(pattern, self.at(layer))) for layer in self.layer_kinds.get(kinds[0], every))
        return self["layers"] * sum(counts) // len(every)
