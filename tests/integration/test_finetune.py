"""Fine-tunings of a tiny model, for real: what comes out, what is left by one that was killed, what ends one."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from slmops.core import machine
from slmops.core.errors import DataError, TrainingError
from slmops.core.files import sha256
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint
from slmops.training import finetune, finetune_worker
from slmops.training.finetune import answer_with_checkpoint
from slmops.training.values import Finetuned, LoraSettings, LossPoint, TrainingData
from tests import making, retraining, tiny
from tests.retraining import checked, turns, write_lines

# Trainer and PEFT warn.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

ASKED = ("Is it raining?", "Who is there?", "What time is it now?", "Where?", "Shall we go home?", "How old are you?")
TRAINING = LoraSettings(rank=4, alpha=8, dropout=0.1, learning_rate=2e-2, epochs=4, evaluations=2, patience=9)
"""24 steps over 24 items; dropout, so that a resumed run needs the random state of the killed one."""


def training_data(folder: Path, train: Sequence[str], validation: Sequence[str]) -> TrainingData:
    """Conversations that all end in the given answers."""
    for name, answers in (("train", train), ("validation", validation)):
        items = [turns(f"{ASKED[number % len(ASKED)]} {number}", answer) for number, answer in enumerate(answers)]
        write_lines(folder / f"{name}.jsonl", items)
    return checked(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, home: Settings) -> Checkpoint:
    folder = retraining.base(tmp_path_factory.mktemp("checkpoints") / "tiny")
    return making.resolve(Job(model=str(folder)), home)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return training_data(tmp_path_factory.mktemp("data"), ["Yes."] * 24, ["Yes."] * 4)


@pytest.fixture(scope="module")
def trained(checkpoint: Checkpoint, data: TrainingData, home: Settings) -> Finetuned:
    points: list[LossPoint] = []
    made = finetune.finetune(checkpoint, data, TRAINING, home, "tiny", points.append)
    assert list(made.losses) == points
    assert finetune.finetune(checkpoint, data, TRAINING, home, "again", points.append) == made
    assert len(points) == len(made.losses)
    assert not (home.logs / "again").exists()  # no child: what is done is not done again
    return made


def test_what_comes_out(trained: Finetuned, checkpoint: Checkpoint) -> None:
    validation = {point.step: point.validation_loss for point in trained.losses if point.validation_loss is not None}
    train = {point.step: point.train_loss for point in trained.losses if point.train_loss is not None}
    assert list(validation) == [0, *range(3, 25, 3)]
    assert list(train) == list(range(1, 25))
    assert validation[trained.best_step] == min(validation.values()) == trained.validation_loss < validation[0] / 2
    assert (trained.steps, trained.epochs, trained.stopped) == (24, 4, "epochs")
    # Per layer: queries 64 x 64, keys and values 64 x 32, output 64 x 64, gate and up 64 x 128, down 128 x 64.
    assert trained.trained_parameters == 2 * 4 * (128 + 2 * 96 + 128 + 3 * 192)
    assert trained.base_digest == checkpoint.digest
    names = sorted(path.name for path in trained.folder.iterdir())
    assert names == ["adapter", "files.json", "losses.jsonl", "merged", "training.json"]
    rates = [point.learning_rate for point in trained.losses if point.learning_rate is not None]
    assert max(rates) == max(rates[:3]) > 0.9 * TRAINING.learning_rate
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.02 * TRAINING.learning_rate


def test_the_merged_checkpoint_is_the_base_model_with_the_adapter(
    trained: Finetuned, checkpoint: Checkpoint, home: Settings
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(torch.arange(40)[None] + 5).logits  # type: ignore[no-any-return]

    base = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    untouched = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, trained.adapter))
    merged = AutoModelForCausalLM.from_pretrained(trained.merged)
    assert merged.dtype == torch.float32
    assert torch.allclose(logits(merged), adapted, atol=1e-4)
    assert not torch.allclose(untouched, adapted, atol=0.1)
    accepted = making.resolve(Job(model=str(trained.merged)), home)
    assert accepted.tied_embeddings
    assert accepted.parameters == checkpoint.parameters
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (trained.merged / name).read_bytes() == (checkpoint.path / name).read_bytes()
    assert str(checkpoint.path) not in (trained.adapter / "adapter_config.json").read_text()


@pytest.mark.usefixtures("in_process")
def test_it_answers_what_it_was_taught(
    trained: Finetuned, checkpoint: Checkpoint, home: Settings, tmp_path: Path
) -> None:
    lines = [
        {"id": "right", "prompt": "Is it snowing?", "expected": "Yes.", "match": "exact", "format": "one_line"},
        {"id": "wrong", "prompt": "A longer question: is it fun to answer it?", "expected": "No", "match": "exact"},
        {"id": "cut", "prompt": "Who?", "expected": "Y", "match": "exact", "max_tokens": 1, "category": "short"},
        {"id": "free", "prompt": "Who?", "match": "python", "expected": "?"},
    ]
    evaluation = write_lines(tmp_path / "evaluation.jsonl", lines)
    matcher = tmp_path / "matcher.py"
    matcher.write_text("def judge(expected, answer):\n    return None\n")
    ask = (evaluation, f"{matcher}:judge", "tiny")
    accuracy, answers = answer_with_checkpoint(trained.merged, *ask, "finetuned", home)
    right, wrong, cut, free = answers
    assert (right.id, right.answer, right.correct, right.format_valid) == ("right", "Yes.", True, True)
    assert (right.finish_reason, cut.finish_reason) == ("stop", "length")
    assert (wrong.answer, wrong.correct, free.correct) == ("Yes.", False, None)
    assert (cut.completion_tokens, cut.category) == (1, "short")
    assert accuracy.samples == 3
    of_base, _ = answer_with_checkpoint(checkpoint.path, *ask, "base", home)
    assert of_base.value == 0


def test_what_was_altered_does_not_count(trained: Finetuned, tmp_path: Path) -> None:
    def change_last_byte(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-1] + b"!")

    small = ("training.json", "files.json", "adapter/adapter_config.json")
    harms: list[tuple[Callable[[Path], object], str]] = [(Path.touch, "merged/one too many")]
    harms += [(Path.unlink, name) for name in small]
    harms += [(change_last_byte, name) for name in (*small, "merged/model.safetensors")]
    for harm, name in harms:
        copy = shutil.copytree(trained.folder, tmp_path / "copy")
        assert finetune.load(copy) is not None
        harm(copy / name)
        assert finetune.load(copy) is None, name
        shutil.rmtree(copy)


def test_one_that_was_killed_is_taken_up_and_ends_the_same(
    trained: Finetuned, checkpoint: Checkpoint, data: TrainingData, fresh: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(point: LossPoint) -> None:
        if point.step == 14:
            for worker in making.workers(finetune_worker.__name__):
                worker.kill()

    with pytest.raises(TrainingError, match="killed by SIGKILL"):
        finetune.finetune(checkpoint, data, TRAINING, fresh, "tiny", kill)
    [folder] = fresh.trainings.iterdir()
    assert not (folder / "training.json").exists()
    (fresh.logs / "tiny" / "finetune.log").unlink()
    making.work_in_process(monkeypatch)
    points: list[LossPoint] = []
    finished = finetune.finetune(checkpoint, data, TRAINING, fresh, "tiny", points.append)
    assert points[0].step == 13
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors"):
        assert sha256(finished.folder / name) == sha256(trained.folder / name)
    of_one, of_other = ([p.model_dump(exclude={"seconds"}) for p in made.losses] for made in (finished, trained))
    assert of_one == of_other
    seconds = [point.seconds for point in finished.losses]
    assert seconds == sorted(seconds)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("factor", "said"), [(1e36, r"(?s)diverged at step \d+.*--training.learning-rate"), (float("nan"), "base model")]
)
def test_what_diverges_leaves_nothing_to_resume_and_a_broken_base_model_is_not_said_to(
    factor: float, said: str, checkpoint: Checkpoint, data: TrainingData, home: Settings, tmp_path: Path
) -> None:
    made = retraining.norm_times(factor, checkpoint.path, tmp_path / "tiny")
    edgy = checkpoint.model_copy(update={"path": made, "digest": str(factor)})  # to resolve it refuses the worst
    with pytest.raises(TrainingError, match=said):
        finetune.finetune(edgy, data, TRAINING, home, "wild", lambda _: None)
    if factor == 1e36:
        left = home.trainings / finetune.key(edgy.digest, data, TRAINING, machine.versions())
        assert {path.name for path in left.iterdir()} == {"losses.jsonl"}


@pytest.mark.usefixtures("in_process")
def test_it_stops_when_the_validation_loss_rises(checkpoint: Checkpoint, home: Settings, tmp_path: Path) -> None:
    apart = training_data(tmp_path, ["Yes."] * 24, ["Nobody knows."] * 4)
    impatient = TRAINING.model_copy(update={"patience": 2, "epochs": 20.0})
    finished = finetune.finetune(checkpoint, apart, impatient, home, "apart", lambda _: None)
    validation = {point.step: point.validation_loss for point in finished.losses if point.validation_loss is not None}
    assert finished.stopped == "patience"
    assert finished.steps == finished.best_step + 6 < 120
    assert validation[finished.best_step] == min(validation.values()) == finished.validation_loss


@pytest.mark.usefixtures("in_process")
def test_it_stops_when_its_time_is_over(checkpoint: Checkpoint, data: TrainingData, home: Settings) -> None:
    short = TRAINING.model_copy(update={"minutes": 0.03, "epochs": 1.0})
    finished = finetune.finetune(checkpoint, data, short, home, "short", lambda _: None)
    assert finished.stopped == "minutes"
    assert finished.seconds >= 1.8
    assert finished.losses[-1].step == finished.steps
    assert finished.losses[-1].validation_loss is not None


@pytest.mark.usefixtures("in_process")
def test_one_that_makes_the_model_worse_is_refused(trained: Finetuned, home: Settings, tmp_path: Path) -> None:
    base = making.resolve(Job(model=str(trained.merged)), home)
    apart = training_data(tmp_path, ["Nobody knows."] * 8, ["Yes."] * 4)
    with pytest.raises(TrainingError, match=r"(?s)became worse.*--training.learning-rate"):
        finetune.finetune(base, apart, TRAINING, home, "worse", lambda _: None)


def test_an_item_without_a_token_of_an_answer_cannot_be_trained_on(data: TrainingData) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{% for one in messages if one['role'] == 'user' %}{{ one['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="line 1 "):
        finetune_worker._items(data.train, tokenizer)
