"""An answer ends in Foundry Local where the checkpoint's turn ends, whatever its configs name."""

import itertools
from pathlib import Path

import pytest

from slmops.core.settings import Settings
from slmops.foundry.register import register
from tests import making, tiny

pytestmark = pytest.mark.integration


def test_a_turn_ends_where_the_chat_template_ends_it(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    newline, *said = (tokenizer(text)["input_ids"][-1] for text in "\nABCXYZ")
    path = [newline, *said[:3], 2, *said[3:], 0]  # after "assistant\n": ABC<|im_end|>XYZ<|endoftext|>
    model = tiny.chain(tmp_path / "chain", dict(itertools.pairwise(path)), eos_token_id=0, pad_token_id=0)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(model)
    asked, settings = making.job(model), Settings(home=tmp_path / "home")
    made = making.variant("fp32", asked, settings)
    assert register(made, "chain", asked, settings).answer == "ABC"
