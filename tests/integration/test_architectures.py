"""Each architecture that slmops calls proven, exported for real and compared with transformers."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slmops.checkpoints import architectures
from slmops.conversion import convert as conversion
from slmops.conversion import verify_worker
from slmops.core.errors import CheckpointError, ConversionError
from slmops.core.job import Job
from slmops.core.settings import Settings
from slmops.core.values import Checkpoint
from tests import making, tiny, values

# Olive, torch and transformers warn at import and at export; they work in child processes otherwise.
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]

WRONG = "phi"
PROVEN = [kind for kind in tiny.KINDS if kind != WRONG]
TOLERANCE = 1e-4
# Name -> bits of the weights, and the largest difference of the logits, relative to the largest logit. Random weights
# are the worst case for rounding.
PRECISIONS = {"fp32": ({32}, TOLERANCE), "fp16": ({16}, 1e-2), "int8": ({8}, 0.1), "int4": ({4, 8}, 0.5)}
# At int4 the head has 8 bits, and what k_quant_mixed takes for the more sensitive layers.
QUANTIZED = {"int8": {"MatMulNBits 8 bit": 11}, "int4": {"MatMulNBits 4 bit": 8, "MatMulNBits 8 bit": 3}}
# Gemma scales its embeddings, and the exporter writes the scaled table beside the head: there is nothing to tie.
UNTIED = {"gemma2"}
EMBEDDING = tiny.VOCABULARY * 64

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
        yield olive.run


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
    assert checkpoint.architecture in architectures.PROVEN
    request = export(olive, precision, job, checkpoint, tmp_path)
    found = verify_worker.handle(request)
    bits, error_limit = PRECISIONS[precision]
    # Each weight is there once, tied ones too.
    count = {int(bits): number for bits, number in found.weights.by_bits.items()}
    assert set(count) == bits
    assert sum(count.values()) == matrices(checkpoint) + (EMBEDDING if kind in UNTIED else 0)
    # Wrong weights of the right size, as a wrongly tied head, would be off by more than their rounding.
    error, _ = verify_worker.export_error(request)
    assert 0 < error <= error_limit
    assert found.export_error == (error if precision == "fp32" else None)
    if precision in QUANTIZED:
        assert found.weights.quantized_ops == {"GatherBlockQuantized 8 bit": 1, **QUANTIZED[precision]}


def test_every_proven_architecture_is_proven_here(folder: Callable[[str], Path], home: Settings) -> None:
    shown = {making.resolve(making.job(folder(kind)), home).architecture for kind in PROVEN}
    assert shown == architectures.PROVEN


def test_phi_is_refused_and_would_be_caught(
    olive: Run, folder: Callable[[str], Path], home: Settings, tmp_path: Path
) -> None:
    job = making.job(folder(WRONG))
    with pytest.raises(CheckpointError, match=r"PhiForCausalLM cannot be converted: .* computes something else"):
        making.resolve(job, home)
    assert list(home.home.iterdir()) == []
    facts = {"parameters": 150_000, "tied_embeddings": False, "linear_sizes": (64, 128)}
    checkpoint = values.checkpoint(path=folder(WRONG), architecture="PhiForCausalLM", **facts)
    request = export(olive, "fp32", job, checkpoint, tmp_path)
    with pytest.raises(ConversionError, match="does not support PhiForCausalLM as it is configured here"):
        verify_worker.handle(request)
    # Everything else about it is in order: nothing but this check would have noticed.
    assert (tmp_path / "model" / "genai_config.json").exists()
    error, _ = verify_worker.export_error(request)
    assert 10 * TOLERANCE < error < 1


@pytest.mark.parametrize(
    ("kind", "window"),
    [
        ("gemma2", {"sliding_window": 64}),  # the exporter takes the odd layers for those with the window
        # The exporter gives all layers the window, or none.
        ("qwen2", {"sliding_window": 100, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_a_window_that_the_exporter_gets_wrong(
    olive: Run, home: Settings, tmp_path: Path, kind: str, window: dict[str, Any]
) -> None:
    model = tiny.make(kind, tmp_path / "checkpoint", **window)
    request = export(olive, "fp32", making.job(model), making.resolve(making.job(model), home), tmp_path)
    right = window["sliding_window"]
    with pytest.raises(ConversionError) as caught:
        verify_worker.handle(request)
    assert f"--max-length {right}" in (caught.value.fix or "")
    shorter = making.job(model, max_length=right)
    within = request.model_copy(update={"checkpoint": making.resolve(shorter, home)})
    assert verify_worker.handle(within).export_error < TOLERANCE
