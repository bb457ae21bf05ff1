"""Attention of Gemma 4's layers, forward and backward: ours against SDPA and eager mode, and on a GPU all there is.

8 query heads over 4 key heads, the global layers' head_dim of 512 and the sliding layers' of 256; and other models'
heads, 1, 2, 8 or all of them on a key head. All implementations of a case run in turns in one process, on the same
tensors. Prints a table of medians; ``--output`` also writes the figures as JSON, with the date, the device, the
versions and the commit they belong to.

    python benchmarks/compare_attention.py [--device cuda] [--cases global-2k,...] [--output FILE]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import against_first, measure_in_turns
from measuring import (
    Alone,
    compare_cases,
    comparison_parser,
    median_seconds,
    parse_cases,
    run_beside_others,
)


@dataclass(frozen=True)
class Case:
    """One layer: ``sequences`` of ``length`` tokens, packed into one row; a query sees ``window`` keys, 0 for all.

    ``heads`` of queries read ``key_heads``.
    """

    length: int
    head_dim: int
    dtype: str
    window: int = 0
    sequences: int = 1
    heads: int = 8
    key_heads: int = 4

    def pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        reach = min(self.window or self.length, self.length)
        return self.sequences * (reach * (reach + 1) // 2 + (self.length - reach) * reach)

    def flops(self) -> int:
        """Of the matrix products, forward (2) and backward (5, the scores once more among them)."""
        return 7 * 2 * self.heads * self.head_dim * self.pairs()


# Query heads to a key head: OLMoE, Gemma 4, gpt-oss; and all on one.
RATIOS = (1, 2, 8, 16)
CASES = {
    "cpu": {
        "global-1k": Case(1024, 512, "float32"),
        "global-1k-bf16": Case(1024, 512, "bfloat16"),
        "sliding-2k": Case(2048, 256, "float32", window=512),
        "packed-4x256": Case(256, 512, "float32", sequences=4),
        "sliding-2k-bf16": Case(2048, 64, "bfloat16", window=128, key_heads=1),
        "short": Case(128, 64, "float32", key_heads=8),
        "heads-128-bf16": Case(1024, 128, "bfloat16", key_heads=8),
        "one-key-head": Case(2048, 64, "float32", heads=4, key_heads=1),
        **{f"ratio-{ratio}": Case(512, 128, "float32", heads=16, key_heads=16 // ratio) for ratio in RATIOS},
    },
    "cuda": {
        **{f"global-{n}k": Case(n * 1024, 512, "bfloat16") for n in (2, 4, 8, 16, 32, 64)},
        **{f"sliding-{n}k": Case(n * 1024, 256, "bfloat16", window=1024) for n in (2, 4, 8, 16, 32, 64)},
        **{f"packed-8x{n}k": Case(n * 1024, 512, "bfloat16", sequences=8) for n in (1, 2, 4, 8)},
        **{
            f"ratio-{ratio}": Case(4096, 128, "bfloat16", heads=16, key_heads=16 // ratio) for ratio in RATIOS
        },
    },
}
# Rounding makes less of a difference than this.
CLOSE = 0.05
# A dense mask or all scores of more tokens than this do not fit.
MOST_DENSE = 16 * 1024

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def visible(case: Case, device: str) -> torch.Tensor:
    """``[1, 1, S, S]``, True where a query sees a key."""
    tokens = torch.arange(case.length * case.sequences, device=device)
    q, k = tokens[:, None], tokens[None]
    allowed = (k <= q) & (q // case.length == k // case.length)
    return (allowed & (k > q - case.window) if case.window else allowed)[None, None]


def ours(kernel: Any, case: Case, device: str) -> Attention:
    window = (case.window - 1, 0) if case.window else (-1, -1)
    if case.sequences == 1:
        attend = partial(kernel.flash_attn_func, causal=True, window_size=window)
    else:
        cu = torch.arange(case.sequences + 1, dtype=torch.int32, device=device) * case.length
        lengths = (cu, cu, case.length, case.length)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.squeeze(0) for x in (q, k, v))
            return kernel.flash_attn_varlen_func(q, k, v, *lengths, causal=True, window_size=window)[None]

    return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def repeated(x: torch.Tensor, case: Case) -> torch.Tensor:
    return x.repeat_interleave(case.heads // case.key_heads, dim=1)


def sdpa(case: Case, device: str) -> Attention:
    """As transformers calls it: K and V repeated, and a dense mask where "causal" does not say it all."""
    if case.window == 0 and case.sequences == 1:
        options: dict[str, Any] = {"is_causal": True}
    else:
        options = {"attn_mask": visible(case, device)}
    return lambda q, k, v: F.scaled_dot_product_attention(q, repeated(k, case), repeated(v, case), **options)


def with_backend(backend: Any, attention: Attention) -> Attention:
    from torch.nn.attention import sdpa_kernel

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return attention(q, k, v)

    return run


def eager(case: Case, device: str) -> Attention:
    mask = visible(case, device)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ repeated(k, case).mT) * case.head_dim**-0.5
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ repeated(v, case)

    return run


def flex(case: Case, device: str) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def allowed(b: Any, h: Any, q: Any, k: Any) -> Any:
        inside = (k <= q) & (q // case.length == k // case.length)
        return inside & (k > q - case.window) if case.window else inside

    # Else what is compiled for a second length is compiled for any, and after a few cases nothing is compiled at all.
    torch.compiler.reset()
    tokens = case.length * case.sequences
    mask = create_block_mask(allowed, None, None, tokens, tokens, device=device, _compile=True)
    return partial(torch.compile(flex_attention), block_mask=mask, enable_gqa=True)


def ffpa(case: Case, device: str) -> Attention:
    """FFPA's, made for heads of more than 256 and called like SDPA; it would hand anything else on to SDPA."""
    from ffpa_attn import ffpa_attn_func

    if case.head_dim <= 256 or case.window or case.sequences > 1:
        raise NotImplementedError("causal, heads of more than 256")
    return lambda q, k, v: ffpa_attn_func(q, k, v, is_causal=True, enable_gqa=True)


