"""Traces of this machine's CPU; and, since there is no GPU here, GPU traces written by the format's documentation.

That is the Trace Event Format (https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU), with
the categories and arguments of torch.profiler: ``kernel``, ``gpu_memcpy``, ``gpu_user_annotation``, ``cuda_runtime``.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import pickle
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "recipes/trace.py"
Event = dict[str, Any]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_trace", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


trace = load_script()


def event(
    category: str, name: str, start: float, length: float, lane: object = 1, **arguments: object
) -> Event:
    pid = 0 if category in ("kernel", "gpu_memcpy", "gpu_memset", "gpu_user_annotation") else 100
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": pid,
        "tid": lane,
        "ts": start,
        "dur": length,
        "args": arguments,
    }


def save(path: Path, events: list[Event], **format: Any) -> Path:
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": events, "traceName": "x"}, **format))
    return path


def shares(result: dict[str, Any]) -> dict[str, float]:
    return {row["family"]: round(row["ms"], 6) for row in result["families"]}


GPU_STEP = [
    {"ph": "M", "name": "process_name", "pid": 0, "args": {"name": "python"}},
    event("user_annotation", "ProfilerStep#3", 0, 1000),
    event("gpu_user_annotation", "ProfilerStep#3", 90, 900, 7),
    # A copy beside a GEMM, on another stream, and a reduction that outlasts it.
    event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 100, 100, 20, bytes=4096),
    event("kernel", "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", 150, 100, 7),
    event(
        "kernel", "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 200, 100, 24
    ),
    event("kernel", "attention_forward_kernel", 300, 200, 7),
    # An optimizer without a fused kernel is known by its annotation.
    event("gpu_user_annotation", "Optimizer.step#AdamW.step", 700, 100, 7),
    event(
        "kernel",
        "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>(int)",
        700,
        100,
        7,
    ),
    event("cuda_runtime", "cudaStreamSynchronize", 450, 150),
    event("cpu_op", "aten::item", 440, 170),
    event("python_function", "train.py(7): step", 600, 400),
    event("kernel", "void cutlass::Kernel2<cutlass_80_tensorop>(Params)", 1100, 50, 7),
]


def test_the_time_of_gpu_streams_is_counted_once_and_adds_up_to_the_step(tmp_path: Path) -> None:
    result = trace.report(save(tmp_path / "t.json", GPU_STEP))
    assert (result["device"], result["devices"], result["step_ms"]) == ("GPU", 1, 1.0)
    # Computation hides copies, copies hide communication.
    assert shares(result) == {
        "copies": 0.05,
        "GEMM": 0.1,
        "communication": 0.05,
        "attention": 0.2,
        "optimizer": 0.1,
    }
    summed = {row["family"]: row["summed_ms"] for row in result["families"]}
    assert (summed["copies"], summed["communication"]) == (0.1, 0.1)
    assert result["idle"]["ms"] == 0.5
    assert result["idle"]["gaps"] == 3
    assert [(gap["after_ms"], gap["ms"], gap["cpu"]) for gap in result["idle"]["longest"]] == [
        (0.5, 0.2, "cudaStreamSynchronize"),
        (0.8, 0.2, "train.py(7): step"),
        (0.0, 0.1, trace._BETWEEN),
    ]
    waits = {row["name"]: row["ms"] for row in result["idle"]["cpu"]}
    assert waits == {
        "train.py(7): step": 0.3,
        "cudaStreamSynchronize": 0.1,
        trace._BETWEEN: 0.1,
    }
    assert result["copies"] == [
        {"name": "Memcpy HtoD (Pageable -> Device)", "calls": 1, "bytes": 4096, "ms": 0.1}
    ]
    assert result["outside_ms"] == 0.05
    assert any(
        line.startswith("the GPU waits for Python") and "idle 0.5 > 0.15" in line for line in result["advice"]
    )
    text = trace.table(result)
    assert re.search(r"attention +0\.200 +20\.0%", text)
    assert "Memcpy HtoD (Pageable -> Device)" in text


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "GEMM"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_64x1_nn_align8>", "GEMM"),
        ("Cijk_Alik_Bljk_BBS_BH_MT128x128x64", "GEMM"),
        ("triton_tem_fused_mm_3", "GEMM"),
        ("void cutlass::device_kernel<GemmUniversal<cutlass::gemm::GroupProblemShape<Shape>>>", "experts"),
        ("aten::_grouped_mm", "experts"),
        ("_scatter2scatter", "experts"),
        ("fused_moe_kernel", "experts"),
        ("void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<64>>", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<128>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::Params)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_31", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>", "quantization"),
        ("void kgemm_4bit_inference_naive<__nv_bfloat16, 128, 16>", "GEMM"),
        ("void kOptimizerStatic8bit2StateBlockwise<__nv_bfloat16, 0>", "optimizer"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>", "optimizer"),
        ("ncclKernel_ReduceScatter_RING_LL_Sum_float", "communication"),
        ("liger_cross_entropy_kernel", "loss"),
        ("_rms_norm_backward_kernel", "norm"),
        ("_swiglu_forward_kernel", "elementwise"),
        ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>", "norm"),
        ("triton_red_fused__to_copy_mean_mul_pow_rsqrt_4", "norm"),
        ("triton_poi_fused_add_mul_silu_2", "elementwise"),
        ("void at::native::(anonymous namespace)::cunn_SoftMaxForward<4, LogSoftMaxForwardEpilogue>", "loss"),
        ("void at::native::elementwise_kernel<128, 2, direct_copy_kernel_cuda>", "copies"),
        ("Memset (Device)", "copies"),
        ("autograd::engine::evaluate_function: GeneratedBackwardFor_scattermoe_lora_rms_norm_forward", "norm"),
        ("my_kernel", "other"),
    ],
)  # fmt: skip
def test_kernels_of_many_libraries_are_of_the_right_family(name: str, family: str) -> None:
    assert trace.family_of(name) == family


def test_every_operator_and_kernel_of_this_package_has_a_family() -> None:
    names: dict[str, str] = {}
    for path in (REPOSITORY / "torch-ext/scattermoe_lora/ops").rglob("*.py"):
        text = path.read_text()
        kernels = re.findall(r"@triton\.jit.*\n(?:@.*\n)*def (\w+_kernel)\b", text)
        names |= dict.fromkeys([*kernels, *re.findall(r'custom_op\("([^"]+)"', text)], path.parent.name)
    assert len(names) > 30
    families = {
        "attention": "attention",
        "experts": "experts",
        "grouped_linear": "experts",
        "rms_norm": "norm",
        "norm_rotary": "norm",
        "linear_cross_entropy": "loss",
        "lora_linear": "GEMM",
        "gated_activation": "elementwise",
        "quantization": "quantization",
    }
    assert {name: trace.family_of(name) for name in names} == {
        name: families[operation] for name, operation in names.items()
    }


def train_step(
    kernel: ModuleType, weights: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    x = weights["embedding"][torch.arange(64) % 32]
    x = kernel.rms_norm(x, weights["norm"])
    heads = (x @ weights["qkv"]).view(1, 64, 3, 2, 16).unbind(2)
    x = kernel.flash_attn_func(*(part.contiguous() for part in heads), causal=True).reshape(64, 32)
    index = torch.arange(128).view(64, 2) % 4
    x = kernel.grouped_linear(x, weights["experts"], index, weights["a"], weights["b"]).sum(1)
    loss = kernel.linear_cross_entropy(x, weights["head"], torch.arange(64) % 32)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A trace of three steps of training with the built kernel, and the profiler that made it."""
    from kernelpress.builder.build import build
    from kernelpress.spec.load import load_spec
    from kernels import get_local_kernel

    folder = tmp_path_factory.mktemp("profiled")
    build(load_spec(REPOSITORY), folder / "build")
    kernel = get_local_kernel(folder / "build")
    torch.manual_seed(0)
    shapes = {"embedding": (32, 32), "norm": (32,), "qkv": (32, 96), "experts": (4, 32, 32), "a": (4, 4, 32)}
    shapes |= {"b": (4, 32, 4), "head": (32, 32)}
    weights = {name: torch.randn(shape).requires_grad_(name != "experts") for name, shape in shapes.items()}
    optimizer = torch.optim.AdamW([weight for weight in weights.values() if weight.requires_grad])
    path = folder / "trace.json.gz"
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
        profile_memory=True,
    ) as profiler:
        for _ in range(4):
            train_step(kernel, weights, optimizer)
            profiler.step()
    return path, profiler


