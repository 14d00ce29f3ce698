"""Checkpoints asked of the runtime's own library before anything is converted: mended, counted or refused."""

import json
import string
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from slmops.checkpoints import chat_template, source
from slmops.core.errors import CheckpointError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.foundry import agreement
from tests import tiny
from tests.chat_templates import text_of
from tests.making import no_download

TURN = "{{ '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}"


def each(of_message: str) -> str:
    """A template that does this and then writes ``c`` for each message."""
    return (
        f"{{% for m in messages %}}{{% set c = m.content %}}{of_message}{TURN}{{% endfor %}}"
        "{{ '<|im_start|>assistant\n' }}"
    )


def before(text: str) -> str:
    return text + tiny.CHATML


# Name: the template, and what the refusal names; None: it is rewritten; "": it may stay as it is.
TEMPLATES: dict[str, tuple[str, str | None]] = {
    "zephyr": (
        "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
        "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        None,
    ),
    "indented": (
        "{% for m in messages %}\n  {% if true %}\n <{{ m.role }}>\n{{ m.content }}\n {% endif %}\n{% endfor %}\n\n\n",
        None,
    ),
    "text in text": (each("{% if '[/think]' in c %}{% set c = c.split('[/think]')[-1] %}{% endif %}"), None),
    "text not in text": (each("{% if m.role == 'user' and '/quiet' not in c %}loud {% endif %}"), None),
    "tools are none": (before("{% if tools is not none %}{{ 'Tools: ' ~ tools }}{% endif %}"), None),
    "no documents": (before("{% if documents is not none %}<docs>{% endif %}"), None),
    "pad": (before("{{ pad_token }}"), None),
    "escape": (before("{{ '\\u00e5' }}"), None),
    "raw": (before("{% raw %}{{ x }}{% endraw %}"), None),
    "replace": (each("{% set c = c.replace('/think', '').rstrip() | replace('a', 'o') %}"), None),
    "first": (before("{% set f = messages | first %}{{ f.content }}"), None),
    "count": (each("{{ c.count('\\r') }}"), "Unknown method: count. In: {{ c.count("),
    "upper": (each("{{ m.role | upper }}"), "m.role|upper"),
    "in some only": (each("{% if c == 'Bye' %}{{ c.upper() }}{% endif %}"), "Unknown method: upper"),
    "of a name": (each("{% set t = '/quiet' %}{% if t in c %}quiet {% endif %}"), "where transformers writes"),
    "recursive": ("{% for m in messages recursive %}{{ m.content }}{% endfor %}", "recursive loop"),
    "qwen3": (text_of("qwen3"), None),
    "chatml": (tiny.CHATML, ""),
    **{name: (text_of(name), "") for name in ("smollm2", "llama3.2", "gemma2", "phi3", "mistral", "granite")},
}
TOKENIZERS: dict[str, str | None] = {
    # Name: what the refusal names; None: it is accepted.
    "own": None,
    "flags": None,
    "prefix": "ordinary conversation",
    "lower case": "ordinary conversation",
    "digits": None,
    "adds BOS": None,
    "runs of blanks": None,
    "blank before": None,
    "Unigram": "Unigram model",
    "WordPiece": "WordPiece model",
    "WordLevel": "WordLevel model",
    "tokenizer.model": "ordinary conversation",  # transformers puts a blank before a text without special tokens
}

IN_ONE_PROCESS = """
import json, sys
from pathlib import Path
from slmops.core.errors import SlmopsError
from slmops.foundry.agreement_worker import AgreementRequest, handle
results = {}
for name, folder, template in json.loads(sys.argv[1]):
    request = AgreementRequest(folder=folder, template=template, trust_remote_code=False, work=Path(sys.argv[2], name))
    try:
        results[name] = handle(request).model_dump()
    except SlmopsError as error:
        results[name] = {"refused": str(error)}
Path(sys.argv[2], "results.json").write_text(json.dumps(results))
"""


