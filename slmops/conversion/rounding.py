"""Weights to few bits: scales, zero points and integers of the operators MatMulNBits and GatherBlockQuantized.

A block of ``group`` neighbours in a row shares a scale s and a zero point z. An integer q stands for the weight
(q - z) * s. Scales are rounded to fp16, as they are stored. Shapes: weights (rows, columns), scales and zero points
(rows, columns / group), integers (rows, columns). For child processes only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_CACHED, _AT_ONCE = 1 << 18, 1 << 24  # weights: what is computed of them stays in the cache, or takes 128 MB
_SHRINKS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05)  # of the scale that covers a block's range
_LEAST_SQUARES = 2  # times
_SMALLEST = 2.0**-24  # number above 0 in fp16
_DAMPING = 0.01  # of the mean of the Hessian's diagonal
_COLUMNS = 64  # whose errors are handed on together


@dataclass(frozen=True)
class Grid:
    """The numbers that quantized weights can be."""

    scales: Tensor  # float32
    zero_points: Tensor  # float32, whole numbers
    bits: int
    group: int

    def nearest(self, weights: Tensor) -> Tensor:
        """The integers nearest to weights, uint8."""
        made = torch.empty(weights.shape, dtype=torch.uint8)
        for rows in _rows(weights, _CACHED):
            blocks = weights[rows].float().unflatten(1, (-1, self.group))
            scaled = blocks / self.scales[rows, :, None] + self.zero_points[rows, :, None]
            made[rows] = scaled.round_().clamp_(0, 2**self.bits - 1).flatten(1).to(torch.uint8)
        return made

    def weights(self, integers: Tensor) -> Tensor:
        """What integers stand for, float32."""
        blocks = integers.unflatten(1, (-1, self.group)).float()
        return ((blocks - self.zero_points[..., None]) * self.scales[..., None]).flatten(1)


def fit(weights: Tensor, bits: int, group: int, *, symmetric: bool, importance: Tensor | None = None) -> Grid:
    """The grid on which the squared errors of the nearest integers are smallest, weighted by ``importance`` (columns,).

    Several scales and zero points are tried for each block, and then the scale that is best for its integers (least
    squares: the sum of w q over that of q squared). A symmetric block has the zero point in the middle; with 8 bits the
    scale that just covers it is best.
    """
    scales, zero_points = (torch.empty(weights.shape[0], weights.shape[1] // group) for _ in range(2))
    weighted = None if importance is None else importance.float().unflatten(0, (-1, group))
    for rows in _rows(weights, _CACHED):
        blocks = weights[rows].float().unflatten(1, (-1, group))
        best = _fit(blocks, bits, weighted, symmetric=symmetric)
        scales[rows], zero_points[rows] = (part.squeeze(-1) for part in best)
    return Grid(scales, zero_points, bits, group)


def _fit(blocks: Tensor, bits: int, weighted: Tensor | None, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    top, middle = 2**bits - 1, torch.tensor(2.0 ** (bits - 1))
    if symmetric:
        largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        covering, centre = -largest / middle, torch.zeros_like(largest)
    else:
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        covering, centre = (high - low) / top, (high + low) / 2
    best: tuple[Tensor, ...] = ()

    def consider(scale: Tensor, zero: Tensor) -> None:
        nonlocal best
        scale = scale.half().float()
        scale = torch.where(scale == 0, _SMALLEST, scale)
        steps = (blocks / scale + zero).round_().clamp_(0, top).sub_(zero)
        errors = (steps * scale).sub_(blocks).square_()
        error = (errors if weighted is None else errors.mul_(weighted)).sum(-1, keepdim=True)
        tried = error, scale, zero, steps
        if best:
            better = error < best[0]
            tried = tuple(torch.where(better, new, old) for new, old in zip(tried, best, strict=True))
        best = tried

    for shrink in (1.0,) if bits == 8 else _SHRINKS:
        scale = covering * shrink
        if symmetric:
            consider(scale, middle.expand_as(scale))
            continue
        zero = (top / 2 - centre / torch.where(scale == 0, 1.0, scale)).floor()
        consider(scale, zero.clamp(0, top))
        consider(scale, (zero + 1).clamp(0, top))
    for _ in range(0 if bits == 8 else _LEAST_SQUARES):
        _, scale, zero, steps = best
        by = steps if weighted is None else steps * weighted
        squares, products = (by * steps).sum(-1, keepdim=True), (by * blocks).sum(-1, keepdim=True)
        consider(torch.where(products == 0, scale, products / squares.clamp(min=_SMALLEST)), zero)
    return best[1], best[2]


def with_feedback(weights: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """Integers, uint8, with the smallest error of the layer's output on the inputs x of which ``hessian`` sums x xT.

    Column by column, the most important first, the error of rounding is made up for by the columns that are still to be
    rounded: GPTQ (Frantar et al. 2023, https://arxiv.org/abs/2210.17323), with act-order on a grid that is fixed.
    """
    top, count = 2**grid.bits - 1, weights.shape[1]
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += _DAMPING * diagonal.mean()
    order = diagonal.argsort(descending=True)
    factor = _factor_of_inverse(hessian[order][:, order])
    factor /= factor.diagonal()[:, None].clone()
    made = torch.empty(weights.shape, dtype=torch.uint8)
    for rows in _rows(weights, _AT_ONCE):
        left = weights[rows].float().T[order].contiguous()
        scales, zeros = grid.scales[rows].T.contiguous(), grid.zero_points[rows].T.contiguous()
        integers = torch.empty_like(left)
        for start in range(0, count, _COLUMNS):
            end = min(start + _COLUMNS, count)
            errors, steps = left[start:end], factor[start:end, start:end]
            for at, block in enumerate((order[start:end] // grid.group).tolist()):
                scale, zero, integer = scales[block], zeros[block], integers[start + at]
                torch.div(errors[at], scale, out=integer).add_(zero).round_().clamp_(0, top)
                errors[at].addcmul_(integer - zero, scale, value=-1)  # a weight until now
                errors[at + 1 :].addr_(steps[at, at + 1 :], errors[at], alpha=-1)
            left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
        made[rows] = integers[order.argsort()].T.to(torch.uint8)
    return made


def _factor_of_inverse(matrix: Tensor) -> Tensor:
    """The upper triangular U with U^T U the inverse of a positive definite matrix, without the inverse itself.

    If V is upper triangular and V V^T is the matrix, then U is the inverse of V.
    """
    turned = torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(turned, torch.eye(len(matrix)), upper=True)


def _rows(weights: Tensor, most: int) -> list[slice]:
    step = max(1, most // weights.shape[1])
    return [slice(start, start + step) for start in range(0, weights.shape[0], step)]
