"""Which tokens are learned, which saved states are whole, and the course of the learning rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from slmops.training import finetune_worker as worker
from slmops.training import masking, resume
from slmops.training.values import LoraSettings, LossPoint, Stopped
from tests.training_data import conversation

MESSAGES = conversation("Hi", "Hello", "Bye", " So long \n", system="Be short.")


def chatml(messages: Sequence[dict[str, str]], opened: bool) -> str:
    turns = "".join(f"<|{message['role']}|>{message['content']}<|end|>\n" for message in messages)
    return turns + "<|assistant|>" * opened


def only_the_last(messages: Sequence[dict[str, str]], opened: bool) -> str:
    """Like templates that remove the thoughts from earlier turns."""
    *earlier, last = messages
    thoughts = "<think></think>" * (last["role"] != "user")
    return "|".join([*(one["content"] for one in earlier), thoughts + last["content"]]) + "|" * opened


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
    for render in (
        only_the_last,
        lambda messages, opened: f"{len(messages)}{chatml(messages, opened)}",
        lambda messages, opened: chatml(messages, opened) if len(messages) < 3 or opened else "Something else",
    ):
        with pytest.raises(ValueError, match="turn"):
            masking.answer_spans(MESSAGES, render)


@pytest.mark.parametrize(
    ("messages", "render", "expected"),
    [
        (MESSAGES, chatml, ["Hello<|end|>", " So long \n<|end|>"]),
        (MESSAGES[:4], chatml, ["Hello<|end|>"]),
        (MESSAGES[:2], chatml, []),
        (MESSAGES[1:3], only_the_last, ["<think></think>Hello"]),
    ],
)
def test_answers_are_learned_with_the_end_of_their_turn(
    messages: list[dict[str, str]], render: masking.Render, expected: list[str]
) -> None:
    text, spans = masking.answer_spans(messages, render)
    assert text == render(messages, False)
    assert [text[start:end] for start, end in spans] == expected


def test_tokens_are_learned_that_begin_in_an_answer() -> None:
    offsets = [(0, 2), (2, 5), (5, 6), (6, 9), (9, 9), (9, 12)]
    assert masking.labels([1, 2, 3, 4, 5, 6], offsets, [(5, 9)]) == [-100, -100, 3, 4, -100, -100]
    assert masking.labels([1, 2, 3, 4, 5, 6], offsets, [(0, 2), (9, 12)]) == [1, -100, -100, -100, 5, 6]
    assert masking.labels([1, 2], [(0, 4), (4, 5)], [(3, 5)]) == [-100, 2]  # one that begins before it


def save(folder: Path, step: int, best: int, stopped: Stopped | None = None) -> Path:
    state = resume.state_folder(folder, step)
    state.mkdir(parents=True)
    (state / "adapter_model.safetensors").write_bytes(b"weights")
    (state / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
    resume.mark_whole(state, 60.0 + step, stopped)
    return state


def test_the_newest_by_number_is_resumed_if_the_best_weights_are_there(tmp_path: Path) -> None:
    assert resume.resumable(tmp_path) is None
    for step in (5, 10, 100):
        save(tmp_path, step, best=5, stopped="patience" if step == 100 else None)
    assert (found := resume.resumable(tmp_path)) is not None
    assert (found[0], found[1].seconds, found[1].stopped) == (100, 160.0, "patience")
    (resume.state_folder(tmp_path, 5) / resume.WHOLE).unlink()
    assert resume.resumable(tmp_path) is None
    assert not (tmp_path / resume.STATES).exists()


@pytest.mark.parametrize("file", [resume.WHOLE, "adapter_model.safetensors"])
@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:4])])
def test_half_a_state_is_removed(tmp_path: Path, file: str, harm: Callable[[Path], object]) -> None:
    whole, half = save(tmp_path, 5, best=5), save(tmp_path, 10, best=5)
    harm(half / file)
    assert (found := resume.resumable(tmp_path)) is not None
    assert (found[0], whole.exists(), half.exists()) == (5, True, False)


def test_points_after_the_saved_state_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "losses.jsonl"
    points = [LossPoint(step=step, epoch=step / 4, seconds=step) for step in (1, 2, 2, 3)]
    lines = [point.model_dump_json() + "\n" for point in points]
    file.write_text("".join(lines) + '{"step":4,')
    for step, kept in ((3, 4), (2, 3), (-1, 0)):
        resume.truncate(file, step)
        assert file.read_text() == "".join(lines[:kept])


def test_the_learning_rate_rises_shortly_and_falls_to_zero() -> None:
    clock = worker._Clock(0.0, LoraSettings(), steps=99)
    shares = [clock.rate(step) for step in range(-1, 100)]
    assert shares[0] == 0
    assert max(shares) == shares[5] > 0.99
    assert shares[:6] == sorted(shares[:6])
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert shares[-1] == clock.rate(149) == pytest.approx(0)


def test_with_a_budget_the_learning_rate_goes_by_time() -> None:
    start, early, late, over = (worker._Clock(before, LoraSettings(minutes=1), 10) for before in (0.0, 6.0, 57.0, 60.0))
    assert start.rate(0) > 0
    assert early.rate(9) > 0.9
    assert late.rate(0) < 0.01
    assert (late.over, over.over, worker._Clock(1e6, LoraSettings(), 10).over) == (False, True, False)