def _tokenizer(name: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    made = tiny.tokenizer()
    inner = made.backend_tokenizer
    if name == "flags":
        made.add_tokens([AddedToken("<left>", lstrip=True, special=True), AddedToken("word", single_word=True)])
    elif name == "prefix":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif name == "lower case":
        inner.normalizer = normalizers.Lowercase()
    elif name == "digits":
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif name == "adds BOS":
        inner.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    elif name in ("runs of blanks", "blank before"):  # as Gemma's and Mistral's
        pieces = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *string.printable, "▁", "▁▁"]
        vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
        inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "▁")], byte_fallback=True, unk_token="<unk>"))
        inner.normalizer = normalizers.Replace(" ", "▁")
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        if name == "runs of blanks":
            inner.add_tokens([AddedToken("▁▁", normalized=False)])
        else:
            inner.normalizer, inner.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        inner.add_special_tokens(["<unk>", "<end>", "<|im_start|>"])
        made = PreTrainedTokenizerFast(
            tokenizer_object=inner, unk_token="<unk>", eos_token="<end>", chat_template=tiny.CHATML
        )
    elif name != "own":
        words = {"<unk>": 0, "a": 1}
        model = {
            "Unigram": lambda: models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0),
            "WordPiece": lambda: models.WordPiece(words, unk_token="<unk>"),
            "WordLevel": lambda: models.WordLevel(words, unk_token="<unk>"),
        }[name]()
        made = PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(model), unk_token="<unk>", chat_template=tiny.CHATML
        )
    return made


def _sentencepiece(folder: Path) -> None:
    """Only a file of sentencepiece, and what says how to read it."""
    from pydoc_data import topics

    import sentencepiece

    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(list(topics.topics.values())[:20]).splitlines()),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
    )
    (folder / "tokenizer.vocab").unlink()
    said = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**said, "chat_template": tiny.CHATML}))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the worker says of each template and tokenizer; one process for all."""
    folder = tmp_path_factory.mktemp("agreement")
    asked = []
    for name in TOKENIZERS:
        if name == "tokenizer.model":
            _sentencepiece(folder / "of" / name)
        else:
            _tokenizer(name).save_pretrained(folder / "of" / name)
        asked.append((name, str(folder / "of" / name), None))
    asked += [(name, str(folder / "of" / "own"), text) for name, (text, _) in TEMPLATES.items()]
    subprocess.run([sys.executable, "-c", IN_ONE_PROCESS, json.dumps(asked), str(folder)], check=True, timeout=300)
    made: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text())
    return made


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(results: dict[str, dict[str, Any]], name: str) -> None:
    named = TEMPLATES[name][1]
    result = results[name]
    if named:
        assert named in result["refused"]
        assert "--chat-template" in result["refused"]
    else:
        assert result.get("refused") is None
        assert (result["template"] is not None) == (result["why"] is not None) == (named is None)


def test_tools_and_blanks_of_other_scripts_are_counted(results: dict[str, dict[str, Any]]) -> None:
    assert results["chatml"]["template_mismatches"] == results["qwen3"]["template_mismatches"] == []
    trimmed = results["llama3.2"]["template_mismatches"]  # | trim leaves an ideographic space to the runtime
    assert len(trimmed) == 2
    assert "\u3000" in trimmed[0]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers(results: dict[str, dict[str, Any]], name: str) -> None:
    named, result = TOKENIZERS[name], results[name]
    if named:
        assert named in result["refused"]
        assert "byte-level BPE" in result["refused"]
    else:
        assert result.get("refused") is None
        assert bool(result["tokenizer_mismatches"]) == (name in ("flags", "runs of blanks"))


def test_a_job_takes_the_rewritten_template(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny.make("llama", tmp_path / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATES["zephyr"][0])
    settings, job = Settings(home=tmp_path / "home"), Job(model=str(folder))

    def resolve() -> Any:
        agree = partial(agreement.agree, job=job, settings=settings)
        return source.resolve(job, settings, download=no_download, agree=agree)

    with caplog.at_level("INFO", "slmops"):
        checkpoint = resolve()
    own, staged = chat_template.load(folder), chat_template.load(checkpoint.path)
    assert checkpoint.path.is_relative_to(settings.checkpoints)
    assert own.text == TEMPLATES["zephyr"][0] != staged.text
    assert "rewritten for Foundry Local" in caplog.text
    assert (checkpoint.tokenizer_mismatches, checkpoint.template_mismatches) == (0, 0)
    assert not [path for path in settings.home.iterdir() if path.name.startswith(".agreement")]
    (folder / "chat_template.jinja").write_text(TEMPLATES["upper"][0])
    with pytest.raises(CheckpointError, match="upper"):
        resolve()


def test_a_runtime_that_dies_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "TIMEOUT_S", 0.1)
    with pytest.raises(CheckpointError, match="does not survive") as raised:
        agreement.agree(tmp_path, None, Job(model="x"), Settings(home=tmp_path / "home"))
    assert "--chat-template" in (raised.value.fix or "")
