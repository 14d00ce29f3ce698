"""Print what each way of quantizing costs in quality and saves in size, for docs/quantization.md.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/quantization.py [CHECKPOINT ...]

By default on the demo checkpoint and on a fine-tuning of it, which off_grid.py makes. It is simulated: weights are
replaced with those that the integers stand for, and activations stay in fp32. Sizes are computed from the bits, fp16
scales and zero points. Errors are made up for on text that the checkpoint itself writes, as in the pass BlockQuantize,
but with the inputs that layers have before anything is quantized. A checkpoint takes about 20 minutes.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import off_grid
import tabulate
import torch
from olive.common.hf.wrapper import ModelWrapper
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from slmops.conversion import block_quantize, rounding
from slmops.conversion.rounding import Grid
from slmops.core import machine
from slmops.evaluation import dataset

TOKENS, WINDOW = 2048, 512
HEAD = "lm_head"
EXPONENTS = (0.0, 0.25, 0.5)  # of AWQ's scales
KEPT = 500  # quantized matrices in memory


@dataclass(frozen=True)
class How:
    """How a matrix is quantized."""

    bits: int = 4
    block: int = 32
    symmetric: bool = False
    grid: str = "weighted"  # plain: minimum to maximum; fitted: least squares; weighted: with the inputs' squares
    feedback: str = ""  # act-order or in-order: GPTQ
    change: str = ""  # awq or rotation, of what is quantized
    exact_scales: bool = False  # fp32
    float_zeros: bool = False
    exponent: float = 0.0  # of the inputs' size, by which AWQ's change scales columns

    def size(self, weights: Tensor) -> float:
        """Bytes."""
        zero = 0 if self.symmetric else 16 if self.float_zeros else self.bits
        scale = 32 if self.exact_scales else 16
        return int(weights.numel()) * (self.bits + (scale + zero) / self.fitting(weights).block) / 8

    def fitting(self, weights: Tensor) -> "How":
        """The same with the largest block that divides the columns."""
        return self if weights.shape[1] % self.block == 0 else replace(self, block=self.block // 2).fitting(weights)


Plan = Callable[["Model"], dict[str, How]]
EIGHT = How(bits=8, symmetric=True, grid="plain")
PLAIN, GPTQ = How(grid="plain"), How(feedback="act-order")
INT4 = ("q_proj", "k_proj", "v_proj", "down_proj:some")


class Model:
    """A checkpoint whose matrices are replaced."""

    def __init__(self, folder: Path) -> None:
        self.net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        modules = self.net.named_modules()
        self.linears: dict[str, Any] = {name: one for name, one in modules if isinstance(one, torch.nn.Linear)}
        self.weights: dict[str, Tensor] = {name: one.weight.clone() for name, one in self.linears.items()}
        self.count = int(sum(one.numel() for one in self.net.parameters()))
        size = self.net.config.hidden_size
        self.rotation = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)))[0]
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = tokenizer.encode(dataset.perplexity_text(None)[0], add_special_tokens=False).ids[:TOKENS]
        self.text = torch.tensor(ids).view(-1, WINDOW)
        self.reference = self._scores(self.text)
        self.own_text = block_quantize._written_by(self.net, TOKENS)
        self.hessians, hooks = block_quantize._collect(self.linears)
        self.net(self.own_text)
        for hook in hooks:
            hook.remove()
        self.made = lru_cache(KEPT)(self._made)

    def share(self, plan: dict[str, How]) -> float:
        """Of the size in fp32, tied embeddings counted once."""
        saved = sum(4 * self.weights[name].numel() - how.size(self.weights[name]) for name, how in plan.items())
        return 1 - float(saved) / 4 / self.count

    def measure(self, plan: dict[str, How]) -> list[str]:
        """KL divergence in nats, perplexity ratio, top-1 agreement."""
        self.put({name: self.made(name, how) for name, how in plan.items()})
        own, exact, target = self._scores(self.text), self.reference, self.text[:, 1:, None]
        distance = kl_div(own, exact, reduction="none", log_target=True).sum(-1).mean()
        ratio = (exact.gather(-1, target).mean() - own.gather(-1, target).mean()).exp()
        return [f"{distance:.4f}", f"{ratio:.3f}", f"{(own.argmax(-1) == exact.argmax(-1)).float().mean():.3f}"]

    def put(self, weights: dict[str, Tensor]) -> None:
        """Replace matrices."""
        for name, module in self.linears.items():
            module.weight.copy_(weights[name])

    def gradients(self, plan: dict[str, How]) -> dict[str, float]:
        """What 8 bits for a matrix take off the KL divergence on the own text, to first order, by weight."""
        self.put(self.weights)
        exact = self._scores(self.own_text)
        self.put({name: self.made(name, how) for name, how in plan.items()})
        self.net.requires_grad_(True)
        for ids, wanted in zip(self.own_text.split(8), exact.split(8), strict=True):
            own = self.net(ids).logits[:, :-1].log_softmax(-1)
            kl_div(own, wanted, reduction="sum", log_target=True).backward()
        self.net.requires_grad_(False)
        change = {name: self.made(name, how) - self.made(name, EIGHT) for name, how in plan.items()}
        found = {name: float((self.linears[name].weight.grad * one).mean()) for name, one in change.items()}
        self.net.zero_grad()
        return found

    def _scores(self, ids: Tensor) -> Tensor:
        return self.net(ids).logits[:, :-1].log_softmax(-1)

    def _made(self, name: str, how: How) -> Tensor:
        """The weights that a quantized matrix stands for."""
        weights, hessian, last = self.weights[name], self.hessians[name], name.rpartition(".")[2]
        if how.change == "rotation" and last in ("o_proj", "down_proj"):
            return self.rotation @ dequantized(self.rotation.T @ weights, how, hessian)
        if how.change == "rotation":  # the norm's weights go into the matrix
            before = "post_attention" if "mlp" in name else "input"
            norm = self.net.get_submodule(name.rsplit(".", 2)[0] + f".{before}_layernorm").weight
            turn, back = norm[:, None] * self.rotation, self.rotation.T / norm
            return dequantized(weights @ turn, how, back @ hessian @ back.T) @ back
        if how.change == "awq" and last != "o_proj":  # what is before it makes up for larger columns
            first = next(one for one in self.weights if self.hessians[one] is hessian)  # all that read the same
            tried = {one: replace(how, change="", exponent=one) for one in EXPONENTS}
            made = {one: self.made(first, replace(tried[one], feedback="")) for one in EXPONENTS}
            return self.made(name, tried[min(EXPONENTS, key=lambda one: lost(self.weights[first], made[one], hessian))])
        scale = hessian.diagonal().clamp(min=1e-12) ** (how.exponent / 2)
        return dequantized(weights * scale, how, hessian / scale / scale[:, None]) / scale


def dequantized(weights: Tensor, how: How, hessian: Tensor) -> Tensor:
    """What is left of weights."""
    how = how.fitting(weights)
    if how.grid == "plain":
        grid = plain(weights, how)
    else:
        importance = hessian.diagonal() if how.grid == "weighted" else None
        grid = rounding.fit(weights, how.bits, how.block, symmetric=how.symmetric, importance=importance)
    if not how.feedback:
        return grid.weights(grid.nearest(weights))
    return grid.weights((rounding.with_feedback if how.feedback == "act-order" else in_order)(weights, grid, hessian))


def plain(weights: Tensor, how: How) -> Grid:
    """From the least to the greatest weight of a block."""
    blocks, top = weights.unflatten(1, (-1, how.block)), 2**how.bits - 1
    least, greatest = blocks.amin(-1), blocks.amax(-1)
    if not how.float_zeros:  # a whole zero point has to be on the grid
        least, greatest = least.clamp(max=0), greatest.clamp(min=0)
    scales = (greatest - least) / top
    if how.symmetric:
        scales = -blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)).squeeze(-1) / 2 ** (how.bits - 1)
    scales = scales if how.exact_scales else scales.half().float()
    scales = torch.where(scales == 0, 2.0**-24, scales)
    zeros = torch.full_like(scales, 2.0 ** (how.bits - 1)) if how.symmetric else -least / scales
    return Grid(scales, zeros if how.float_zeros else zeros.round().clamp(0, top), how.bits, how.block)


def in_order(weights: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """GPTQ from the first column to the last."""
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    steps, left = torch.linalg.cholesky(inverse, upper=True), weights.T.clone()
    made = torch.empty(left.shape, dtype=torch.uint8)
    for at, column in enumerate(left):
        scale, zero = grid.scales[:, at // grid.group], grid.zero_points[:, at // grid.group]
        integer = (column / scale + zero).round().clamp(0, 2**grid.bits - 1)
        made[at] = integer.to(torch.uint8)
        left[at + 1 :].addr_(steps[at, at + 1 :], (column - (integer - zero) * scale) / steps[at, at], alpha=-1)
    return made.T.contiguous()


def mixed(*eight: str, low: How = GPTQ, head: How = EIGHT) -> Plan:
    """8 bits for layers of these names, or of NAME:some for some of them, as in BlockQuantize."""

    def plan(model: Model) -> dict[str, How]:
        names = set(block_quantize._with_eight_bits(ModelWrapper.from_model(model.net), list(eight)))
        return {**{name: EIGHT if name in names else low for name in model.weights}, HEAD: head}

    return plan


def chosen(score: Callable[[Model, dict[str, How]], dict[str, float]]) -> Plan:
    """8 bits for the matrices of highest score, as many as in int4."""

    def plan(model: Model) -> dict[str, How]:
        made, most = mixed()(model), model.share(mixed(*INT4)(model))
        scores = score(model, made)
        for name in sorted(scores, key=lambda one: scores[one], reverse=True):
            more = {**made, name: EIGHT}
            made = more if model.share(more) <= most else made
        return made

    return plan


def by(score: Callable[[Tensor, Tensor, Tensor], Any]) -> Plan:
    """The score of a matrix comes from it, what it has become, and its Hessian."""

    def each(model: Model, plan: dict[str, How]) -> dict[str, float]:
        parts = {name: (model.weights[name], model.made(name, how), model.hessians[name]) for name, how in plan.items()}
        return {name: float(score(*three)) for name, three in parts.items()}

    return chosen(each)


def lost(exact: Tensor, made: Tensor, hessian: Tensor) -> float:
    """The squared error of a layer's output on the own text, relative to the output's square."""
    off = made - exact
    return float(((off @ hessian) * off).sum() / ((exact @ hessian) * exact).sum())


DOUBLES = "the embeddings are no longer the head's"
STEP = "kernels dequantize at each step"
SLOW = "kernels are fast for blocks of 32"


def rows() -> Iterator[tuple[str, Plan, str]]:
    """What is tried, how, and what speaks against it beyond its figures."""
    for block in (16, 32, 64, 128):
        yield f"plain, blocks of {block}", mixed(low=replace(PLAIN, block=block)), ""
    yield "plain, symmetric", mixed(low=replace(PLAIN, symmetric=True)), ""
    yield "plain, scales in fp32", mixed(low=replace(PLAIN, exact_scales=True)), ""
    yield "plain, float zero points", mixed(low=replace(PLAIN, float_zeros=True)), STEP
    for block in (16, 32, 64):
        yield f"least squares, blocks of {block}", mixed(low=How(block=block, grid="fitted")), ""
    yield "least squares, symmetric", mixed(low=How(grid="fitted", symmetric=True)), ""
    yield "weighted by activations", mixed(low=How()), ""
    yield "weighted, AWQ's scaling", mixed(low=How(change="awq")), ""
    yield "weighted, rotation", mixed(low=How(change="rotation")), DOUBLES
    for block in (16, 32, 64, 128):
        yield f"GPTQ, blocks of {block}", mixed(low=replace(GPTQ, block=block)), ""
    yield "GPTQ, symmetric", mixed(low=replace(GPTQ, symmetric=True)), ""
    yield "GPTQ, symmetric, blocks of 16", mixed(low=replace(GPTQ, symmetric=True, block=16)), ""
    yield "GPTQ, no act-order", mixed(low=replace(GPTQ, feedback="in-order")), ""
    yield "GPTQ on the plain grid", mixed(low=replace(GPTQ, grid="plain")), ""
    yield "GPTQ, AWQ's scaling", mixed(low=replace(GPTQ, change="awq")), ""
    yield "GPTQ, rotation", mixed(low=replace(GPTQ, change="rotation")), DOUBLES
    yield "GPTQ, float zero points", mixed(low=replace(GPTQ, grid="plain", float_zeros=True)), STEP
    yield "GPTQ, 2 bits, blocks of 16", mixed(low=replace(GPTQ, bits=2, block=16)), "recipes have 4 or 8 bits"
    yield "8 bits: q, k, v", mixed(*INT4[:3]), ""
    yield "8 bits: o", mixed("o_proj"), ""
    yield "8 bits: gate", mixed("gate_proj"), ""
    yield "8 bits: down", mixed("down_proj"), ""
    yield "8 bits: some of down", mixed("down_proj:some"), ""
    yield "8 bits: q, k, v, some of down (int4)", mixed(*INT4), ""
    yield "8 bits: q, k, v, down", mixed(*INT4[:3], "down_proj"), ""
    yield "8 bits by SNR", by(lambda exact, made, _: (made - exact).square().sum() / exact.square().sum()), ""
    yield "8 bits by IQE", by(lambda exact, made, _: (made - exact).square().mean(-1).max()), ""
    yield "8 bits by relative output error", by(lambda *three: lost(*three) / three[0].numel()), ""
    yield "8 bits by KL gradient", chosen(Model.gradients), ""
    yield "int4, AWQ's scaling", mixed(*INT4, low=replace(GPTQ, change="awq")), ""
    yield "int4, head of 4 bits", mixed(*INT4, head=GPTQ), ""
    yield "int4, head of 6 bits", mixed(*INT4, head=replace(EIGHT, bits=6)), "no kernels"
    yield "int4-small", mixed("down_proj:some", head=GPTQ), ""
    yield "all of 4 bits", mixed(head=GPTQ), ""
    for block in (16, 32, 64):
        eight = replace(EIGHT, block=block)
        yield f"all of 8 bits, blocks of {block}", mixed(low=eight, head=eight), "" if block == 32 else SLOW


def main(*models: str) -> None:
    """Measure each checkpoint, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        if not models:
            tuned = Path(folder) / "tuned"
            off_grid.make("demo", tuned)
            models = ("demo", str(tuned))
        measured = [_measured(off_grid.find(model)) for model in models]
    here = machine.hardware()
    print(f"{here.processor}, {here.cores} cores; {TOKENS:,} tokens; simulated, with activations in fp32")
    headers = [f"{figure}, {Path(model).name}" for model in models for figure in ("KL", "perplexity", "top-1")]
    table = []
    for number, (label, _, against) in enumerate(rows()):
        figures = [one for rows_ in measured for one in rows_[number][1:]]
        table.append([label, measured[0][number][0], *figures, against])
    print(tabulate.tabulate(table, ["", "of fp32", *headers, "against it"], tablefmt="github", disable_numparse=True))


def _measured(folder: Path) -> list[list[str]]:
    model, measured = Model(folder), []
    for label, plan, _ in rows():
        hows = plan(model)
        measured.append([f"{model.share(hows):.3f}", *model.measure(hows)])
        print(label, *measured[-1], file=sys.stderr, flush=True)
    return measured


if __name__ == "__main__":
    main(*sys.argv[1:])
