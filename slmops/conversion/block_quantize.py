"""The pass BlockQuantize of an Olive workflow: a checkpoint to blocks of few bits. For child processes only.

Olive 0.13 rounds each weight by itself (Rtn), or makes up for errors on a grid that it does not fit to the weights
(Gptq, which needs data of the user, and keeps a whole checkpoint and its copy in memory). This pass fits the grid, and
makes up for errors on texts that the model itself writes, or on the user's. It goes through the layers one by one, and
a layer is packed before the next is run.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from olive.common.hf.wrapper import ModelWrapper
from olive.common.quant.hf_utils import OliveHfQuantizationConfig, tie_quant_word_embeddings
from olive.common.quant.nn import QuantEmbedding, QuantLinear
from olive.constants import PrecisionBits
from olive.passes import Pass
from olive.passes.pass_config import PassConfigParam
from olive.passes.pytorch.common import inherit_hf_from_hf
from olive.passes.pytorch.quant_utils import get_qkv_quantization_groups
from olive.passes.pytorch.train_utils import load_hf_base_model
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from slmops.conversion import rounding

_SEQUENCES = 64
_SEED = 0
_FAST_GROUP = 32
_DRAWN, _MOST_DRAWN = 64, 4096  # tokens whose gradients are summed, and all

Hessian: TypeAlias = Tensor | None  # the sum of x xT over the inputs x of a layer, if it is known
Quantize = Callable[[str, Tensor, Hessian], dict[str, Any]]  # the name of a layer, its weights


class BlockQuantize(Pass):  # type: ignore[misc] # Olive has no types
    """Quantize all linear layers, embeddings and the head in blocks, for ModelBuilder to export."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, PassConfigParam]:  # noqa: ARG003 - Olive names it
        made = PassConfigParam
        return {
            "bits": made(type_=PrecisionBits, default_value=PrecisionBits.BITS4, description="Of a weight: 4 or 8."),
            "group_size": made(type_=int, default_value=32, description="Neighbours in a row that share a scale."),
            "sym": made(type_=bool, default_value=False, description="No zero points, as always with 8 bits."),
            "head_bits": made(
                type_=PrecisionBits, default_value=PrecisionBits.BITS8, description="Of the embeddings and the head."
            ),
            "eight": made(
                type_=list[str],
                default_value=[],
                description="Names of layers that get 8 bits; NAME:some is some of them.",
            ),
            "tokens": made(
                type_=int,
                default_value=0,
                description="Of text on which rounding errors are made up for; 0: they are not.",
            ),
            "text": made(type_=str, default_value="", description="A file with that text; the model's own by default."),
            "text_sha256": made(
                type_=str, default_value="", description="Of its content: another text is another variant."
            ),
            "choose": made(
                type_=bool,
                default_value=False,
                description="Give 8 bits to as many weights as eight names, but to those that lose most on the text.",
            ),
        }

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _run_for_config(self, model: Any, config: Any, output_model_path: str) -> Any:
        net = load_hf_base_model(model).eval()
        wrapper = ModelWrapper.from_model(net)
        head, embeddings = net.get_output_embeddings(), net.get_input_embeddings()
        at_head, at_embeddings = (_name_of(net, module) for module in (head, embeddings))
        tied = head.weight.data_ptr() == embeddings.weight.data_ptr()
        ids = None
        if config.tokens:
            ids = _read(model, Path(config.text), config.tokens) if config.text else _written_by(net, config.tokens)
        eight = list(_with_eight_bits(wrapper, config.eight))
        if config.choose and ids is not None:
            eight = _costliest(wrapper, ids, sum(net.get_submodule(name).weight.numel() for name in eight), config)
        overrides = {name: _grid(8, config) for name in eight}
        overrides |= {name: _grid(config.head_bits, config) for name in (at_head, at_embeddings)}
        settings = OliveHfQuantizationConfig(
            **_grid(config.bits, config), lm_head=True, embeds=True, overrides=overrides, tie_word_embeddings=tied
        )

        def quantize(name: str, weights: Tensor, hessian: Hessian) -> dict[str, Any]:
            return _quantized(weights, settings.get_qlinear_init_args(name), hessian)

        hessian = None if ids is None else _layer_by_layer(net, wrapper, ids, quantize)
        for name, module in [*net.named_modules()]:
            if isinstance(module, nn.Linear) and module is not head:
                _replace(net, name, quantize(name, module.weight, None))  # not run on the text
        packed = quantize(at_head, head.weight, hessian)
        _replace(net, at_head, packed)
        _replace(net, at_embeddings, packed if tied else quantize(at_embeddings, embeddings.weight, None))
        if tied:
            tie_quant_word_embeddings(net)
        net.quantization_method, net.config.quantization_config = settings.quant_method, settings
        net.save_pretrained(output_model_path)
        model.save_metadata(output_model_path)
        return inherit_hf_from_hf(model, output_model_path, adapter_path=None)


