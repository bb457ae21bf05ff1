"""The attention kernels to compile ahead of time: every tile configuration, in the way that needs most of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..compile_spec import TARGETS, CompileSpec
from ..tile_tables import DEFAULT, DEVICES, Rule, Timing, load
from .descriptors import box_of
from .gpu import TILES, delta_block
from .kernels import attention_delta_kernel, attention_forward_kernel
from .kernels_backward import attention_dkdv_kernel, attention_dq_kernel

_KERNELS = {
    "attention_forward": attention_forward_kernel,
    "attention_dkdv": attention_dkdv_kernel,
    "attention_dq": attention_dq_kernel,
}
_POINTERS = {"cu_seqlens_q_ptr": "*i32:16", "cu_seqlens_k_ptr": "*i32:16"}
_STATISTICS = ("lse_ptr", "delta_ptr", "grad_lse_ptr")
# The default serves no architecture that is compiled for; this one has the least shared memory.
_LEAST = ("gfx90a",)

# A window over packed sequences needs most registers, and a soft cap a few more.
_WINDOW = {"VARLEN": True, "LEFT": True, "RIGHT": True, "SOFTCAP": False}
_CAUSAL = {**_WINDOW, "LEFT": False}
_CAPPED = {"VARLEN": True, "LEFT": True, "RIGHT": True, "SOFTCAP": True}


# What a table may turn on: for each kernel changes of the devices' own launches for heads of 512, and who takes them.
_PASSES = {"SPLIT": 0, "PASSES": 2, "ONE_LOOP": 1}
_WITH_TMA = ("sm_90", "sm_100", "sm_120")
# A head's tiles stay on the chip. Two warp groups of Hopper would each compute all of a chain's first product.
_RESIDENT = {"TMA": 1, "ONE_LOOP": 1, "UNCHAIN": 1, "CHUNK": 512, "num_warps": 8, "num_stages": 1}
_OPTIONAL = {
    "attention_forward": (
        ({"ONE_LOOP": 1}, TARGETS),
        ({"TMA": 1}, _WITH_TMA),
        ({"TMA": 1, "ONE_LOOP": 1}, _WITH_TMA),
        ({"PASSES": 2, "ONE_LOOP": 1}, TARGETS),
        ({"TMA": 1, "ONE_LOOP": 1, "PASSES": 2, "BLOCK_M": 128, "BLOCK_N": 32, "CHUNK": 512}, ("sm_90",)),
        ({**_RESIDENT, "BLOCK_M": 64, "BLOCK_N": 64}, ("sm_90",)),
    ),
    "attention_dkdv": (
        (_PASSES, TARGETS),
        ({"TMA": 1}, _WITH_TMA),
        ({"TMA": 1, "ONE_LOOP": 1}, _WITH_TMA),
        ({**_PASSES, "TMA": 1}, _WITH_TMA),
        ({**_RESIDENT, "BLOCK_M": 32, "BLOCK_N": 64}, ("sm_90",)),
        # On sm_80 it spills.
        (
            {**_PASSES, "BLOCK_M": 64, "BLOCK_N": 16, "CHUNK": 64, "num_warps": 4},
            tuple(target for target in TARGETS if target != "sm_80"),
        ),
    ),
    "attention_dq": (
        ({"DELTA": 1}, TARGETS),
        ({"ONE_LOOP": 1}, TARGETS),
        ({"TMA": 1}, _WITH_TMA),
        ({"TMA": 1, "ONE_LOOP": 1}, _WITH_TMA),
        ({"TMA": 1, "DELTA": 1}, _WITH_TMA),
        ({**_RESIDENT, "BLOCK_M": 64, "BLOCK_N": 32}, ("sm_90",)),
    ),
}
_OFF = {"ONE_LOOP": 0, "PASSES": 1, "DELTA": 0, "TMA": 0, "UNCHAIN": 0}


def _type(name: str, dtype: str, head_dim: int) -> str:
    if name.endswith("_ptr"):
        return _POINTERS.get(name, "*fp32:16" if name in _STATISTICS else f"*{dtype}:16")
    if name in ("scale", "softcap"):
        return "fp32"
    # Strides of q, k and v are passed in units of 8 elements. Those of rows are those of heads times an even number.
    divides = head_dim % (128 if name in ("stride_qh", "stride_kh", "stride_vh") else 64) == 0
    return "i32:16" if name.startswith("stride_") and divides else "i32"


def _spec(
    kernel: Any,
    label: str,
    dtype: str,
    constants: dict[str, Any],
    options: dict[str, int],
    targets: tuple[str, ...],
    timing: Timing | None = None,
) -> CompileSpec:
    arguments = {
        name: _type(name, dtype, constants["HEAD_DIM"]) for name in kernel.arg_names if name not in constants
    }
    if constants.get("TMA"):
        arguments |= {name: f"tensordesc<{dtype}{box}>" for name, box in _boxes(kernel, constants).items()}
        constants = {name: value for name, value in constants.items() if name not in arguments}
    measured = None if timing is None else str(timing)
    return CompileSpec(kernel, label, arguments, constants, options, targets, measured)


def _boxes(kernel: Any, constants: dict[str, Any]) -> dict[str, list[int]]:
    """The boxes of what a kernel reads by descriptors."""
    rows, keys, chunk, width = (constants[name] for name in ("BLOCK_M", "BLOCK_N", "CHUNK", "WIDTH"))
    packed = constants["VARLEN"]
    boxes = {"q_ptr": box_of(rows, chunk, packed), "k_ptr": box_of(keys, chunk, packed)}
    columns = width // constants.get("PASSES", 1)
    if kernel is attention_forward_kernel:
        return {**boxes, "v_ptr": box_of(keys, columns, packed)}
    boxes |= {"v_ptr": box_of(keys, chunk, packed), "grad_out_ptr": box_of(rows, chunk, packed)}
    if columns == chunk:
        return boxes
    if kernel is attention_dq_kernel:
        return {**boxes, "k_columns_ptr": box_of(keys, columns, packed)}
    return {
        **boxes,
        "q_columns_ptr": box_of(rows, columns, packed),
        "grad_out_columns_ptr": box_of(rows, columns, packed),
    }


def _largest_head(rule: Rule) -> int:
    head_dim = rule.largest("head_dim")
    assert head_dim is not None
    return head_dim


def _specs_of(
    name: str,
    rule: Rule,
    dtype: str,
    precision: str,
    targets: tuple[str, ...],
    use: str,
    mask: dict[str, bool],
    head_dim: int | None = None,
    timing: Timing | None = None,
) -> Iterator[CompileSpec]:
    head_dim, same_kv = head_dim or _largest_head(rule), bool(rule.limits.get("same_kv"))
    blocks = {key: value for key, value in rule.launch.items() if not key.startswith("num_")}
    options = {key: value for key, value in rule.launch.items() if key.startswith("num_")}
    is_split = blocks.pop("SPLIT", 0) and not same_kv
    width = 1 << (head_dim - 1).bit_length()
    constants = {
        **mask,
        **{option: off for option, off in _OFF.items() if option in _KERNELS[name].arg_names},
        **blocks,
        "SAME_KV": same_kv,
        "PRECISION": precision,
        "HEAD_DIM": head_dim,
        "WIDTH": width,
        "CHUNK": min(blocks["CHUNK"], width),
    }
    if name == "attention_dq" and not constants["DELTA"]:
        constants.update(out_ptr=None, grad_lse_ptr=None)
    columns = ("q_columns_ptr", "grad_out_columns_ptr", "k_columns_ptr")
    constants |= {argument: None for argument in columns if argument in _KERNELS[name].arg_names}
    only = " K=V" if same_kv else " windows alone" if rule.limits.get("window") else ""
    label = f"{use} {head_dim}{only} {dtype} {precision}"
    if name != "attention_dkdv":
        yield _spec(_KERNELS[name], label, dtype, constants, options, targets, timing)
        return
    for want_k, want_v in ((True, False), (False, True)) if is_split else ((True, True),):
        flags = {"WANT_K": want_k, "WANT_V": want_v}
        of = "" if want_k and want_v else " dk" if want_k else " dv"
        yield _spec(_KERNELS[name], label + of, dtype, {**constants, **flags}, options, targets, timing)


def _takes(rule: Rule, change: Mapping[str, int]) -> bool:
    """True if a trial's options are added to a rule: one for all heads of 512, and boxes to timed ones like it, too."""
    is_general = dict(rule.limits) == {"head_dim": 512}
    is_timed = rule.measured is not None and _largest_head(rule) >= 256
    return rule.bytes == 2 and (is_general or ("TMA" in change and "BLOCK_M" not in change and is_timed))