def test_a_real_trace_of_the_cpu_is_what_the_profiler_itself_adds_up(
    profiled: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, profiler = profiled
    # An operator has a row in each family that it serves; all of them are added up below.
    monkeypatch.setattr(trace, "_LISTED", 10_000)
    result = trace.report(path)
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = {
        one["name"]: one["dur"] / 1000 for one in events if str(one.get("name")).startswith("ProfilerStep")
    }
    assert {step["name"]: step["ms"] for step in result["steps"]} == pytest.approx(steps, abs=1e-3)
    assert len(steps) == 3
    assert result["device"] == "CPU"
    total = sum(row["ms"] for row in result["families"]) + result["idle"]["ms"]
    assert total == pytest.approx(result["total_ms"], abs=1e-4)
    families = shares(result)
    for family in ("attention", "experts", "norm", "loss", "optimizer", "GEMM"):
        assert families[family] > 0, family
    own = {row.key: row.self_cpu_time_total / 1000 for row in profiler.key_averages()}
    reported: Counter[str] = Counter()
    for row in result["names"]:
        reported[row["name"]] += row["ms"]
    longest = [name for name, _ in reported.most_common(8)]
    assert {name: reported[name] for name in longest} == pytest.approx(
        {name: own[name] for name in longest}, rel=0.02, abs=0.02
    )
    allocated = [one["args"]["Total Allocated"] for one in events if one.get("name") == "[memory]"]
    assert [device["peak_allocated"] for device in result["memory"]] == [max(allocated)]
    # With the package's own kernels there is nothing to advise on them.
    assert not any("kernel.register" in line for line in result["advice"])


FAMILY_NAMES = {
    "GEMM": "ampere_gemm",
    "norm": "rms_forward_kernel",
    "copies": "Memcpy DtoD (Device -> Device)",
    "communication": "ncclDevKernel_AllGather",
}
# Family, start, length in microseconds, and stream.
Kernels = list[tuple[str, int, int, int]]
KERNELS = st.lists(
    st.tuples(
        st.sampled_from(sorted(FAMILY_NAMES)), st.integers(0, 60), st.integers(0, 25), st.integers(7, 9)
    ),
    min_size=1,
    max_size=25,
)


def gpu_events(kernels: Kernels) -> list[Event]:
    steps = [event("user_annotation", f"ProfilerStep#{index}", 10 + 20 * index, 20) for index in range(2)]
    calls = [event("cuda_runtime", "cudaLaunchKernel", start // 2, length) for _, start, length, _ in kernels]
    return [*steps, *(event("kernel", FAMILY_NAMES[family], *rest) for family, *rest in kernels), *calls]


@given(KERNELS)
def test_every_microsecond_of_a_step_is_one_familys_or_idle(
    tmp_path_factory: pytest.TempPathFactory, kernels: Kernels
) -> None:
    # A stream runs one kernel after the other.
    streams: dict[int, int] = {}
    for index, (family, start, length, stream) in enumerate(kernels):
        begin = max(start, streams.get(stream, 0))
        streams[stream] = begin + length
        kernels[index] = (family, begin, length, stream)
    result = trace.report(save(tmp_path_factory.mktemp("t") / "t.json", gpu_events(kernels)))
    order = ("GEMM", "norm", "copies", "communication")
    expected: Counter[str] = Counter()
    for moment in range(10, 50):
        running = [
            (max(order.index(family), 1), start, FAMILY_NAMES[family], family)
            for family, start, length, _ in kernels
            if start <= moment < start + length
        ]
        expected[min(running)[-1] if running else "idle"] += 1
    reported = {family: round(1000 * ms) for family, ms in shares(result).items()}
    reported["idle"] = round(1000 * result["idle"]["ms"])
    assert Counter(reported) == expected
    assert all(row["ms"] <= row["summed_ms"] for row in result["families"])
    assert result["total_ms"] == 0.04


@given(
    KERNELS,
    st.randoms(use_true_random=False),
    st.integers(1, 200),
    st.booleans(),
    st.sampled_from([None, 0, 3]),
)
def test_a_report_depends_on_neither_order_nor_format(
    tmp_path_factory: pytest.TempPathFactory,
    kernels: Kernels,
    shuffle: random.Random,
    chunk: int,
    packed: bool,
    indent: int | None,
) -> None:
    folder, events = tmp_path_factory.mktemp("t"), gpu_events(kernels)
    path = folder / "t.json"
    expected = trace.report(save(path, events))
    shuffle.shuffle(events)
    events = [dict(sorted(one.items(), key=lambda _: shuffle.random())) for one in events]
    text = json.dumps({"other": [{"a": [1]}, 1.5], "traceEvents": events, "n": 12}, indent=indent)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "_CHUNK", chunk)
        assert trace.report(path) == expected
    path.write_text(json.dumps(events))
    assert trace.report(path) == expected


def failure(*arguments: object) -> str:
    """The message with which the script ends."""
    with pytest.raises(SystemExit) as caught:
        trace.main([str(argument) for argument in arguments])
    assert isinstance(caught.value.code, str)
    assert "\n" not in caught.value.code
    return caught.value.code


def test_a_trace_that_is_cut_off_anywhere_is_refused_and_the_place_named(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    text = save(path, GPU_STEP[:6]).read_text()
    for length in range(1, len(text)):
        path.write_text(text[:length])
        with pytest.raises(trace.TraceError, match=rf"cut off at character {length:,}, after \d events"):
            trace.report(path)
    packed = gzip.compress(text.encode())
    path.write_bytes(packed[:-12])
    message = failure(path)
    assert message.startswith(f"{path}: cut off: the gzip file ends before its last block")
    assert "Nothing is reported" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"PK\x03\x04 not json", "not a trace: it begins neither"),
        (b"{}", "no traceEvents"),
        (b'{"traceEvents": {"a": 1}}', "no traceEvents"),
        (b"[]", "no operator and no kernel"),
        (b'{"traceEvents": [{"ph": "M", "name": "x"}]}', "no operator and no kernel"),
        (b'{"traceEvents": [{"ph": "X" "cat": "kernel", "name": "' + b"x" * 99 + b'"}]}', "no JSON at character 28"),
        (b'{"traceEvents": [1 2]}', "no JSON at character 19: unexpected '2'"),
        (b'{"a" 1}', "no JSON at character 5"),
        (b'{"traceEvents": []} {', "no JSON at character 20: unexpected '{'"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"traceEvents": [' + b"9" * 5000 + b"]}", "a number of too many digits at character 17"),
        (gzip.compress(b"[1, 2]", mtime=0)[:-8] + bytes(8), "a damaged gzip file"),
        (b"\x1f\x8b" + b"no" * 9, "a damaged gzip file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    assert message in failure(path)


@given(st.binary(max_size=200), st.integers(0, 400))
def test_no_damage_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int
) -> None:
    path = tmp_path_factory.mktemp("t") / "t.json"
    data = save(path, GPU_STEP[:5]).read_bytes()
    path.write_bytes(data[:place] + noise + data[place + len(noise) :])
    try:
        trace.report(path)
    except trace.TraceError as error:
        message = str(error)
    else:
        message = ""
    assert "\n" not in message


def test_a_file_that_is_not_there_and_events_without_time_are_told_of(tmp_path: Path) -> None:
    assert failure(tmp_path / "none.json") == f"{tmp_path / 'none.json'}: No such file or directory"
    assert "Is a directory" in failure(tmp_path)
    events = [*GPU_STEP, event("kernel", "k", float("nan"), 1), event("kernel", "k", 1, -5)]
    assert trace.report(save(tmp_path / "t.json", events))["untimed_events"] == 2


def test_strange_names_sizes_and_steps_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"Device Type": 1, "Device Id": "\ud800", "Total Allocated": 10**30, "Total Reserved": 1e9}
    memory = {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "ts": 1, "args": sizes}
    step = event("user_annotation", "ProfilerStep#0", 0, 0)
    trace.main([str(save(tmp_path / "t.json", [step, memory, event("kernel", "\ud800", 0, 5)]))])
    assert "0 steps of 0.00 ms" in capsys.readouterr().out
    trace.main([str(save(tmp_path / "t.json", [memory, event("kernel", "\ud800", 0, 5)]))])
    # Without annotations the whole trace is one step.
    assert "1 steps of 0.01 ms" in capsys.readouterr().out


def snapshot(path: Path) -> Path:
    """A snapshot as ``torch.cuda.memory``'s documentation has it: 100 bytes before, 300 at most, 50 at the end."""
    actions = [
        ("segment_alloc", 512),
        ("alloc", 200),
        ("free_requested", 200),
        ("free_completed", 200),
        ("alloc", 30),
    ]
    actions += [("free_completed", 80)]
    events = [
        {"action": action, "addr": 0, "size": size, "stream": 0, "time_us": 1000 + 10 * index, "frames": []}
        for index, (action, size) in enumerate(actions)
    ]
    segment = {
        "device": 0,
        "address": 0,
        "total_size": 1024,
        "active_size": 50,
        "allocated_size": 50,
        "blocks": [],
    }
    path.write_bytes(pickle.dumps({"segments": [segment], "device_traces": [events, []]}))
    return path


def test_memory_over_time_is_told_back_from_the_end_of_a_snapshot(tmp_path: Path) -> None:
    result = trace.report(save(tmp_path / "t.json", GPU_STEP), snapshot(tmp_path / "s.pickle"))
    (device,) = result["memory"]
    assert device["curve"] == [
        [0.0, 100, 1024],
        [0.01, 300, 1024],
        [0.02, 300, 1024],
        [0.03, 100, 1024],
        [0.04, 130, 1024],
        [0.05, 50, 1024],
    ]
    assert (device["peak_allocated"], device["peak_reserved"]) == (300, 1024)


class Harmful:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Harmful()), "it names builtins.exec"),
        (b"", "no snapshot of memory"),
        (pickle.dumps({"segments": []}), "no snapshot of memory"),
        (pickle.dumps([1])[:-3], "no snapshot of memory"),
        (b"{}", "no snapshot of memory"),
    ],
)
def test_a_snapshot_that_is_none_is_one_message_and_runs_nothing(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "s.pickle"
    path.write_bytes(content)
    assert message in failure(save(tmp_path / "t.json", GPU_STEP), "--snapshot", path)


def test_each_rule_speaks_only_above_its_threshold() -> None:
    for rule in trace.RULES:
        below = dict(rule.above)
        above = {name: threshold + 0.01 for name, threshold in below.items()}
        assert not any(line.startswith(rule.advice) for line in trace.advise(below))
        (line,) = (line for line in trace.advise(above) if line.startswith(rule.advice))
        assert all(f"{name} {above[name]:.3g} > {threshold:g}" in line for name, threshold in below.items())


LIMITED = """
import json, resource, runpy, sys
resource.setrlimit(resource.RLIMIT_AS, (48 << 20, 48 << 20))
try:
    json.load(open(sys.argv[1]))
except MemoryError:
    runpy.run_path("trace.py", run_name="__main__")
else:
    sys.exit("the trace is too small to show anything")
"""


def test_a_large_trace_is_read_in_little_memory_by_the_script_alone(tmp_path: Path) -> None:
    (tmp_path / "trace.py").write_bytes(SCRIPT.read_bytes())
    line = json.dumps(event("kernel", "ampere_gemm", 0, 5, 7, grid=[1, 2, 3], block=[4, 5, 6], correlation=7))
    with (tmp_path / "t.json").open("w") as file:
        file.write('{"traceEvents": [')
        for index in range(50_000):
            file.write(line.replace('"ts": 0,', f'"ts": {10 * index},') + ",\n")
        file.write(json.dumps(event("user_annotation", "ProfilerStep#0", 0, 500_000)) + "]}")
    command = [sys.executable, "-c", LIMITED, "t.json", "--json"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert process.returncode == 0, process.stderr
    result = json.loads(process.stdout)
    assert shares(result) == {"GEMM": 250.0}
    assert result["idle"]["gaps"] == 50_000


def test_the_picture_is_a_png_and_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, picture = save(tmp_path / "t.json", GPU_STEP), tmp_path / "t.png"
    python = REPOSITORY / ".venv-consumer/bin/python"
    command = [python, SCRIPT, path, "--png", picture, "--snapshot", snapshot(tmp_path / "s.pickle")]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert process.returncode == 0, process.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "Memory, GPU 0: at most 0.0 MB allocated" in process.stdout
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in failure(path, "--png", picture)
