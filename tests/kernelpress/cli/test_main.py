from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import kernelpress as kernelpress_here
from localhub import running_hub


def kernelpress(
    *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "COLUMNS"))}
    return subprocess.run(
        [sys.executable, "-m", "kernelpress", *arguments],
        cwd=cwd, env=kept | {"COLUMNS": "200"} | environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def test_build_check_and_publish_work_from_the_kernels_directory(make_kernel, tmp_path):
    root = make_kernel()
    built = kernelpress("build", cwd=root)
    assert built.returncode == 0, built.stderr
    assert re.search(r"torch-universal +_demo_kernel_universal_[0-9a-f]{10} +7", built.stdout)
    checked = kernelpress("check", cwd=root)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stderr.startswith(
        "loading torch-cpu, torch-cuda, torch-universal, each in a clean process"
    )
    with running_hub(tmp_path / "hub") as hub:
        first = kernelpress("publish", cwd=root, HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path))
        second = kernelpress("publish", "--endpoint", hub.endpoint, cwd=root, HF_HOME=str(tmp_path))
    assert (first.returncode, second.returncode) == (0, 3), first.stderr + second.stderr
    assert re.search(r"v1 +published", first.stdout)
    assert re.search(r"v1 +unchanged nothing to commit", second.stdout)


def test_check_prints_findings_and_fails(make_kernel):
    root = make_kernel(**{"torch-ext/demo_kernel/twice.py": "import not_there\n"})
    kernelpress_here("build", str(root))
    process = kernelpress_here("check", str(root))
    assert process.returncode == 1
    assert "torch-ext/demo_kernel/twice.py:1: KP201" in process.stdout
    assert "torch-ext/demo_kernel/twice.py:1: KP303 not_there" in process.stdout
    assert "2 errors" in process.stdout


@pytest.mark.parametrize(
    ("changed", "arguments", "message"),
    [
        ({}, ["build", "nowhere"], "nowhere: there is no build.toml here"),
        ({"build.toml": "[general\n"}, ["build", "."], "build.toml:1: malformed TOML"),
        ({}, ["publish", ".", "--repo-id", "none"], "'none' is no repository id"),
        ({}, ["publish", ".", "--endpoint", "http://127.0.0.1:9"], "does not answer"),
        ({"torch-ext/demo_kernel/twice.py": "def f(:\n"}, ["publish", "."], "twice.py:1: syntax error"),
        ({}, ["check", "."], "there is no build here"),
    ],
)
def test_bad_input_ends_in_one_message_and_no_traceback(make_kernel, changed, arguments, message):
    root = make_kernel(**changed)
    process = kernelpress_here(*arguments, cwd=root)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ")
    assert message in process.stderr
    assert process.stderr.count("\n") == 1
    assert "Traceback" not in process.stderr + process.stdout


def test_the_version_is_the_installed_one():
    assert re.fullmatch(r"kernelpress \d+\.\d+\.\d+\S*\n", kernelpress("--version").stdout)


def test_a_hub_is_served_until_interrupted(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "kernelpress", "serve", "--root", str(tmp_path), "--port", "0", "--trust", "org"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert "http://127.0.0.1:" in process.stdout.readline()
    finally:
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    assert "Traceback" not in output + errors


def test_a_token_made_on_the_command_line_is_what_the_hub_then_asks_for(make_kernel, tmp_path):
    root = make_kernel()
    token = kernelpress_here("token", "create", "me", "--root", str(tmp_path / "hub")).stdout.strip()
    with running_hub(tmp_path / "hub") as hub:
        without = kernelpress("publish", str(root), HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path))
        process = kernelpress(
            "publish", str(root), HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path), HF_TOKEN=token
        )
    assert without.returncode == 1
    assert "token" in without.stderr
    assert process.returncode == 0, process.stderr


def test_unbundling_to_a_directory_and_to_a_hub_at_once_is_wrong_usage(tmp_path):
    process = kernelpress_here("unbundle", "k.tar", "--into", str(tmp_path / "new"), "--repo-id", "org/k")
    assert process.returncode == 2
    assert "--into unpacks to a directory" in process.stderr


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads processor time in /proc")
@pytest.mark.parametrize("seconds", [1.0, 2.0])
def test_an_interrupt_during_a_build_ends_it_and_keeps_the_one_before(make_kernel, seconds):
    root = make_kernel()
    assert kernelpress_here("build", str(root)).returncode == 0
    before = {path: path.read_bytes() for path in (root / "build").rglob("*") if path.is_file()}
    lines = "".join(f"def f{number}(x):\n    return x + {number}\n" for number in range(350))
    for number in range(400):
        (root / f"torch-ext/demo_kernel/m{number}.py").write_text(f"N = {number}\n{lines}")
    running = subprocess.Popen(
        [sys.executable, "-m", "kernelpress", "build", str(root)], start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # As from a terminal: what a shell runs in the background ignores interrupts, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        # Processor time, so that the build is as far on a busy machine: to start takes half a second of it.
        ticks = seconds * os.sysconf("SC_CLK_TCK")
        while running.poll() is None:
            fields = Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()
            if int(fields[11]) + int(fields[12]) >= ticks:
                break
            time.sleep(0.01)
        os.killpg(running.pid, signal.SIGINT)
        stderr = running.communicate(timeout=60)[1]
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    assert (running.returncode, stderr) == (130, "error: interrupted; run the same command again to finish\n")
    assert before == {path: path.read_bytes() for path in (root / "build").rglob("*") if path.is_file()}
