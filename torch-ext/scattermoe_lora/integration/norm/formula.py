"""The RMSNorm that a module computes, found by trying."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from ...ops.rms_norm import cpu
from ...ops.rms_norm.arguments import Operands
from .. import trying


class Formula(NamedTuple):
    """``x / rms(x) * (weight + offset)``, by the names of a module's attributes.

    Attributes:
        eps: The attribute that is added to the mean of squares.
        weighted: Whether the module has a ``weight``.
        offset, round_first: As :func:`scattermoe_lora.rms_norm` takes them.
    """

    eps: str
    weighted: bool
    offset: float
    round_first: bool


# Of x and the weight.
_DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)


def find_formula(module: torch.nn.Module) -> Formula | str | None:
    """The formula that computes what ``module`` computes, to the bit in float32 and in bfloat16.

    Its class is not asked what it is called: its forward runs on rows of every size.

    Returns:
        None where the module is no norm: it has other parameters than one ``weight`` of rows, or its result changes
        with the size of large rows. Where it is one of another formula, a reason.
    """
    if module._modules or module._buffers or not module._parameters.keys() <= {"weight"}:
        return None
    own = module._parameters.get("weight")
    if own is not None and own.dim() != 1:
        return None
    weighted, size = own is not None, 128 if own is None else own.shape[0]
    names = [name for name, value in vars(module).items() if isinstance(value, float) and 0 < value < 1]
    choices = (
        [(offset, first) for offset in (0.0, 1.0) for first in (False, True)] if weighted else [(0.0, False)]
    )
    formulas = [Formula(name, weighted, *choice) for name in names for choice in choices]

    def is_norm() -> bool:
        x = _rows(size, torch.float32)[-1:]
        y, larger, other = (_result(module, t) for t in (x, 4 * x, -x))
        return torch.allclose(y, larger) and torch.allclose(y, -other)

    def agrees(formula: Formula) -> bool:
        for dtype, weight_dtype in _DTYPES:
            x, weight = _rows(size, dtype), _weight(size, weight_dtype) if weighted else None
            operands = Operands(x, weight, getattr(module, formula.eps), formula.offset, formula.round_first)
            expected, got = cpu.forward(operands, None)[0], _result(module, x, weight_dtype)
            if expected.dtype != got.dtype or not torch.equal(expected, got):
                return False
        return True

    if not trying.succeeds(is_norm):
        return None
    return next(
        (formula for formula in formulas if trying.succeeds(partial(agrees, formula))),
        "it computes none of the formulas of rms_norm",
    )


def _rows(size: int, dtype: torch.dtype, shift: float = 0.0) -> torch.Tensor:
    """``[4, size]`` numbers, each row's larger than those of the one before."""
    probe = trying.probe(dtype, shift)
    return probe.repeat(1, size // probe.shape[1] + 1)[:, :size].contiguous()


def _weight(size: int, dtype: torch.dtype) -> torch.Tensor:
    return _rows(size, dtype, 11.0)[1]


def _result(module: Any, x: torch.Tensor, weight_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the module's class computes of rows, with a weight of ours."""
    parameters = {
        name: _weight(x.shape[-1], weight_dtype)
        for name, own in module._parameters.items()
        if own is not None
    }
    result: torch.Tensor = type(module).forward(trying.twin(module, {}, parameters), x)
    return result
