"""LoRA factors of one experts module in the two layouts that adapter files have.

PEFT (``target_parameters``) keeps one pair of factors for a stack of weights: A ``[r * E, in]``, expert-major, and B
``[out, r * E]``, rank-major, with gate and up in one stack. Servers read a pair for each expert and projection, as if
each were a linear layer: A ``[r, in]`` and B ``[out, r]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

Pair = tuple[torch.Tensor, torch.Tensor]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Names of an expert's linear layers; a module without a gate has the last two."""


@dataclass(frozen=True)
class Factors:
    """``scaling * b @ a`` is what an adapter adds to a weight, or to each of a stack.

    Attributes:
        a: ``[..., r, in]``.
        b: ``[..., out, r]``.
        scaling: ``alpha / r``, or ``alpha / sqrt(r)`` of rank-stabilised LoRA.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def rank(self) -> int:
        """The rank without what is zero in both factors at its end, as :meth:`padded` leaves it; such a part adds
        nothing, and as neither factor has a gradient there, it cannot be trained either."""
        r = self.a.shape[-2]
        used = (self.a != 0).transpose(-2, -1).reshape(-1, r).any(0)
        used |= (self.b != 0).reshape(-1, r).any(0)
        return int(used.nonzero().max()) + 1 if bool(used.any()) else 0

    def padded(self, rank: int) -> Factors:
        """The same product with factors of another rank: zeros added, or zeros left out."""
        more = rank - self.a.shape[-2]
        pad = torch.nn.functional.pad
        return replace(self, a=pad(self.a, (0, 0, 0, more)), b=pad(self.b, (0, more)))

    def scaled(self, scaling: float) -> Factors:
        """The same product with another scaling, the ratio of both in B.

        B keeps its dtype where that holds the product exactly, as with ratios that are powers of two, and is float64
        elsewhere.
        """
        if scaling == self.scaling:
            return self
        wide = self.b.double() * (self.scaling / scaling)
        narrow = wide.to(self.b.dtype)
        return replace(self, b=narrow if torch.equal(narrow.double(), wide) else wide, scaling=scaling)

    def fitted(self, rank: int, scaling: float) -> Pair:
        """A and B of this rank and scaling, of the same product."""
        factors = self.scaled(scaling).padded(rank)
        return factors.a, factors.b


@dataclass(frozen=True)
class Experts:
    """An experts module of transformers: its place in the model and the shapes of its weights.

    Attributes:
        path: Name of the module in the model.
        number: ``E``.
        up_name: ``gate_up_proj``, or ``up_proj`` of a module without a gate.
        hidden, intermediate: ``H`` and ``I``.
        interleaved: True if gate and up alternate in the rows of the first weight.
    """

    path: str
    number: int
    up_name: str
    hidden: int
    intermediate: int
    interleaved: bool

    @classmethod
    def of(cls, path: str, module: Any) -> Experts:
        """The description of a module whose class carries ``@use_experts_implementation``."""
        number, first, second = module.down_proj.shape
        hidden, intermediate = (second, first) if module.is_transposed else (first, second)
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        return cls(
            path, number, up_name, hidden, intermediate, module.has_gate and not module.is_concatenated
        )

    @property
    def parameters(self) -> tuple[str, str]:
        """The names of its two stacks of weights."""
        return self.up_name, "down_proj"

    def features(self, name: str) -> tuple[int, int]:
        """Inputs and outputs of a parameter, or of one expert's projection."""
        if name == "down_proj":
            return self.intermediate, self.hidden
        return self.hidden, (2 if name == "gate_up_proj" else 1) * self.intermediate

    @property
    def projections(self) -> tuple[str, ...]:
        """The names among :data:`PROJECTIONS` that an expert has."""
        return PROJECTIONS if self.up_name == "gate_up_proj" else PROJECTIONS[1:]