def _name_of(net: nn.Module, wanted: nn.Module) -> str:
    name: str = next(name for name, module in net.named_modules() if module is wanted)
    return name


def _grid(bits: int, config: Any) -> dict[str, Any]:
    """Of 8 bits ONNX Runtime has fast kernels for blocks of 32 without zero points."""
    eight = bits == 8
    group = min(config.group_size, _FAST_GROUP) if eight else config.group_size
    return {"bits": int(bits), "symmetric": eight or config.sym, "group_size": group}


def _linears(wrapper: ModelWrapper) -> Iterator[tuple[int, str]]:
    """The number of the layer and the name of each linear module that is in one."""
    layers, prefix = wrapper.get_layers()
    for number, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                yield number, f"{prefix}.{number}.{name}"


def _with_eight_bits(wrapper: ModelWrapper, patterns: list[str]) -> Iterator[str]:
    """Of ``NAME:some`` the first and the last tenth of the layers, and every tenth."""
    for number, name in _linears(wrapper):
        some = number % 10 == 0 or not 0.1 <= (number + 0.5) / wrapper.num_hidden_layers < 0.9
        last = name.rpartition(".")[2]
        if last in patterns or (some and f"{last}:some" in patterns):
            yield name


def _costliest(wrapper: ModelWrapper, ids: Tensor, most: int, config: Any) -> list[str]:
    """The names of layers with at most so many weights in which the fewer bits cost most for each weight.

    To second order, errors E of weights cost a KL divergence of half the mean of (g E)^2, where g is the gradient of
    the log-probability of tokens drawn from the model's own distribution (Fisher's information). Inputs of attention
    are one matrix in the export, so they are taken together. Of a weight 6 bytes are in memory: itself and its error.
    """
    net = wrapper.model.float().requires_grad_(False)
    groups = get_qkv_quantization_groups(wrapper)
    grouped = {name for group in groups for name in group}
    groups += [(name,) for _, name in _linears(wrapper) if name not in grouped]
    weights = {name: net.get_submodule(name).weight.requires_grad_() for group in groups for name in group}
    errors = {}
    for name, weight in weights.items():
        grid = rounding.fit(weight.detach(), int(config.bits), config.group_size, symmetric=config.sym)
        errors[name] = (weight.detach() - grid.weights(grid.nearest(weight.detach()))).bfloat16()
    lost: dict[str, float] = {}

    def lose(name: str, weight: Tensor) -> None:
        lost[name] = float((weight.grad * errors[name]).sum())
        weight.grad = None  # so only one is in memory

    handles = [weight.register_post_accumulate_grad_hook(partial(lose, name)) for name, weight in weights.items()]
    costs = dict.fromkeys(groups, 0.0)
    generator = torch.Generator().manual_seed(_SEED)
    for sequence in ids.flatten()[:_MOST_DRAWN].split(_DRAWN):
        with torch.enable_grad():
            likely = net(sequence[None], use_cache=False).logits[0].log_softmax(-1)
            drawn = _drawn(likely.detach().exp(), generator)
            likely.gather(1, drawn).sum().backward()
        for group in groups:
            costs[group] += sum(lost.get(name, 0.0) for name in group) ** 2
        lost.clear()
    for handle in handles:
        handle.remove()
    net.requires_grad_(False)
    chosen: list[str] = []
    sizes = {group: sum(weights[name].numel() for name in group) for group in groups}
    for group in sorted(groups, key=lambda group: costs[group] / sizes[group], reverse=True):
        if sizes[group] <= most:
            most -= sizes[group]
            chosen += group
    return chosen


def _quantized(weights: Tensor, arguments: dict[str, Any], hessian: Hessian) -> dict[str, Any]:
    """What Olive's modules are made of."""
    bits, group, symmetric = (arguments[key] for key in ("bits", "group_size", "symmetric"))
    feedback = None if bits == 8 else hessian
    importance = None if feedback is None else feedback.diagonal()
    grid = rounding.fit(weights, bits, group, symmetric=symmetric, importance=importance)
    integers = grid.nearest(weights) if feedback is None else rounding.with_feedback(weights, grid, feedback)
    return {
        **arguments,
        "weight": integers,
        "scales": grid.scales,
        "zero_points": grid.zero_points.to(torch.int32),
        "quantized": True,
    }


