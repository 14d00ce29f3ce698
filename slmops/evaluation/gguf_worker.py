"""Child process: write a checkpoint as GGUF files, in fp32 by the package gguf and then quantized by llama.cpp itself.

The files hold no vocabulary: they are fed with token ids, and an ONNX variant's size counts no tokenizer either.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from slmops.checkpoints import inspection, reading
from slmops.checkpoints import model as stored
from slmops.core.errors import CheckpointError, EvaluationError
from slmops.core.files import move
from slmops.core.values import Frozen

LLAMA_CPP_NAMES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""The architectures that can be written here, in llama.cpp's words."""
FP32 = "F32"
PROBE_TOKENS = 64


class GgufRequest(Frozen):
    """Files of which types to put into a folder: F32.gguf, Q8_0.gguf and so on. One that is there is kept."""

    checkpoint: Path
    folder: Path
    types: tuple[str, ...]
    tolerance: float  # largest difference of the logits of F32.gguf, relative to the largest logit
    trust_remote_code: bool = False


class GgufResult(Frozen):
    error: float  # the difference
    system_info: str  # what llama.cpp was built for


def check(checkpoint: Path) -> None:
    """Raise a CheckpointError for a checkpoint that cannot be written as GGUF."""
    config = reading.read_if_there(checkpoint, "config.json")
    architecture = (config.get("architectures") or ["unknown"])[0]
    rope = inspection.rotary_positions(config)
    rotary = rope.get("rope_type") or rope.get("type") or "default"
    window = config.get("use_sliding_window", True) and config.get("sliding_window")
    if architecture not in LLAMA_CPP_NAMES:
        why = f"{architecture} is none of {', '.join(LLAMA_CPP_NAMES)}"
    elif rotary not in ("default", "llama3"):
        why = f"its rotary positions are of the type {rotary}"
    elif window and window < config["max_position_embeddings"]:
        why = f"its attention has a window of {window} tokens"
    else:
        return
    raise CheckpointError(f"It cannot be written as GGUF for llama.cpp: {why}.", "Leave out --peer.")


def handle(request: GgufRequest) -> GgufResult:
    """Write F32.gguf, compare its logits with the checkpoint's, and have llama.cpp quantize it to each type.

    It is an EvaluationError if the logits differ by more than the tolerance, or if llama.cpp fails.
    """
    import llama_cpp

    check(request.checkpoint)
    request.folder.mkdir(parents=True, exist_ok=True)
    source = request.folder / f"{FP32}.gguf"
    model = stored.load(request.checkpoint, trust_remote_code=request.trust_remote_code)
    if not source.exists():
        write(model, source)
    error = _error(model, source)
    if not error <= request.tolerance:
        raise EvaluationError(
            f"Its GGUF file computes something else: the logits differ by {error:.2g} of the largest one."
        )
    del model
    for kind in request.types:
        target = request.folder / f"{kind}.gguf"
        if target.exists():
            continue
        how = llama_cpp.llama_model_quantize_default_params()
        how.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        part = target.with_suffix(".part")
        if llama_cpp.llama_model_quantize(bytes(source), bytes(part), how) != 0:
            raise EvaluationError(f"llama.cpp cannot quantize it to {kind}.")
        move(part, target)
    return GgufResult(error=error, system_info=llama_cpp.llama_print_system_info().decode().strip(" |"))


def write(model: Any, path: Path) -> None:
    """Write a model of transformers in fp32, its tensors one after the other."""
    import gguf

    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, LLAMA_CPP_NAMES[type(model).__name__])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    tensors = list(_tensors(model, head))
    for name, tensor in tensors:
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), 4 * tensor.numel())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors:
        writer.write_tensor_data(tensor.float().contiguous().numpy())
    writer.close()
    move(part, path)


def _tensors(model: Any, head: int) -> Iterator[tuple[str, Any]]:
    """llama.cpp's name of each tensor, and the tensor; heads have ``head`` dimensions."""
    import gguf
    import torch

    config = model.config
    architecture = LLAMA_CPP_NAMES[type(model).__name__]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise CheckpointError(f"llama.cpp has no place for its tensor {key}.", "Leave out --peer.")
        if architecture == "llama" and key.rpartition(".")[0].endswith(("q_proj", "k_proj")):
            # Rotary positions turn pairs of neighbours there, and pairs of one from each half in transformers.
            halves = tensor.reshape(-1, 2, head // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        yield name, tensor
    if config.rope_parameters["rope_type"] == "llama3":
        plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head, 2) / head)
        yield "rope_freqs.weight", plain / model.model.rotary_emb.inv_freq


def _error(model: Any, file: Path) -> float:
    """Largest difference of the logits on some tokens / largest logit."""
    import torch

    from slmops.evaluation.gguf_model import GgufModel

    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=PROBE_TOKENS)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)[None]).logits[0].float().numpy()
    found = GgufModel(file, PROBE_TOKENS, exact=True).logits(ids)
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
