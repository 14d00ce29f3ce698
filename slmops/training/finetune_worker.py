"""Child process: trains a LoRA adapter on the answers of conversations, and merges it into the base model."""

import json
import math
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slmops.checkpoints import merge_worker
from slmops.checkpoints.merge_worker import MergeRequest
from slmops.core.errors import DataError, TrainingError
from slmops.core.files import write_atomic
from slmops.core.values import Checkpoint, Frozen
from slmops.training.tokens_worker import IGNORED, answer_spans, labels, renderer
from slmops.training.values import LoraSettings, LossPoint, Stopped, TrainingData, TrainingResult

POINT = "loss point: "  # prefix of each line of output that is a point of the loss curves

LOSSES_FILE, ADAPTER, MERGED = "losses.jsonl", "adapter", "merged"
STATES, WHOLE = "checkpoints", "complete.json"
"""Folder of the saved states, which transformers calls checkpoints, and the file that a whole one has."""
WARM_UP = 0.05  # share of the training in which the learning rate rises
POINTS_BETWEEN = 10  # points of the training loss between two validations


class FinetuneRequest(Frozen):
    checkpoint: Checkpoint
    data: TrainingData
    training: LoraSettings
    bf16: bool
    folder: Path


class WholeMark(Frozen):
    """Content of :data:`WHOLE`, the file of a saved state that is written last, with the sizes of the others."""

    seconds: float
    stopped: Stopped | None
    sizes: dict[str, int]


def state_folder(folder: Path, step: int) -> Path:
    """Where the training in ``folder`` saves its state after ``step``."""
    return folder / STATES / f"checkpoint-{step}"


def trainer_state(folder: Path, step: int) -> Any:
    return json.loads((state_folder(folder, step) / "trainer_state.json").read_text(encoding="utf-8"))


def resumable(folder: Path) -> tuple[int, WholeMark] | None:
    """Find the newest whole state of the training in ``folder``: its step and its mark. Removes broken ones.

    The Trainer writes and deletes states in place, so a killed process leaves parts of them. If the state with the
    best weights is missing, the others are of no use.
    """
    whole: dict[int, WholeMark] = {}
    for state in (folder / STATES).glob("checkpoint-*"):
        mark = WholeMark.from_file(state / WHOLE)
        with suppress(OSError):
            if mark and all((state / name).stat().st_size == size for name, size in mark.sizes.items()):
                whole[int(state.name.rpartition("-")[2])] = mark
                continue
        shutil.rmtree(state)
    if not whole:
        return None
    newest = max(whole)
    if trainer_state(folder, newest)["best_global_step"] not in whole:
        shutil.rmtree(folder / STATES)
        return None
    return newest, whole[newest]


def mark_whole(state: Path, seconds: float, stopped: Stopped | None) -> None:
    sizes = {path.name: path.stat().st_size for path in state.iterdir() if path.name != WHOLE}
    write_atomic(state / WHOLE, WholeMark(seconds=seconds, stopped=stopped, sizes=sizes).model_dump_json())


def truncate(file: Path, step: int) -> None:
    """Drop the points of a loss curve after ``step``, and a line that is cut off."""
    kept = []
    with suppress(ValueError):
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            if LossPoint.model_validate_json(line).step <= step:
                kept.append(line + "\n")
    write_atomic(file, "".join(kept))


def handle(request: FinetuneRequest) -> TrainingResult:
    """Train, starting from the newest whole state if there is one, and write ``adapter`` and ``merged``.

    It is a DataError if an item has no answer to learn, and a TrainingError if the training diverged.
    """
    kept = resumable(request.folder)
    truncate(request.folder / LOSSES_FILE, kept[0] if kept else -1)
    step, mark = kept if kept and kept[1].stopped else _train(request, kept)
    state = trainer_state(request.folder, step)
    before = next(one["eval_loss"] for one in state["log_history"] if "eval_loss" in one)
    if state["best_metric"] > before:
        shutil.rmtree(request.folder / STATES)
        losses = f"{before:.3g} before the training, and at best {state['best_metric']:.3g} afterwards"
        raise _diverged(request.training, f"The model became worse: its validation loss was {losses}.")
    parameters = _adapter(request.folder, state["best_global_step"])
    shutil.rmtree(request.folder / MERGED, ignore_errors=True)
    (request.folder / MERGED).mkdir()
    base, adapter = request.checkpoint.path, request.folder / ADAPTER
    merge_worker.handle(MergeRequest(base=base, adapter=adapter, folder=request.folder / MERGED))
    return TrainingResult(
        steps=step,
        epochs=state["epoch"],
        best_step=state["best_global_step"],
        validation_loss=state["best_metric"],
        stopped=mark.stopped or "epochs",
        seconds=mark.seconds,
        trained_parameters=parameters,
    )


def _diverged(training: LoraSettings, message: str) -> TrainingError:
    lower = f"{training.learning_rate / 5:.1g} instead of {training.learning_rate}"
    return TrainingError(message, f"Lower --training.learning-rate, for example to {lower}.")


