"""Quantizing the experts of a loaded model, and decoding them again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ....ops.quantization.encode import FORMATS, quantize
from ....ops.quantization.stack import QuantizedStack
from .loading import describe_dense, describe_quantized
from .parameter import QuantizedWeight
from .read import read_stack


def quantize_experts(model: torch.nn.Module, format: str = "nf4") -> None:
    """Quantizes a loaded model's experts in place, one weight after the other; they are frozen then.

    ``experts_implementation="scattermoe"`` computes with the codes; what else reads a weight decodes it. Beside the
    model one quantized weight and a few megabytes are allocated at a time, and each dense weight is freed at once if
    nothing else holds it. LoRA may be added before or after (PEFT's ``target_parameters``).

    Args:
        model: A model of transformers, or of PEFT around one.
        format: ``"nf4"`` or ``"fp4"`` as bitsandbytes has them (4.5 bits a weight), or ``"fp8"``: float8 (E4M3) with a
            scale for blocks of 128 x 128 (8 bits).

    Raises:
        ValueError: An unknown format; a model without experts modules; experts that are quantized already or being
            trained, that have adapters merged into them, or whose numbers cannot be quantized. Nothing has been changed
            then.
        NotImplementedError: Weights that FSDP2 has split (quantize before ``fully_shard``), or that are split otherwise
            than along the experts.
    """
    if format not in FORMATS:
        raise ValueError(f"quantize_experts: format: expected one of {', '.join(FORMATS)}, got {format!r}")
    places = list(_weights(model))
    if not places:
        raise ValueError(f"quantize_experts: {_no_experts(model)}")
    _refuse_merged(model)
    holders: dict[int, list[tuple[torch.nn.Module, str, str]]] = {}
    for path, module, name in places:
        label = f"quantize_experts: {path}.{name}"
        if read_own(module, name) is not None:
            raise ValueError(f"{label}: already quantized; call dequantize_experts(model) first")
        parameter = getattr(module, name)
        if parameter.grad is not None or (parameter.requires_grad and "modules_to_save" in path.split(".")):
            raise ValueError(
                f"{label}: being trained (it has a gradient, or is a copy in PEFT's modules_to_save), and a quantized "
                "weight cannot be; train LoRA on it"
            )
        if _is_distributed(parameter):
            _refuse_other_splits(model, parameter, label, "quantize")
        if id(parameter) not in holders:
            _refuse_numbers(_local(parameter), format, label)
        holders.setdefault(id(parameter), []).append((module, name, label))
    del parameter
    for (module, name, label), *others in holders.values():
        parameter = torch.nn.Parameter(_quantized(getattr(module, name), format, label), requires_grad=False)
        for module_with_it, its_name, _ in ((module, name, label), *others):
            setattr(module_with_it, its_name, parameter)
    describe_quantized(model, format)


def _refuse_merged(model: torch.nn.Module) -> None:
    """Raises ValueError for merged adapters, which could not be taken out of codes again."""
    for path, module in model.named_modules():
        if not (getattr(module, "merged_adapters", ()) and hasattr(module, "parameter_name")):
            continue
        if hasattr(module.get_base_layer(), "is_transposed"):
            raise ValueError(
                f"quantize_experts: {path}: adapters are merged into {module.parameter_name}: "
                f"{', '.join(module.merged_adapters)}; unmerge first, or merge_and_unload"
            )


def _refuse_numbers(weight: torch.Tensor, format: str, label: str) -> None:
    """Raises ValueError for a weight that ``quantize`` would refuse, which takes no memory to know."""
    quantize(weight[:1].to("meta"), format, label)
    if weight.is_meta:
        return
    # Of each matrix, for a stack that is transposed would be copied.
    ranges = [torch.stack(matrix.detach().aminmax()) for matrix in weight]
    if not bool(torch.stack(ranges).isfinite().all()):
        raise ValueError(f"{label}: expected finite weights, got some that are NaN or infinite")


def _quantized(parameter: Any, format: str, label: str) -> torch.Tensor:
    weight = QuantizedWeight(quantize(_local(parameter), format, label))
    return _placed_as(parameter, weight) if _is_distributed(parameter) else weight


def _placed_as(parameter: Any, local: torch.Tensor) -> torch.Tensor:
    """A ``DTensor`` of this process's part, split as another is."""
    from torch.distributed.tensor import DTensor

    mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=shape, stride=parameter.stride()
    )


