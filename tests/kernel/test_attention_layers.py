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
    """What the registered attention makes of a layer, queries, keys, values and a mask."""
    return AttentionInterface._global_mapping[FLASH](*arguments, scaling=0.25, **others)[0]


def in_float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Attention ``[B, Sq, H, D]`` to the keys that are seen, bool ``[B, 1, Sq, Sk]``."""
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q.double() @ k.mT / 4).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def states(queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return 3 * torch.randn(2, 4, queries, 16), torch.randn(2, 2, keys, 16), torch.randn(2, 2, keys, 16)


PADDING = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("others", [{}, {"dropout": 1e-9}, {"output_attentions": True}])
def test_a_mask_that_a_model_reshapes_says_the_same(
    attention, submodule, causal: bool, others: dict[str, Any]
) -> None:
    """In the kernel, in sdpa and in eager mode; so do ones and zeros of its own, which are no bias."""
    layer = llama()
    function = masking_utils.causal_mask_function if causal else masking_utils.bidirectional_mask_function
    mask = submodule("integration.attention_masks").mask(
        batch_size=2,
        q_length=5,
        kv_length=5,
        mask_function=function,
        attention_mask=PADDING,
        config=layer.config,
    )
    assert mask.shape == (2, 5)
    q, k, v = states(5, 5)
    seen = (PADDING > 0)[:, None, None, :].expand(2, 1, 5, 5)
    for given, allowed in ((mask, seen.tril() if causal else seen), (PADDING, seen)):
        got = attend(layer, q, k, v, given[:, None, None, :], **others)
        exact = in_float64(q, k, v, allowed)
        assert_close([got[PADDING > 0]], [exact[PADDING > 0]], 1e-5)
