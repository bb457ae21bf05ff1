"""Measures the embedded Hub: requests for small files a second, and a cold ``get_kernel``.

    python benchmarks/hub.py [--seconds S] [--connections N]

Clients run in processes of their own on the same machine, so the figures share its cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, HfApi
from localhub import running_hub

FILES = 32
SIZE = 2048
COLD = """
import os, sys, time, torch, kernels, transformers
start = time.perf_counter()
kernels.get_kernel(sys.argv[1], version=1, trust_remote_code=True)
print(time.perf_counter() - start)
"""
METADATA = {
    "name": "bench",
    "id": "_bench_cpu_0",
    "version": 1,
    "license": "MIT",
    "python-depends": [],
    "backend": {"type": "cpu"},
}


def client(address: str, seconds: float, results: multiprocessing.Queue[list[float]], number: int) -> None:
    """Ask for files one after another over one connection, as fast as they come."""
    host, port = urlsplit(address).hostname, urlsplit(address).port
    taken: list[float] = []
    with socket.create_connection((host, port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end, asked = time.perf_counter() + seconds, number
        while (start := time.perf_counter()) < end:
            asked += 1
            path = f"/kernels/org/bench/resolve/v1/build/torch-cpu/f{asked % FILES}.py"
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            head, _, body = b"", b"", b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(65536)
            head, _, body = head.partition(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(head.decode())
            while len(body) < SIZE:
                body += connection.recv(65536)
            taken.append(time.perf_counter() - start)
    results.put(taken)


def fill(endpoint: str) -> None:
    """A kernel with files of a usual size."""
    api = HfApi(endpoint=endpoint, token=False)
    api.create_repo("org/bench", repo_type="kernel")
    files = {f"f{number}.py": f"# {number}\n".encode().ljust(SIZE, b"#") for number in range(FILES)}
    files |= {"__init__.py": b"", "metadata.json": json.dumps(METADATA).encode()}
    operations = [CommitOperationAdd(f"build/torch-cpu/{name}", data) for name, data in files.items()]
    api.create_commit("org/bench", operations, commit_message="bench", repo_type="kernel")
    api.create_branch("org/bench", branch="v1", repo_type="kernel")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, running_hub(Path(scratch, "hub")) as hub:
        fill(hub.endpoint)
        results: multiprocessing.Queue[list[float]] = multiprocessing.Queue()
        clients = [
            multiprocessing.Process(target=client, args=(hub.endpoint, options.seconds, results, number))
            for number in range(options.connections)
        ]
        for process in clients:
            process.start()
        taken = sorted(seconds for _ in clients for seconds in results.get())
        for process in clients:
            process.join()
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": f"{scratch}/home"}
        cold = subprocess.run(
            [sys.executable, "-c", COLD, "org/bench"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
    rate = len(taken) / options.seconds
    cuts = statistics.quantiles(taken, n=100)
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"resolve of {SIZE} bytes over {options.connections} connections: {rate:.0f} a second")
    print(f"latency p50 {cuts[49] * 1e3:.1f} ms, p99 {cuts[98] * 1e3:.1f} ms")
    print(f"cold get_kernel after imports: {float(cold.stdout.strip().splitlines()[-1]):.2f} s")


if __name__ == "__main__":
    main()
