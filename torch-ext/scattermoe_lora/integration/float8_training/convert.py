"""A model whose linear layers and experts are trained in float8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...ops.float8.products import refuse_without_products
from ...ops.float8.tensor import FLOATS
from ...ops.float8.weight import Float8Weight, MultipliedWeight
from .checkpoint import describe, keep_standard_keys


def train_in_float8(
    model: torch.nn.Module, *, skip_modules: Sequence[str] = (), float8_products: bool = False
) -> None:
    """Keeps the weights of a model's linear layers and experts in float8, and lets their gradients be made in float8.

    They become E4M3 with a scale for 128 x 128 elements, one weight after the other, and are decoded for each use;
    :class:`.adafactor.Adafactor` trains them. Embeddings, the output layer, routers (linear layers with as many outputs
    as there are experts), norms and biases stay as they are. ``save_pretrained`` and ``state_dict()`` write the keys of
    fine-grained FP8 checkpoints, and ``load_state_dict`` takes these or dense weights.

    Args:
        model: A model in float32, bfloat16 or float16, whole (before ``fully_shard``), its experts computed by this
            package (``experts_implementation="scattermoe"``). What is frozen stays frozen.
        skip_modules: Modules to leave as they are, by a name or a part of one between dots.

        float8_products: Multiply in float8 in the forward of linear layers, too (``torch._scaled_mm``), on an NVIDIA
            Ada or Hopper GPU, where the model is. Activations are rounded to E4M3; the backward and experts stay as
            they are.

    Raises:
        ValueError: A model with nothing to convert, weights that are NaN or infinite, experts that another
            implementation computes, or a string for ``skip_modules``; the message names the parameter.
        NotImplementedError: Parameters that are split already, or weights that are quantized; float8 products on
            a device without them.
    """
    if isinstance(skip_modules, str):
        raise ValueError(
            f"train_in_float8: skip_modules: expected a list of names, got the string {skip_modules!r}"
        )
    places: dict[int, list[tuple[torch.nn.Module, str]]] = {}
    labels: dict[int, str] = {}
    for path, module, name in _weights(model, skip_modules):
        parameter = getattr(module, name)
        places.setdefault(id(parameter), []).append((module, name))
        labels[id(parameter)] = f"train_in_float8: {path}.{name}"
    if not places:
        raise ValueError(
            f"train_in_float8: expected linear layers or experts in {type(model).__name__}, got none"
        )
    for key, label in labels.items():
        module, name = places[key][0]
        _check(getattr(module, name), label)
        if _is_experts(module):
            _check_implementation(module, label)
        elif float8_products:
            refuse_without_products(getattr(module, name).device, label)
    for sharers in places.values():
        module, name = sharers[0]
        parameter = getattr(module, name)
        kind = MultipliedWeight if float8_products and not _is_experts(module) else Float8Weight
        weight = kind.from_dense(parameter, stochastic=False)
        converted = torch.nn.Parameter(weight, requires_grad=parameter.requires_grad)
        del parameter
        for module, name in sharers:
            setattr(module, name, converted)
            keep_standard_keys(module)
    linears = (
        (path, module) for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    )
    describe(model, [path for path, module in linears if not isinstance(module.weight, Float8Weight)])


def _weights(model: torch.nn.Module, skip_modules: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """Path, module and parameter's name of each weight to convert."""
    kept = {id(parameter) for parameter in _kept(model)}
    routes = {module.num_experts for module in model.modules() if _is_experts(module)}
    for path, module in model.named_modules():
        parts = f".{path}."
        if any(f".{name}." in parts for name in skip_modules):
            continue
        if _is_experts(module):
            names: Sequence[str] = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        elif type(module) is torch.nn.Linear and module.out_features not in routes:
            names = ("weight",)
        else:
            continue
        for name in names:
            parameter = getattr(module, name, None)
            is_left = parameter is None or id(parameter) in kept or isinstance(parameter, Float8Weight)
            if not is_left:
                yield path, module, name


def _is_experts(module: Any) -> bool:
    return hasattr(module, "has_gate") and hasattr(module, "is_transposed")


def _kept(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """The parameters of embeddings and output layers, with which linear layers may be tied."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            yield module.weight
        output = getattr(module, "get_output_embeddings", lambda: None)()
        if output is not None:
            yield from output.parameters()


def _check(parameter: torch.Tensor, label: str) -> None:
    if hasattr(parameter, "device_mesh"):
        raise NotImplementedError(
            f"{label}: split over processes already; convert before fully_shard "
            "(tensor and expert parallelism are not supported)"
        )
    if type(parameter) is not torch.nn.Parameter or parameter.dtype not in FLOATS:
        raise NotImplementedError(
            f"{label}: expected a parameter among {', '.join(map(str, FLOATS))}, got {type(parameter).__name__} of "
            f"{parameter.dtype}; load the model with dequantize=True in its quantization config"
        )
    if not parameter.is_meta and not all(bool(matrix.isfinite().all()) for matrix in parameter.detach()):
        raise ValueError(f"{label}: expected finite weights, got some that are NaN or infinite")


def _check_implementation(experts: Any, label: str) -> None:
    """Raises ValueError if another implementation computes the experts, which would decode all of them."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    name = experts.config._experts_implementation
    function = ALL_EXPERTS_FUNCTIONS.get(name, None)
    package = __name__.partition(".integration.")[0]
    if not getattr(function, "__module__", "").startswith(f"{package}."):
        raise ValueError(
            f"{label}: expected experts that this kernel computes, got experts_implementation={name!r}; call "
            'register() and model.set_experts_implementation("scattermoe") first'
        )
