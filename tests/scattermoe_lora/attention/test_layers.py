"""One layer's attention, called in the ways of models that do not treat masks as most do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_models import FLASH, SMALL
from helpers import assert_close
from transformers import AttentionInterface, LlamaConfig, masking_utils
from transformers.models.llama.modeling_llama import LlamaAttention


def llama() -> Any:
    return LlamaAttention(LlamaConfig(**SMALL), 0)


def attend(*arguments: Any, **others: Any) -> torch.Tensor:
    """The registered attention's result for a layer, queries, keys, values and a mask."""
    return AttentionInterface._global_mapping[FLASH](*arguments, scaling=0.25, **others)[0]


def in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention ``[B, Sq, H, D]`` to the keys that are seen, bool ``[B, 1, Sq, Sk]``."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q.double() @ k.mT / 4).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def states(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return 3 * torch.randn(2, 4, queries, 16), torch.randn(2, 2, keys, 16), torch.randn(2, 2, keys, 16)


def made(
    submodule: Any, queries: int, keys: int, causal: bool, padding: torch.Tensor | None = None
) -> torch.Tensor:
    """The mask that transformers has the registered mask function make."""
    function = masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function
    return submodule("integration.attention.masks").mask(
        batch_size=2, q_length=queries, kv_length=keys, q_offset=0 if not causal else keys - queries,
        mask_function=function, attention_mask=padding, config=LlamaConfig(),
    )  # fmt: skip


PADDING = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("others", [{}, {"dropout": 1e-9}, {"output_attentions": True}])
def test_a_mask_that_a_model_reshapes_says_the_same(
    attention, submodule, causal: bool, others: dict[str, Any]
) -> None:
    """In the kernel, in sdpa and in eager mode; so do ones and zeros of its own, which are no bias."""
    layer = llama()
    mask = made(submodule, 5, 5, causal, PADDING)
    assert mask.shape == (2, 5)
    q, k, v = states(5, 5)
    seen = (PADDING > 0)[:, None, None, :].expand(2, 1, 5, 5)
    for given, allowed in ((mask, seen.tril() if causal else seen), (PADDING, seen)):
        got = attend(layer, q, k, v, given[:, None, None, :], **others)
        exact = in_float64(q, k, v, allowed)
        assert_close([got[PADDING > 0]], [exact[PADDING > 0]], 1e-5)


def test_a_mask_made_for_one_query_serves_a_layers_many(attention, submodule) -> None:
    """As LightGlue's, whose keypoints all see the same ones; also from another image, by a mask that it reshapes."""
    mask = made(submodule, 1, 5, False, PADDING)
    q, k, v = states(5, 5)
    for given, padding in (
        (mask, PADDING),
        (mask.reshape(1, 2, 1, 1, 5).flip(1).view(2, 1, 1, 5), PADDING.flip(0)),
    ):
        seen = (padding > 0)[:, None, None, :]
        assert_close([attend(llama(), q, k, v, given)], [in_float64(q, k, v, seen)], 1e-5)


def test_queries_that_a_causal_mask_says_nothing_of_are_refused(attention, submodule) -> None:
    mask = made(submodule, 1, 5, True)
    q, k, v = states(5, 5)
    with pytest.raises(ValueError, match=r"attention_mask: .*5 queries, got one for 1;"):
        attend(llama(), q, k, v, mask)
    # The last of those that it is for are.
    whole = made(submodule, 5, 5, True, PADDING.flip(1))
    exact = in_float64(
        q, k, v, (PADDING.flip(1) > 0)[:, None, None, :] & torch.ones(5, 5, dtype=torch.bool).tril()
    )
    assert_close([attend(llama(), q[:, :, 3:], k, v, whole)], [exact[:, 3:]], 1e-5)


@pytest.mark.parametrize("others", [{}, {"dropout": 1e-9}])
def test_a_layer_that_sees_both_ways_has_no_window_without_a_mask(attention, others: dict[str, Any]) -> None:
    """As in DiffusionGemma's decoder, whose layers name their window and see all of the canvas where none is a mask."""
    q, k, v = states(5, 9)
    got = attend(llama(), q, k, v, None, sliding_window=3, is_causal=False, **others)
    assert_close([got], [in_float64(q, k, v, torch.ones(2, 1, 5, 9, dtype=torch.bool))], 1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [4, 8])
def test_keys_that_a_mask_says_nothing_of_are_refused(attention, submodule, causal: bool, keys: int) -> None:
    for padding in (None, PADDING):
        mask = made(submodule, 5, 5, causal, padding)
        with pytest.raises(ValueError, match=f"attention_mask: .* layer's {keys} keys, got one for 5;"):
            attend(llama(), *states(5, keys), mask)
    if keys < 5:
        # Nor is a copy, which does not know of a static cache's empty rest, or a padding mask of a model's own.
        for copy in (mask.clone(), PADDING):
            with pytest.raises(ValueError, match="layer's 4 keys, got one for 5;"):
                attend(llama(), *states(4, keys), copy)


def test_the_empty_rest_of_a_static_cache_is_not_seen(attention, submodule) -> None:
    layer, (q, k, v) = llama(), states(5, 8)
    mask = submodule("integration.attention.masks").mask(
        batch_size=2, q_length=5, kv_length=8, attention_mask=PADDING.flip(1), config=layer.config
    )
    assert mask.shape == (2, 5)
    seen = (PADDING.flip(1) > 0)[:, None, None, :] & torch.ones(5, 5, dtype=torch.bool).tril()
    exact = in_float64(q, k[:, :, :5], v[:, :, :5], seen)
    for given in (mask, mask.clone()):
        got = attend(layer, q, k, v, given)
        assert_close([got[PADDING.flip(1) > 0]], [exact[PADDING.flip(1) > 0]], 1e-5)


def test_dropout_alone_is_no_matter_for_eager(attention, log_lines) -> None:
    q, k, v = states(5, 5)
    attend(llama(), q, k, v, None, dropout=0.5, output_attentions=False)
    assert log_lines() == [
        "attention of LlamaAttention, head_dim 16: transformers' sdpa, because of dropout 0.5"
    ]


def test_lengths_of_packed_sequences_need_no_longest(attention) -> None:
    q, k, v = (x[:1] for x in states(6, 6))
    starts = torch.tensor([0, 2, 6])
    ids = torch.tensor([0, 0, 1, 1, 1, 1])
    exact = in_float64(q, k, v, (ids[:, None] == ids) & torch.ones(6, 6, dtype=torch.bool).tril())
    assert_close([attend(llama(), q, k, v, None, cu_seq_lens_q=starts, cu_seq_lens_k=starts)], [exact], 1e-5)
    with pytest.raises(ValueError, match=r"cu_seq_lens_k: .* got None"):
        attend(llama(), q, k, v, None, cu_seq_lens_q=starts)
