"""What libraries below say went wrong, in one line."""


def one_line(error: BaseException) -> str:
    """Return an error's text on one line, or its kind when it has none."""
    return " ".join(str(error).split()) or type(error).__name__
