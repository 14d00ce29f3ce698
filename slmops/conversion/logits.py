"""Logits of a variant, from ONNX Runtime on the files that Foundry Local serves. For child processes only."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from slmops.conversion import bf16_worker
from slmops.core import machine

_TYPES = {"tensor(int64)": np.int64, "tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxModel:
    """A decoder exported by ModelBuilder, run without a cache."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = machine.physical_cores()  # ONNX Runtime may find one core where there are two
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        graph = with_all_logits(onnx.load(folder / config["model"]["decoder"]["filename"], load_external_data=False))
        graph = bf16_worker.for_cpu(graph)
        self._session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of shape (tokens, vocabulary) for one sequence ``ids`` of shape (tokens,)."""
        count = len(ids)
        known = {"input_ids": ids, "attention_mask": np.ones(count), "position_ids": np.arange(count)}
        feeds = {}
        for node in self._session.get_inputs():
            # The others are an empty cache: (batch, key-value heads, 0, head size).
            value = known[node.name][None] if node.name in known else np.zeros((1, node.shape[1], 0, node.shape[3]))
            feeds[node.name] = value.astype(_TYPES[node.type])
        (logits,) = self._session.run(["logits"], feeds)
        return np.asarray(logits[0], np.float32)


def with_all_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the logits of all tokens, where ModelBuilder has left those of the last only (prune_lm_head)."""
    nodes = {node.name: node for node in model.graph.node}
    first, last = (nodes.get(f"/lm_head/prune/{operator}") for operator in ("Gather", "Unsqueeze"))
    if first is None or last is None:
        return model
    for node in model.graph.node:
        node.input[:] = [first.input[0] if name == last.output[0] else name for name in node.input]
    model.graph.node.remove(first)
    model.graph.node.remove(last)
    for value in (*model.graph.value_info, *model.graph.output):
        shape = value.type.tensor_type.shape.dim
        if (value.name == "logits" or value.name.startswith("/lm_head/")) and len(shape) == 3:  # those of one token
            shape[1].dim_param = "sequence_length"
    return model
