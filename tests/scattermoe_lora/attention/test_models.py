"""Attention registered in transformers: language models of every kind, compared with eager mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_models import (
    CONFIGS,
    FLASH,
    LENGTHS,
    SEVERAL,
    assert_trains_as_eager,
    gemma4,
    labels_of,
    model,
    results,
    tokens,
)
from helpers import assert_close
from transformers import (
    StaticCache,
)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_has_the_loss_and_gradients_of_eager(attention, log_lines, name: str) -> None:
    ids = tokens(2, 13)
    assert_trains_as_eager(model(CONFIGS[name]()), input_ids=ids, labels=ids)
    assert log_lines()
    assert all(line.endswith(": the kernel") for line in log_lines())


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("name", [*SEVERAL, "qwen2 moe", "gemma4 bidirectional"])
def test_a_padded_batch_has_the_loss_and_gradients_of_eager(
    attention, log_lines, name: str, side: str
) -> None:
    ids = tokens(3, 13)
    mask = torch.ones_like(ids)
    if side != "right":
        mask[0, :4] = 0
    if side != "left":
        mask[1, 8:] = 0
    labels = labels_of(ids, mask)
    assert_trains_as_eager(model(CONFIGS[name]()), input_ids=ids, labels=labels, attention_mask=mask)
    assert all(line.endswith(": the kernel") for line in log_lines())


def test_padding_between_tokens_counts_in_a_window(attention, log_lines) -> None:
    ids = tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[0, 5:8] = 0
    labels = labels_of(ids, mask)
    assert_trains_as_eager(model(gemma4()), input_ids=ids, labels=labels, attention_mask=mask)
    assert [line for line in log_lines() if "(sliding_attention)" in line] == [
        "attention of Gemma4TextAttention (sliding_attention), head_dim 16: transformers' sdpa, "
        "because of a window over keys with padding between them"
    ]


@pytest.mark.parametrize("name", ["qwen2 moe", "gemma4 bidirectional"])
def test_a_mask_that_was_copied_on_its_way_says_the_same(attention, log_lines, name: str) -> None:
    """As where layers are spread over several GPUs; neither model's layers tell their attention all of the mask."""
    m, ids = model(CONFIGS[name]()), tokens(3, 13)
    mask = torch.ones_like(ids)
    mask[0, :4], mask[1, 8:] = 0, 0
    inputs = {"input_ids": ids, "labels": labels_of(ids, mask), "attention_mask": mask}
    expected = results(m, FLASH, **inputs)

    def copy(layer: Any, arguments: Any, others: dict[str, Any]) -> Any:
        return arguments, {**others, "attention_mask": others["attention_mask"].clone()}

    for layer in m.model.layers:
        layer.register_forward_pre_hook(copy, with_kwargs=True)
    for a, b in zip(results(m, FLASH, **inputs), expected, strict=True):
        assert torch.equal(a, b)
    assert all(line.endswith(": the kernel") for line in log_lines())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["gemma4 dense", "gemma4 shared KV", "qwen3", "qwen2 moe"])
def test_packed_sequences_have_the_loss_and_gradients_of_unpacked(
    attention, log_lines, name: str, rows: int
) -> None:
    m, ids = model(CONFIGS[name]()), tokens(rows, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).expand(rows, -1)
    labels = ids.masked_fill(positions == 0, -100)
    packed = results(m, FLASH, input_ids=ids, labels=labels, position_ids=positions)
    assert all(line.endswith(": the kernel") for line in log_lines())

    m.zero_grad()
    parts = [part for row in ids for part in row.split(LENGTHS) if len(part) > 1]
    losses = [
        m(input_ids=part[None], labels=part[None], use_cache=False).loss * (len(part) - 1) for part in parts
    ]
    loss = sum(losses) / sum(len(part) - 1 for part in parts)
    loss.backward()
    apart = [loss.detach(), *(p.grad.clone() for p in m.parameters() if p.grad is not None)]
    assert_close(packed, apart, 1e-3)
    assert_close(packed, results(m, "eager", input_ids=ids, labels=labels, position_ids=positions), 1e-3)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", ["gemma4 shared KV", "gemma4 K=V", "qwen3", "qwen2 moe", "llama"])
def test_packed_sequences_do_not_see_each_other_where_an_empty_cache_is_filled(
    attention, log_lines, name: str, cache: str | None, rows: int
) -> None:
    """As a plain loop calls a model; transformers makes a mask of the positions only if there is no cache."""
    m, ids = model(CONFIGS[name]()), tokens(rows, sum(LENGTHS))
    # Such that the first row's sequences begin elsewhere than the second's.
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in LENGTHS[:: 1 - 2 * row]]) for row in range(rows)]
    )
    m.set_attn_implementation("eager")
    expected = m(input_ids=ids, position_ids=positions, use_cache=False).logits
    m.set_attn_implementation(FLASH)
    filled = StaticCache(m.config, max_cache_len=20) if cache else None
    got = m(input_ids=ids, position_ids=positions, past_key_values=filled)
    assert got.past_key_values.get_seq_length() == ids.shape[1]
    assert_close([got.logits], [expected], 1e-4)
    assert all(line.endswith(": the kernel") for line in log_lines())
    if rows == 1:
        # transformers' own wrapper of a flash kernel.
        m.set_attn_implementation("org/scattermoe-lora", allow_all_kernels=True)
        assert_close([m(input_ids=ids, position_ids=positions).logits], [expected], 1e-4)


