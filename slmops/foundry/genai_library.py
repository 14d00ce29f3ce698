"""Tokenizer and chat templates of the library that Foundry Local serves with, through its C interface; no weights.

For child processes only: the process must not hold the Python package onnxruntime_genai, which is another version.
"""

import ctypes
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_bool, c_char_p, c_int32, c_size_t, c_void_p
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from slmops.core.errors import PrerequisiteError

_FUNCTIONS = (
    *("CreateTokenizerFromPath", "CreateSequences", "TokenizerEncode", "TokenizerDecode"),
    *("TokenizerApplyChatTemplate", "CreateTokenizerStream", "TokenizerStreamDecode"),
)
# What the runtime needs beside a tokenizer to load it.
_DECODER = {"filename": "none.onnx", "head_size": 8, "hidden_size": 8, "num_attention_heads": 1}
_DECODER |= {"num_hidden_layers": 1, "num_key_value_heads": 1, "inputs": {}, "outputs": {}}
_MODEL = {"type": "llama", "context_length": 8, "vocab_size": 8, "bos_token_id": 1, "eos_token_id": 1}
_CONFIG = {"model": {**_MODEL, "pad_token_id": 1, "decoder": _DECODER}, "search": {}}


class LibraryError(Exception):
    """What the runtime said; its first line."""


class RuntimeTokenizer:
    def __init__(self, folder: Path) -> None:
        """Load it; ``folder`` holds nothing but its files, and gets a genai_config.json."""
        (folder / "genai_config.json").write_text(json.dumps(_CONFIG), encoding="utf-8")
        # The one has the other's symbols.
        ctypes.CDLL(str(_library("onnxruntime", "capi", "*onnxruntime.*")), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(_library("onnxruntime_genai_core", "bin", "*onnxruntime-genai.*")))
        for name in _FUNCTIONS:
            getattr(self._library, f"Oga{name}").restype = c_void_p
        self._library.OgaResultGetError.restype = c_char_p
        self._library.OgaSequencesGetSequenceCount.restype = c_size_t
        self._library.OgaSequencesGetSequenceData.restype = POINTER(c_int32)
        self._tokenizer = self._made("CreateTokenizerFromPath", str(folder).encode())

    def encode(self, text: str) -> list[int]:
        """The ids of a text; the runtime adds none, as transformers with ``add_special_tokens=False``."""
        sequences = self._made("CreateSequences")
        self._call("TokenizerEncode", self._tokenizer, text.encode(), sequences)
        count = self._library.OgaSequencesGetSequenceCount(sequences, c_size_t(0))
        ids = list(self._library.OgaSequencesGetSequenceData(sequences, c_size_t(0))[:count])
        self._library.OgaDestroySequences(sequences)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        with self._text("TokenizerDecode", self._tokenizer, (c_int32 * len(ids))(*ids), c_size_t(len(ids))) as text:
            return text.decode(errors="replace")

    def stream(self, ids: Sequence[int]) -> str:
        """The same token by token, as an answer is."""
        stream, parts = self._made("CreateTokenizerStream", self._tokenizer), []
        for each in ids:
            part = c_void_p()  # belongs to the stream
            self._call("TokenizerStreamDecode", stream, c_int32(each), byref(part))
            parts.append(ctypes.string_at(part.value or 0))
        self._library.OgaDestroyTokenizerStream(stream)
        return b"".join(parts).decode(errors="replace")

    def render(self, template: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None) -> str:
        """Render a conversation up to where the answer begins."""
        given = [json.dumps(each).encode() if each is not None else None for each in (messages, tools)]
        asked = (self._tokenizer, template.encode(), *given, c_bool(True))
        with self._text("TokenizerApplyChatTemplate", *asked) as rendered:
            return rendered.decode()

    def _call(self, name: str, *arguments: object) -> None:
        if result := getattr(self._library, f"Oga{name}")(*arguments):
            said = self._library.OgaResultGetError(c_void_p(result)).decode(errors="replace")
            self._library.OgaDestroyResult(c_void_p(result))
            raise LibraryError(said)

    def _made(self, name: str, *arguments: object) -> c_void_p:
        made = c_void_p()
        self._call(name, *arguments, byref(made))
        return made

    @contextmanager
    def _text(self, name: str, *arguments: object) -> Iterator[bytes]:
        text = self._made(name, *arguments)
        yield ctypes.string_at(text.value or 0)
        self._library.OgaDestroyString(text)


def _library(package: str, folder: str, pattern: str) -> Path:
    spec = find_spec(package)
    places = spec.submodule_search_locations if spec else None
    for found in sorted(Path(places[0], folder).glob(pattern)) if places else ():
        if {".so", ".dylib", ".dll"} & set(found.suffixes):
            return found
    raise PrerequisiteError(f"The package {package} has no library.", "Install the project's requirements again.")