def _local(parameter: Any) -> torch.Tensor:
    """What this process has of a parameter."""
    return parameter.to_local() if _is_distributed(parameter) else parameter


def read_own(module: Any, name: str) -> QuantizedStack | None:
    """The quantized stack that this process has under a parameter's name, or None."""
    parameter = module._parameters.get(name)
    if not _is_distributed(parameter):
        return read_stack(module, name)
    local = _local(parameter)
    return local.stack if isinstance(local, QuantizedWeight) else None


def _is_distributed(parameter: Any) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _refuse_other_splits(model: torch.nn.Module, parameter: Any, label: str, action: str) -> None:
    """Raises NotImplementedError for a parameter that FSDP2 has split, or that is split inside of its matrices."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import Shard

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise NotImplementedError(f"{label}: split by FSDP2; {action} before fully_shard")
    if any(not placement.is_replicate() and placement != Shard(0) for placement in parameter.placements):
        raise NotImplementedError(
            f"{label}: expected a weight that is whole or split along its experts, got placements "
            f"{tuple(parameter.placements)}"
        )


def dequantize_experts(model: torch.nn.Module) -> None:
    """Decodes a model's quantized experts in place, one weight after the other; they stay frozen.

    Args:
        model: A model whose experts :func:`quantize_experts` quantized, or ``bitsandbytes.nn.parametrize``.

    Raises:
        ValueError: A model without quantized experts, but for one whose experts merging made dense.
        NotImplementedError: Experts whose own class computes with codes (transformers' fine-grained FP8), or weights
            that FSDP2 has split. Nothing has been changed then.
    """
    quantized = [(path, *place) for path, *place in _weights(model) if read_own(*place) is not None]
    if not quantized:
        if describe_dense(model):  # Merging decoded them.
            return
        raise ValueError(
            f"dequantize_experts: expected quantized experts in {type(model).__name__}, got none"
        )
    for path, module, name in quantized:
        label = f"dequantize_experts: {path}.{name}"
        _refuse_own_class(module, name, label)
        if _is_distributed(parameter := module._parameters.get(name)):
            _refuse_other_splits(model, parameter, label, "dequantize")
    # A parameter that modules share stays one.
    dense: dict[int, torch.nn.Parameter] = {}
    for path, module, name in quantized:
        held = module._parameters.get(name)
        if id(held) in dense and held is not None:
            setattr(module, name, dense[id(held)])
        else:
            make_dense(module, name, f"dequantize_experts: {path}.{name}")
            dense[id(held)] = module._parameters[name]
    describe_dense(model)


def make_dense(module: Any, name: str, label: str) -> None:
    """Puts a dense, frozen parameter in a quantized one's place.

    Raises:
        NotImplementedError: The module's class computes with codes.
    """
    _refuse_own_class(module, name, label)
    stack, parameter = read_own(module, name), module._parameters.get(name)
    assert stack is not None
    weight = QuantizedWeight(stack).dequantize().contiguous()
    if _is_distributed(parameter):
        weight = _placed_as(parameter, weight)
    if name in module._parameters:
        module._parameters[name] = None
    else:
        torch.nn.utils.parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))


def _refuse_own_class(module: Any, name: str, label: str) -> None:
    if hasattr(module, f"{name}_scale_inv") or hasattr(module, f"{name}_blocks"):
        raise NotImplementedError(
            f"{label}: {type(module).__name__} computes with codes alone; load the model with dequantize=True in its "
            "quantization config instead"
        )


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Path, module and parameter's name of each weight of each experts module, of transformers' common kind."""
    for path, module in model.named_modules():
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
            for name in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                if hasattr(module, name) or hasattr(module, f"{name}_blocks"):
                    yield path, module, name


def _no_experts(model: torch.nn.Module) -> str:
    return f"expected experts modules (classes with @use_experts_implementation) in {type(model).__name__}, got none"
