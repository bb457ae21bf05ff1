"""Tell where the time of a training step goes, from a trace of torch.profiler.

    python trace.py trace.json.gz                              # a table
    python trace.py trace.json --json > report.json            # the same and more, for programs
    python trace.py trace.json --png report.png --snapshot memory.pickle

Needs Python alone, and matplotlib for the picture. A trace of any size is read in bounded memory: events go through a
temporary file (SQLite's) of some 40 bytes an event. docs/tracing.md says how to make a trace, and what each number is.
"""

from __future__ import annotations

import argparse
import codecs
import gzip
import heapq
import io
import json
import math
import os
import pickle
import re
import sqlite3
import statistics
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

# A kernel, operator or annotation is of the first family whose pattern its name matches. All that runs within an
# operator or annotation of a family before "copies" is of that family: what an optimizer multiplies is the optimizer's.
FAMILIES = {
    "communication": r"nccl|rccl|gloo|c10d::|record_param_comms|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all"
    r"|deep_?ep|intranode|internode",
    "optimizer": r"optimizer|multi_tensor_apply|fused_?adam|_foreach_|adafactor|preconditionoptimizer",
    "loss": r"cross_?entropy|nll_loss|log_?soft_?max|logits_(forward|backward|gradient)",
    "attention": r"attention|attn|flash_(fwd|bwd)|flash::|fmha|sdpa|segments_(for|back)ward",
    "quantization": r"dequant|kquantize|quantize_(4bit|blockwise|nf4|fp4|fp8|mx)|decode_(experts|kernel)",
    "experts": r"expert|(?<!scatter)moe|grouped_?(mm|gemm|matmul|outer|linear)|group_?gemm|groupproblemshape"
    r"|gate_(up|forward|backward)_kernel|quantized_matmul|(count|place)_pairs|sum_choices|tile_schedule"
    r"|scaled_transpose|matmul_ogs|scatter2scatter|groupxty|bitmatrix|_sdd_",
    "norm": r"(layer|rms|group|batch)_?norm|rms_(for|back)ward|rms_layernorm|gammabeta|(norm_)?rotary_(for|back)ward"
    r"|triton_(red|per)_fused.*rsqrt",
    "copies": r"memcpy|memset|copy|(^|::)(to|clone|contiguous|cat|stack|fill_|zero_)$|catarray|fillfunctor|pin_memory",
    "GEMM": r"gemm|gemv|cublas|cutlass|nvjet|xmma|splitk|cijk_|matmul|lora_linear|convolution|conv\dd|implicit_conv"
    r"|[dw]grad|triton_tem_fused.*mm|(^|::|_)(mm|addmm|bmm|baddbmm|mv|addmv|dot|linear|addbmm|scaled_mm|int_mm)_?$",
    "elementwise": r"elementwise|element_mul|reduce|triton_(poi|red|per)_|softmax|gated_|swiglu|geglu|silu|gelu|relu"
    r"|sigmoid|tanh|rope|rotary|dropout|index|gather|scatter|embedding|sort|topk|cumsum|scan|where|mask|arange"
    r"|(^|::)(add|sub|mul|div|neg|pow|sqrt|rsqrt|exp|log|sin|cos|sum|mean|max|min|amax|amin|abs|clamp|lerp|addcmul"
    r"|addcdiv|lt|gt|le|ge|eq|ne|logical_\w+|bitwise_\w+|nonzero|tril|triu|norm|linalg_\w*norm|histc|bincount|any|all"
    r"|argmax|random_|normal_|uniform_)_?(\.|$)",
}
_PATTERNS = [(family, re.compile(pattern, re.IGNORECASE)) for family, pattern in FAMILIES.items()]
_SPECIFIC = list(FAMILIES)[: list(FAMILIES).index("copies")]
_NAMES = (*FAMILIES, "other")
# This package's kernels and operators, which no advice is about.
_OURS = re.compile(
    r"scattermoe_lora|^(attention_(forward|delta|dkdv|dq)|(rms|rotary|gated|logits)_(for|back)ward)_kernel"
)


class Rule(NamedTuple):
    """Advice, and what has to be exceeded, all of it: each a share of the step, or what the name says."""

    above: dict[str, float]
    advice: str


