"""What llama.cpp does, through llama-cpp-python, which is optional: quantizing GGUF files, reading them."""

import ctypes
import functools
from collections.abc import Callable, Mapping, Sequence
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
        llama_cpp.llama_backend_init()
        self.most_tokens, self.context = None, None
        self.version = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"
        loading = llama_cpp.llama_model_default_params()
        loading.n_gpu_layers = 0
        loading.use_extra_bufts = False  # weights stay as the file has them: those laid out anew for AMX crash some processors
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
        if self.model:
            reading = llama_cpp.llama_context_default_params()
            reading.n_ctx = reading.n_batch = reading.n_ubatch = context
            reading.n_threads = reading.n_threads_batch = torch.get_num_threads()
            reading.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
            self.context = llama_cpp.llama_init_from_model(self.model, reading)
        if not self.context:
            self.close()
            raise ValueError(f"llama.cpp did not load {path.name}")
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Return the logits after every token, shape `(tokens, vocab)`."""
        import llama_cpp

        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, True
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        failed = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if failed:
            raise ValueError(f"llama.cpp did not read {len(tokens)} tokens (code {failed})")
        shape = len(tokens), llama_cpp.llama_vocab_n_tokens(self.vocab)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), shape).copy()

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with those that begin and end it."""
        return self._tokens(text, edges=True)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of a chat in the template that the file holds, up to where the answer begins."""
        import llama_cpp
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        words = {"bos_token": self._text_of(llama_cpp.llama_vocab_bos), "eos_token": self._text_of(llama_cpp.llama_vocab_eos)}
        made = Jinja2ChatFormatter(template=llama_cpp.llama_model_chat_template(self.model, None).decode(), **words)
        return self._tokens(made(messages=list(messages)).prompt, edges=False)

    def _tokens(self, text: str, edges: bool) -> list[int]:
        import llama_cpp

        data = text.encode()
        found = (llama_cpp.llama_token * (len(data) + 8))()  # a token is a byte of it, or more, or one that begins or ends it
        return found[: llama_cpp.llama_tokenize(self.vocab, data, len(data), found, len(found), edges, True)]

    def _text_of(self, special: Callable[[Any], int]) -> str:
        """Return what a special token is in a text; nothing where there is none."""
        import llama_cpp

        if (token := special(self.vocab)) < 0:
            return ""
        text = ctypes.create_string_buffer(256)
        return text.raw[: llama_cpp.llama_token_to_piece(self.vocab, token, text, len(text), 0, True)].decode()

    def close(self) -> None:
        """Free its memory."""
        import llama_cpp

        if self.context:
            llama_cpp.llama_free(self.context)
        if self.model:
            llama_cpp.llama_model_free(self.model)
        self.model = self.context = None


def _be_quiet() -> None:
    """Keep what llama.cpp logs off the terminal; errors are told by those who call it."""
    import llama_cpp

    llama_cpp.llama_log_set(_silence(), ctypes.c_void_p(0))


@functools.cache
def _silence() -> Any:
    """Return what llama.cpp calls with its messages, as long as the process lives."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)
