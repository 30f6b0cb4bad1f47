"""What llama.cpp does, through llama-cpp-python, which is optional: quantizing GGUF files, reading them."""

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def quantize(source: Path, target: Path, kind: str, importance: Mapping[str, np.ndarray] | None = None) -> None:
    """Quantize a GGUF file.

    Args:
        source (`Path`): The file, in F16.
        target (`Path`): The new one; it has its name only once it is complete.
        kind (`str`): The type, such as `Q4_K_M`.
        importance (`Mapping[str, np.ndarray]`, *optional*): By the file's names of tensors, the mean square of each number that
            their rows are multiplied by.

    Raises:
        ValueError: when llama.cpp does not do it.
    """
    import llama_cpp

    _be_quiet()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = torch.get_num_threads()
    rows = {name: np.ascontiguousarray(values, np.float32) for name, values in (importance or {}).items()}
    if rows:
        entries = [
            (name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size) for name, values in rows.items()
        ]
        matrix = (llama_cpp.llama_model_imatrix_data * (len(entries) + 1))(*entries)  # the last, empty one ends it
        params.imatrix = ctypes.cast(matrix, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    unfinished = target.with_name(target.name + ".tmp")
    try:
        if llama_cpp.llama_model_quantize(str(source).encode(), str(unfinished).encode(), ctypes.byref(params)):
            raise ValueError(f"llama.cpp did not quantize {source.name} to {kind}")
        unfinished.rename(target)
    finally:
        unfinished.unlink(missing_ok=True)


class LlamaCpp:
    """A GGUF file, loaded by llama.cpp.

    Args:
        path (`Path`): The file.
        context (`int`): Tokens that it shall read at a time.

    Raises:
        ValueError: when llama.cpp does not load it.
    """

    def __init__(self, path: Path, context: int):
        import llama_cpp

        _be_quiet()
        self.most_tokens = None
        self.version = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        sizes = {"n_ctx": context, "n_batch": context, "n_ubatch": context, "n_threads": torch.get_num_threads()}
        self.model = llama_cpp.Llama(str(path), logits_all=True, verbose=False, **sizes)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits after every token, shape `(tokens, vocab)`."""
        self.model.reset()
        self.model.eval(tokens)
        return self.model.scores[: len(tokens)]

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with those that begin and end it."""
        return self.model.tokenize(text.encode(), add_bos=True, special=True)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of a chat in the template that the file holds, up to where the answer begins."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        words = {name: self.model.detokenize([id], special=True).decode() if id >= 0 else "" for name, id in
                 (("bos_token", self.model.token_bos()), ("eos_token", self.model.token_eos()))}  # fmt: skip
        made = Jinja2ChatFormatter(template=self.model.metadata["tokenizer.chat_template"], **words)
        return self.model.tokenize(made(messages=list(messages)).prompt.encode(), add_bos=False, special=True)

    def close(self) -> None:
        """Free its memory."""
        self.model.close()


def _be_quiet() -> None:
    """Keep what llama.cpp logs off the terminal; errors are told by those who call it."""
    import llama_cpp

    llama_cpp.llama_log_set(_silence(), ctypes.c_void_p(0))


@functools.cache
def _silence() -> Any:
    """Return what llama.cpp calls with its messages, as long as the process lives."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)
