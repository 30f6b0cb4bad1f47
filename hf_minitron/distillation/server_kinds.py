"""The kinds of servers that say what follows every token of a prompt, and how each is asked."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Post = Callable[[str, dict], Any]
Table = Mapping[int, float]  # tokens and their log-probabilities


def _vllm(post: Post, model: str, ids: list[int], places: Sequence[int], k: int) -> list[Table]:
    asked = {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": k}
    tables = post("v1/completions", asked)["choices"][0]["prompt_logprobs"]
    found = [{int(token): entry["logprob"] for token, entry in (table or {}).items()} for table in tables]
    return _after(places, ids, found, [[*table] for table in found])


def _sglang(post: Post, model: str, ids: list[int], places: Sequence[int], k: int) -> list[Table]:
    asked = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    meta = post("generate", asked | {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": k})["meta_info"]
    found = [{token: logprob for logprob, token, *_ in table or ()} for table in meta["input_top_logprobs"]]
    return _after(places, ids, found, [[token] for _, token, *_ in meta["input_token_logprobs"]])


def _after(places: Sequence[int], ids: list[int], found: list[Table], read: list[list[int]]) -> list[Table]:
    """Return what is said of the token after each place, of tables that stand beside the tokens that they are of."""
    if len(found) != len(ids) or any(ids[place + 1] not in read[place + 1] for place in places):
        raise ValueError(f"it has read other tokens than the {len(ids)} it was sent")
    return [found[place + 1] for place in places]


def _llama_cpp(post: Post, model: str, ids: list[int], places: Sequence[int], k: int) -> list[Table]:
    """Ask about one place after another: it says nothing of a prompt, but keeps what it has computed of its beginning.

    What it generates is not used. It is biased to be an "a", which leaves the probabilities as they are: of a token that is a
    part of a character the server gives none.
    """
    how = {"n_predict": 1, "n_probs": k, "temperature": -1, "cache_prompt": True, "logit_bias": [["a", 1e4]]}
    tables = []
    for place in places:
        answer = post("completion", {"prompt": ids[: place + 1], **how})
        if answer["tokens_evaluated"] != place + 1:
            raise ValueError(f"it has read {answer['tokens_evaluated']} tokens instead of the {place + 1} it was sent")
        (said,) = answer["completion_probabilities"]
        tables.append({entry["id"]: entry["logprob"] for entry in said["top_logprobs"]})
    return tables


@dataclass(frozen=True)
class Kind:
    """How a kind of server is asked.

    Args:
        name (`str`): The server.
        ask (`Callable`): Returns for each place in a prompt the likeliest tokens after it.
        text (`str`): What its `/tokenize` calls the text.
        special (`str`): And the choice of special tokens at its beginning.
        slots (`str`, *optional*): Where it says how many sequences it keeps, and how many tokens of all of them.
    """

    name: str
    ask: Callable[[Post, str, list[int], Sequence[int], int], list[Table]]
    text: str = "prompt"
    special: str = "add_special_tokens"
    slots: str | None = None


# By whom `/v1/models` says that it is owned by.
KINDS = {
    "vllm": Kind("vLLM", _vllm),
    "sglang": Kind("SGLang", _sglang),
    "llamacpp": Kind("llama.cpp", _llama_cpp, "content", "add_special", "props"),
}