_EXPANDABLE = "PYTORCH_ALLOC_CONF=expandable_segments:True, or smaller batches"
# The thresholds are judgement: below them there is little to win.
RULES = (
    Rule(
        {"idle": 0.15}, "the GPU waits for Python: larger batches, torch.compile, or fewer, fused operators"
    ),
    Rule(
        {"idle": 0.05, "synchronizations a step": 2},
        "Python waits for the GPU, then the GPU for Python: no .item(), .cpu(), print or boolean mask in each step",
    ),
    Rule({"idle in memory management": 0.02}, f"the GPU's memory is allocated in the step: {_EXPANDABLE}"),
    Rule({"idle in the data loader": 0.03}, "data is waited for: num_workers, prefetch_factor of DataLoader"),
    Rule(
        {"pageable copies": 0.01},
        "pageable memory is copied: pin_memory=True, .to(device, non_blocking=True)",
    ),
    Rule({"copies": 0.10}, "tensors are copied: look for .contiguous(), changes of dtype and offloading"),
    Rule(
        {"attention by others": 0.30}, 'kernel.register_attention(), attn_implementation="scattermoe_flash"'
    ),
    Rule({"experts by others": 0.30}, 'kernel.register(), experts_implementation="scattermoe"'),
    Rule({"norm by others": 0.10}, 'kernel.apply_to(model, "norm")'),
    Rule({"loss by others": 0.10}, 'kernel.apply_to(model, "loss"), which makes no logits'),
    Rule({"elementwise": 0.25}, 'kernel.apply_to(model, "norm", "mlp"), or torch.compile'),
    Rule({"optimizer": 0.10}, "fused=True, fewer trained parameters, or gradient accumulation"),
    Rule({"quantization": 0.20}, "weights are decoded again and again: larger batches, or 8 bits, not 4"),
    Rule({"communication": 0.15}, "nothing hides it: gradient accumulation under no_sync, larger batches"),
    Rule({"outside of the steps": 0.05}, "the device worked on after the last step: profile more steps"),
    Rule({"reserved over allocated": 1.4}, f"memory is fragmented: {_EXPANDABLE}"),
)

_MANAGES_MEMORY = r"(cuda|hip|cu)(Malloc|Free|HostAlloc|HostFree|Mem(Map|Unmap|Create|Release))"
_LOADS_DATA = r"DataLoader|_next_data|collate"
_BETWEEN = "Python, between operators"

# Kinds of intervals, outermost first. Which of a profiler's categories is which; earlier versions of it have capitals.
STEP, ANNOTATION, PYTHON, OPERATOR, RUNTIME, GPU = range(6)
_KINDS = {"user_annotation": ANNOTATION, "gpu_user_annotation": ANNOTATION, "python_function": PYTHON}
_KINDS |= {"cpu_op": OPERATOR, "operator": OPERATOR, "runtime": RUNTIME}
_KINDS |= dict.fromkeys(("kernel", "gpu_memcpy", "gpu_memset", "memcpy", "memset"), GPU)
_HIDDEN = {"copies": 1, "communication": 2}
_CHUNK = 1 << 20
_LARGEST_EVENT = 64 << 20
_POINTS = 400
_LONGEST = 10
_LISTED = 40
# The sign by which an event of a snapshot changes allocated and reserved bytes.
_ALLOCATED = {"alloc": 1, "free_completed": -1}
_RESERVED = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}


class TraceError(Exception):
    """A file that cannot be reported on; the message says why, where, and how to mend it."""


class DamageError(TraceError):
    """A trace whose rest cannot be read."""


class Label(NamedTuple):
    """What intervals have in common: kind, process or device, thread or stream, and name."""

    kind: int
    device: str
    lane: str
    name: str


@dataclass(slots=True, eq=False)
class Running:
    """An interval in nanoseconds, within those that its lane ran when it began."""

    start: int
    end: int
    label: Label
    family: str
    ours: bool


def family_of(name: str) -> str:
    """The family of a kernel, operator or annotation by its name."""
    return next((family for family, pattern in _PATTERNS if pattern.search(name)), "other")


# --- Reading: one event at a time, whatever the file's size.


