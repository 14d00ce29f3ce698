"""Each architecture that slmops calls proven, exported for real and compared with transformers."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from slmops.checkpoints import architectures
from slmops.checkpoints import model as stored
from slmops.conversion import convert as conversion
from slmops.conversion import fixes, thin_worker, verify_worker
from slmops.core.errors import ConversionError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint
from tests import making, tiny
from tests.checkpoint_folders import edit_json

# Olive, torch and transformers warn at import and at export; they work in child processes otherwise.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

UNPROVEN = "phi"
PROVEN = [kind for kind in tiny.KINDS if kind != UNPROVEN]
TOLERANCE = 1e-4
# Name -> bits of the weights, and the largest difference of the logits, relative to the largest logit. Random weights
# are the worst case for rounding.
PRECISIONS = {"fp32": ({32}, TOLERANCE), "fp16": ({16}, 1e-2), "int8": ({8}, 0.1), "int4": ({4, 8}, 0.5)}
# At int4 the head has 8 bits, and so have attention's inputs and some of the layers that end a block.
QUANTIZED = {"int8": {"MatMulNBits 8 bit": 11}, "int4": {"MatMulNBits 4 bit": 7, "MatMulNBits 8 bit": 4}}
# Gemma 2 scales its embeddings, and the exporter writes the scaled table beside the head: there is nothing to tie.
UNTIED = {"gemma2"}

Run = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def olive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Olive in this process, which saves its import of five seconds a conversion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        import olive
        from olive.passes.onnx import model_builder

        patch.setattr(model_builder, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        fixes.apply()
        yield partial(olive.run, package_config=fixes.package())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes each kind of checkpoint once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def made(kind: str) -> Path:
        return root / kind if (root / kind).exists() else tiny.make(kind, root / kind)

    return made


def export(olive: Run, name: str, job: Job, checkpoint: Checkpoint, work: Path) -> verify_worker.VerifyRequest:
    """Convert as :func:`slmops.conversion.convert.convert` does, in this process; what it would have checked."""
    recipe = making.recipe(name, job, checkpoint)
    olive(conversion.workflow(recipe, checkpoint, job, work, work / "model"))
    return verify_worker.VerifyRequest(
        folder=work / "model", recipe=recipe, checkpoint=checkpoint, tolerance=TOLERANCE, trust_remote_code=False
    )


def matrices(checkpoint: Checkpoint) -> int:
    """Number of weights that can be quantized: norms and biases are vectors."""
    from safetensors import safe_open

    with safe_open(checkpoint.path / "model.safetensors", "np") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]  # noqa: SIM118 - it is no dict
    return sum(math.prod(shape) for shape in shapes if len(shape) > 1)


@pytest.mark.parametrize("kind", PROVEN)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_proven_architecture(
    olive: Run, folder: Callable[[str], Path], home: Settings, tmp_path: Path, kind: str, precision: str
) -> None:
    job = making.job(folder(kind))
    checkpoint = making.resolve(job, home)
    request = export(olive, precision, job, checkpoint, tmp_path)
    found = verify_worker.handle(request)
    bits, error_limit = PRECISIONS[precision]
    # Each weight is there once, tied ones too.
    count = {int(bits): number for bits, number in found.weights.by_bits.items()}
    assert set(count) == bits
    assert sum(count.values()) == matrices(checkpoint) + (tiny.VOCABULARY * 64 if kind in UNTIED else 0)
    # Wrong weights of the right size, as a wrongly tied head, would be off by more than their rounding.
    assert (found.export_error is None) == (precision != "fp32")
    error = found.export_error or verify_worker.export_error(request)[0]
    assert 0 < error <= error_limit
    if precision in QUANTIZED:
        assert found.weights.quantized_ops == {"GatherBlockQuantized 8 bit": 1, **QUANTIZED[precision]}


def test_every_proven_architecture_is_proven_here(folder: Callable[[str], Path], home: Settings) -> None:
    shown = {making.resolve(making.job(folder(kind)), home).architecture for kind in PROVEN}
    assert shown == architectures.PROVEN


def test_an_architecture_that_is_not_proven(
    olive: Run, folder: Callable[[str], Path], home: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = making.job(folder(UNPROVEN))
    request = export(olive, "fp32", job, making.resolve(job, home), tmp_path)
    assert "PhiForCausalLM is not among the architectures tested here" in caplog.text
    assert verify_worker.handle(request).export_error < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "changed", "layers"),
    [
        ("smollm3", {"num_hidden_layers": 8, "no_rope_layers": [1, 1, 1, 0] * 2}, 4),
        ("llama3-rope", {"num_hidden_layers": 5}, 2),
        # Norms and a scale of embeddings that 16 bits are too few for.
        ("gemma2", {"hidden_size": 96}, 2),
        ("gemma3", {"hidden_size": 96}, 2),
    ],
)
def test_first_layers_stand_for_all(
    olive: Run, home: Settings, tmp_path: Path, kind: str, changed: dict[str, Any], layers: int
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = tiny.make(kind, tmp_path / "whole", **changed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="300KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    ids = torch.arange(40)[None]
    with torch.no_grad():  # bf16 in memory computes what fp32 does, to the last bit
        exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")(ids)
        assert torch.equal(stored.load(folder, attn_implementation="eager")(ids).logits, exact.logits)
    job = making.job(folder)
    cut = tmp_path / "thin"
    cut.mkdir()
    made = thin_worker.handle(thin_worker.ThinRequest(checkpoint=folder, folder=cut, trust_remote_code=False))
    thin = making.resolve(job, home).model_copy(update={"path": cut, "parameters": made.parameters})
    config = json.loads((cut / "config.json").read_text(encoding="utf-8"))
    assert (config["num_hidden_layers"], len(config.get("no_rope_layers", range(layers)))) == (layers, layers)
    assert 0 < verify_worker.handle(export(olive, "fp32", job, thin, tmp_path)).export_error < TOLERANCE


@pytest.mark.parametrize(
    ("window", "really", "right"),
    # As if the exporter overlooked this: then nothing but the comparison would notice.
    [(64, {"rms_norm_eps": 1e-3}, None), (64, {"sliding_window": 100}, 64), (600, {"sliding_window": None}, 600)],
)
def test_an_export_that_computes_something_else(
    olive: Run, home: Settings, tmp_path: Path, window: int, really: dict[str, Any], right: int | None
) -> None:
    model = tiny.make("mistral", tmp_path / "checkpoint", sliding_window=window)
    job = making.job(model)
    request = export(olive, "fp32", job, making.resolve(job, home), tmp_path)
    other = shutil.copytree(model, tmp_path / "other")
    edit_json(other / "config.json", **really)
    wrong = request.model_copy(update={"checkpoint": request.checkpoint.model_copy(update={"path": other})})
    with pytest.raises(ConversionError, match="MistralForCausalLM as it is configured here") as caught:
        verify_worker.handle(wrong)
    fix = caught.value.fix or ""
    assert (f"right for {right} tokens" in fix, "--max-length" in fix) == (right is not None, right == 600)
    if right:
        within = wrong.checkpoint.model_copy(update={"context_length": right})
        assert verify_worker.handle(wrong.model_copy(update={"checkpoint": within})).export_error < TOLERANCE


@pytest.mark.parametrize("border", [256, 4096])
def test_answers_across_the_border_of_longrope(olive: Run, home: Settings, tmp_path: Path, border: int) -> None:
    """The runtime computes the cache anew at 4,096 tokens, which is the border of the real ones, and nowhere else."""
    lengths = {"original_max_position_embeddings": border, "max_position_embeddings": 2 * border}
    model = tiny.make("phi3-longrope", tmp_path / "checkpoint", **lengths)
    job = making.job(model)
    checkpoint = making.resolve(job, home)
    assert checkpoint.context_length == border
    beyond = checkpoint.model_copy(update={"context_length": 2 * border})
    request = export(olive, "fp32", job, beyond, tmp_path)
    if border == 4096:
        assert verify_worker.handle(request).export_error < TOLERANCE
    else:
        with pytest.raises(ConversionError) as caught:
            verify_worker.handle(request)
        assert f"--max-length {border} " in (caught.value.fix or "")
