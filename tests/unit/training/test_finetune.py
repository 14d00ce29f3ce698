"""The names of a fine-tuning and of a retraining's input, what is learned and saved; how a retraining ends."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from slmops.core.values import Measurement
from slmops.selection import policy
from slmops.training import finetune, tokens_worker
from slmops.training import finetune_worker as worker
from slmops.training.values import DEFAULT_POLICY, LoraSettings, LossPoint, Retrain, Retrained, Stopped, TrainingData
from tests import values
from tests.retraining import checked, conversation

VERSIONS = {"torch": "2", "transformers": "5", "peft": "0.1", "accelerate": "1", "mlflow": "3"}


@pytest.fixture
def data(tmp_path: Path) -> TrainingData:
    for name in ("train", "validation", "evaluation"):
        (tmp_path / f"{name}.jsonl").write_text(name)
    return checked(tmp_path)


def test_a_fine_tuning_is_named_by_what_changes_its_result(data: TrainingData) -> None:
    def key(base: str = "b", versions: dict[str, str] | None = None, training: Any = None, **changes: Any) -> str:
        changed = data.model_copy(update=changes)
        return finetune.key(base, changed, LoraSettings(**(training or {})), {**VERSIONS, **(versions or {})})

    assert key() == key(source="elsewhere", evaluation_digest="0", versions={"mlflow": "4"})
    others = [key(base="c"), key(digest="c" * 64), key(train=data.evaluation), key(validation=data.evaluation)]
    others += [key(training={"seed": 1}), key(training={"minutes": 5.0})]
    others += [key(versions={name: "9"}) for name in finetune.TRAINING_PACKAGES]
    assert len({key(), *others}) == len(others) + 1


def test_whatever_could_change_the_result_of_a_retraining_changes_its_digest(tmp_path: Path) -> None:
    evaluation, one, other, matcher = (tmp_path / name for name in ("a.jsonl", "one.toml", "other.toml", "matcher.py"))
    evaluation.write_text("a question")
    one.write_text('objective = "smallest"')
    other.write_text('objective = "fastest"')
    matcher.write_text("def same(expected, answer): return True")

    def digest(base: str = "c", items: str = "d", file: Path = evaluation, **changes: Any) -> str:
        asked = Retrain(**{"model": "org/tiny", "data": "data.jsonl", **changes})
        return finetune.input_digest(asked, values.checkpoint(digest=base), items, file)

    copy = Path(shutil.copy(evaluation, tmp_path / "copy.jsonl"))
    elsewhere = {"data": "elsewhere", "evaluation_set": copy, "name": "other"}
    assert digest() == digest(file=copy, serve=True, watch_s=1, approval=True, **elsewhere)
    changes: list[dict[str, Any]] = [{}, {"training": LoraSettings(seed=1)}, {"precision": ["int4"]}, {"quick": True}]
    changes += [{"policy": one}, {"policy": other}, {"leak_similarity": 0.9}, {"base": "e"}, {"items": "e"}]
    digests = [digest(**change) for change in [*changes, {"matcher": f"{matcher}:same"}]]
    matcher.write_text("def same(expected, answer): return False")
    digests.append(digest(matcher=f"{matcher}:same"))
    evaluation.write_text("another question")
    digests.append(digest())
    assert len(set(digests)) == len(digests)


def test_only_points_are_passed_on_and_a_receiver_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    point = LossPoint(step=3, epoch=0.5, seconds=1.0, train_loss=2.0)
    receiver = mock.Mock(side_effect=[None, ConnectionError("the server is away")])
    for text in ("Loading weights: 100%", *[worker.POINT + point.model_dump_json()] * 2):
        finetune._pass_on(text, receiver)
    finetune._pass_on(worker.POINT + "{broken", receiver)
    assert receiver.mock_calls == [mock.call(point)] * 2
    assert "the server is away" in caplog.text


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
            tokens_worker.answer_spans(MESSAGES, render)


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
    messages: list[dict[str, str]], render: tokens_worker.Render, expected: list[str]
) -> None:
    text, spans = tokens_worker.answer_spans(messages, render)
    assert text == render(messages, False)
    assert [text[start:end] for start, end in spans] == expected


def test_tokens_are_learned_that_begin_in_an_answer() -> None:
    offsets = [(0, 2), (2, 5), (5, 6), (6, 9), (9, 9), (9, 12)]
    assert tokens_worker.labels([1, 2, 3, 4, 5, 6], offsets, [(5, 9)]) == [-100, -100, 3, 4, -100, -100]
    assert tokens_worker.labels([1, 2, 3, 4, 5, 6], offsets, [(0, 2), (9, 12)]) == [1, -100, -100, -100, 5, 6]
    assert tokens_worker.labels([1, 2], [(0, 4), (4, 5)], [(3, 5)]) == [-100, 2]  # one that begins before it


def save(folder: Path, step: int, best: int, stopped: Stopped | None = None) -> Path:
    state = worker.state_folder(folder, step)
    state.mkdir(parents=True)
    (state / "adapter_model.safetensors").write_bytes(b"weights")
    (state / "trainer_state.json").write_text(json.dumps({"best_global_step": best}))
    worker.mark_whole(state, 60.0 + step, stopped)
    return state


def test_the_newest_by_number_is_resumed_if_the_best_weights_are_there(tmp_path: Path) -> None:
    assert worker.resumable(tmp_path) is None
    for step in (5, 10, 100):
        save(tmp_path, step, best=5, stopped="patience" if step == 100 else None)
    assert (found := worker.resumable(tmp_path)) is not None
    assert (found[0], found[1].seconds, found[1].stopped) == (100, 160.0, "patience")
    (worker.state_folder(tmp_path, 5) / worker.WHOLE).unlink()
    assert worker.resumable(tmp_path) is None
    assert not (tmp_path / worker.STATES).exists()


@pytest.mark.parametrize("file", [worker.WHOLE, "adapter_model.safetensors"])
@pytest.mark.parametrize("harm", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:4])])
def test_half_a_state_is_removed(tmp_path: Path, file: str, harm: Callable[[Path], object]) -> None:
    whole, half = save(tmp_path, 5, best=5), save(tmp_path, 10, best=5)
    harm(half / file)
    assert (found := worker.resumable(tmp_path)) is not None
    assert (found[0], whole.exists(), half.exists()) == (5, True, False)


def test_points_after_the_saved_state_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "losses.jsonl"
    points = [LossPoint(step=step, epoch=step / 4, seconds=step) for step in (1, 2, 2, 3)]
    lines = [point.model_dump_json() + "\n" for point in points]
    file.write_text("".join(lines) + '{"step":4,')
    for step, kept in ((3, 4), (2, 3), (-1, 0)):
        worker.truncate(file, step)
        assert file.read_text() == "".join(lines[:kept])


def test_the_learning_rate_rises_shortly_and_falls_to_zero_with_a_budget_by_time() -> None:
    clock = worker._Clock(0.0, LoraSettings(), steps=99)
    shares = [clock.rate(step) for step in range(-1, 100)]
    assert shares[0] == 0
    assert max(shares) == shares[5] > 0.99
    assert shares[:6] == sorted(shares[:6])
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert shares[-1] == clock.rate(149) == pytest.approx(0)
    start, early, late, over = (worker._Clock(before, LoraSettings(minutes=1), 10) for before in (0.0, 6.0, 57.0, 60.0))
    assert start.rate(0) > 0
    assert early.rate(9) > 0.9
    assert late.rate(0) < 0.01
    assert (late.over, over.over, worker._Clock(1e6, LoraSettings(), 10).over) == (False, True, False)


def test_a_fine_tuning_may_not_make_it_worse() -> None:
    low, high = (Measurement(value=value, unit="1") for value in (0.4, 0.5))
    assert "0.50 before it, 0.40 after it" in str(finetune.worse(high, low))
    assert finetune.worse(high, high) is finetune.worse(low, high) is None


def test_the_policy_that_ships_can_be_read() -> None:
    gates = [f"{gate.metric} to {gate.to}" for gate in policy.load(DEFAULT_POLICY).gates]
    assert gates == ["accuracy to baseline", "perplexity to baseline", "accuracy to champion"]


def test_the_text_has_accuracy_and_times() -> None:
    base = Measurement(value=0.1, unit="1", samples=60, low=0.05, high=0.2)
    accuracy = {"base": base, "int4": Measurement(value=1.0, unit="1", samples=1)}
    told = {"outcome": "promoted", "detail": "It is good.", "accuracy": accuracy, "seconds": {"fine-tune": 61.6}}
    lines = Retrained(model="bot", input_digest="a", run_id="r", url="-", **told).text.splitlines()
    assert lines[0] == "promoted: It is good."
    said = [" ".join(line.split()) for line in lines if line.startswith(("base", "int4", "fine-tune"))]
    assert said == ["base 0.10 [0.05, 0.20] 60", "int4 1.00 1", "fine-tune 62"]
