"""Patience with the Hub, and words for what it answers when patience does not help.

huggingface_hub waits and tries again by itself where it uploads blobs; where it creates, looks and commits it does not.
"""

import json
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import get_token
from huggingface_hub.errors import HTTPError
from huggingface_hub.utils import parse_ratelimit_headers

from hf_minitron.errors import RETRYABLE

T = TypeVar("T")
WAITS = (2, 8, 30)  # seconds between attempts
LONGEST_WAIT = 300  # seconds; the Hub counts requests in windows of five minutes (https://huggingface.co/docs/hub/rate-limits)
REFUSALS = {
    400: "The Hub refuses the request",
    401: "The Hub does not accept the token. Log in again with `hf auth login --force`, or renew HF_TOKEN, which comes first",
    402: "The Hub wants to be paid before {repo_id} takes more: see the storage and the plan of its owner "
         "(https://huggingface.co/settings/billing), or publish a public model",
    403: "The token may not write to {repo_id}. Use a token with write access (https://huggingface.co/settings/tokens) of a "
         "member of its owner, or offer the model with create_pr",
    404: "The Hub has no {repo_id} that this token may see. If you can see it, use a token that can; if you cannot, its name "
         "is taken, so choose another repo_id",
    409: "{repo_id} is in use: something else writes to it now. Push again in a while",
    413: "The Hub takes no request as large as this one for {repo_id}: save the weights in smaller shards",
    412: "{repo_id} was changed during the push. Push again",
    507: "The storage of the owner of {repo_id} is full: delete or buy some (https://huggingface.co/settings/billing)",
    429: "The Hub counts too many requests{wait}. Push again later: what has arrived is not sent again",
}  # fmt: skip
logger = logging.getLogger(__name__)


def retry(call: Callable[[], T], repo_id: str, done: str = "") -> T:
    """Call until it works, with waits between attempts, as long as the reason may pass.

    Args:
        call (`Callable`): What can be called again without harm.
        repo_id (`str`): The repository it is about, for messages.
        done (`str`, *optional*): What has been reached before, for messages.

    Raises:
        ValueError: for what will not pass: no permission, a wrong token or name.
        OSError: for what has not passed: no connection, a failing Hub, a long wait that it asks for.
    """
    for wait in (*WAITS, None):
        try:
            return call()
        except (HTTPError, RuntimeError, json.JSONDecodeError) as caught:  # the last: a proxy's page instead of an answer
            error, reason = caught, _root_cause(caught)
        status = status_of(reason)
        asked = _retry_after(reason)
        passing = status in RETRYABLE or (status is None and not isinstance(reason, RuntimeError))
        tried = reason is not error  # by a thread that uploads, which huggingface_hub makes patient itself
        if wait is None or tried or not passing or asked > LONGEST_WAIT:
            message = done + _explained(reason, status, repo_id, asked) + f"\n{scrub(reason)}"
            raise OSError(message) if passing or status is None else ValueError(message)
        logger.warning("%s; once more in %d s", scrub(reason).splitlines()[0], max(wait, asked))
        time.sleep(max(wait, asked))
    raise AssertionError  # the last attempt returns or raises


def status_of(error: Exception) -> int | None:
    """Return the HTTP status that an error tells of, `None` when there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def scrub(error: Exception) -> str:
    """Return an error's text without the user's token, should the other side have repeated it."""
    token, text = get_token(), str(error).strip() or type(error).__name__
    return text.replace(token, "<token>") if token else text


def _root_cause(error: Exception) -> Exception:
    """Return what is behind the RuntimeError in which threads that upload wrap an answer."""
    inner = error
    while not isinstance(inner, HTTPError) and inner.__cause__ is not None:
        inner = inner.__cause__
    return inner if isinstance(inner, HTTPError) else error


def _retry_after(error: Exception) -> int:
    """Return for how many seconds the Hub asks to wait."""
    if status_of(error) not in RETRYABLE:
        return 0
    headers = error.response.headers
    limit, seconds = parse_ratelimit_headers(headers), headers.get("Retry-After", "")
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    return int(seconds) if seconds.isdigit() else 0


def _explained(error: Exception, status: int | None, repo_id: str, asked: int) -> str:
    if status in REFUSALS:
        wait = f" and asks to wait {asked} seconds" if asked else ""
        return f"{REFUSALS[status].format(repo_id=repo_id, wait=wait)} ({status})."
    if status is not None:
        return f"The Hub fails ({status}). Push again later: what has arrived is not sent again."
    return "The Hub cannot be reached, or something answers in its place. Push again: what has arrived is not sent again."
