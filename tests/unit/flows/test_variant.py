"""What becomes of the peers of a job on one machine, whatever happens to them."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from flows import variant as flow
from slmops.cluster.parts import MeasuredPeer
from slmops.core.errors import CheckpointError, EvaluationError, UsageError
from slmops.core.job import Job, JobContext
from slmops.core.settings import Settings
from slmops.core.values import Registration
from slmops.evaluation.speed import Peer
from tasks.prepare import plan_recipes
from tests import measured, values

QUALITY, SPEED = measured.quality(), measured.speed(measured.turn(measured.timed(0.1, 1)))
BROKEN = EvaluationError("It broke.")
NAMES = ["llama.cpp-Q8_0", "llama.cpp-Q4_K_M"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mock:
    """The stages of a job with one variant, which fails to be measured, and two peers."""
    made = Mock()
    made.convert_variant.return_value = values.variant(tmp_path)
    made.register_variant.return_value = Registration(foundry_id="tiny-int4-generic-cpu:1", path=tmp_path, answer="x")
    files = [tmp_path / f"{name}.gguf" for name in NAMES]
    for file in files:
        file.write_bytes(bytes(2_000_000))
    where: dict[str, Any] = {"folder": tmp_path, "context_length": 64}
    made.make_gguf_files.return_value = [Peer(name=file.stem, file=file, **where) for file in files]
    made.measure_speed.return_value = {"int4": BROKEN, **dict.fromkeys(NAMES, SPEED)}
    made.score_checkpoint.return_value = None
    made.score_peer.return_value = QUALITY
    monkeypatch.setattr(flow, "steps", made)
    monkeypatch.setattr(
        flow, "Earlier", lambda *_: Mock(**{"speeds.return_value": None, "qualities.return_value": None})
    )
    monkeypatch.setattr(flow, "together", lambda *_: nullcontext())
    monkeypatch.setattr(flow, "in_order", list)
    return made


def outcomes(folder: Path, peer: str | None = "llama.cpp") -> dict[str, Any]:
    settings = Settings(home=folder)
    context = JobContext(Job(model="m", peer=peer), "tiny", values.checkpoint(), settings)
    return dict(flow.make_here([values.variant(folder).recipe], context, Mock()))


def test_peers_are_measured_with_the_variants(steps: Mock, tmp_path: Path) -> None:
    found = outcomes(tmp_path)
    assert steps.measure_speed.call_args.args[2] == steps.make_gguf_files.return_value
    whole = MeasuredPeer(size_mb=2, speed=SPEED, quality=QUALITY, hardware=flow.machine.hardware())
    assert found == {"int4": BROKEN, **dict.fromkeys(NAMES, whole)}
    assert outcomes(tmp_path, None).keys() == {"int4"}


@pytest.mark.parametrize("why", ["there is no device here", None])
def test_what_has_no_device_here_is_not_timed_and_when_it_has_one_it_is(
    steps: Mock, tmp_path: Path, why: str | None
) -> None:
    registered = Registration(foundry_id="tiny-int4-generic-gpu:1", path=tmp_path, answer="", not_run=why)
    steps.register_variant.return_value = registered
    steps.measure_speed.return_value = {"int4": SPEED}
    steps.measure_quality.return_value = QUALITY
    assert outcomes(tmp_path, None)["int4"].speed == (None if why else SPEED)
    assert steps.measure_speed.called == (why is None)


def test_a_peer_that_fails_leaves_the_others(steps: Mock, tmp_path: Path) -> None:
    steps.measure_speed.return_value = {"int4": BROKEN, NAMES[0]: BROKEN, NAMES[1]: SPEED}
    found = outcomes(tmp_path)
    assert found[NAMES[0]] is BROKEN
    assert isinstance(found[NAMES[1]], MeasuredPeer)
    steps.make_gguf_files.side_effect = BROKEN
    assert outcomes(tmp_path) == dict.fromkeys([*NAMES, "int4"], BROKEN)


def test_a_checkpoint_that_is_no_gguf_is_refused_before_anything_is_converted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Phi3ForCausalLM"]}')
    settings = Settings(home=tmp_path / "home")
    context = JobContext(Job(model="m", peer="llama.cpp"), "tiny", values.checkpoint(path=tmp_path), settings)
    with pytest.raises(CheckpointError, match="Phi3ForCausalLM"):
        plan_recipes.fn(context)


def test_questions_with_tools_are_for_checkpoints_that_can_call_them(tmp_path: Path) -> None:
    asked = tmp_path / "asked.jsonl"
    tool = '{"type": "function", "function": {"name": "f"}}'
    asked.write_text('{"prompt": "?", "expected": "x", "tools": [' + tool + "]}")
    job, settings = Job(model="m", evaluation_set=asked), Settings(home=tmp_path / "home")
    for template, said in (
        ("{{ messages }}", "Its chat template knows no tools"),
        ("{{ messages }}</think>", "Its chat template knows no tools"),  # whatever is wrong with its thoughts
        ("{{ tools }}", "such as <tool_call>"),
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(UsageError, match="items with tools, which the variants of this") as refused:
            plan_recipes.fn(JobContext(job, "tiny", values.checkpoint(path=tmp_path), settings))
        assert said in refused.value.fix
