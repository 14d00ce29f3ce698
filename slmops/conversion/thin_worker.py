"""Child process: a checkpoint's first layers as a checkpoint, small enough to export in fp32.

An exporter treats layers of one kind alike. So a checkpoint that has the embeddings, at least one layer of each kind,
the last norm and the head shows whether it exports the architecture rightly, as this checkpoint configures it.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from slmops.checkpoints import inspection, weight_files
from slmops.checkpoints.reading import read_if_there
from slmops.core.values import Frozen

LEAST = 2
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class ThinRequest(Frozen):
    checkpoint: Path
    folder: Path
    trust_remote_code: bool


class Thinned(Frozen):
    layers: int
    parameters: int


def handle(request: ThinRequest) -> Thinned:
    """Write it into an empty folder."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoConfig

    said = json.loads((request.checkpoint / "config.json").read_text(encoding="utf-8"))
    known = AutoConfig.from_pretrained(request.checkpoint, trust_remote_code=request.trust_remote_code).to_dict()
    layers = layers_needed({**known, **said})
    present = inspection.names(request.checkpoint)
    root = weight_files.choose(present, str(request.checkpoint), allow_pickle=True)
    mapped = read_if_there(request.checkpoint, root).get("weight_map", {}) if root.endswith(".json") else {"": root}
    tensors = {}
    for shard in set(mapped.values()):
        file = request.checkpoint / shard
        pickled = file.suffix != ".safetensors"
        # Either way, a tensor is read when it is looked at.
        held = torch.load(file, mmap=True, weights_only=True) if pickled else load_file(file)
        for name, tensor in held.items():
            layer = _LAYER.search(name)
            if layer is None or int(layer[1]) < layers:
                tensors[name] = tensor.clone()  # two names of one tensor cannot be saved
    save_file(tensors, request.folder / "model.safetensors", {"format": "pt"})
    for name in present - {root, *mapped.values()}:
        shutil.copyfile(request.checkpoint / name, request.folder / name)
    thin = cut(said, layers)
    (request.folder / "config.json").write_text(json.dumps(thin, indent=2), encoding="utf-8")
    return Thinned(layers=layers, parameters=sum(one.numel() for one in tensors.values()))


def layers_needed(config: dict[str, Any]) -> int:
    """How many of the first layers have one of each kind, by all that config.json says of single layers."""
    count: int = config["num_hidden_layers"]
    lists = _of_layers(config, count).values()
    kinds = [json.dumps([one[layer] for one in lists]) for layer in range(count)]
    border = config.get("max_window_layers") if config.get("use_sliding_window") else None
    return min(count, max(LEAST, 1 + max(map(kinds.index, kinds)), 1 + (border or 0)))


def cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same config.json for the first ``layers`` only."""
    lists = _of_layers(config, config["num_hidden_layers"])
    return {**config, **{key: values[:layers] for key, values in lists.items()}, "num_hidden_layers": layers}


def _of_layers(config: dict[str, Any], count: int) -> dict[str, list[Any]]:
    """What config.json lists for each layer."""
    lists = {key: value for key, value in config.items() if "layer" in key and isinstance(value, list)}
    return {key: values for key, values in lists.items() if len(values) == count}