def read_text(path: Path) -> Iterator[str]:
    """A file's text in parts, unpacked if it is gzip's."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        stream: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        while True:
            try:
                data = stream.read1(_CHUNK)
            except EOFError:
                raise DamageError("cut off: the gzip file ends before its last block") from None
            except (gzip.BadGzipFile, zlib.error) as error:
                raise DamageError(f"a damaged gzip file: {error}") from None
            if not data:
                return
            yield decoder.decode(data)


class Reader:
    """JSON values taken one after the other from text that comes in parts."""

    def __init__(self, parts: Iterator[str]) -> None:
        self._parts, self._text, self._at, self._before = parts, "", 0, 0
        # Names on Windows have had control characters.
        self._decoder = json.JSONDecoder(strict=False)

    @property
    def position(self) -> int:
        """The number of characters before the next."""
        return self._before + self._at

    def _more(self) -> bool:
        self._before += self._at
        parts, size = [self._text[self._at :]], 0
        # As much again as there is: a long value is not looked at from its start too often.
        while size <= len(parts[0]):
            part = next(self._parts, None)
            if part is None:
                break
            parts.append(part)
            size += len(part)
        self._text, self._at = "".join(parts), 0
        return size > 0

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at].isspace():
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def take(self, wanted: str) -> bool:
        """Pass the next character if it is this one."""
        if self.peek() != wanted:
            return False
        self._at += 1
        return True

    def value(self) -> Any:
        """The next value.

        Raises:
            DamageError: There is none, or only its beginning.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # A number that ends with the text may go on.
                if end < len(self._text) or not self._more():
                    self._at = min(end, len(self._text))
                    return value
            except json.JSONDecodeError as error:
                broken = error.pos < len(self._text) - 16 and not error.msg.startswith("Unterminated")
                if broken or len(self._text) - self._at > _LARGEST_EVENT:
                    place = self._before + error.pos
                    raise DamageError(f"no JSON at character {place:,}: {error.msg}") from None
                if not self._more():
                    raise DamageError(f"cut off at character {self._before + len(self._text):,}") from None
            except (RecursionError, ValueError) as error:
                kind = (
                    "nested too deeply"
                    if isinstance(error, RecursionError)
                    else "a number of too many digits"
                )
                raise DamageError(f"{kind} at character {self.position:,}") from None

    def members(self, closing: str) -> Iterator[None]:
        """Stops before each member of a list or an object that was opened, and passes ``closing`` at its end."""
        while not self.take(closing):
            yield
            if not self.take(",") and self.peek() != closing:
                raise self.unexpected()

    def unexpected(self) -> DamageError:
        """The error of a next character that may not stand there."""
        if not self.peek():
            return DamageError(f"cut off at character {self.position:,}")
        return DamageError(f"no JSON at character {self.position:,}: unexpected {self.peek()!r}")


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """A trace's events: those of an object's ``traceEvents``, wherever it is, or of a list.

    Raises:
        TraceError: The file is none of these, is damaged, or its end is missing.
    """
    count = 0
    try:
        for event in _values(Reader(read_text(path))):
            count += 1
            if isinstance(event, dict):
                yield event
    except DamageError as error:
        raise TraceError(
            f"{error}, after {count:,} events. Nothing is reported: events are in no order of time, so what is missing "
            "may be of any step. Let export_chrome_trace end, or profile fewer steps"
        ) from None


def _values(reader: Reader) -> Iterator[Any]:
    has_events = reader.take("[")
    if has_events:
        for _ in reader.members("]"):
            yield reader.value()
    elif reader.take("{"):
        for _ in reader.members("}"):
            key = reader.value()
            if not reader.take(":"):
                raise reader.unexpected()
            if key == "traceEvents" and reader.take("["):
                has_events = True
                for _ in reader.members("]"):
                    yield reader.value()
            else:
                reader.value()
    else:
        raise TraceError(
            "not a trace: it begins neither as a JSON object nor as a list" if reader.peek() else "empty"
        )
    # Only at its end is a gzip file known to be whole.
    if reader.peek():
        raise reader.unexpected()
    if not has_events:
        raise TraceError("not a trace: it has no traceEvents; export_chrome_trace writes them")


@dataclass
class Trace:
    """A trace in a temporary database: its intervals, labels by number, and the events that have no valid time."""

    database: sqlite3.Connection
    labels: list[Label]
    untimed: int

    @property
    def has_gpu(self) -> bool:
        """True if something ran on a GPU."""
        return any(label.kind == GPU for label in self.labels)

    def intervals(self) -> Iterator[tuple[int, int, int, int]]:
        """Start, end, number of label and bytes, by start, the longest first; never in the file's order."""
        yield from self.database.execute(
            "SELECT start, stop, label, bytes FROM interval JOIN rank USING (label) "
            "ORDER BY start, stop DESC, rank, bytes"
        )


