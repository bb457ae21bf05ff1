"""Arguments of an experts module's forward that do not fit together, refused before a kernel reads past their ends."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .module import Weights

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that weights may be of."""

LowRank = tuple[torch.Tensor, torch.Tensor]
"""Low-rank factors of one parameter: ``A`` ``[E, r, N_in]`` and ``B`` ``[E, N_out, r]``, the scaling in ``B``."""


def check_inputs(
    weights: Weights,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    lora: Mapping[str, LowRank],
) -> None:
    """Raises ValueError where the arguments of ``experts_forward`` do not fit the weights or each other, and
    NotImplementedError for weights of a dtype that the kernels do not compute in."""
    up, down = weights.up, weights.down
    if up.dtype not in DTYPES:
        raise NotImplementedError(
            f"experts_forward: {weights.up_name}: expected one of {', '.join(map(str, DTYPES))}, got {up.dtype}"
        )
    _expect("down_proj", "dtype of the first projection,", up.dtype, down.dtype)
    experts, width, hidden = up.shape
    intermediate = width // 2 if weights.up_name == "gate_up_proj" else width
    _expect("down_proj", "shape [E, H, I]", (experts, hidden, intermediate), tuple(down.shape))
    for name, bias, features in (
        (f"{weights.up_name}_bias", weights.up_bias, width),
        ("down_proj_bias", weights.down_bias, hidden),
    ):
        if bias is not None:
            _expect(name, "shape", (experts, features), tuple(bias.shape))
    if top_k_index.dim() != 2 or top_k_index.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "experts_forward: top_k_index: expected [T, K] of int32 or int64, "
            f"got {list(top_k_index.shape)} of {top_k_index.dtype}"
        )
    _expect("hidden_states", "shape", (top_k_index.shape[0], up.shape[2]), tuple(hidden_states.shape))
    _expect("top_k_weights", "shape", tuple(top_k_index.shape), tuple(top_k_weights.shape))
    for name, tensor in (("hidden_states", hidden_states), ("top_k_weights", top_k_weights)):
        if not tensor.is_floating_point():
            raise ValueError(f"experts_forward: {name}: expected a floating dtype, got {tensor.dtype}")
        _expect(name, "device of the weights,", up.device, tensor.device)
    _expect("top_k_index", "device of the weights,", up.device, top_k_index.device)
    for name, factors in lora.items():
        _check_factors(weights, name, *factors)


def _check_factors(weights: Weights, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    named = {weights.up_name: weights.up, "down_proj": weights.down}
    if name not in named:
        raise ValueError(f"experts_forward: lora: expected keys among {sorted(named)}, got {name!r}")
    experts, n_out, n_in = named[name].shape
    if a.dim() != 3 or a.shape[1] == 0:
        raise ValueError(
            f"experts_forward: lora[{name!r}][0]: expected [E, r, N_in] with r >= 1, got {list(a.shape)}"
        )
    _expect(f"lora[{name!r}][0]", "shape", (experts, a.shape[1], n_in), tuple(a.shape))
    _expect(f"lora[{name!r}][1]", "shape", (experts, n_out, a.shape[1]), tuple(b.shape))
    for i, factor in enumerate((a, b)):
        _expect(f"lora[{name!r}][{i}]", "dtype of the weight,", named[name].dtype, factor.dtype)
        _expect(f"lora[{name!r}][{i}]", "device of the weights,", weights.up.device, factor.device)


def _expect(name: str, quality: str, expected: object, got: object) -> None:
    if expected != got:
        raise ValueError(f"experts_forward: {name}: expected {quality} {expected}, got {got}")
