"""What went wrong, in one line that repeats no access token."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

# Access tokens and keys, by the forms of those who issue them: the Hub, GitHub, GitLab, OpenAI and others, AWS, Google, Slack
TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{50,}"
    r"|glpat-[\w-]{20,}|sk-[\w-]{32,}|AKIA[0-9A-Z]{16}(?![0-9A-Z])|AIza[\w-]{35}|xox[abeprs]-[\w-]{20,})"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)

RETRYABLE = (408, 429, 500, 502, 503, 504)  # what a server answers that may be over in a while


class RecipeError(ValueError):
    """A recipe or an override that cannot be run."""


def one_line(error: BaseException) -> str:
    """Return an error's text on one line, or its kind when it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def told(where: str = "") -> Iterator[None]:
    """Make one line of whatever a user's input sets off before any work is begun, in the libraries below, too.

    Raises:
        RecipeError: with where it was, and what.
    """
    try:
        yield
    except RecipeError:
        raise
    except (ValueError, OSError) as error:
        raise RecipeError(f"{where}{one_line(error)}") from error
    except Exception as error:
        raise RecipeError(f"{where}{type(error).__name__}: {one_line(error)}") from error
