"""Projections of the same rows with their low-rank terms, in few products that add to their result in place.

Every product is a library's: the wide ones are dense, and the narrow ones are bound by memory. So one code serves all
devices. In half precision the low-rank term is written first and the base product is added to it: the sum is then
rounded once, after the large term. No mask of dropout is kept: the backward draws it again from the seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch

from ..cpu_matmul import onednn_layout, prefers_onednn
from ..routing import empty_gradient
from .arguments import Operands

Product = tuple[torch.Tensor, torch.Tensor]

# Multiplications from which oneDNN's set-up is worth its while.
_LARGE = 1 << 20


def _with_onednn(left: torch.Tensor, right: torch.Tensor) -> bool:
    """True if oneDNN multiplies these faster than what torch calls by itself."""
    return (
        left.device.type == "cpu"
        and left.dtype == torch.float32
        and left.shape[0] * right.numel() >= _LARGE
        and prefers_onednn()
    )


def _sum_of_products(products: Sequence[Product], bias: torch.Tensor | None = None) -> torch.Tensor:
    """``left @ right`` of every pair, and ``bias``, in one tensor to which each is added in place.

    Args:
        products: ``[T, k]`` and ``[k, n]``, the terms that are smaller first.
        bias: ``[n]`` or None.
    """
    total: torch.Tensor | None = None
    # oneDNN makes its result in memory of its own: what it makes first needs no addition.
    for left, right in sorted(products, key=lambda product: not _with_onednn(*product)):
        if _with_onednn(left, right):
            weight = onednn_layout(right.t())
            first = bias if total is None else None
            term = torch.ops.mkldnn._linear_pointwise(left, weight, first, "none", [], "")
            total = term if total is None else total.add_(term)
        elif total is None:
            total = left @ right if bias is None else torch.addmm(bias, left, right)
        else:
            total.addmm_(left, right)
    assert total is not None
    return total


def _dropped(operands: Operands) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The rows that each pair's ``a`` multiplies, without the factor 1/(1-p), and the mask that they were dropped by.

    The masks are the same each time.
    """
    x, generator = operands.x, None
    if operands.seed is not None:
        generator = torch.Generator(x.device).manual_seed(int(operands.seed))
    for probability in operands.dropout:
        if probability == 0:
            yield x, None
        else:
            mask = torch.empty_like(x).bernoulli_(1 - probability, generator=generator)
            yield x * mask, mask


class _Factors:
    """The factors in the dtype of ``x``: those of all pairs as one matrix ``a``, those of a projection as one ``b``."""

    def __init__(self, operands: Operands) -> None:
        self._operands = operands
        self._dtype = operands.x.dtype
        # Dropout's factor is here, too, and not in a pass over all rows.
        self.scaling = [s / (1 - p) for s, p in zip(operands.scaling, operands.dropout, strict=True)]

    def a(self) -> torch.Tensor:
        """``[R, N_in]``."""
        factors = [a.to(self._dtype) for a in self._operands.a]
        return factors[0] if len(factors) == 1 else torch.cat(factors)

    def b(self, pairs: range) -> torch.Tensor:
        """``[N_p, R_p]``, the scaling in it, as the transposed view of something contiguous."""
        # Scaled in the wider dtype: float32 factors are rounded once.
        scaled = [(self._operands.b[i].t() * self.scaling[i]).to(self._dtype) for i in pairs]
        return torch.cat(scaled).t()


def _bias(operands: Operands, projection: int) -> torch.Tensor | None:
    """The sum of a projection's biases, or None."""
    total = None
    for bias, owner, scaling in zip(
        operands.biases, operands.bias_projections, operands.bias_scaling, strict=True
    ):
        if owner == projection:
            total = bias * scaling if total is None else total + bias * scaling
    return None if total is None else total.to(operands.x.dtype)


