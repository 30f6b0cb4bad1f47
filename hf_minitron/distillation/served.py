"""A served teacher: what a server (vLLM, SGLang, llama.cpp) says of the likeliest tokens fills a cache.

Prompts are sent as token ids, so that nothing is tokenized twice. Which kind of server it is, `/v1/models` says. The key, where
it wants one, is read from the environment and goes nowhere else.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import torch
from requests.adapters import HTTPAdapter
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from urllib3.util import Retry

from hf_minitron.architecture.config import pruned_vocab, text_config
from hf_minitron.distillation.records import Arrays, TopK, record_of
from hf_minitron.distillation.server_kinds import KINDS, Post, Table
from hf_minitron.distillation.teacher import teacher_folder
from hf_minitron.errors import RETRYABLE, one_line

API_KEY = "OPENAI_API_KEY"  # as every client of such servers reads it
RETRIES, BACKOFF = 5, 1.0  # attempts after the first; seconds before the second of them, doubled from one to the next
TIMEOUT = (10, 600)  # seconds to connect, and to read an answer
PROBED = 200  # tokens, from all over a vocabulary, in the text by which tokenizers are compared


class ServedTeacher:
    """The likeliest tokens of a teacher that a server runs, for `write_cache`.

    Args:
        url (`str`): The server, such as `http://127.0.0.1:8000/v1`.

    Attributes:
        model (`str`): What the server calls its model.
        kind (`Kind`): The kind of server.

    Raises:
        ValueError: for an address that is none, a server of another kind, or one that wants another key.
        OSError: for one that cannot be reached.
    """

    def __init__(self, url: str):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"server: {url!r} is no address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password:
            raise ValueError(f"server: the address holds a user or a password; set {API_KEY} in the environment instead")
        self.root, self._key = url.rstrip("/").removesuffix("/v1"), os.environ.get(API_KEY)
        again = Retry(RETRIES, backoff_factor=BACKOFF, status_forcelist=RETRYABLE, allowed_methods=None, raise_on_status=False)
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=64, max_retries=again))
        models = self._answer("GET", "v1/models", None, lambda found: [(m["id"], m.get("owned_by")) for m in found["data"]])
        if len(models) != 1:
            names = ", ".join(name for name, _ in models) or "none"
            raise ValueError(f"server: {self.root} must serve one model, the teacher; it serves {names}")
        self.model, owner = models[0]
        if owner not in KINDS:
            known = ", ".join(kind.name for kind in KINDS.values())
            raise ValueError(f"server: {self.root} (owned_by: {owner}) is none of {known}, of which it is known how they say "
                             "what follows every token of a prompt; llama-cpp-python's says it of text alone")  # fmt: skip
        self.kind = KINDS[owner]

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a server whose model has another tokenizer, by a text of tokens from all over the vocabulary.

        Args:
            tokenizer (`PreTrainedTokenizerBase`): The teacher's.

        Raises:
            ValueError: with the first token that differs.
        """
        spread = range(0, len(tokenizer), len(tokenizer) // PROBED + 1)
        words = [tokenizer.decode([token], skip_special_tokens=True).strip() for token in spread]
        text = " ".join(word for word in words if word.isprintable() and "\ufffd" not in word)
        asked = {"model": self.model, self.kind.text: text, self.kind.special: False}
        theirs = self._answer("POST", "tokenize", asked, lambda found: [int(token) for token in found["tokens"]])
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        pairs = itertools.zip_longest(ours, theirs)
        if other := next(((number, *pair) for number, pair in enumerate(pairs) if pair[0] != pair[1]), None):
            raise ValueError("server: {} serves {} with another tokenizer than the teacher's: token {} of a text is {} here "
                             "and {} there".format(self.root, self.model, *other))  # fmt: skip

    def at_once(self, rows: int, length: int) -> int:
        """Return how many of some sequences to ask about at the same time: no more than the server keeps, where it says so.

        Args:
            rows (`int`): The sequences.
            length (`int`): Tokens of the longest.

        Raises:
            ValueError: when it does not keep one.
        """
        if self.kind.slots is None:
            return rows
        slots, context = self._room
        if length > context:
            raise ValueError(f"server: {self.root} has a context of {context:,} tokens, and a sequence has {length:,}; start "
                             f"it with -c {length} or more")  # fmt: skip
        return max(1, min(rows, slots, context // length))

    @cached_property
    def _room(self) -> tuple[int, int]:
        """The sequences that the server keeps, and the tokens of them together."""
        return self._answer("GET", self.kind.slots, None, lambda found: (
            int(found["total_slots"]), int(found["default_generation_settings"]["n_ctx"])))  # fmt: skip

    def likeliest(self, ids: list[int], places: Sequence[int], record: TopK) -> Arrays:
        """Return what a cache keeps of the tokens after some places of a sequence.

        Args:
            ids (`list[int]`): The sequence.
            places (`Sequence[int]`): Its positions.
            record (`TopK`): How many tokens are kept, and how.

        Raises:
            ValueError: for an answer that is none.
        """

        def read(post: Post) -> Arrays:
            tables = self.kind.ask(post, self.model, ids, places, record.k)
            kept = [_kept(table, record) for table in tables]
            if len(kept) != len(places):
                raise ValueError(f"{len(kept)} positions instead of {len(places)}")
            return record.stored(*map(torch.tensor, zip(*kept, strict=True)))

        return self._said(lambda: read(lambda path, asked: self._send("POST", path, asked)))

    def _answer(self, method: str, path: str, asked: dict | None, read: Callable[[Any], Any]) -> Any:
        return self._said(lambda: read(self._send(method, path, asked)))

    def _said(self, read: Callable[[], Any]) -> Any:
        """Return what is read of an answer; one line of whatever is wrong with it."""
        try:
            return read()
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, _RefusedError):
                raise
            what = f"{type(error).__name__}: {one_line(error)}" if isinstance(error, KeyError | TypeError) else one_line(error)
            raise ValueError(self._scrubbed(f"server: {self.root} gives an answer that cannot be used: {what}")) from error

    def _send(self, method: str, path: str, asked: dict | None) -> Any:
        try:
            answer = self._session.request(
                method, f"{self.root}/{path}", json=asked, auth=self._sign, timeout=TIMEOUT, allow_redirects=False
            )
        except requests.RequestException as error:
            raise OSError(self._scrubbed(f"server: no answer from {self.root} ({one_line(error)[:200]}). Start it, or mend "
                                         "its address; what has been written stays")) from error  # fmt: skip
        if answer.status_code in (401, 403):
            given = "another" if self._key else "one"
            raise _RefusedError(f"server: {self.root} wants a key ({answer.status_code}): set {given} in {API_KEY}")
        if answer.status_code in RETRYABLE:
            raise OSError(self._scrubbed(f"server: {self.root} fails ({answer.status_code}). Start the same command again "
                                         "later: it goes on"))  # fmt: skip
        if answer.status_code != 200:
            said = self._scrubbed(one_line(ValueError(answer.text))[:300])
            raise _RefusedError(f"server: {self.root}/{path} refuses ({answer.status_code}): {said}")
        return answer.json()

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Add the key; with an `auth` of its own a request takes none from a user's netrc."""
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _scrubbed(self, text: str) -> str:
        return text.replace(self._key, "<key>") if self._key else text


class _RefusedError(ValueError):
    """What the server says itself."""


def _kept(table: Table, record: TopK) -> tuple[list[int], list[float]]:
    """Return the likeliest tokens of one position, ascending, and their log-probabilities with that of all others."""
    if len(table) < record.k:
        raise ValueError(f"{len(table)} tokens of a position instead of k: {record.k}; set k lower, or start the server so "
                         "that it gives more (max-logprobs of vLLM)")  # fmt: skip
    best = sorted(table, key=lambda token: -table[token])[: record.k]
    if wrong := [token for token in best if type(token) is not int or not 0 <= token < record.vocab]:
        raise ValueError(f"token {wrong[0]!r}, and the teacher has {record.vocab:,}: it is another model")
    chances = [math.exp(table[token]) for token in best]
    if not math.isfinite(total := sum(chances)) or total > 1 + 1e-3 or max(chances) > 1 + 1e-6:
        raise ValueError(f"log-probabilities of one position whose probabilities sum to {total:.3g}")
    ids = sorted(best)
    return ids, [*(table[token] for token in ids), math.log(max(1 - total, torch.finfo(torch.float32).tiny))]


@dataclass(frozen=True)
class Served:
    """Answers of a served teacher about batches, for the recorder of `write_cache`.

    Args:
        teacher (`ServedTeacher`): The teacher.
        record (`TopK`): How its answers are stored.
    """

    teacher: ServedTeacher
    record: TopK

    def __call__(self, inputs: Mapping[str, Tensor], asked: Tensor, first: int) -> Iterator[Arrays]:
        """Yield what is kept of every row; as many rows as the server keeps are asked about at the same time."""
        rows = [row.tolist() for row in inputs["input_ids"]]
        places = [row.nonzero().flatten().tolist() for row in asked]
        with ThreadPoolExecutor(self.teacher.at_once(len(rows), len(rows[0]))) as threads:
            yield from threads.map(self.teacher.likeliest, rows, places, [self.record] * len(rows))


def served_teacher(
    server: str,
    model: PreTrainedModel | str | Path,
    method: Mapping[str, int],
    init_kwargs: dict | None = None,
    student: str | Path | None = None,
    apart: bool = False,
) -> ServedTeacher:
    """Return a teacher behind a server; refuse what it cannot answer, and one with another tokenizer.

    Args:
        server (`str`): Its address.
        model, method, init_kwargs, student: As for `write_cache`.
        apart (`bool`, *optional*): Whether attention is document-masked.

    Raises:
        ValueError: with what to change.
    """
    if not isinstance(model, str | Path):
        raise ValueError("server: give the teacher by its name, whose tokenizer is compared with the server's")
    folder = teacher_folder(model, init_kwargs)
    if not isinstance(record_of(method, text_config(AutoConfig.from_pretrained(folder)).vocab_size), TopK):
        raise ValueError(f"server: it gives the likeliest tokens alone; set method to top_k, with a k below the vocabulary, "
                         f"not {dict(method)}")  # fmt: skip
    if apart:
        raise ValueError("server: it attends to all that stands before a token, so document-masked attention cannot be had; "
                         "set cross_documents to true")  # fmt: skip
    if student is not None and pruned_vocab(AutoConfig.from_pretrained(student)):
        raise ValueError("server: it speaks of all of the teacher's tokens, and the student has some of them; leave server out")
    teacher = ServedTeacher(server)
    teacher.check_tokenizer(AutoTokenizer.from_pretrained(folder))
    return teacher
