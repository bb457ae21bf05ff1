"""Experts modules whose weights are quantized, in every way that libraries keep them, compute as the dense ones do."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import assert_close, experts_module
from quantized_modules import (
    SHAPE,
    WEIGHTS,
    assert_adapts_as_dense,
    assert_computes_as_dense,
    dense_experts,
    inputs,
)


def ours(kernel: ModuleType, format: str) -> Any:
    module = experts_module(SHAPE)
    kernel.quantize_experts(module, format)
    return module


def fine_grained(kernel: ModuleType, expert_dtype: str) -> Any:
    from transformers.integrations import finegrained_fp8, moe

    dense = experts_module(SHAPE)
    kind = moe.use_experts_implementation(
        experts_class=type("Experts", (finegrained_fp8.FP8Experts,), {}),
        experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS,
    )
    config = copy.deepcopy(dense.config)
    config._experts_implementation, config.dtype = "scattermoe", torch.float32
    module = kind(config, block_size=(32, 16), expert_dtype=expert_dtype)
    for name in WEIGHTS:
        codes = getattr(module, name)
        codes.data.copy_(torch.randint(0, 100, codes.shape, dtype=torch.uint8).view(codes.dtype))
        scales = getattr(module, f"{name}_scale_inv")
        scales.data.copy_(torch.rand(scales.shape) / 64)
    return module


def mxfp4(kernel: ModuleType) -> Any:
    module = experts_module(SHAPE)
    for name in WEIGHTS:
        experts, n, k = getattr(module, name).shape
        delattr(module, name)
        blocks = torch.randint(256, (experts, n, k // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 122, (experts, n, k // 32), dtype=torch.uint8)
        for part, tensor in (("blocks", blocks), ("scales", scales)):
            module.register_parameter(f"{name}_{part}", torch.nn.Parameter(tensor, requires_grad=False))
    module.config.dtype = torch.float32
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda kernel: ours(kernel, "nf4"),
        lambda kernel: ours(kernel, "fp4"),
        lambda kernel: ours(kernel, "fp8"),
        lambda kernel: fine_grained(kernel, "fp8"),
        lambda kernel: fine_grained(kernel, "fp4"),
        mxfp4,
    ],
    ids=["nf4", "fp4", "fp8", "FP8Experts", "FP4 experts", "mxfp4"],
)
def test_quantized_experts_compute_what_the_dense_ones_do(
    registered: ModuleType, submodule: Any, make: Callable[[ModuleType], Any]
) -> None:
    module = make(registered)
    assert_computes_as_dense(registered, submodule, module)
    if hasattr(module, "gate_up_proj_scale_inv"):
        # Its class asks the other interface, for the implementation of its config.
        arguments = inputs()
        dense = registered.experts_forward(dense_experts(submodule, module), *arguments)
        assert_close([module(*arguments)], [dense], 2e-5)


@pytest.mark.parametrize("expert_dtype", ["fp8", "fp4"])
def test_peft_sees_the_weight_that_codes_stand_for(
    registered: ModuleType, submodule: Any, expert_dtype: str
) -> None:
    assert_adapts_as_dense(submodule, fine_grained(registered, expert_dtype))


def test_registration_reaches_and_leaves_the_interface_of_fine_grained_fp8(kernel: ModuleType) -> None:
    from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface

    kernel.register("fast")
    assert FP8ExpertsInterface._global_mapping["fast"] is kernel.experts_forward
    kernel.unregister()
    assert "fast" not in FP8ExpertsInterface._global_mapping


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.mT.contiguous(),
            r"Experts\.gate_up_proj_scale_inv: expected \[4, 2, 4\] for blocks of 32 x 16, got",
        ),
        (
            lambda t: t[:, :1],
            r"Experts\.gate_up_proj_scale_inv: expected \[4, 2, 4\] for blocks of 32 x 16, got",
        ),
        (lambda t: t.to("meta"), r"Experts\.gate_up_proj: expected device of its scales cpu, got meta"),
    ],
    ids=["transposed", "another block", "another device"],
)
def test_scales_that_do_not_fit_are_refused(
    registered: ModuleType, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    module = fine_grained(registered, "fp8")
    module.gate_up_proj_scale_inv = torch.nn.Parameter(change(module.gate_up_proj_scale_inv.data))
    with pytest.raises(ValueError, match=message):
        module(*inputs())


def test_missing_scales_are_refused(registered: ModuleType) -> None:
    module = fine_grained(registered, "fp8")
    module.down_proj_scale_inv = None
    with pytest.raises(
        ValueError, match=r"Experts\.down_proj: expected scales under the name down_proj_scale_inv"
    ):
        module(*inputs())
    module = mxfp4(registered)
    del module.gate_up_proj_scales
    with pytest.raises(
        ValueError, match="gate_up_proj: expected scales under the name gate_up_proj_scales, got none"
    ):
        registered.experts_forward(module, *inputs())


def test_model_is_quantized_and_decoded_in_place(kernel: ModuleType) -> None:
    model = torch.nn.ModuleDict({"a": experts_module(SHAPE), "b": experts_module(SHAPE)})
    model["b"].down_proj = model["a"].down_proj
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kernel.quantize_experts(model, "fp8")
    assert model["a"].down_proj is model["b"].down_proj
    assert not any(p.requires_grad for p in model.parameters())
    assert sum(p.stack.nbytes for p in model.parameters()) < 0.52 * sum(
        2 * t.numel() for t in before.values()
    )
    kernel.dequantize_experts(model)
    assert model["a"].down_proj is model["b"].down_proj
    for name, parameter in model.named_parameters():
        assert type(parameter) is torch.nn.Parameter
        assert_close([parameter], [before[name]], 0.04)


def _trained(model: Any) -> None:
    model.experts.down_proj.grad = torch.zeros_like(model.experts.down_proj)


def _copied(model: Any) -> None:
    model.modules_to_save = model.experts
    del model.experts


def _bad(model: Any) -> None:
    model.experts.down_proj.data[0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("format", "prepare", "message"),
    [
        ("int4", lambda model: None, "quantize_experts: format: expected one of nf4, fp4, fp8, got 'int4'"),
        (
            "nf4",
            lambda model: delattr(model, "experts"),
            "quantize_experts: expected experts modules .* got none",
        ),
        ("nf4", _trained, r"quantize_experts: experts\.down_proj: being trained .* train LoRA on it"),
        (
            "nf4",
            _copied,
            r"quantize_experts: modules_to_save\.gate_up_proj: being trained .* train LoRA on it",
        ),
        ("nf4", _bad, r"quantize_experts: experts\.down_proj: expected finite weights"),
    ],
    ids=["format", "no experts", "trained", "copied by PEFT", "NaN"],
)
def test_models_that_cannot_be_quantized(
    kernel: ModuleType, format: str, prepare: Callable[[Any], None], message: str
) -> None:
    model = torch.nn.Module()
    model.experts = experts_module(SHAPE)
    prepare(model)
    with pytest.raises(ValueError, match=message):
        kernel.quantize_experts(model, format)
    assert not any(hasattr(parameter, "stack") for parameter in model.parameters())


def test_quantized_or_dense_twice_is_refused(kernel: ModuleType) -> None:
    module = experts_module(SHAPE)
    with pytest.raises(ValueError, match="expected quantized experts in Gemma4TextExperts, got none"):
        kernel.dequantize_experts(module)
    kernel.quantize_experts(module)
    with pytest.raises(ValueError, match="gate_up_proj: already quantized; call dequantize_experts"):
        kernel.quantize_experts(module)


def test_codes_that_a_class_computes_with_stay(registered: ModuleType) -> None:
    with pytest.raises(
        NotImplementedError, match="Experts computes with codes alone; load the model with dequantize"
    ):
        registered.dequantize_experts(fine_grained(registered, "fp8"))


def test_dense_weights_are_freed_one_by_one(kernel: ModuleType) -> None:
    module = experts_module(SHAPE)
    dense = [weakref.ref(getattr(module, name)) for name in WEIGHTS]
    alive = []
    register = type(module).__setattr__

    class Watched(type(module)):
        def __setattr__(self, name: str, value: object) -> None:
            register(self, name, value)
            alive.append(sum(reference() is not None for reference in dense))

    module.__class__ = Watched
    kernel.quantize_experts(module)
    assert alive == [1, 0]
