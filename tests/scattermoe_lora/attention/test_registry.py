"""Registering attention in transformers, alone and with another flash attention."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from attention_models import CONFIGS, FLASH, LENGTHS, assert_trains_as_eager, gemma4, labels_of, model, tokens
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

REPOSITORY = Path(__file__).resolve().parents[3]


def test_the_log_says_each_thing_once(attention, log_lines) -> None:
    m, ids = model(gemma4(layers=4)), tokens(2, 13)
    for _ in range(3):
        m(input_ids=ids)
    assert log_lines() == [
        "attention of Gemma4TextAttention (sliding_attention), head_dim 16: the kernel",
        "attention of Gemma4TextAttention (full_attention), head_dim 32: the kernel",
    ]


def test_registering_twice_is_registering_once_and_unregistering_undoes_it(kernel) -> None:
    from transformers import modeling_flash_attention_utils as flash_utils

    def state() -> tuple[Any, ...]:
        return (
            dict(AttentionInterface._global_mapping),
            dict(AttentionMaskInterface._global_mapping),
            flash_utils._lazy_imports,
        )

    before = state()
    kernel.register_attention()
    once = state()
    kernel.register_attention()
    assert state() == once
    kernel.register_attention("another")
    model(CONFIGS["llama"]())
    kernel.unregister_attention()
    assert state() == before
    assert flash_utils._loaded_implementation != FLASH
    kernel.unregister_attention()
    assert state() == before


@pytest.fixture(scope="module")
def another(kernel, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """Another build of the kernel package."""
    from kernelpress.builder.build import build
    from kernelpress.spec.load import load_spec
    from kernels import get_local_kernel

    there = tmp_path_factory.mktemp("another")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "torch-ext", there / "torch-ext", ignore=ignored)
    for name in ("build.toml", "LICENSE"):
        shutil.copy(REPOSITORY / name, there)
    with (there / "torch-ext/scattermoe_lora/ops/routing.py").open("a") as source:
        source.write("# attention of another build\n")
    build(load_spec(there), there / "build")
    built = get_local_kernel(there / "build")
    assert built.__name__ != kernel.__name__
    return built


@pytest.mark.parametrize("first", [0, 1])
def test_two_builds_leave_transformers_as_it_was_whichever_goes_first(
    kernel, another: ModuleType, first: int
) -> None:
    from transformers import modeling_flash_attention_utils as flash_utils

    before = flash_utils._lazy_imports
    builds = {"one_flash": kernel, "another_flash": another}
    for name, build in builds.items():
        build.register_attention(name)
    for name, build in builds.items():
        assert flash_utils._lazy_imports(name)[0].__module__.startswith(build.__name__)
    (gone, leaving), (left, staying) = list(builds.items())[:: 1 if first == 0 else -1]
    leaving.unregister_attention()
    assert flash_utils._lazy_imports is not before
    assert flash_utils._lazy_imports(left)[0].__module__.startswith(staying.__name__)
    assert gone not in AttentionInterface._global_mapping
    staying.unregister_attention()
    assert flash_utils._lazy_imports is before


@pytest.mark.parametrize("name", ["sdpa", "eager", "flash_attention_2"])
def test_a_name_that_is_taken_is_refused(kernel, name: str) -> None:
    with pytest.raises(ValueError, match=f"already has an attention implementation '{name}'"):
        kernel.register_attention(name)


@pytest.mark.parametrize("hybrid", ["eager", "no_such", FLASH])
def test_a_hybrid_with_nothing_is_refused(kernel, hybrid: str) -> None:
    with pytest.raises(ValueError, match=f"hybrid: .*'{hybrid}'"):
        kernel.register_attention(hybrid=hybrid)
    assert FLASH not in AttentionInterface._global_mapping


def test_a_hybrid_with_a_package_that_is_not_installed_is_refused(kernel) -> None:
    from transformers import modeling_flash_attention_utils as flash_utils

    loaded = flash_utils._loaded_implementation
    with pytest.raises(ImportError):
        kernel.register_attention(hybrid="flash_attention_3")
    assert flash_utils._loaded_implementation == loaded
    assert FLASH not in AttentionInterface._global_mapping


# Hybrid


class StandIn:
    """A flash attention for head_dim <= 256 that keeps a record: what it is given, computed by sdpa."""

    def __init__(self) -> None:
        self.head_dims: list[int] = []

    def __call__(
        self, module, query, key, value, attention_mask, sliding_window=None, is_causal=None, **kwargs
    ):
        assert module.config._attn_implementation == "stand_in"
        assert attention_mask is None or attention_mask.shape == (query.shape[0], key.shape[2])
        self.head_dims.append(query.shape[-1])
        queries, keys = query.shape[2], key.shape[2]
        q, k = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
        seen = torch.ones(1, 1, queries, keys, dtype=torch.bool)
        if is_causal:
            seen = seen & (k <= q)
        if sliding_window is not None:
            seen = seen & (k > q - sliding_window)
        if attention_mask is not None:
            seen = seen & attention_mask[:, None, None, :]
        if kwargs.get("cu_seq_lens_q") is not None:
            ids = torch.bucketize(
                torch.arange(query.shape[0] * queries, dtype=torch.int32),
                kwargs["cu_seq_lens_q"][1:],
                right=True,
            )
            ids = ids.view(query.shape[0], 1, queries)
            seen = seen & (ids[..., :, None] == ids[..., None, :])
        # A row of padding that sees nothing is left at zero, as flash attention leaves it.
        rows = seen.any(-1, keepdim=True)
        out, _ = sdpa_attention_forward(module, query, key, value, seen | ~rows, scaling=kwargs["scaling"])
        return out * rows.transpose(1, 2), None


@pytest.fixture
def stand_in(kernel) -> Iterator[StandIn]:
    function = StandIn()
    AttentionInterface.register("stand_in", function)
    kernel.register_attention(hybrid="stand_in")
    yield function
    kernel.unregister_attention()
    del AttentionInterface._global_mapping["stand_in"]


@pytest.mark.parametrize("inputs", ["plain", "padded", "packed"])
def test_hybrid_takes_the_other_attention_up_to_256(stand_in: StandIn, log_lines, inputs: str) -> None:
    ids = tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).expand(2, -1)
    given = {"plain": {}, "padded": {"attention_mask": mask}, "packed": {"position_ids": positions}}[inputs]
    labels = labels_of(ids, mask) if inputs == "padded" else ids
    m = model(gemma4(layers=4, global_head_dim=512))
    assert_trains_as_eager(m, input_ids=ids, labels=labels, **given)
    assert stand_in.head_dims == [16, 16]
    assert log_lines() == [
        "attention of Gemma4TextAttention (sliding_attention), head_dim 16: stand_in",
        "attention of Gemma4TextAttention (full_attention), head_dim 512: the kernel",
    ]


def test_registering_with_another_hybrid_replaces_the_first(kernel, stand_in: StandIn) -> None:
    kernel.register_attention()
    ids = tokens(2, 13)
    model(gemma4())(input_ids=ids)
    assert stand_in.head_dims == []
