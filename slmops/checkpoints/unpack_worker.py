"""Child process: turn a GGUF file, or a checkpoint in FP8, into a folder in Hugging Face format."""

import errno
import functools
from pathlib import Path
from typing import Any

from slmops.checkpoints.architectures import PROVEN
from slmops.checkpoints.inspection import copy_texts
from slmops.core.errors import CheckpointError
from slmops.core.values import Frozen

_ORIGINAL = "Use the original checkpoint in Hugging Face format."


class UnpackRequest(Frozen):
    source: Path
    folder: Path


def handle(request: UnpackRequest) -> Frozen:
    """Write the weights, of a GGUF file in fp32, with config, tokenizer and chat template into a folder.

    A CheckpointError says that the file is broken, or that transformers cannot read what it holds.
    """
    import gguf
    import torch
    import transformers

    where: dict[str, Any] = {"pretrained_model_name_or_path": request.source}
    how = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True), "dtype": "auto"}
    if is_gguf := request.source.is_file():
        where = {"pretrained_model_name_or_path": request.source.parent, "gguf_file": request.source.name}
        # transformers would read the file again for config, model and tokenizer, and build the map for each module.
        for name in ("GGUFReader", "get_tensor_name_map"):
            setattr(gguf, name, functools.cache(getattr(gguf, name)))
        # Without dequantize, save_pretrained refuses the model.
        how = {"quantization_config": transformers.GgufConfig(dequantize=True), "dtype": torch.float32}
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, **how, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where) if is_gguf else None
    except Exception as error:
        # Broken bytes make gguf and transformers raise anything: struct.error, ValueError, KeyError, IndexError.
        # A full disk or memory is not the file's fault.
        if isinstance(error, (MemoryError, ImportError)) or getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise CheckpointError(
            f"transformers cannot read {request.source}: {type(error).__name__}: {error}",
            "Compare the file's SHA-256 with the publisher's and fetch it again if it differs; "
            "if it is whole, use the original checkpoint in Hugging Face format.",
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        # transformers would fill these with random numbers and go on.
        raise CheckpointError(
            f"{request.source} does not hold all weights of a {type(model).__name__}: "
            f"{', '.join(missing[:3])} and {max(len(missing) - 3, 0)} more are missing.",
            _ORIGINAL,
        )
    if is_gguf and (unread := _unread(request.source, model)):
        raise CheckpointError(
            f"transformers does not read all of {request.source}, and would compute something else: {unread}.",
            _ORIGINAL,
        )
    model.save_pretrained(request.folder, save_original_format=is_gguf)  # else it is put into FP8 again
    if tokenizer:
        tokenizer.save_pretrained(request.folder)
    else:
        copy_texts(request.source, request.folder)
    return Frozen()


def _unread(path: Path, model: Any) -> str | None:
    """What the file says of the calculation and the model does not do."""
    import gguf
    import torch
    from transformers import modeling_gguf_pytorch_utils as reading

    reader, config = gguf.GGUFReader(str(path)), model.config
    rope = getattr(config, "rope_parameters", None) or {}
    architecture = reader.fields["general.architecture"].contents()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if factors := tensors.pop("rope_freqs.weight", None):
        if not _scale_as_llama3(config, torch.tensor(factors.data.copy())):
            return "rope_freqs.weight is not the scaling of Llama 3"
    elif (scaling := rope.get("rope_type", "default")) == "default":
        scaling = "none"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    for key, done in {
        "rope.scaling.type": "none" if factors else scaling,
        "rope.dimension_count": int(head * rope.get("partial_rotary_factor", 1)),
        "attention.key_length": head,
        "attention.sliding_window": window or config.max_position_embeddings,
    }.items():
        field = reader.fields.get(f"{architecture}.{key}")
        said = field.contents() if field else done
        longer = key == "attention.sliding_window" and not window and said >= done
        if said != done and not longer:
            return f"{architecture}.{key} is {said}, and the model would have {done}"
    if type(model).__name__ in PROVEN:
        processor = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)(config=config.to_dict())
        known = reading.get_gguf_hf_weights_map(model, processor)
        return next((f"nothing uses {name}" for name in tensors if name not in known), None)
    return None


def _scale_as_llama3(config: Any, factors: Any) -> bool:
    """Let RoPE be scaled as in Llama 3.1 and later, and tell whether that comes to the file's factors."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = theta ** -(torch.arange(0, 2 * len(scaled), 2) / (2 * len(scaled)))
    return len(scaled) == len(factors) and torch.allclose(plain / scaled, factors, rtol=1e-3)
