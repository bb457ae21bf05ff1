"""Heads of 512 compile, fit and keep their values in registers, where shared memory is least and where it is most."""

from __future__ import annotations

import pytest
from kernelpress import aot, specifications
from kernelpress.specifications import name_of

# 99 KB of shared memory a block, and 227 KB with instructions of its own.
TARGETS = {"sm_86": "mma.sync.aligned.m16n8k16", "sm_90": "wgmma.mma_async.sync.aligned.m64n256k16"}


@pytest.mark.parametrize("target", TARGETS)
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
    compiled = aot.compiled_kernel(spec, target)
    assert compiled.metadata.shared <= specifications.TARGETS[target].shared_limit
    _, spilled = aot._cuda_needs(compiled.asm)
    assert spilled == 0
    assert TARGETS[target] in compiled.asm["ptx"]


def test_every_tile_of_every_device_is_compiled(submodule) -> None:
    """A rule that no specification stands for would be found too large by a user."""
    devices, tiles = submodule("ops.tile_tables"), submodule("ops.attention.tiles")
    specs = submodule("ops.attention.specs").COMPILE_SPECS
    kernels = {
        "forward": "attention_forward_kernel",
        "dkdv": "attention_dkdv_kernel",
        "dq": "attention_dq_kernel",
    }
    compiled = {
        (name_of(s), target, s.constants["HEAD_DIM"], s.constants["BLOCK_M"], s.constants["BLOCK_N"])
        for s in specs
        for target in s.targets
        if "BLOCK_M" in s.constants
    }
    for device in devices.available():
        target = "gfx90a" if device == devices.DEFAULT else device
        for kernel, rules in tiles.load(device).items():
            for rule in rules:
                at = (kernels[kernel], target, rule.head_dim, rule.launch["BLOCK_M"], rule.launch["BLOCK_N"])
                assert at in compiled


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 72, 256, 320, 512])
def test_every_device_has_a_tile_for_every_head(submodule, monkeypatch, itemsize, head_dim) -> None:
    import torch

    devices, tiles = submodule("ops.tile_tables"), submodule("ops.attention.tiles")
    like = torch.empty(1, dtype=torch.bfloat16 if itemsize == 2 else torch.float32)
    for device in devices.available():
        monkeypatch.setattr(devices, "table_of", lambda _, device=device: device)
        for kernel in ("forward", "dkdv", "dq"):
            for same_kv in (False, True):
                assert tiles.launch(kernel, like, head_dim, same_kv)["num_warps"] in (4, 8)
    with pytest.raises(NotImplementedError, match=r"attention: no Triton kernel for torch.float64"):
        tiles.launch("forward", like.double(), head_dim, False)