def unstack(experts: Experts, pair: Pair, expected: str, old: bool) -> tuple[str, Pair] | None:
    """The parameter that PEFT's factors belong to, and A ``[E, r, in]`` and B ``[E, out, r]`` of its linear map.

    Which parameter it is the shapes say, for the order in which PEFT nests its wrappers depends on whether a parameter
    is parametrized. None if they fit neither.

    Args:
        expected: The parameter where the shapes fit both, which those of a module without a gate can.
        old: PEFT before 0.20 made the factors: A is of the outputs, unless the shapes say otherwise.
    """
    a, b = pair
    n_in, n_out = a.shape[1], b.shape[0]
    if a.shape[0] % experts.number:
        return None
    a = a.reshape(experts.number, -1, n_in)
    b = b.reshape(n_out, -1, experts.number).permute(2, 0, 1)
    for turned in (old, not old):
        for name in sorted(experts.parameters, key=expected.__ne__):
            if experts.features(name) == ((n_out, n_in) if turned else (n_in, n_out)):
                return name, (b.mT, a.mT) if turned else (a, b)
    return None


def stack(factors: Factors) -> Pair:
    """A ``[r * E, in]`` and B ``[out, r * E]``, as PEFT keeps A ``[E, r, in]`` and B ``[E, out, r]``."""
    return factors.a.flatten(0, 1), factors.b.permute(1, 2, 0).flatten(1)


def split(experts: Experts, parameters: Mapping[str, Factors]) -> dict[str, Factors]:
    """The factors of each projection, from those of each parameter: gate and up share A, and B is cut in two.

    Servers expect a pair for every projection: where a parameter has none, it is of zeros.
    """
    projections = {}
    example = next(iter(parameters.values()))
    for name in experts.parameters:
        if name in parameters:
            factors = parameters[name]
        else:
            n_in, n_out = experts.features(name)
            a, b = (example.a.new_zeros((experts.number, *shape)) for shape in ((1, n_in), (n_out, 1)))
            factors = Factors(a, b, example.scaling)
        if name == "gate_up_proj":
            gate, up = _halves(experts, factors.b)
            projections["gate_proj"] = replace(factors, b=gate)
            projections["up_proj"] = replace(factors, b=up)
        else:
            projections[name] = factors
    return projections


def join(experts: Experts, projections: Mapping[str, Factors]) -> dict[str, Factors]:
    """The inverse of :func:`split`, without what is zero.

    Gate and up whose A are equal share it again. Where they differ, the stack's A has both, one below the other, and
    its B is block-diagonal: ``[B_gate 0; 0 B_up] [A_gate; A_up]``, of the sum of their ranks.
    """
    used = {name: factors for name, factors in projections.items() if factors.rank}
    parameters = {name: used[name] for name in experts.parameters if name in used}
    gate, up = used.get("gate_proj"), used.get("up_proj")
    if experts.up_name != "gate_up_proj" or not (gate or up):
        return parameters
    scaling = (gate or up).scaling  # type: ignore[union-attr]
    gate, up = (f.padded(f.rank).scaled(scaling) if f else None for f in (gate, up))
    shared = gate is not None and up is not None and torch.equal(gate.a, up.a)
    factors = [f for f in (gate, up) if f is not None]
    a = factors[0].a if shared else torch.cat([f.a for f in factors], 1)
    b = a.new_zeros((experts.number, 2 * experts.intermediate, a.shape[1]), dtype=_widest(factors))
    start = 0
    for half, f in zip(_halves(experts, b), (gate, up), strict=True):
        if f is not None:
            width = f.a.shape[1]
            half[..., start : start + width] = f.b
            start += 0 if shared else width
    return {"gate_up_proj": Factors(a, b, scaling), **parameters}


def _widest(factors: Sequence[Factors]) -> torch.dtype:
    dtype = factors[0].b.dtype
    for f in factors:
        dtype = torch.promote_types(dtype, f.b.dtype)
    return dtype


def _halves(experts: Experts, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of gate's and up's rows of B ``[E, 2I, r]``."""
    if experts.interleaved:
        return b[:, 0::2], b[:, 1::2]
    return b[:, : experts.intermediate], b[:, experts.intermediate :]
