"""Run huggingface_hub's own tests against the embedded Hub: ``python tests/clients/run.py [pytest options]``.

The tests come from the source distribution of the version of huggingface_hub that is installed here. The address and
the tokens that they name are replaced by those of a Hub that runs as long as they do. out_of_scope.txt lists the tests
that are left out, known_failures.txt those that fail.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from localhub.process import running_hub
from localhub.tokens import create_token

HERE = Path(__file__).resolve().parent
# The suite's modules in which tests send requests to a Hub, without those about other services (buckets, jobs, ...).
MODULES = [
    f"tests/test_{name}.py"
    for name in (
        "cache_layout", "cli", "cli_discussions", "commit_scheduler", "file_download", "hf_api", "hf_file_system",
        "hub_mixin", "hub_mixin_pytorch", "kernels", "repocard", "snapshot_download", "utils_http",
    )
]  # fmt: skip
OPTIONS = (
    "-q", "--tb=short", "--timeout=60", "--disable-warnings", "-p", "no:cacheprovider", "-o", "addopts=",
    "-o", "asyncio_default_fixture_loop_scope=function",
)  # fmt: skip
STAGING = "https://hub-ci.huggingface.co"
# The tokens that the suite's testing_constants.py names: the holder of each, and the namespaces that it may write to.
HOLDERS = {
    "TOKEN": ("__DUMMY_HUB_USER__", ["__DUMMY_HUB_USER__", "valid_org_hub"]),
    "OTHER_TOKEN": ("DVUser", ["DVUser"]),
    "ENTERPRISE_TOKEN": ("EnterpriseAdmin", ["EnterpriseAdmin", "EnterpriseOrgPrivate"]),
}
# The tests of HfFileSystem use a dataset, for which a model does as well.
AS_MODEL = {
    'repo_type="dataset"': 'repo_type="model"',
    'f"datasets/{repo_id}"': "repo_id",
    'f"datasets/{self.repo_id}"': "self.repo_id",
}


def pip(*arguments: str) -> None:
    """Run pip; where that fails, end with pip's last line."""
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check", "--no-deps"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        reason = outcome.stderr.strip().splitlines()[-1:] or [f"exit status {outcome.returncode}"]
        sys.exit(f"error: the client's tests cannot be downloaded: {reason[0]}")


def fetch_suite(folder: Path) -> Path:
    """Unpack the source distribution of the installed huggingface_hub below ``folder``; returns its directory."""
    requirement = f"huggingface_hub=={importlib.metadata.version('huggingface_hub')}"
    pip("download", "--no-binary=huggingface_hub", f"--dest={folder}", requirement)
    (archive,) = folder.glob("huggingface_hub-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def adapt_suite(tests: Path, endpoint: str, root: Path) -> None:
    """Let the suite's modules name this Hub, and add the fixtures that the source distribution lacks."""
    replacements = {f'"{STAGING}': f'"{endpoint}'}
    for line in (tests / "testing_constants.py").read_text("utf-8").splitlines():
        name, _, value = line.partition(" = ")
        if name in HOLDERS:
            holder, namespaces = HOLDERS[name]
            replacements[value] = f'"{create_token(root, holder, organizations=namespaces)}"'
    if len(replacements) != 1 + len(HOLDERS):
        sys.exit(f"error: testing_constants.py of this huggingface_hub does not name {', '.join(HOLDERS)}")
    for path in tests.glob("*.py"):
        text = path.read_text("utf-8")
        for old, new in (replacements | (AS_MODEL if path.name == "test_hf_file_system.py" else {})).items():
            text = text.replace(old, new)
        path.write_text(text, "utf-8")
    (tests / "__init__.py").touch()
    shutil.copy(HERE / "suite_conftest.py", tests / "conftest.py")


def main(arguments: Sequence[str]) -> int:
    """Entry point; returns pytest's exit status."""
    with tempfile.TemporaryDirectory(prefix="client-tests-") as temporary:
        folder = Path(temporary)
        suite = fetch_suite(folder)
        pip("install", f"--target={folder / 'plugins'}", f"--requirement={HERE / 'requirements.txt'}")
        with running_hub(folder / "hub") as hub:
            adapt_suite(suite / "tests", hub.endpoint, hub.root)
            environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
            environment |= {
                "PYTHONPATH": str(folder / "plugins"),
                "HOME": str(folder / "home"),
                "HF_ENDPOINT": hub.endpoint,
                "HF_HUB_DISABLE_XET": "1",
                "CLIENT_TESTS_LISTS": str(HERE),
                "CLIENT_TESTS_COMPLETE": "" if arguments else "1",
            }
            command = [sys.executable, "-m", "pytest", *OPTIONS, *MODULES, *arguments]
            return subprocess.run(command, cwd=suite, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
