"""Heads of 512 compile, fit and keep their values in registers, where shared memory is least and where it is most."""

from __future__ import annotations

import pytest
from kernelpress.compile import aot
from kernelpress.compile.specs import TARGETS, name_of

# 99 KB of shared memory a block, and 227 KB with instructions of its own.
INSTRUCTIONS = {"sm_86": "mma.sync.aligned.m16n8k16", "sm_90": "wgmma.mma_async.sync.aligned.m64n256k16"}


@pytest.mark.parametrize("target", INSTRUCTIONS)
@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("attention_forward_kernel", "window 512 bf16 ieee"),
        ("attention_dkdv_kernel", "window 512 bf16 ieee dk"),
        ("attention_dkdv_kernel", "window 512 bf16 ieee dv"),
        ("attention_dq_kernel", "window 512 bf16 ieee"),
    ],
)
def test_head_of_512_fits_and_multiplies_on_tensor_cores(submodule, target, name, label) -> None:
    specs = submodule("ops.attention.specs").COMPILE_SPECS
    (spec,) = (s for s in specs if name_of(s) == name and s.label == label and target in s.targets)
    compiled = aot.compile_one(spec, target)
    assert (compiled.error, compiled.spilled) == (None, 0)
    assert INSTRUCTIONS[target] in aot.compiled_kernel(spec, target).asm["ptx"]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("attention_forward_kernel", "causal 512 bf16 ieee"),
        ("attention_dkdv_kernel", "causal 512 bf16 ieee dk"),
        ("attention_dkdv_kernel", "causal 512 bf16 ieee dv"),
        ("attention_dq_kernel", "causal 512 bf16 ieee"),
        ("attention_forward_kernel", "window 256 windows alone bf16 ieee"),
        ("attention_dkdv_kernel", "window 256 windows alone bf16 ieee dk"),
        ("attention_dkdv_kernel", "window 256 windows alone bf16 ieee dv"),
        ("attention_dq_kernel", "window 256 windows alone bf16 ieee"),
    ],
)
def test_a_launch_that_was_timed_fits_and_says_so(submodule, name, label) -> None:
    """They spill up to 424 bytes a thread in one pass over the queries; that was in the time, and they were fastest."""
    specs = submodule("ops.attention.specs").COMPILE_SPECS
    (spec,) = (s for s in specs if name_of(s) == name and s.label == label)
    compiled = aot.compile_one(spec, "sm_90")
    # When is the table's to say, of the last run that found it fastest.
    assert (compiled.error, str(compiled.measured)[:23]) == (None, "NVIDIA H100 80GB HBM3, ")
    assert compiled.spilled <= 424
    assert "wgmma.mma_async" in aot.compiled_kernel(spec, "sm_90").asm["ptx"]


def test_every_tile_of_every_device_is_compiled(submodule) -> None:
    """A rule that no specification stands for would be found too large by a user."""
    tables, gpu = submodule("ops.tile_tables"), submodule("ops.attention.gpu")
    specs = submodule("ops.attention.specs").COMPILE_SPECS
    compiled = {
        (name_of(s), target, s.constants["HEAD_DIM"], s.constants["BLOCK_M"], s.constants["BLOCK_N"])
        for s in specs
        for target in s.targets
        if "BLOCK_M" in s.constants
    }
    for device in tables.DEVICES:
        target = "gfx90a" if device == tables.DEFAULT else device
        for kernel, rules in tables.load(gpu.TILES, device).rules.items():
            for rule in rules:
                blocks = (rule.largest("head_dim"), rule.launch["BLOCK_M"], rule.launch["BLOCK_N"])
                assert (f"{kernel}_kernel", target, *blocks) in compiled


def test_every_option_of_a_launch_is_compiled_for_every_device_that_has_it(submodule) -> None:
    specs = submodule("ops.attention.specs").COMPILE_SPECS
    options = {
        "attention_forward_kernel": {"ONE_LOOP": 1, "PASSES": 2, "TMA": 1},
        "attention_dkdv_kernel": {"ONE_LOOP": 1, "PASSES": 2, "TMA": 1},
        "attention_dq_kernel": {"ONE_LOOP": 1, "DELTA": 1, "TMA": 1},
    }
    for kernel, values in options.items():
        for option, value in values.items():
            targets = {
                t for s in specs if name_of(s) == kernel and s.constants[option] == value for t in s.targets
            }
            assert targets == ({"sm_90", "sm_100", "sm_120"} if option == "TMA" else set(TARGETS))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("attention_dkdv_kernel", "SPLIT 0 PASSES 2 ONE_LOOP 1 512 bf16 ieee"),
        ("attention_dq_kernel", "DELTA 1 512 bf16 ieee"),
        ("attention_dkdv_kernel", "TMA 1 causal 512 bf16 ieee dk"),
        ("attention_dkdv_kernel", "TMA 1 causal 512 bf16 ieee dv"),
        ("attention_dq_kernel", "TMA 1 causal 512 bf16 ieee"),
    ],
)
def test_options_of_a_head_of_512_keep_their_values_in_registers(submodule, name, label) -> None:
    specs = submodule("ops.attention.specs").COMPILE_SPECS
    (spec,) = (s for s in specs if name_of(s) == name and s.label == label and "sm_90" in s.targets)
    compiled = aot.compile_one(spec, "sm_90")
    assert (compiled.error, compiled.spilled) == (None, 0)


@pytest.mark.parametrize("passes", [(16, 1), (40, 2), (512, 2)])
def test_passes_leave_a_product_16_columns(submodule, monkeypatch, passes) -> None:
    import torch

    head_dim, expected = passes
    tables, gpu = submodule("ops.tile_tables"), submodule("ops.attention.gpu")
    monkeypatch.setattr(tables, "find", lambda *_: {"CHUNK": 64, "PASSES": 2})
    assert gpu.tile("attention_dkdv", torch.empty(1), head_dim, False)["PASSES"] == expected


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 72, 256, 320, 512])
def test_every_device_has_a_tile_for_every_head(submodule, monkeypatch, itemsize, head_dim) -> None:
    import torch

    tables, gpu = submodule("ops.tile_tables"), submodule("ops.attention.gpu")
    like = torch.empty(1, dtype=torch.bfloat16 if itemsize == 2 else torch.float32)
    for device in tables.DEVICES:
        monkeypatch.setattr(tables, "table_of", lambda _, device=device: device)
        for kernel in ("attention_forward", "attention_dkdv", "attention_dq"):
            for same_kv in (False, True):
                assert gpu.tile(kernel, like, head_dim, same_kv)["num_warps"] in (4, 8)
    with pytest.raises(NotImplementedError, match=r"attention_forward: no Triton kernel for torch.float64"):
        gpu.tile("attention_forward", like.double(), head_dim, False)
