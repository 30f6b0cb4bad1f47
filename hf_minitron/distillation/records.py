"""What is kept of a teacher's distributions over a packed sequence, as bytes and back.

Ids of a row are kept in ascending order, as the differences between them in an Exp-Golomb code: a prefix of zeros and a one
says how many bits follow. All is read without a loop over tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hf_minitron.distillation.losses.tokens import CROSS_ENTROPY, function_of
from hf_minitron.distillation.signals import SparseSignal, StoredSignal

# numpy's type of a stored log-probability. float16 keeps 11 bits: an error of at most 2**-11 of the logarithm.
DTYPES = {"float16": "<f2", "float32": "<f4"}

Arrays = Sequence[np.ndarray]  # each with one row per token


def pack(values: np.ndarray, widths: np.ndarray) -> bytes:
    """Write whole numbers one after another in as many bits as `widths` says, lowest bit first; at most 56 each."""
    starts = np.cumsum(widths) - widths
    bit = np.arange(widths.sum()) - np.repeat(starts, widths)
    return np.packbits((np.repeat(values, widths) >> bit & 1).astype(np.uint8), bitorder="little").tobytes()


def unpack(raw: bytes, widths: np.ndarray) -> np.ndarray:
    """Read what `pack` wrote."""
    words = np.ndarray(len(raw) + 1, "<u8", raw + bytes(8), strides=(1,))  # the eight bytes from every byte on
    starts = np.cumsum(widths) - widths
    return (words[starts >> 3] >> (starts & 7).astype(np.uint64) & ((1 << widths) - 1).astype(np.uint64)).astype(np.int64)


def pack_ids(ids: np.ndarray, first: np.ndarray, vocab: int) -> bytes:
    """Write the ids of several rows, ascending in each.

    Args:
        ids (`np.ndarray` of shape `(ids,)`): All ids, row after row.
        first (`np.ndarray` of shape `(ids,)`): Which of them begin a row.
        vocab (`int`): Size of the vocabulary.
    """
    least = _least_bits(vocab)
    gaps = ids - np.where(first, -1, np.roll(ids, 1)) - 1
    scaled = (gaps >> least) + 1
    zeros = np.frexp(scaled)[1] - 1  # the whole part of the logarithm to base 2
    prefixes = pack(1 << zeros, zeros + 1)
    return prefixes + pack(gaps - ((1 << zeros) - 1 << least), zeros + least)


def unpack_ids(raw: bytes, first: np.ndarray, vocab: int) -> tuple[np.ndarray, int]:
    """Read what `pack_ids` wrote at the beginning of some bytes; return the ids and how many bytes they took."""
    least = _least_bits(vocab)
    ones = np.flatnonzero(np.unpackbits(np.frombuffer(raw, np.uint8), bitorder="little"))[: len(first)]
    zeros = np.diff(ones, prepend=-1) - 1
    begin = int(ones[-1]) // 8 + 1
    widths = zeros + least
    end = begin + (int(widths.sum()) + 7) // 8
    steps = unpack(raw[begin:end], widths) + ((1 << zeros) - 1 << least) + 1
    total = np.cumsum(steps)
    before = (total - steps)[first]  # what the rows before have added up
    return total - before[np.cumsum(first) - 1] - 1, end


def _least_bits(vocab: int) -> int:
    """Return the bits that every gap takes: 8 fit a vocabulary of 2**16, of which some ten to seventy ids are kept."""
    return max((vocab - 1).bit_length() - 8, 0)


@dataclass(frozen=True)
class RandomSampling:
    """Tokens drawn with replacement from the teacher's distribution, and how often each came (2503.16870, RS-KD).

    The share of the draws is an unbiased estimate of the probability, so the gradient of the forward KL is unbiased too; its
    value is higher by a number that does not depend on the student.

    Args:
        draws (`int`): Draws per token; 50 give about as good a student as the whole distribution (the paper's choice).
        vocab (`int`): Size of the teacher's vocabulary.
    """

    draws: int
    vocab: int
    losses = ("forward_kl",)
    is_full_vocab = False
    columns = ("teacher_ids", "teacher_shares")

    @property
    def about_bytes(self) -> float:
        """Bytes per token if two of five draws gave a new token, as with small models on web text."""
        return (self.draws + 0.4 * self.draws * 12) / 8

    def keep(self, logits: Tensor, rng: np.random.Generator) -> Arrays:
        """Return the drawn ids, ascending, shape `(rows, draws)`, for logits of shape `(rows, vocab)`."""
        uniform = torch.from_numpy(np.sort(rng.random((len(logits), self.draws)), -1)).to(logits.device)
        below = logits.softmax(-1).double().cumsum(-1)
        ids = torch.searchsorted(below, uniform * below[:, -1:], right=True)
        return [ids.clamp(max=self.vocab - 1).cpu().numpy()]

    def encode(self, arrays: Arrays) -> bytes:
        """Return the bytes of a sequence: one bit per draw but the first, set where it differs from the last, then the ids."""
        (ids,) = arrays
        new = np.diff(ids, axis=-1, prepend=-1) > 0
        first = np.zeros_like(new)
        first[:, 0] = True
        bits = np.packbits(new[:, 1:], axis=None, bitorder="little")
        return bits.tobytes() + pack_ids(ids[new], first[new], self.vocab)

    def decode(self, raw: bytes, rows: int) -> Arrays:
        """Return the different ids and the shares of the draws, each `(rows, draws)`, filled up with `vocab` and zeros."""
        size = rows * (self.draws - 1)
        new = np.ones((rows, self.draws), bool)
        bits = np.unpackbits(np.frombuffer(raw, np.uint8, (size + 7) // 8), count=size, bitorder="little")
        new[:, 1:] = bits.reshape(rows, self.draws - 1)
        starts = np.flatnonzero(new)
        row, column = starts // self.draws, (np.cumsum(new, -1) - 1)[new]
        ids, shares = np.full(new.shape, self.vocab), np.zeros(new.shape, np.float32)
        ids[row, column] = unpack_ids(raw[(size + 7) // 8 :], column == 0, self.vocab)[0]
        shares[row, column] = np.diff(starts, append=new.size) / self.draws
        return ids, shares

    def signal(self, ids: Tensor, shares: Tensor) -> SparseSignal:
        """Return the signal of the draws."""
        return SparseSignal(ids, shares.log(), None, self.vocab)


@dataclass(frozen=True)
class TopK:
    """The teacher's most likely tokens with their log-probabilities, and the mass of all others.

    Divergences on it are lower bounds of those on the whole vocabulary.

    Args:
        k (`int`): Tokens kept.
        vocab (`int`): Size of the teacher's vocabulary.
        dtype (`str`): How log-probabilities are stored: float16 or float32.
    """

    k: int
    vocab: int
    dtype: str
    losses = None  # all
    is_full_vocab = False
    columns = ("teacher_ids", "teacher_logp")

    @property
    def about_bytes(self) -> float:
        """Bytes per token with about 12 bits for an id."""
        return 12 * self.k / 8 + np.dtype(DTYPES[self.dtype]).itemsize * (self.k + 1)

    def keep(self, logits: Tensor, rng: np.random.Generator) -> Arrays:
        """Return ids, ascending, `(rows, k)`, and log-probabilities `(rows, k + 1)`, the last that of the rest."""
        logp = logits.log_softmax(-1)
        ids = logp.topk(self.k, sorted=False).indices.sort(-1).values
        rest = logp.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
        return self.stored(ids, torch.cat([logp.gather(-1, ids), rest], -1))

    def stored(self, ids: Tensor, values: Tensor) -> Arrays:
        """Return what `keep` does, of the likeliest tokens, ascending, and of log-probabilities that are known already."""
        return ids.cpu().numpy(), _stored(values, self.dtype)

    def encode(self, arrays: Arrays) -> bytes:
        """Return the bytes of a sequence: the ids, then the log-probabilities."""
        ids, values = arrays
        return pack_ids(ids.ravel(), self._first(len(ids)), self.vocab) + values.tobytes()

    def decode(self, raw: bytes, rows: int) -> Arrays:
        """Return what `keep` returned."""
        ids, end = unpack_ids(raw, self._first(rows), self.vocab)
        values = np.frombuffer(raw, DTYPES[self.dtype], offset=end)
        return ids.reshape(rows, self.k), values.reshape(rows, self.k + 1)

    def signal(self, ids: Tensor, values: Tensor) -> SparseSignal:
        """Return the signal of the kept tokens."""
        return SparseSignal(ids, values[:, :-1], values[:, -1], self.vocab)

    def _first(self, rows: int) -> np.ndarray:
        return np.arange(rows * self.k) % self.k == 0


@dataclass(frozen=True)
class FullDistribution:
    """The teacher's log-probabilities of the whole vocabulary: as good as the teacher, for small vocabularies.

    Args:
        vocab (`int`): Size of the teacher's vocabulary.
        dtype (`str`): How log-probabilities are stored: float16 or float32.
    """

    vocab: int
    dtype: str
    losses = None  # all
    is_full_vocab = True
    columns = ("teacher_logp",)

    @property
    def about_bytes(self) -> float:
        """Bytes per token."""
        return np.dtype(DTYPES[self.dtype]).itemsize * self.vocab

    def keep(self, logits: Tensor, rng: np.random.Generator) -> Arrays:
        """Return log-probabilities `(rows, vocab)`."""
        return [_stored(logits.log_softmax(-1), self.dtype)]

    def encode(self, arrays: Arrays) -> bytes:
        """Return the bytes of a sequence."""
        return arrays[0].tobytes()

    def decode(self, raw: bytes, rows: int) -> Arrays:
        """Return what `keep` returned."""
        return [np.frombuffer(raw, DTYPES[self.dtype]).reshape(rows, self.vocab)]

    def signal(self, logp: Tensor) -> StoredSignal:
        """Return the signal of all tokens."""
        return StoredSignal(logp)


Record = RandomSampling | TopK | FullDistribution


def record_of(method: Mapping[str, int], vocab: int, dtype: str = "float16") -> Record:
    """Return how a method stores outputs.

    Args:
        method (`Mapping[str, int]`): `{"random": draws}` or `{"top_k": k}`; with k the vocabulary or more all is kept.
        vocab (`int`): Size of the teacher's vocabulary.
        dtype (`str`): How log-probabilities are stored: float16 or float32.

    Raises:
        ValueError: for another method, number or dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {', '.join(DTYPES)}")
    name, number = next(iter(method.items()), (None, None))
    if len(method) != 1 or name not in ("random", "top_k") or type(number) is not int or not 1 <= number <= 10**6:
        raise ValueError(f"method: {dict(method)} is neither {{'random': draws}} nor {{'top_k': k}}, numbers from 1 on")
    if name == "random":
        return RandomSampling(number, vocab)
    return TopK(number, vocab, dtype) if number < vocab else FullDistribution(vocab, dtype)


def _stored(values: Tensor, dtype: str) -> np.ndarray:
    """Return log-probabilities as they are stored; those that float16 cannot hold are those of nothing."""
    return values.clamp(min=torch.finfo(torch.float16).min).cpu().numpy().astype(DTYPES[dtype])


def check_losses(record: Record, losses: Iterable[str], temperature: float) -> None:
    """Refuse losses and a temperature that a way of storing outputs cannot serve.

    Args:
        record (`Record`): How outputs are stored.
        losses (`Iterable[str]`): Names, as in `DistillationArguments`.
        temperature (`float`): Of the distillation; only the whole vocabulary can be had at another than 1.

    Raises:
        ValueError: naming the first loss that cannot be had, and what to do.
    """
    for name in losses:
        if name == CROSS_ENTROPY:
            continue
        if function_of(name) is None:
            raise ValueError(f"losses: {name} reads the teacher's states, which no cache holds: leave it out, or the cache")
        if record.losses is not None and name not in record.losses:
            raise ValueError(f"losses: {name} cannot be had from random draws, unbiased for {record.losses[0]} alone: "
                             "use that, or cache with method top_k")  # fmt: skip
    if temperature != 1 and not record.is_full_vocab:
        raise ValueError(
            f"temperature: {temperature}, but a cache of some tokens is of temperature 1; set that, or use no cache"
        )
