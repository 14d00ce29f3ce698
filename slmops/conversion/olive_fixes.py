"""Where Olive 0.13 takes several times the memory that it needs, or rounds twice, corrected. For child processes only.

With these a 4 B checkpoint in bf16 is quantized on a machine of 16 GB. What is made is the same, except that a
checkpoint in 16 bits is quantized in fp32: in its own 16 bits a weight is rounded before it is rounded to 8 bits.
"""

import contextlib
from pathlib import Path
from typing import Any

_WEIGHTS = 1 << 24  # so many weights are quantized at once; a matrix of embeddings can have 600 million


def apply() -> None:
    """Correct Olive's quantizer and its surgery in this process."""
    _quantize_by_rows()
    _tie_without_loading()


def _quantize_by_rows() -> None:
    """A scale belongs to a group of weights in a row, so rows can be quantized some at a time."""
    import torch
    from olive.common.quant.utils import WeightQuantizer

    find_qparams, quantize = WeightQuantizer.find_qparams, WeightQuantizer.quantize

    def find(self: Any, tensor: Any) -> Any:
        if not self.group_size:
            return find_qparams(self, tensor)
        found = [find_qparams(self, rows.float()) for rows in tensor.split(_rows(tensor))]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def quantized(self: Any, tensor: Any, scales: Any, zero_points: Any) -> Any:
        if not self.group_size or self.signed:
            return quantize(self, tensor, scales, zero_points)
        made = torch.empty(tensor.shape, dtype=torch.uint8)
        split = (part.split(_rows(tensor)) for part in (made, tensor, scales, zero_points))
        for rows, weights, *others in zip(*split, strict=True):
            rows.copy_(quantize(self, weights.float(), *others))
        return made

    WeightQuantizer.find_qparams, WeightQuantizer.quantize = find, quantized


def _rows(tensor: Any) -> int:
    return max(1, _WEIGHTS // int(tensor.shape[1]))


def _tie_without_loading() -> None:
    """Tying embeddings changes the graph. The surgery loads all the weights, four times over."""
    import onnx
    import onnx_ir as ir
    from olive.model.utils import resolve_onnx_path
    from olive.passes.onnx.common import ir_model_to_olive_model
    from olive.passes.onnx.graph_surgeries import GraphSurgeries
    from onnx_ir.passes.common import DeduplicateHashedInitializersPass

    run = GraphSurgeries._run_for_config

    def tie(self: Any, model: Any, config: Any, output: str) -> Any:
        if [surgery["surgeon"] for surgery in config.surgeries] != ["TieWordEmbeddings"]:
            return run(self, model, config, output)
        source = Path(model.model_path).absolute()
        proto = onnx.load(str(source), load_external_data=False)
        with contextlib.chdir(source.parent):  # the surgery reads two tensors, beside the current folder
            tied = ir.from_proto(self.init_surgeon_instance(config.surgeries[0])(proto))
        ir.external_data.set_base_dir(tied.graph, source.parent)
        tied = DeduplicateHashedInitializersPass()(tied).model if config.remove_duplicate_initializers else tied
        return ir_model_to_olive_model(tied, resolve_onnx_path(output, source.name), config)

    GraphSurgeries._run_for_config = tie
