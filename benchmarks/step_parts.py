"""Parts of a step of each MoE layer of compare.py on a CPU: milliseconds by operator, and page faults.

An operator's time is its own, without that of operators within it: the median over profiled steps of each of its calls,
so that what else the machine does is left out. What remains of an unprofiled step's processor time is Python, autograd
and torch's dispatcher.

    OMP_NUM_THREADS=1 python benchmarks/step_parts.py [--shapes small,medium,large] [--implementation scattermoe]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from compare import OURS, SHAPES
from interleaved import without_stderr
from layer import Layer
from measuring import built_kernel, chosen, device_name

STEPS = 9
SHOWN = 16


def processor_ms(step: Callable[[], None]) -> float:
    """The processor time of a step, a median."""
    times = []
    for _ in range(STEPS):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def operator_ms(step: Callable[[], None]) -> tuple[Counter[str], Counter[str]]:
    """Milliseconds of torch's own operators, and their calls in a step, by name."""
    profiles = []
    for _ in range(STEPS):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with without_stderr(), torch.profiler.profile(activities=activities) as profile:
            step()
        events = sorted(profile.events(), key=lambda e: (e.time_range.start, -e.time_range.end))
        profiles.append([(event.name, event.self_cpu_time_total) for event in events])
    # A step whose calls are not those of the others, which none should be, is left out.
    names = Counter(tuple(name for name, _ in profile) for profile in profiles).most_common(1)[0][0]
    same = [profile for profile in profiles if tuple(name for name, _ in profile) == names]
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for call in zip(*same, strict=True):
        name = call[0][0]
        if name.startswith(("aten::", "mkldnn::")):
            times[name] += statistics.median(microseconds for _, microseconds in call) / 1000
            calls[name] += 1
    return times, calls


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="small,medium,large", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--implementation", choices=OURS, default=OURS[0])
    arguments = parser.parse_args()
    shapes = chosen(parser, "--shapes", arguments.shapes, SHAPES)
    print(f"{device_name('cpu')}, {torch.get_num_threads()} threads of {os.cpu_count()}")
    with built_kernel() as kernel:
        kernel.register()
        for name, shape in shapes.items():
            torch.manual_seed(0)
            layer = Layer(shape, arguments.implementation)

            def step(layer: Layer = layer) -> None:
                layer.forget()
                layer.module.experts(layer.x, layer.index, layer.weights).backward(layer.grad)

            step()
            step()
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            total = processor_ms(step)
            faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults) // STEPS
            times, calls = operator_ms(step)
            rest = total - sum(times.values())
            print(f"\n{name}: {total:.1f} ms of the processor a step, {faults} page faults", flush=True)
            for operator, milliseconds in times.most_common(SHOWN):
                print(f"{operator:<28}{milliseconds:>9.2f} ms{calls[operator]:>7} calls")
            others = sum(times.values()) - sum(ms for _, ms in times.most_common(SHOWN))
            print(f"{'other operators':<28}{others:>9.2f} ms\n{'the rest':<28}{rest:>9.2f} ms", flush=True)


if __name__ == "__main__":
    main()
