"""Child process: turn a GGUF file into a folder in Hugging Face format."""

import errno
from pathlib import Path

from slmops.core.errors import CheckpointError
from slmops.core.values import Frozen
from slmops.processes import child


class UnpackRequest(Frozen):
    gguf: Path
    folder: Path


def handle(request: UnpackRequest) -> Frozen:
    """Write the weights of a GGUF file (as fp32 safetensors), config, tokenizer and chat template into a folder.

    A CheckpointError says that the file is broken, or that transformers cannot read what it holds.
    """
    import torch
    import transformers

    where = {"pretrained_model_name_or_path": request.gguf.parent, "gguf_file": request.gguf.name}
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            **where,
            # Without dequantize, save_pretrained refuses the model.
            quantization_config=transformers.GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except Exception as error:
        # Broken bytes make gguf and transformers raise anything: struct.error, ValueError, KeyError, IndexError.
        # A full disk or memory is not the file's fault.
        if isinstance(error, (MemoryError, ImportError)) or getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise CheckpointError(
            f"transformers cannot read {request.gguf}: {type(error).__name__}: {error}",
            "Compare the file's SHA-256 with the publisher's and fetch it again if it differs; "
            "if it is whole, use the original checkpoint in Hugging Face format.",
        ) from error
    if missing := sorted(loaded["missing_keys"]):
        # transformers would fill these with random numbers and go on.
        raise CheckpointError(
            f"{request.gguf} does not hold all weights of a {type(model).__name__}: "
            f"{', '.join(missing[:3])} and {max(len(missing) - 3, 0)} more are missing.",
            "Use the original checkpoint in Hugging Face format.",
        )
    model.save_pretrained(request.folder)
    tokenizer.save_pretrained(request.folder)
    return Frozen()


if __name__ == "__main__":
    child.main(UnpackRequest, handle)