def test_a_plain_loop_over_packed_sequences_has_the_gradients_of_eager_without_a_cache(attention) -> None:
    m, ids = model(CONFIGS["gemma4 dense"]()), tokens(1, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    inputs = {"input_ids": ids, "labels": ids, "position_ids": positions}
    m.zero_grad()
    loss = m(**inputs).loss
    loss.backward()
    got = [loss.detach(), *(p.grad.clone() for p in m.parameters() if p.grad is not None)]
    assert_close(got, results(m, "eager", **inputs), 1e-3)


@pytest.mark.parametrize("first", [0, 2])
def test_positions_are_those_of_the_keys_only_where_the_cache_was_empty(attention, first: int) -> None:
    """Positions that do not start again, and a cache with keys in it, divide nothing."""
    m, ids = model(CONFIGS["llama"]()), tokens(2, 12)
    outputs = []
    for implementation in ("eager", FLASH):
        m.set_attn_implementation(implementation)
        cache = m(
            input_ids=ids[:, :6], position_ids=torch.arange(first, 6 + first).expand(2, -1)
        ).past_key_values
        again = torch.tensor([[0, 1, 2, 0, 1, 2]])
        outputs.append(m(input_ids=ids[:, 6:], position_ids=again, past_key_values=cache).logits)
    assert_close(outputs[1:], outputs[:1], 1e-4)


def test_what_the_kernel_does_not_run_is_divided_by_positions_too(attention, log_lines) -> None:
    m, ids = model(CONFIGS["llama"]()), tokens(2, sum(LENGTHS))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    expected = m(input_ids=ids, position_ids=positions, use_cache=False).logits
    m.train()
    for layer in m.model.layers:
        layer.self_attn.attention_dropout = 1e-9
    assert_close([m(input_ids=ids, position_ids=positions).logits], [expected], 1e-4)
    assert log_lines()[-1].endswith("transformers' sdpa, because of dropout 1e-09")


def test_lengths_handed_over_by_a_collator_are_taken(attention, log_lines) -> None:
    m, ids = model(CONFIGS["llama"]()), tokens(1, sum(LENGTHS))
    boundaries = torch.tensor([0, 5, 6, 13], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    arguments = {
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": 7,
        "max_length_k": 7,
    }
    eager = m(input_ids=ids, position_ids=positions, use_cache=False).logits
    # Without positions the mask knows of one sequence, and the layers of three.
    m.model.rotary_emb.forward = lambda x, position_ids, f=m.model.rotary_emb.forward: f(x, positions)
    assert_close([m(input_ids=ids, use_cache=False, **arguments).logits], [eager], 1e-4)
    m.train()
    for layer in m.model.layers:
        layer.self_attn.attention_dropout = 1e-9
    assert_close([m(input_ids=ids, use_cache=False, **arguments).logits], [eager], 1e-4)
    assert log_lines()[-1].endswith("transformers' sdpa, because of dropout 1e-09")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", [*SEVERAL, "gemma4 moe", "mistral"])
def test_generation_gives_the_tokens_of_eager(attention, name: str, cache: str | None, padded: bool) -> None:
    m, ids = model(CONFIGS[name]()).eval(), tokens(2, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    generated = []
    for implementation in (FLASH, "eager"):
        m.set_attn_implementation(implementation)
        generated.append(
            m.generate(
                ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0,
                eos_token_id=None, cache_implementation=cache,
            )
        )  # fmt: skip
    assert generated[0].shape == (2, 17)
    assert torch.equal(*generated)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", SEVERAL)
def test_a_prompt_in_pieces_has_the_logits_of_a_whole_one(
    attention, log_lines, name: str, static: bool
) -> None:
    """Pieces before, at and beyond the window of a sliding cache, without any mask."""
    m, ids = model(CONFIGS[name]()).eval(), tokens(2, 14)
    m.set_attn_implementation("eager")
    with torch.no_grad():
        whole = m(input_ids=ids, use_cache=False).logits
        m.set_attn_implementation(FLASH)
        cache = StaticCache(m.config, max_cache_len=20) if static else None
        pieces = []
        for piece in ids.split([3, 4, 6, 1], dim=1):
            out = m(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            pieces.append(out.logits)
    assert_close([torch.cat(pieces, 1)], [whole], 1e-4)
    assert all(
        line.endswith(": the kernel") or "a step of decoding with a static cache" in line
        for line in log_lines()
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_bits(attention, reentrant: bool) -> None:
    ids = tokens(2, 13)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    m = model(gemma4(layers=4)).train()
    inputs = {"input_ids": ids, "labels": labels_of(ids, mask), "attention_mask": mask}
    plain = results(m, FLASH, **inputs)
    m.gradient_checkpointing_enable({"use_reentrant": reentrant})
    m.enable_input_require_grads()
    for a, b in zip(plain, results(m, FLASH, **inputs), strict=True):
        assert torch.equal(a, b)


def test_autocast_computes_in_its_dtype(attention, log_lines) -> None:
    m, ids = model(gemma4()), tokens(2, 13)
    losses = []
    for implementation in (FLASH, "sdpa"):
        m.set_attn_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(m(input_ids=ids, labels=ids).loss)
    torch.testing.assert_close(*losses, rtol=3e-2, atol=0)
    assert all(line.endswith(": the kernel") for line in log_lines())
