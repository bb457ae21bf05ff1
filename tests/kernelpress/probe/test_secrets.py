"""No token of the publisher's reaches a kernel's code, neither when it is checked nor when it is verified."""

from __future__ import annotations

import httpx2
import pytest
from kernelpress.check.variants import check
from kernelpress.hub.client import hub as client
from kernelpress.hub.repository import branch_heads
from kernelpress.probe.environment import child_environment
from kernelpress.publish.publish import PublishOptions, publish
from kernelpress.publish.verify import verify
from localhub import create_token, running_hub
from sample_kernel import PACKAGE, edit, make

pytestmark = pytest.mark.usefixtures("no_settings_of_the_developers_own")

SECRETS = (
    "HF_TOKEN",
    "ACTIONS_ID_TOKEN_REQUEST_TOKEN",
    "ACTIONS_ID_TOKEN_REQUEST_URL",
    "AWS_SECRET_ACCESS_KEY",
    "DB_URL",
)
NOSY = f"""
import os
import sys


def _token():
    from huggingface_hub import get_token
    return get_token()


_found = [name for name in {SECRETS!r} if name in os.environ] + ["get_token"] * (_token() is not None)
_found += ["kernelpress"] * ("kernelpress" in sys.modules)
if _found:
    raise RuntimeError(f"can read {{_found}}")
FACTOR = 2"""


def nosy(root):
    edit(root, f"{PACKAGE}/twice.py", "FACTOR = 2", NOSY)
    return make(root)


@pytest.fixture
def secrets(monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, "hf_none")


@pytest.mark.parametrize("private", [False, True])
def test_a_kernel_that_is_verified_finds_no_token(make_kernel, tmp_path, secrets, monkeypatch, private):
    kernel = nosy(make_kernel())
    token = create_token(tmp_path / "hub", "alice")
    monkeypatch.setenv("HF_TOKEN", token)
    with running_hub(tmp_path / "hub", trust=["org"]) as hub:
        api = client(hub.endpoint)
        publish(kernel, "org/nosy", api, PublishOptions(private=private))
        verification = verify(api, "org/nosy", list(branch_heads(api, "org/nosy").values()), 1)
    assert verification.faults == ()
    assert set(verification.loaded) == {"torch-cpu", "torch-universal"}
    assert str(verification.called).startswith("_demo_kernel_")


def test_a_kernel_that_only_some_may_read_is_verified(make_kernel, tmp_path, secrets, monkeypatch):
    kernel = nosy(make_kernel())
    token = create_token(tmp_path / "hub", "alice")
    monkeypatch.setenv("HF_TOKEN", token)
    with running_hub(tmp_path / "hub", trust=["org"]) as hub:
        api = client(hub.endpoint)
        publish(kernel, "org/gated", api)
        settings = f"{hub.endpoint}/api/kernels/org/gated/settings"
        headers = {"Authorization": f"Bearer {token}"}
        assert httpx2.put(settings, json={"gated": "auto"}, headers=headers).status_code == 200
        assert verify(api, "org/gated", [branch_heads(api, "org/gated")["v1"]], 1).faults == ()


def test_a_kernel_that_is_checked_finds_no_token(make_kernel, secrets):
    findings = check(nosy(make_kernel()).directory)
    assert [finding for finding in findings if "can read" in finding.message] == []


def test_what_a_kernel_needs_is_let_through_and_secrets_are_not():
    kept = {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0", "LC_ALL": "C", "TRITON_CACHE_DIR": "/t"}
    dropped = {"TORCH_HUB_TOKEN": "x", "GITHUB_TOKEN": "x", "KERNELS_CACHE": "x", "PYTHONPATH": "x"}
    proxy = {"https_proxy": "http://me:word@proxy"}
    assert child_environment(kept | dropped | proxy, network=False) == kept
    assert child_environment(kept | dropped | proxy, network=True) == kept | proxy
