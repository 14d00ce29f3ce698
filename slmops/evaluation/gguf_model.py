"""A GGUF file in llama.cpp, by way of its C interface, with its own defaults. For child processes only."""

import ctypes
import logging
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Threads that sleep while they wait, as our other children want them, decode at a third of llama.cpp's speed. Its
# OpenMP reads this when it is loaded.
os.environ.pop("OMP_WAIT_POLICY", None)

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from slmops.core import machine
from slmops.core.errors import EvaluationError
from slmops.evaluation import prompts

UBATCH = 512  # llama.cpp's default: so many tokens of a prompt are computed at once

logging.getLogger("llama-cpp-python").setLevel(logging.WARNING)  # llama.cpp has a line for each tensor of a graph


class GgufModel:
    """One model with one sequence of at most ``context`` tokens, on all physical cores that this process may use.

    With ``exact``, keys and values are kept in fp32, which llama.cpp keeps in fp16 by default.
    """

    def __init__(self, file: Path, context: int, *, exact: bool = False) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(bytes(file), llama_cpp.llama_model_default_params())
        how = llama_cpp.llama_context_default_params()
        how.n_ctx = how.n_batch = max(context, UBATCH)
        how.n_ubatch = UBATCH
        how.n_threads = how.n_threads_batch = machine.physical_cores()
        if exact:
            how.type_k = how.type_v = llama_cpp.GGML_TYPE_F32
            how.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = self._model and llama_cpp.llama_init_from_model(self._model, how)
        if not self._context:
            raise EvaluationError(f"llama.cpp cannot load {file}.")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def logits(self, ids: NDArray[Any]) -> NDArray[np.float32]:
        """Logits of shape (tokens, vocabulary) for one sequence ``ids`` of shape (tokens,)."""
        self.forget()
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for at, token in enumerate(ids.tolist()):
            batch.token[at], batch.pos[at], batch.logits[at] = token, at, True
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, 0
        self._decode(batch)
        llama_cpp.llama_batch_free(batch)
        found = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (len(ids), self._vocabulary)).copy()

    def likeliest(self, ids: list[int]) -> int:
        """Add tokens to the sequence; returns the likeliest next one."""
        kept = (ctypes.c_int32 * len(ids))(*ids)  # the batch only points there
        self._decode(llama_cpp.llama_batch_get_one(kept, len(ids)))
        found = llama_cpp.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(found, (self._vocabulary,)).argmax())

    def forget(self) -> None:
        """Begin a new sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), False)

    def close(self) -> None:
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def _decode(self, batch: Any) -> None:
        if (status := llama_cpp.llama_decode(self._context, batch)) != 0:
            raise EvaluationError(f"llama.cpp cannot compute {batch.n_tokens} tokens: status {status}.")


class GgufChat:
    """A file with the tokenizer and the chat template of its checkpoint, which lie in ``folder``."""

    def __init__(self, file: Path, folder: Path, context: int) -> None:
        self._file, self._context, self._encode = file, context, prompts.encoder(folder)

    def load(self) -> None:
        self._model = GgufModel(self._file, self._context)

    def unload(self) -> None:
        self._model.close()

    def ask(self, text: str, max_tokens: int) -> SimpleNamespace:
        """Answer greedily, up to the limit. Rendering and tokenizing count, as they do in a runtime.

        The figures are named as those of :class:`slmops.foundry.runtime.TimedReply`.
        """
        started = time.perf_counter()
        ids = next_ids = self._encode(text)
        self._model.forget()
        stamps = []
        for _ in range(max_tokens):
            next_ids = [self._model.likeliest(next_ids)]
            stamps.append(time.perf_counter() - started)
        tokens = {"prompt_tokens": len(ids), "completion_tokens": max_tokens}
        return SimpleNamespace(**tokens, first_s=stamps[0], last_s=stamps[-1], total_s=stamps[-1])
