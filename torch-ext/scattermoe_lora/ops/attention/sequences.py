"""The sequences of a padded or packed batch, as numbers of their tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Sequences(NamedTuple):
    """The places of a batch's sequences, as ``flash_attn_varlen_func`` takes them.

    Attributes:
        query_index: int64 ``[tokens]``, the queries that take part, counted through the batch; None for all.
        key_index: The same for keys.
        cu_query, cu_key: int32 ``[sequences + 1]``, each sequence's first token; the last is the number of tokens.
        max_query, max_key: Length of the longest sequence.
    """

    query_index: torch.Tensor | None
    key_index: torch.Tensor | None
    cu_query: torch.Tensor
    cu_key: torch.Tensor
    max_query: int
    max_key: int


def packed_sequences(numbers: torch.Tensor) -> Sequences:
    """The sequences of rows that hold several, from the number ``[B, K]`` of each token's."""
    starts = torch.ones_like(numbers, dtype=torch.bool)
    starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    ends = starts.new_ones(1)
    cu = torch.cat([starts.flatten(), ends]).nonzero().flatten().int()
    longest = int(cu.diff().max())
    return Sequences(None, None, cu, cu, longest, longest)


def padded_sequences(valid: torch.Tensor, queries: int, same_tokens: bool) -> Sequences:
    """One sequence a row, without its padding.

    Args:
        valid: bool ``[B, K]``, False for padding.
        queries: Sq.
        same_tokens: Whether the last keys of a row are its queries, so that padding's take no part; else all do.
    """
    key_lengths = valid.sum(1)
    query_index = None
    if same_tokens:
        taking_part = valid[:, valid.shape[1] - queries :]
        query_index = taking_part.flatten().nonzero().flatten()
        query_lengths = taking_part.sum(1)
    else:
        query_lengths = torch.full_like(key_lengths, queries)
    max_query, max_key = torch.stack([query_lengths.max(), key_lengths.max()]).tolist()
    return Sequences(
        query_index,
        valid.flatten().nonzero().flatten(),
        _cumulative(query_lengths),
        _cumulative(key_lengths),
        max_query,
        max_key,
    )


def _cumulative(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()


def select_tokens(states: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """The tokens ``[tokens, ...]`` of ``[B, S, ...]`` that ``index`` counts through the batch; None for all."""
    states = states.flatten(0, 1)
    return states if index is None else states.index_select(0, index)