def _items(file: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    render = renderer(tokenizer)
    items = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        text, spans = answer_spans(json.loads(line)["messages"], render)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens, learned = encoded["input_ids"], labels(encoded["input_ids"], encoded["offset_mapping"], spans)
        if all(label == IGNORED for label in learned[1:]):
            raise DataError(f"{file.name}, line {number} has no answer to learn.", "Remove this item.")
        items.append({"input_ids": tokens, "labels": learned})
    return items


def _train(request: FinetuneRequest, kept: tuple[int, WholeMark] | None) -> tuple[int, WholeMark]:
    """Train to the end. Returns the last step and the mark of its saved state."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    training, folder = request.training, request.folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(request.checkpoint.path, padding_side="right")
    items, validation = (_items(file, tokenizer) for file in (request.data.train, request.data.validation))
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.convert_ids_to_tokens(0)  # any will do: it is masked
    per_epoch = math.ceil(len(items) / training.batch_size)
    every = math.ceil(per_epoch / training.evaluations)
    steps = math.ceil(training.epochs * per_epoch)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / STATES),
        max_steps=steps if training.minutes is None else 10**9,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        eval_strategy="steps",
        eval_steps=every,
        eval_on_start=kept is None,
        save_steps=every,
        save_total_limit=2,
        metric_for_best_model="eval_loss",
        logging_steps=max(1, every // POINTS_BETWEEN),
        logging_nan_inf_filter=False,
        seed=training.seed,
        use_cpu=True,
        bf16=request.bf16,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    torch.utils.deterministic.fill_uninitialized_memory = False  # only helps to find bugs, and costs time
    transformers.enable_full_determinism(training.seed)
    # The base model's weights are frozen. The adapter's weights are fp32 in any case.
    dtype = torch.bfloat16 if request.bf16 else torch.float32
    base = transformers.AutoModelForCausalLM.from_pretrained(request.checkpoint.path, dtype=dtype)
    base.name_or_path = request.checkpoint.name  # the adapter records it, and a path means nothing on another machine
    adapter = LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        lora_dropout=training.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = transformers.Trainer(
        model=get_peft_model(base, adapter),
        args=arguments,
        train_dataset=items,
        eval_dataset=validation,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
    )
    trainer.compute_loss = _loss
    clock = _Clock(kept[1].seconds if kept else 0.0, training, steps)
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.create_optimizer(), clock.rate)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.add_callback(_callback(clock, request))
    try:
        trainer.train(resume_from_checkpoint=str(state_folder(folder, kept[0])) if kept else None)
    except FloatingPointError as error:
        shutil.rmtree(folder / STATES, ignore_errors=True)  # a resumed training would diverge again
        if trainer.state.global_step == 0:
            said = f"The base model's {error} before any training, so its weights are broken."
            raise TrainingError(said, "Fetch or make it again.") from None
        raise _diverged(training, f"The training diverged at step {trainer.state.global_step}: its {error}.") from None
    finished = resumable(folder)
    if finished is None or finished[1].stopped is None:
        raise TrainingError(f"The last saved state of the training is missing in {folder / STATES}.", "Run it again.")
    return finished


@dataclass
class _Clock:
    before: float  # seconds of earlier attempts
    training: LoraSettings
    steps: int
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    @property
    def over(self) -> bool:
        return self.training.minutes is not None and self.seconds >= 60 * self.training.minutes

    def rate(self, step: int) -> float:
        """The learning rate after ``step`` steps, as a share of its maximum.

        It rises linearly, and falls with the cosine (Loshchilov and Hutter 2017, "SGDR", without restarts).
        """
        share = (step + 1) / (self.steps + 1)
        if self.training.minutes is not None:
            share = max(self.seconds / (60 * self.training.minutes), 0.1 * WARM_UP)
        return min(1.0, share / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _loss(model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
    """The Trainer's own makes the logits of all tokens: a vocabulary is large, and most tokens are of the questions."""
    import torch

    wanted = torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
    keep = wanted != IGNORED
    outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], logits_to_keep=keep)
    loss = torch.nn.functional.cross_entropy(outputs.logits.float(), wanted[keep])
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss is {loss.item()}")
    return (loss, outputs) if return_outputs else loss


def _callback(clock: _Clock, request: FinetuneRequest) -> Any:
    import transformers

    class TrainingCallback(transformers.TrainerCallback):  # type: ignore[misc]
        """Writes the points of the loss curves, ends the training, and marks saved states as whole."""

        def on_step_end(self, _args: Any, _state: Any, control: Any, **_: Any) -> None:
            if clock.over:
                control.should_training_stop = control.should_evaluate = control.should_save = True
            if control.should_evaluate:  # so no point has steps on both sides of a saved state
                control.should_log = True

        def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
            if not math.isfinite(logs.get("grad_norm", 0.0)):
                raise FloatingPointError(f"gradient is {logs['grad_norm']}")
            point = LossPoint(
                step=state.global_step,
                epoch=state.epoch or 0.0,
                seconds=clock.seconds,
                train_loss=logs.get("loss"),
                validation_loss=logs.get("eval_loss"),
                learning_rate=logs.get("learning_rate"),
            )
            if point.train_loss is None and point.validation_loss is None:
                return  # the Trainer's own summary at the end
            line = point.model_dump_json()
            with (request.folder / LOSSES_FILE).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            print(POINT + line, flush=True)

        def on_save(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
            worse = [one for one in state.log_history if one["step"] > state.best_global_step and "eval_loss" in one]
            stopped: Stopped | None = None
            if clock.over:
                stopped = "minutes"
            elif state.global_step >= state.max_steps:
                stopped = "epochs"
            elif len(worse) >= request.training.patience:
                stopped = "patience"
            control.should_training_stop |= stopped is not None
            mark_whole(state_folder(request.folder, state.global_step), clock.seconds, stopped)

    return TrainingCallback()


def _adapter(folder: Path, step: int) -> int:
    """Copy the best weights into ``adapter``. Returns how many parameters they are."""
    from safetensors.numpy import load_file

    shutil.rmtree(folder / ADAPTER, ignore_errors=True)
    (folder / ADAPTER).mkdir()
    best = state_folder(folder, step)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(best / name, folder / ADAPTER / name)
    return sum(weights.size for weights in load_file(folder / ADAPTER / "adapter_model.safetensors").values())