def flash(case: Case, device: str) -> Attention:
    import flash_attn

    return ours(flash_attn, case, device)


def implementations(kernel: Any, case: Case, device: str) -> Iterator[tuple[str, Callable[[], Attention]]]:
    """Name and maker of each; a maker may fail where the implementation does not take the case."""
    dense_fits = case.length * case.sequences <= MOST_DENSE
    yield "scattermoe", partial(ours, kernel, case, device)
    plain = case.window == 0 and case.sequences == 1
    if plain or dense_fits:
        if device == "cuda":
            from torch.nn.attention import SDPBackend

            for name in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
                if name != "MATH" or dense_fits:
                    backend = getattr(SDPBackend, name)
                    yield (
                        f"sdpa {name.split('_')[0].lower()}",
                        lambda backend=backend: with_backend(backend, sdpa(case, device)),
                    )
        else:
            yield "sdpa", partial(sdpa, case, device)
    if dense_fits:
        yield "eager", partial(eager, case, device)
    if device == "cuda":
        yield "flex_attention", partial(flex, case, device)
        yield "flash_attn", partial(flash, case, device)
        yield "ffpa_attn", partial(ffpa, case, device)


def measure(
    kernel: Any, case: Case, device: str, seconds: float, alone: Alone = run_beside_others
) -> dict[str, Any]:
    """The case's rows, as of :func:`measure_in_turns`, with peak memory above the inputs and the largest error."""
    generator = torch.Generator(device).manual_seed(0)
    tokens, dtype = case.length * case.sequences, getattr(torch, case.dtype)

    def random(heads: int) -> torch.Tensor:
        shape = (1, tokens, heads, case.head_dim)
        return torch.randn(shape, generator=generator, device=device).to(dtype).transpose(1, 2)

    inputs = [random(heads).requires_grad_() for heads in (case.heads, case.key_heads, case.key_heads)]
    grad = random(case.heads)

    def prepared(make: Callable[[], Attention]) -> Callable[[], list[torch.Tensor]]:
        attention = make()

        def step() -> list[torch.Tensor]:
            out = attention(*inputs)
            return [out, *torch.autograd.grad(out, inputs, grad)]

        return step

    makers = {name: partial(prepared, make) for name, make in implementations(kernel, case, device)}
    return measure_in_turns(makers, against_first(device), device, seconds, alone)


def dense_rate(dtype: str, device: str) -> float:
    """Floating-point operations a second of this device's matrix product."""
    side = 8192 if device == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds, _ = median_seconds(lambda: a @ a, finish, repeats=15, budget=2.0)
    return float(2 * side**3 / seconds)


def show(name: str, case: Case, rows: dict[str, Any], rate: float) -> None:
    print(f"\n{name}: {case}\n{'':<16}{'ms':>9}{'runs':>6}{'MB above inputs':>17}{'of dense rate':>15}")
    for implementation, row in rows.items():
        if "not" in row:
            print(f"{implementation:<16}  {row['not']}")
            continue
        share = case.flops() / (row["ms"] / 1000) / rate
        megabytes = row["peak_bytes_above_inputs"] / 1e6
        # So that NaN is told too.
        other = "" if row["difference"] < CLOSE else f"  {row['difference']:.0%} off the first"
        print(f"{implementation:<16}{row['ms']:>9.2f}{row['runs']:>6}{megabytes:>17.0f}{share:>15.0%}{other}")
    mine = rows["scattermoe"]
    others = {name: row for name, row in rows.items() if name != "scattermoe" and "ms" in row}
    if "ms" in mine and others:
        best = min(others, key=lambda name: others[name]["ms"])
        memory = mine["peak_bytes_above_inputs"] / others[best]["peak_bytes_above_inputs"]
        ratio = others[best]["ms"] / mine["ms"]
        print(
            f"{'':<16}{ratio:>8.2f}x the best of the others ({best}), with {memory:.0%} of its memory",
            flush=True,
        )


def main() -> None:
    arguments, cases = parse_cases(comparison_parser(__doc__, list(CASES)), CASES, 2.0)
    rates: dict[str, float] = {}

    def measured(kernel: Any, name: str, case: Case) -> dict[str, Any]:
        if case.dtype not in rates:
            rates[case.dtype] = dense_rate(case.dtype, arguments.device)
        rows = measure(kernel, case, arguments.device, arguments.seconds)
        show(name, case, rows, rates[case.dtype])
        return rows

    compare_cases(arguments, cases, measured, dense_flops=rates)


if __name__ == "__main__":
    main()