def load(path: Path) -> Trace:
    """Read a trace into a temporary database.

    Raises:
        TraceError: See :func:`read_events`; or nothing in it has a duration.
    """
    database = sqlite3.connect("", isolation_level=None)
    database.execute("PRAGMA journal_mode = OFF")
    database.execute("CREATE TABLE interval (start INTEGER, stop INTEGER, label INTEGER, bytes INTEGER)")
    database.execute("CREATE TABLE rank (label INTEGER PRIMARY KEY, rank INTEGER)")
    database.execute("CREATE TABLE memory (time INTEGER, device TEXT, allocated INTEGER, reserved INTEGER)")
    labels: dict[Label, int] = {}
    untimed = 0

    def rows() -> Iterator[tuple[int, int, int, int]]:
        nonlocal untimed
        for event in read_events(path):
            name, arguments = str(event.get("name")), event.get("args")
            arguments = arguments if isinstance(arguments, dict) else {}
            start, duration = _nanoseconds(event.get("ts")), _nanoseconds(event.get("dur"))
            if name == "[memory]" and start is not None:
                add_memory(database, [(start, *_memory(arguments))])
            kind = _kind(event, name)
            if kind is not None and start is not None and duration is not None and duration >= 0:
                label = Label(kind, str(event.get("pid")), str(event.get("tid")), name)
                number = labels.setdefault(label, len(labels))
                yield start, start + duration, number, _bytes(arguments.get("bytes"), least=0)
            else:
                untimed += kind is not None

    database.execute("BEGIN")
    database.executemany("INSERT INTO interval VALUES (?, ?, ?, ?)", rows())
    ranks = ((labels[label], rank) for rank, label in enumerate(sorted(labels)))
    database.executemany("INSERT INTO rank VALUES (?, ?)", ranks)
    database.execute("COMMIT")
    if not any(label.kind in (OPERATOR, GPU) for label in labels):
        raise TraceError(
            "no operator and no kernel in it has a duration; profile with activities=[CPU, CUDA]"
        )
    return Trace(database, list(labels), untimed)


def _kind(event: dict[str, Any], name: str) -> int | None:
    if event.get("ph") != "X":
        return None
    category = str(event.get("cat")).lower()
    kind = RUNTIME if category.endswith(("_runtime", "_driver")) else _KINDS.get(category)
    if name.startswith("ProfilerStep"):
        return None if category == "gpu_user_annotation" or kind is None else STEP
    return kind


def _nanoseconds(microseconds: object) -> int | None:
    if isinstance(microseconds, bool) or not isinstance(microseconds, int | float):
        return None
    # Also refuses infinity and what is not a number.
    return round(microseconds * 1000) if abs(microseconds) < 1 << 52 else None


def _bytes(size: object, least: int = -(1 << 62)) -> int:
    return size if isinstance(size, int) and least <= size < 1 << 62 else 0


def _memory(arguments: dict[str, Any]) -> tuple[str, int, int]:
    keys = ("Device Id", "Total Allocated", "Total Reserved")
    number, allocated, reserved = (_bytes(arguments.get(key)) for key in keys)
    # c10's DeviceType: 0 is the CPU.
    return "CPU" if arguments.get("Device Type") == 0 else f"GPU {number}", allocated, reserved


# --- Adding up: one pass in order of time.


Lanes = dict[tuple[str, str], list[Running]]
# Nanoseconds in which nothing began or ended, the step's name if within one, and what ran, by device and lane.
Moment = tuple[int, int, str | None, Lanes]


def moments(trace: Trace, began: Callable[[Running, int, bool], None]) -> Iterator[Moment]:
    """The trace's time in order, cut wherever an interval begins or ends.

    Args:
        trace: Without steps in it, all of it is one.
        began: Gets each interval, its bytes, and whether it began within a step.
    """
    whole = None if any(label.kind == STEP for label in trace.labels) else "the whole trace"
    families = [family_of(label.name) for label in trace.labels]
    ours = [bool(_OURS.search(label.name)) for label in trace.labels]
    lanes: Lanes = {}
    steps: list[Running] = []
    ends: list[tuple[int, int, list[Running], Running]] = []
    now: int | None = None

    def until(time: int) -> Iterator[Moment]:
        nonlocal now
        if now is not None and time > now:
            yield now, time, steps[-1].label.name if steps else whole, lanes
        now = time

    def end_before(time: float) -> Iterator[Moment]:
        while ends and ends[0][0] <= time:
            yield from until(ends[0][0])
            _, _, lane, interval = heapq.heappop(ends)
            lane.remove(interval)

    for number, (start, stop, index, size) in enumerate(trace.intervals()):
        yield from end_before(start)
        yield from until(start)
        label = trace.labels[index]
        lane = steps if label.kind == STEP else lanes.setdefault(label[1:3], [])
        interval = Running(start, stop, label, families[index], ours[index])
        if lane and lane[-1].family in _SPECIFIC:
            interval.family = lane[-1].family
            interval.ours |= lane[-1].ours
        began(interval, size, whole is not None or bool(steps))
        lane.append(interval)
        heapq.heappush(ends, (stop, number, lane, interval))
    yield from end_before(math.inf)


