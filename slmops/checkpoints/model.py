"""A checkpoint in transformers, computed in fp32 with its weights kept as they are stored. For child processes only."""

from pathlib import Path
from typing import Any

from slmops.checkpoints import weight_files


def load(folder: Path, **options: Any) -> Any:
    """The causal model in ``folder``, to be run without gradients; ``options`` are those of from_pretrained.

    Weights that are all stored in one type of 16 bits stay so in memory. A layer is widened while it runs, which loses
    nothing: the logits are those of the whole model in fp32, and that takes twice the memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    files = [weight_files.read_file(file, str(file)) for file in folder.glob("*.safetensors")]
    stored = {tensor.dtype for file in files for tensor in file.values()}
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16}.get("".join(stored), torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    layers = next((one for one in model.modules() if isinstance(one, torch.nn.ModuleList)), None)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if dtype == torch.float32 or not layers or head is None:
        return model.float()
    kept: dict[Any, list[Any]] = {}

    def widen(part: Any, _inputs: Any) -> None:
        kept[part] = [parameter.data for parameter in part.parameters()]
        part.float()

    def narrow(part: Any, _inputs: Any, _output: Any) -> None:
        for parameter, data in zip(part.parameters(), kept.pop(part), strict=True):
            parameter.data = data

    parts = (*layers, head, embeddings)
    for part in parts:
        part.register_forward_pre_hook(widen)
        part.register_forward_hook(narrow)
    if scale := getattr(embeddings, "scalar_embed_scale", None):  # Gemma's, rounded to the type of the weights
        embeddings.embed_scale = torch.tensor(scale, dtype=torch.float32)
    large = {id(parameter) for part in parts for parameter in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in large:
            parameter.data = parameter.data.float()
    return model
