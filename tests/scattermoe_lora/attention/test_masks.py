"""Masks read from their descriptions, compared with transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    masking_utils,
)


@given(data=st.data())
def test_a_mask_says_what_transformers_own_says(kernel, submodule, data: st.DataObject) -> None:
    plans, masks = submodule("integration.attention.plans"), submodule("integration.attention.masks")
    masks.know_functions()
    draw = data.draw
    batch, queries, earlier = draw(st.integers(1, 3)), draw(st.integers(1, 9)), draw(st.integers(0, 6))
    dropped, spare = draw(st.integers(0, earlier)), draw(st.integers(0, 4))
    kv_length = earlier - dropped + queries
    window = draw(st.none() | st.integers(1, 8))
    causal = draw(st.booleans())
    if causal:
        kv_length += spare
        parts = [masking_utils.causal_mask_function]
        parts += [masking_utils.sliding_window_overlay(window)] if window else []
    else:
        parts = [masking_utils.bidirectional_mask_function]
        parts += [masking_utils.sliding_window_bidirectional_overlay(window)] if window else []
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    padding = None
    if draw(st.booleans()):
        padding = torch.rand(batch, earlier + queries, generator=generator) < draw(
            st.sampled_from([0.5, 0.9, 1.0])
        )
    elif earlier == 0 and spare == 0 and draw(st.booleans()):
        ids = (torch.rand(batch, queries, generator=generator) < 0.3).cumsum(1)
        parts.append(masking_utils.packed_sequence_mask_function(ids))
    arguments = {
        "batch_size": batch,
        "q_length": queries,
        "kv_length": kv_length,
        "q_offset": earlier,
        "kv_offset": dropped,
        "mask_function": masking_utils.and_masks(*parts),
        "attention_mask": padding,
        "config": LlamaConfig(),
    }
    expected = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    got = masks.mask(**arguments)
    if got.dim() == 4:
        assert torch.equal(got == 0, expected)
        holes = padding is not None and window is not None
        assert holes or queries > kv_length, masks.reason_of(got)
        return
    keys = got.shape[1]
    plan = plans.plan_of(got, queries, causal=not causal, window=(0, 0))
    dense = plans.dense(plan, got, queries)
    assert torch.equal(dense, expected[..., :keys])
    assert not expected[..., keys:].any()
    # What the kernel makes of the plan, for the queries that take part.
    seen, rows = seen_by_the_kernel(plan, batch, queries, keys)
    assert torch.equal(seen[rows], expected[:, 0, :, :keys][rows])
    assert padding is not None or rows.all()
    # A copy has lost the plan, and what the layer says of causality and the window does not count either.
    again = plans.plan_of(got.clone(), queries, causal=not causal, window=(0, 0))
    assert torch.equal(plans.dense(again, got, queries), dense)
    seen, rows = seen_by_the_kernel(again, batch, queries, keys)
    assert torch.equal(seen[rows], expected[:, 0, :, :keys][rows])
    # Of padding alone nothing is left to tell, and nothing is seen.
    assert again[:2] == plan[:2] or not expected.any()


def seen_by_the_kernel(plan: Any, batch: int, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys that each query sees, ``[B, Q, K]``, and the queries that take part, ``[B, Q]``."""
    if plan.sequences is None:
        q_index, k_index = torch.arange(batch * queries), torch.arange(batch * keys)
        cu_q, cu_k = torch.arange(batch + 1) * queries, torch.arange(batch + 1) * keys
    else:
        q_index, k_index, cu_q, cu_k, longest_q, longest_k = plan.sequences
        assert (longest_q, longest_k) == (cu_q.diff().max(), cu_k.diff().max())
        q_index = torch.arange(batch * queries) if q_index is None else q_index
        k_index = torch.arange(batch * keys) if k_index is None else k_index
    rows = torch.zeros(batch * queries, dtype=torch.bool)
    seen = torch.zeros(batch * queries, batch * keys, dtype=torch.bool)
    rows[q_index] = True
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        q, k = torch.arange(d - c - (b - a), d - c)[:, None], torch.arange(d - c)
        left, right = plan.window
        part = torch.ones(len(q), len(k), dtype=torch.bool)
        part = part & (k <= q) if plan.causal else part
        part = part & (k >= q - left) if left >= 0 else part
        part = part & (k <= q + right) if right >= 0 else part
        seen[q_index[a:b, None], k_index[c:d]] = part
    seen = seen.view(batch, queries, batch, keys)
    assert seen.any((1, 3)).logical_and(~torch.eye(batch, dtype=torch.bool)).sum() == 0
    return seen[torch.arange(batch), :, torch.arange(batch)], rows.view(batch, queries)


def test_a_model_that_takes_no_flash_attention_has_the_mask_of_eager(kernel, submodule) -> None:
    class Config(LlamaConfig):
        pass

    class Model(LlamaForCausalLM):
        config_class = Config
        _supports_flash_attn = False

    masks = submodule("integration.attention.masks")
    got = masks.mask(batch_size=1, q_length=4, kv_length=4, config=Config())
    assert got.shape == (1, 1, 4, 4)
    assert masks.reason_of(got) == "transformers gives this model no flash attention"


def test_a_users_class_around_a_model_does_not_speak_for_it(kernel, submodule) -> None:
    supports = submodule("integration.attention.masks").supports

    class Config(LlamaConfig):
        pass

    # Before and after what transformers was asked of first.
    for kind, expected in ((LlamaConfig, True), (Config, False), (LlamaConfig, True)):
        Config.__module__ = "somewhere.else"
        assert supports(kind(), "_supports_flash_attn") is expected

        class Reward(PreTrainedModel):
            config_class = kind

        assert not Reward._supports_flash_attn
        assert supports(kind(), "_supports_flash_attn") is expected

    class Own(LlamaForCausalLM):
        config_class = Config
        _supports_flash_attn = True

    # A class that says something counts from when it is there.
    assert supports(Config(), "_supports_flash_attn")


def test_a_padding_mask_of_a_models_own_is_read_by_what_the_layer_says(submodule) -> None:
    plans = submodule("integration.attention.plans")
    padding = torch.tensor([[True, True, False], [True, True, True]])
    for mask in (padding, padding.long()):
        plan = plans.plan_of(mask, 3, causal=True, window=(1, -1))
        expected = [[1, 0, 0], [1, 1, 0], [0, 1, 0]], [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
        assert torch.equal(plans.dense(plan, mask, 3)[:, 0], torch.tensor(expected, dtype=torch.bool))
        assert plan.sequences.cu_key.tolist() == [0, 2, 5]