def forward(operands: Operands) -> tuple[list[torch.Tensor], torch.Tensor]:
    """See :func:`scattermoe_lora.ops.lora_linear.op.lora_linear_forward`."""
    x = operands.x
    factors = _Factors(operands)
    if not operands.a:
        low = x.new_empty((x.shape[0], 0))
    elif operands.seed is None:
        low = x @ factors.a().t()
    else:
        rows = (rows for rows, _ in _dropped(operands))
        low = torch.cat([part @ a.to(x.dtype).t() for part, a in zip(rows, operands.a, strict=True)], dim=1)
    results = []
    for p, weight in enumerate(operands.weights):
        products = [(x, weight.to(x.dtype).t())]
        if pairs := operands.pairs_of(p):
            products.insert(0, (low[:, operands.columns_of(pairs)], factors.b(pairs).t()))
        results.append(_sum_of_products(products, _bias(operands, p)))
    return results, low


def backward(
    dys: dict[int, torch.Tensor], operands: Operands, low: torch.Tensor, names: Collection[tuple[str, int]]
) -> dict[tuple[str, int], torch.Tensor]:
    """See :func:`scattermoe_lora.ops.lora_linear.op.lora_linear_backward`.

    Args:
        dys: The gradient of each projection that has one.
        operands, low: Of the forward.
        names: The gradients to compute: a field's name and the position in its list (0 for ``x``).
    """
    x = operands.x
    factors = _Factors(operands)
    gradients: dict[tuple[str, int], torch.Tensor] = {}
    d_low = low.new_zeros(low.shape) if len(dys) < len(operands.weights) else torch.empty_like(low)
    for p, dy in dys.items():
        if pairs := operands.pairs_of(p):
            columns = operands.columns_of(pairs)
            torch.mm(dy, factors.b(pairs), out=d_low[:, columns])
            if any(("b", i) in names for i in pairs):
                # As its transpose: the rank is the shorter side, and libraries are faster with it first.
                db = low[:, columns].t() @ dy
                for i, part in zip(pairs, db.split([operands.ranks[i] for i in pairs]), strict=True):
                    if ("b", i) in names:
                        gradients["b", i] = _written(operands.b[i], part.t(), factors.scaling[i])
        if ("weights", p) in names:
            gradients["weights", p] = _written(operands.weights[p], dy.t() @ x)
        for i, owner in enumerate(operands.bias_projections):
            if owner == p and ("biases", i) in names:
                gradients["biases", i] = _written(operands.biases[i], _sum_rows(dy), operands.bias_scaling[i])
    needs_a = any(name == "a" for name, _ in names)
    needs_x = ("x", 0) in names
    masked: list[tuple[Product, torch.Tensor]] = []
    products: list[Product] = []
    if operands.a and operands.seed is None:
        if needs_a:
            for i, da in enumerate((d_low.t() @ x).split(operands.ranks)):
                if ("a", i) in names:
                    gradients["a", i] = _written(operands.a[i], da)
        products.append((d_low, factors.a()))
    elif operands.a and (needs_a or needs_x):
        parts = d_low.split(operands.ranks, dim=1)
        for i, (part, (rows, mask)) in enumerate(zip(parts, _dropped(operands), strict=True)):
            if ("a", i) in names:
                gradients["a", i] = _written(operands.a[i], part.t() @ rows)
            product = (part, operands.a[i].to(x.dtype))
            if mask is None:
                products.append(product)
            else:
                masked.append((product, mask))
    if needs_x:
        products += [(dy, operands.weights[p].to(x.dtype)) for p, dy in dys.items()]
        dx = _sum_of_products(products)
        for (part, a), mask in masked:
            dx.addcmul_(part @ a, mask)
        gradients["x", 0] = dx
    return gradients


def _sum_rows(dy: torch.Tensor) -> torch.Tensor:
    """``[n]``, the sum over rows, in float32 at least."""
    return dy.sum(dim=0, dtype=torch.promote_types(dy.dtype, torch.float32))


def _written(like: torch.Tensor, value: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """``value * scaling`` as a gradient of ``like``."""
    gradient = empty_gradient(like)
    return (
        torch.mul(value, scaling, out=gradient)
        if value.dtype == like.dtype
        else gradient.copy_(value).mul_(scaling)
    )