@dataclass
class Gap:
    """Time in which a device ran nothing, and the nanoseconds of what the CPU did then, by name."""

    start: int
    stop: int
    step: str
    cpu: Counter[str]


class Totals:
    """Sums of nanoseconds over the steps of a trace.

    Every nanosecond of a step on a device is one family's or idle, so that the two add up to :attr:`length`. ``summed``
    counts one for each stream (or, without a GPU, thread) that was busy.
    """

    def __init__(self, trace: Trace) -> None:
        self.work = GPU if trace.has_gpu else OPERATOR
        # Threads share the CPU's cores, so they are one device.
        self.devices = sorted({label.device for label in trace.labels if label.kind == GPU}) or ["CPU"]
        self.steps: dict[str, Counter[str]] = {}
        self.once: Counter[str] = Counter()
        self.ours: Counter[str] = Counter()
        self.summed: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.names: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self.copies: dict[str, Counter[str]] = defaultdict(Counter)
        self.idle_by: Counter[str] = Counter()
        self.gaps: list[Gap] = []
        self.gap_count = self.outside = self.synchronizations = 0
        self._open: dict[str, Gap] = {}
        for moment in moments(trace, self._began):
            self._add(*moment)
        for device in list(self._open):
            self._close(device)
        self._keep_longest()

    @property
    def length(self) -> int:
        """Nanoseconds of the steps, over all devices."""
        return sum(step["length"] for step in self.steps.values()) * len(self.devices)

    def _began(self, interval: Running, size: int, in_step: bool) -> None:
        if not in_step:
            return
        name = interval.label.name
        if interval.label.kind == RUNTIME:
            self.synchronizations += "Synchronize" in name
        elif interval.label.kind == self.work:
            self.calls[interval.family] += 1
            self.names[interval.family, name]["calls"] += 1
            if interval.label.kind == GPU and name.startswith("Memcpy"):
                self.copies[name].update(calls=1, bytes=size, ns=interval.end - interval.start)

    def _add(self, start: int, stop: int, step_name: str | None, lanes: Lanes) -> None:
        length = stop - start
        running: dict[str, list[Running]] = {}
        for (device, _), lane in lanes.items():
            # The interval that the lane began last.
            interval = next((one for one in reversed(lane) if one.label.kind == self.work), None)
            if interval is not None:
                running.setdefault(device if self.work == GPU else "CPU", []).append(interval)
        if step_name is None:
            self.outside += length * len(running)
            for device in list(self._open):
                self._close(device)
            return
        if step_name not in self.steps:
            self.steps[step_name] = Counter(start=start)
        step = self.steps[step_name]
        step["length"] += length
        for device in self.devices:
            intervals = running.get(device)
            if not intervals:
                step["idle"] += length
                if device not in self._open:
                    self._open[device] = Gap(start, stop, step_name, Counter())
                gap, name = self._open[device], _cpu_name(lanes)
                gap.stop = stop
                gap.cpu[name] += length
                self.idle_by[name] += length
                continue
            self._close(device)
            for interval in intervals:
                self.summed[interval.family] += length
            first = intervals[0] if len(intervals) == 1 else min(intervals, key=_precedence)
            self.once[first.family] += length
            self.ours[first.family] += length * first.ours
            self.names[first.family, first.label.name]["ns"] += length
            step[first.family] += length

    def _close(self, device: str) -> None:
        gap = self._open.pop(device, None)
        if gap is not None:
            self.gap_count += 1
            self.gaps.append(gap)
            # Only the longest are of interest, and there may be millions.
            if len(self.gaps) > 100 * _LONGEST:
                self._keep_longest()

    def _keep_longest(self) -> None:
        self.gaps.sort(key=lambda gap: (gap.start - gap.stop, gap.start))
        del self.gaps[_LONGEST:]


def _precedence(interval: Running) -> tuple[int, int, str, str]:
    """Of kernels that run at once on several streams, time is the one's that computes, then copies, and began first."""
    return _HIDDEN.get(interval.family, 0), interval.start, interval.label.name, interval.label.lane


def _cpu_name(lanes: Lanes) -> str:
    """What the CPU did: the innermost of what its threads ran."""
    tops = [lane[-1] for lane in lanes.values() if lane and lane[-1].label.kind != GPU]
    top = max(tops, key=lambda top: (top.label.kind, top.start, top.label.name), default=None)
    return _BETWEEN if top is None else top.label.name