def _specs() -> Iterator[CompileSpec]:
    for device in DEVICES:
        targets = _LEAST if device == DEFAULT else (device,)
        table = load(TILES, device)
        for name, rules in table.rules.items():
            for rule in rules:
                dtype = "bf16" if rule.bytes == 2 else "fp32"
                use, mask = "default window" if device == DEFAULT else "window", _WINDOW
                if rule.limits.get("window") is False:
                    use, mask = "causal", _CAUSAL
                timing = table.timing(rule)
                yield from _specs_of(name, rule, dtype, "ieee", targets, use, mask, timing=timing)
    # What another dtype, a soft cap and a head that fills no power of two change, where the mma instructions differ.
    for device in ("sm_80", "sm_90"):
        for name, rules in load(TILES, device).rules.items():
            for rule in rules:
                if rule.bytes == 2 and _largest_head(rule) == 512 and "same_kv" not in rule.limits:
                    yield from _specs_of(name, rule, "fp16", "ieee", (device,), "soft cap", _CAPPED, 320)
                if rule.bytes == 4 and _largest_head(rule) == 512:
                    yield from _specs_of(name, rule, "fp32", "tf32", (device,), "window", _WINDOW)
    for name, changes in _OPTIONAL.items():
        for change, devices in changes:
            use = " ".join(f"{option} {value}" for option, value in change.items())
            for device in devices:
                for rule in load(TILES, device).rules[name]:
                    if _takes(rule, change):
                        optional = replace(rule, launch={**rule.launch, **change}, measured=None)
                        mask = _CAUSAL if rule.limits.get("window") is False else _WINDOW
                        named = f"{use} causal" if mask is _CAUSAL else use
                        yield from _specs_of(name, optional, "bf16", "ieee", (device,), named, mask)
    constants = {"GRAD_LSE": True, "HEAD_DIM": 512, "WIDTH": 512, "BLOCK": delta_block(512)}
    yield _spec(attention_delta_kernel, "512 bf16", "bf16", constants, {"num_warps": 4}, TARGETS)


COMPILE_SPECS = list(_specs())