def _replace(net: nn.Module, name: str, packed: dict[str, Any]) -> None:
    old = net.get_submodule(name)
    if isinstance(old, nn.Embedding):
        shape = {"num_embeddings": old.num_embeddings, "embedding_dim": old.embedding_dim}
        made = QuantEmbedding.from_tensors(**packed, **shape, padding_idx=old.padding_idx)
    else:
        shape = {"in_features": old.in_features, "out_features": old.out_features}
        made = QuantLinear.from_tensors(**packed, **shape, bias=old.bias is not None)
        if old.bias is not None:
            made.bias = old.bias.data.float()
    net.set_submodule(name, made)


def _written_by(net: Any, tokens: int) -> Tensor:
    """Token ids, shape (sequences, length), that the model samples after the token with which texts begin."""
    config, generator = net.config, torch.Generator().manual_seed(_SEED)
    ends = config.eos_token_id
    first = config.bos_token_id
    if first is None:
        first = (ends if isinstance(ends, int) else ends[0]) if ends is not None else 0
    ids, past = torch.full((_SEQUENCES, 1), first), None
    while ids.numel() < tokens:
        made = net(ids[:, -1:], past_key_values=past, use_cache=True)
        past = made.past_key_values
        likely = made.logits[:, -1].float().softmax(-1)
        ids = torch.cat([ids, _drawn(likely, generator)], 1)
    return ids


def _drawn(likely: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row of probabilities, shape (rows, 1). multinomial draws a number for each of a row."""
    sums = likely.cumsum(-1)
    return torch.searchsorted(sums, torch.rand(len(sums), 1, generator=generator) * sums[:, -1:])


def _read(model: Any, path: Path, tokens: int) -> Tensor:
    """Token ids, shape (sequences, length), from all parts of a text; it is repeated if it is too short."""
    ids = torch.tensor(model.get_hf_tokenizer()(path.read_text(encoding="utf-8"))["input_ids"])
    length = max(tokens // _SEQUENCES, 2)
    ids = ids.repeat(-(-_SEQUENCES * length // len(ids)))
    starts = torch.linspace(0, len(ids) - length, _SEQUENCES).long()
    return ids.unfold(0, length, 1)[starts]


def _layer_by_layer(net: Any, wrapper: ModelWrapper, ids: Tensor, quantize: Quantize) -> Tensor:
    """Run the model once; a layer's weights are packed as soon as it has handed on what it makes of its input.

    The arithmetic is in fp32, whatever the checkpoint's dtype. Nothing keeps what was packed: only one layer's weights
    are there in fp32. Returns the Hessian of the head.
    """
    layers = wrapper.get_layers(return_name=False)
    names: list[list[str]] = [[] for _ in layers]
    for number, name in _linears(wrapper):
        names[number].append(name)

    def widen(layer: nn.Module, _inputs: Any) -> None:
        layer.float()

    def pack(names: list[str], _layer: nn.Module, _inputs: Any, _made: Any) -> None:
        for name in names:
            _replace(net, name, quantize(name, net.get_submodule(name).weight, hessians.pop(name, None)))

    hessians, handles = _collect({name: net.get_submodule(name) for own in names for name in own})
    embeddings = net.get_input_embeddings()
    handles.append(embeddings.register_forward_hook(lambda _module, _inputs, made: made.float()))
    for layer, own in zip(layers, names, strict=True):
        handles += [layer.register_forward_pre_hook(widen), layer.register_forward_hook(partial(pack, own))]
    for module in net.base_model.children():
        if not isinstance(module, nn.ModuleList | nn.Embedding):
            module.float()
    states = net.base_model(ids, use_cache=False).last_hidden_state.flatten(0, -2)
    for handle in handles:
        handle.remove()
    return states.T @ states


def _collect(linears: dict[str, nn.Linear]) -> tuple[dict[str, Tensor], list[RemovableHandle]]:
    """The Hessians, which come as the modules are run, and the hooks. Modules with the same input share one."""
    hessians: dict[str, Tensor] = {}
    last: list[Any] = [None, None]

    def collect(name: str, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0] is not last[0]:
            rows = inputs[0].flatten(0, -2).float()
            last[:] = inputs[0], rows.T @ rows
        hessians[name] = last[1]

    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, name=name: collect(name, inputs))
        for name, linear in linears.items()
    ]
    return hessians, hooks