def _ms(nanoseconds: float) -> float:
    return round(nanoseconds / 1e6, 6)


def report(path: Path, snapshot: Path | None = None) -> dict[str, Any]:
    """Read a trace, and a snapshot of the GPU's memory if there is one, and return everything that can be said of them.

    Raises:
        TraceError: One of them is no such file, or is damaged.
        OSError: One of them cannot be read.
    """
    trace = load(path)
    with closing(trace.database) as database:
        totals = Totals(trace)
        if snapshot is not None:
            database.execute("DELETE FROM memory")
            add_memory(database, read_snapshot(snapshot))
        memory = memory_over_time(database)
    length, idle = totals.length or 1, sum(step["idle"] for step in totals.steps.values())
    steps = sorted(totals.steps.items(), key=lambda item: item[1]["start"])
    names = sorted(totals.names.items(), key=lambda item: (-item[1]["ns"], item[0]))
    return {
        "trace": str(path),
        "device": "GPU" if trace.has_gpu else "CPU",
        "devices": len(totals.devices),
        "steps": [
            {
                "name": name,
                "ms": _ms(step["length"]),
                "idle_ms": _ms(step["idle"]),
                "families": {family: _ms(step[family]) for family in _NAMES if step[family]},
            }
            for name, step in steps
        ],
        "step_ms": _ms(statistics.median([step["length"] for _, step in steps] or [0])),
        "total_ms": _ms(length),
        "families": [
            {
                "family": family,
                "ms": _ms(totals.once[family]),
                "share": totals.once[family] / length,
                "summed_ms": _ms(totals.summed[family]),
                "calls": totals.calls[family],
            }
            for family in sorted(_NAMES, key=lambda name: (-totals.once[name], name))
            if totals.calls[family] or totals.summed[family]
        ],
        "idle": {
            "ms": _ms(idle),
            "share": idle / length,
            "gaps": totals.gap_count,
            "longest": [
                {
                    "step": gap.step,
                    "after_ms": _ms(gap.start - totals.steps[gap.step]["start"]),
                    "ms": _ms(gap.stop - gap.start),
                    "cpu": _largest(gap.cpu)[0][0],
                }
                for gap in totals.gaps
            ],
            "cpu": [{"name": name, "ms": _ms(ns)} for name, ns in _largest(totals.idle_by)[:_LONGEST]],
        },
        "names": [
            {"name": name, "family": family, "ms": _ms(counts["ns"]), "calls": counts["calls"]}
            for (family, name), counts in names[:_LISTED]
        ],
        "copies": [
            {"name": name, "calls": counts["calls"], "bytes": counts["bytes"], "ms": _ms(counts["ns"])}
            for name, counts in sorted(totals.copies.items())
        ],
        "memory": memory,
        "outside_ms": _ms(totals.outside),
        "untimed_events": trace.untimed,
        "advice": advise(measures(totals, memory, trace.has_gpu)),
    }


