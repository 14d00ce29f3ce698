"""What the exporter and Olive do wrongly or with too much memory, corrected. For child processes only.

The model builder of onnxruntime-genai 0.14.1 reads config.json by names that transformers 5 has given up, chooses the
layers with a window of attention by rules of its own, and overlooks YaRN and layers without rotary positions. It is the
comparison of the fp32 export with the checkpoint that decides whether an export is right.

Olive 0.13 loads all weights to change a graph. With these corrections a 4 B checkpoint in bf16 is quantized on a
machine of 16 GB.
"""

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

_LIGHT = {"TieWordEmbeddings", "HalfScales", "ComputeRotaryTables"}  # surgeries that need few of the tensors


def apply() -> None:
    """Correct the classes of the builder and of Olive in this process."""
    _export_as_transformers_computes()
    _operate_without_loading()
    _tie_before_a_cast()


def _export_as_transformers_computes() -> None:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    builder = importlib.import_module("onnxruntime_genai.models.builder")
    model, gemma = builder.Model, builder.GemmaModel
    init, attention, caches = model.__init__, model.make_attention, model.make_rotary_embedding_caches_from_scratch
    layernorm, init_gemma = model.make_layernorm, gemma.__init__

    def made(self: Any, config: Any, *others: Any) -> None:
        _by_old_names(config)
        init(self, config, *others)
        self.checkpoint_config = config

    def made_gemma(self: Any, config: Any, *others: Any) -> None:
        init_gemma(self, config, *others)
        self.embed_attrs["scale"] = config.hidden_size**0.5  # the builder rounds it to two decimals

    def make_layernorm(self: Any, layer_id: int, norm: Any, *others: Any, **named: Any) -> None:
        _widen(norm)
        layernorm(self, layer_id, norm, *others, **named)

    def make_attention(self: Any, layer_id: int, module: Any, *others: Any, **named: Any) -> None:
        _widen(getattr(module, "q_norm", None), getattr(module, "k_norm", None))
        config, before = self.checkpoint_config, self.window_size
        window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
        rotary = getattr(config, "no_rope_layers", None)  # 1 for a layer that has rotary positions
        self.window_size = window if window and (not kinds or kinds[layer_id] == "sliding_attention") else -1
        self.attention_attrs["rope"] = not rotary or bool(rotary[layer_id])
        attention(self, layer_id, module, *others, **named)
        self.window_size = before

    def make_caches(self: Any) -> Any:
        config, rope = self.checkpoint_config, self.rope_attrs
        if (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "yarn":
            frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](config, None)
            angles = torch.outer(torch.arange(rope["cache_length"]).float(), frequencies)
            return angles.cos() * factor, angles.sin() * factor
        if rope["theta"] == getattr(self, "rope_local_theta", None):
            rope["rescale_factors"] = 1  # Gemma 3 scales the positions of its layers without a window only
        return caches(self)

    model.__init__, model.make_attention, model.make_layernorm = made, make_attention, make_layernorm
    model.make_rotary_embedding_caches_from_scratch, gemma.__init__ = make_caches, made_gemma


def _widen(*norms: Any) -> None:
    """Gemma's norms multiply by 1 + weight, a sum that 16 bits are too few for; transformers adds in fp32."""
    for norm in norms:
        if getattr(norm, "weight", None) is not None:
            norm.weight.data = norm.weight.data.float()


def _by_old_names(config: Any) -> None:
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope:  # Gemma 3: one base for layers with a window, another for the others
        config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
        config.rope_scaling = rope = rope["full_attention"]
    if "partial_rotary_factor" in rope:
        config.partial_rotary_factor = rope["partial_rotary_factor"]
    if not hasattr(config, "rms_norm_eps") and hasattr(config, "layer_norm_eps"):
        config.rms_norm_eps = config.layer_norm_eps


def _operate_without_loading() -> None:
    """These surgeries change the graph. The pass loads all the weights, four times over."""
    import onnx
    import onnx_ir as ir
    from olive.model.utils import resolve_onnx_path
    from olive.passes.onnx.common import ir_model_to_olive_model
    from olive.passes.onnx.graph_surgeries import GraphSurgeries
    from onnx_ir.passes.common import DeduplicateHashedInitializersPass

    from slmops.conversion import surgeries  # noqa: F401 - Olive finds surgeries that are imported

    run = GraphSurgeries._run_for_config

    def operate(self: Any, model: Any, config: Any, output: str) -> Any:
        if not {surgery["surgeon"] for surgery in config.surgeries} <= _LIGHT:
            return run(self, model, config, output)
        source = Path(model.model_path).absolute()
        proto = onnx.load(str(source), load_external_data=False)
        with contextlib.chdir(source.parent):  # a surgery reads single tensors, beside the current folder
            for surgery in config.surgeries:
                proto = self.init_surgeon_instance(surgery)(proto)
            changed = ir.from_proto(proto)
        ir.external_data.set_base_dir(changed.graph, source.parent)
        if config.remove_duplicate_initializers:
            changed = DeduplicateHashedInitializersPass()(changed).model
        return ir_model_to_olive_model(changed, resolve_onnx_path(output, source.name), config)

    GraphSurgeries._run_for_config = operate


def _tie_before_a_cast() -> None:
    """In bf16 the head's output is cast to fp32 logits, and TieWordEmbeddings looks for a head that makes them."""
    from olive.passes.onnx.graph_surgeries import TieWordEmbeddings

    tie = TieWordEmbeddings.__call__

    def tied(self: Any, model: Any) -> Any:
        last = next((node for node in model.graph.node if "logits" in node.output), None)
        if last is None or last.op_type != "Cast":
            return tie(self, model)
        model.graph.node.remove(last)
        (head,) = (node for node in model.graph.node if last.input[0] in node.output)
        head.output[0] = "logits"
        model = tie(self, model)
        (head,) = (node for node in model.graph.node if "logits" in node.output)
        head.output[0] = last.input[0]
        model.graph.node.append(last)
        return model

    TieWordEmbeddings.__call__ = tied


def package() -> dict[str, Any]:
    """Olive's passes, and ours."""
    from olive.package_config import OlivePackageConfig

    known: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    known["passes"]["BlockQuantize"] = {
        **known["passes"]["Rtn"],
        "module_path": "slmops.conversion.block_quantize.BlockQuantize",
    }
    return known