def _largest(counts: Counter[str]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def measures(totals: Totals, memory: Sequence[dict[str, Any]], has_gpu: bool) -> dict[str, float]:
    """The numbers that :data:`RULES` have thresholds for: shares of the steps, or what the name says."""
    length = totals.length or 1

    def idle_in(pattern: str) -> float:
        return sum(ns for name, ns in totals.idle_by.items() if re.search(pattern, name)) / length

    values = {family: totals.once[family] / length for family in _NAMES}
    for family in _NAMES:
        values[f"{family} by others"] = (totals.once[family] - totals.ours[family]) / length
    values["outside of the steps"] = totals.outside / length
    if has_gpu:
        pageable = sum(counts["ns"] for name, counts in totals.copies.items() if "Pageable" in name)
        values |= {
            "idle": idle_in(""),
            "idle in memory management": idle_in(_MANAGES_MEMORY),
            "idle in the data loader": idle_in(_LOADS_DATA),
            "pageable copies": pageable / length,
            "synchronizations a step": totals.synchronizations / max(len(totals.steps), 1),
        }
    gpus = [device for device in memory if device["device"] != "CPU" and device["peak_allocated"]]
    ratios = [device["peak_reserved"] / device["peak_allocated"] for device in gpus]
    return values | {"reserved over allocated": max(ratios, default=0.0)}


def advise(values: dict[str, float]) -> list[str]:
    """The advice of each rule whose thresholds are all exceeded, with the numbers."""
    return [
        f"{rule.advice} ({', '.join(f'{name} {values[name]:.3g} > {above:g}' for name, above in rule.above.items())})"
        for rule in RULES
        if all(values.get(name, 0.0) > above for name, above in rule.above.items())
    ]


# --- Memory over time.


def add_memory(database: sqlite3.Connection, points: Iterable[tuple[int, str, int, int]]) -> None:
    """Note nanoseconds, device, allocated and reserved bytes."""
    database.executemany("INSERT INTO memory VALUES (?, ?, ?, ?)", points)


def memory_over_time(database: sqlite3.Connection) -> list[dict[str, Any]]:
    """By device, the curve and peak of what was noted: the highest of each part of the time."""
    curves: dict[str, list[list[float]]] = {}
    rows = database.execute(
        "SELECT device, (time - low) * ? / (high - low + 1) AS part, MIN(time - low), MAX(allocated), MAX(reserved) "
        "FROM memory, (SELECT MIN(time) AS low, MAX(time) AS high FROM memory) "
        "GROUP BY device, part ORDER BY device, part",
        (_POINTS,),
    )
    for device, _, time, allocated, reserved in rows:
        curves.setdefault(device, []).append([_ms(time), allocated, reserved])
    return [
        {
            "device": device,
            "peak_allocated": max(allocated for _, allocated, _ in curve),
            "peak_reserved": max(reserved for _, _, reserved in curve),
            "curve": curve,
        }
        for device, curve in curves.items()
    ]


class _Plain(pickle.Unpickler):
    """Reads numbers, strings, lists and dictionaries, which is all that a snapshot has; a pickle could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        raise TraceError(
            f"no snapshot of memory: it names {module}.{name}, and a snapshot has plain data alone"
        )


def read_snapshot(path: Path) -> list[tuple[int, str, int, int]]:
    """What :func:`add_memory` takes, of a snapshot of ``torch.cuda.memory._dump_snapshot``, which is read whole.

    It has the state at its end, from which it is told back.
    """
    points = []
    try:
        with path.open("rb") as file:
            snapshot = _Plain(file).load()
        for index, events in enumerate(snapshot["device_traces"]):
            segments = [segment for segment in snapshot["segments"] if segment["device"] == index]
            allocated, reserved = (
                sum(segment[size] for segment in segments) for size in ("active_size", "total_size")
            )
            for event in reversed(events):
                points.append((round(1000 * event["time_us"]), f"GPU {index}", allocated, reserved))
                allocated -= _ALLOCATED.get(event["action"], 0) * event["size"]
                reserved -= _RESERVED.get(event["action"], 0) * event["size"]
    except TraceError as error:
        raise TraceError(f"{error} ({path})") from None
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        hint = "torch.cuda.memory._dump_snapshot writes one"
        reason = error or "empty"
        raise TraceError(f"{path}: no snapshot of memory, or a damaged one ({reason}); {hint}") from None
    return points


# --- Showing.


def table(result: dict[str, Any]) -> str:
    """A report for people."""
    idle, gpu, devices = result["idle"], result["device"] == "GPU", result["devices"]
    steps = max(len(result["steps"]), 1)
    where = f"{devices} GPU{'s' * (devices > 1)}" if gpu else "the CPU, by operators' own time"
    lines = [
        f"{len(result['steps'])} steps of {result['step_ms']:.2f} ms (median) on {where}",
        "",
        f"{'family':<16}{'ms a step':>12}{'share':>8}{'calls':>9}{'all streams' if gpu else 'all threads':>14}",
    ]
    nothing = {**idle, "family": "idle" if gpu else "no operator", "calls": idle["gaps"]}
    for row in (*result["families"], nothing):
        summed = f"{row['summed_ms'] / steps:>14.3f}" if "summed_ms" in row else ""
        line = (
            f"{row['family']:<16}{row['ms'] / steps:>12.3f}{row['share']:>8.1%}{row['calls'] / steps:>9.0f}"
        )
        lines.append(line + summed)

    def section(title: str, rows: Iterable[tuple[float, str]]) -> None:
        listed = [f"  {milliseconds:>10.3f}{text}" for milliseconds, text in rows]
        if listed:
            lines.extend(["", title, *listed])

    section(
        f"Longest {'kernels' if gpu else 'operators'} (ms a step, calls, family):",
        (
            (row["ms"] / steps, f"{row['calls'] / steps:>8.0f}  {row['family']:<14}{_short(row['name'])}")
            for row in result["names"][:8]
        ),
    )
    if gpu:
        waits = ((row["ms"] / steps, f"  {_short(row['name'])}") for row in idle["cpu"][:6])
        section("While the GPU was idle, the CPU was in (ms a step):", waits)
        section(
            "Longest gaps (ms, and mostly in):",
            (
                (gap["ms"], f"  {_short(gap['cpu'])} ({gap['step']}, after {gap['after_ms']:.3f} ms)")
                for gap in idle["longest"][:4]
            ),
        )
    section(
        "Copies (ms a step, MB a step, calls):",
        (
            (
                row["ms"] / steps,
                f"{row['bytes'] / 1e6 / steps:>10.2f}{row['calls'] / steps:>8.0f}  {row['name']}",
            )
            for row in result["copies"]
        ),
    )
    for device in result["memory"]:
        reserved = f", {device['peak_reserved'] / 1e6:.1f} MB reserved" if device["peak_reserved"] else ""
        allocated = f"{device['peak_allocated'] / 1e6:.1f} MB allocated"
        lines += ["", f"Memory, {device['device']}: at most {allocated}{reserved}"]
    if result["outside_ms"]:
        lines += ["", f"Outside of the steps: {result['outside_ms']:.3f} ms, which nothing above counts"]
    if result["untimed_events"]:
        lines += ["", f"Left out: {result['untimed_events']} events without a valid time"]
    advice = result["advice"] or ["nothing: no rule's threshold is exceeded"]
    return "\n".join([*lines, "", "To try:", *(f"  - {line}" for line in advice)])


def _short(name: str) -> str:
    return name if len(name) <= 76 else f"{name[:73]}..."


def draw(result: dict[str, Any], path: Path) -> None:
    """Write a PNG: each step's time by family, and memory over time where it is known."""
    from matplotlib.figure import Figure

    steps, memory = result["steps"], result["memory"]
    figure = Figure(figsize=(10, 7 if memory else 4), layout="constrained")
    axes = figure.subplots(2 if memory else 1, 1, squeeze=False)[:, 0]
    families = [
        (row["family"], [step["families"].get(row["family"], 0) for step in steps])
        for row in result["families"]
    ]
    nothing = "idle" if result["device"] == "GPU" else "no operator"
    left = [0.0] * len(steps)
    for index, (family, values) in enumerate([*families, (nothing, [step["idle_ms"] for step in steps])]):
        share = sum(values) / result["total_ms"]
        colour = "#e6e6e6" if family == nothing else f"C{index % 10}"
        axes[0].barh(range(len(steps)), values, left=left, label=f"{family} {share:.1%}", color=colour)
        left = [sum(pair) for pair in zip(left, values, strict=True)]
    axes[0].set(xlabel="ms", title=f"{Path(result['trace']).name}: time by family, {result['device']}")
    if len(steps) <= 20:
        axes[0].set_yticks(range(len(steps)), [step["name"] for step in steps])
    axes[0].invert_yaxis()
    axes[0].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    for device in memory:
        times = [time for time, _, _ in device["curve"]]
        for column, (line, style) in enumerate((("allocated", "-"), ("reserved", ":")), start=1):
            sizes = [point[column] / 1e6 for point in device["curve"]]
            if any(sizes):
                axes[1].plot(times, sizes, style, drawstyle="steps-post", label=f"{device['device']}, {line}")
        axes[1].set(xlabel="ms", ylabel="MB", title="memory over time", ylim=(0, None))
        axes[1].legend()
    temporary = path.with_name(f"{path.name}.part")
    try:
        figure.savefig(temporary, format="png", dpi=110)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Tell where the time of a training step goes, from a torch.profiler trace."
    )
    parser.add_argument("trace", type=Path, help="what export_chrome_trace wrote: .json, or .json.gz")
    parser.add_argument(
        "--snapshot", type=Path, help="of the GPU's memory, from torch.cuda.memory._dump_snapshot"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--png", type=Path, help="draw time by family and memory over time into this file")
    options = parser.parse_args(arguments)
    try:
        result = report(options.trace, options.snapshot)
        if options.png is not None:
            draw(result, options.png)
    except TraceError as error:
        sys.exit(f"{options.trace}: {error}")
    except OSError as error:
        sys.exit(f"{error.filename or options.trace}: {error.strerror or error}")
    except sqlite3.Error as error:
        sys.exit(
            f"{options.trace}: no room for the temporary database: {error}; set SQLITE_TMPDIR to where there is"
        )
    except ModuleNotFoundError as error:
        sys.exit(f"--png needs {error.name}: pip install {error.name}")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A kernel's name may have what the terminal, or even UTF-8, does not.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(json.dumps(result, indent=1) if options.json else table(result), flush=True)
    except BrokenPipeError:
        # Whoever reads has enough, as head does; what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
