from __future__ import annotations

import json
import sys
import venv
from pathlib import Path

import pytest
from kernelpress.builder.build import build
from kernelpress.check.variants import RULE_CHECKS, check
from kernelpress.errors import CheckError
from kernelpress.findings.model import Finding
from kernelpress.findings.rules import RULES
from kernelpress.spec.load import load_spec

PACKAGE = "torch-ext/demo_kernel"


def built(root: Path, only: str = "torch-cpu") -> Path:
    """A build with a single variant, since each one costs a process that imports torch."""
    directory = build(load_spec(root)).directory
    for variant in directory.iterdir():
        if only and variant.name != only:
            for path in sorted(variant.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            variant.rmdir()
    return directory


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def test_a_good_build_has_no_findings_in_any_variant(make_kernel):
    assert check(built(make_kernel(), only="")) == []


def test_checking_leaves_no_bytecode_in_the_build(make_kernel):
    directory = built(make_kernel())
    before = sorted(directory.rglob("*"))
    check(directory)
    assert sorted(directory.rglob("*")) == before


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_without_a_build_there_is_one_message(tmp_path, where):
    with pytest.raises(CheckError, match="there is no build here"):
        check(tmp_path / where)


@pytest.mark.parametrize(
    ("key", "value"), [("backend", {"type": "universal"}), ("id", None), ("python-depends", None)]
)
def test_metadata_that_the_loader_refuses_is_found(make_kernel, key, value):
    path = built(make_kernel()) / "torch-cpu" / "metadata.json"
    fields = json.loads(path.read_bytes())
    if value is None:
        del fields[key]
    else:
        fields[key] = value
    path.write_text(json.dumps(fields))
    findings = check(path.parent.parent)
    assert codes(findings) == ["KP101"]
    assert findings[0].path == path


def test_missing_metadata_is_found(make_kernel):
    directory = built(make_kernel())
    (directory / "torch-cpu" / "metadata.json").unlink()
    assert codes(check(directory)) == ["KP101"]


def test_a_changed_a_missing_and_an_added_file_are_found(make_kernel):
    directory = built(make_kernel())
    variant = directory / "torch-cpu"
    (variant / "ops" / "common.py").write_text("DEFAULT = 4.0\n")
    (variant / "_ops.py").unlink()
    (variant / "added.py").write_text("")
    findings = check(directory)
    assert codes(findings) == ["KP102"] * 3
    messages = " ".join(finding.message for finding in findings)
    assert all(name in messages for name in ("ops/common.py", "_ops.py", "added.py"))


def test_bytecode_links_and_hidden_files_are_found(make_kernel, monkeypatch):
    directory = built(make_kernel())
    variant = directory / "torch-cpu"
    (variant / "__pycache__").mkdir()
    (variant / "__pycache__" / "twice.cpython-311.pyc").write_bytes(b"")
    (variant / ".hidden").write_text("")
    (variant / "link.py").symlink_to("twice.py")
    monkeypatch.chdir(directory.parent)
    findings = [finding for finding in check(Path("build")) if finding.code == "KP103"]
    assert {finding.path for finding in findings} == {
        Path("build/torch-cpu", name)
        for name in ("__pycache__", "__pycache__/twice.cpython-311.pyc", ".hidden", "link.py")
    }


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("import torch\nimport module_of_the_project\n", "No module named 'module_of_the_project'", 2),
        ("x = 1\nraise RuntimeError('on import')\n", "RuntimeError: on import", 2),
        ("import sys\nsys.exit(3)\n", "SystemExit: 3", 2),
        ("import os\nos._exit(4)\n", "ended with status 4", None),
    ],
)
def test_a_variant_that_does_not_load_is_found_with_the_line(make_kernel, text, message, line):
    directory = built(make_kernel(**{f"{PACKAGE}/twice.py": text}))
    (finding,) = check(directory)
    assert (finding.code, finding.severity, finding.line) == ("KP201", "error", line)
    assert message in finding.message
    if line is not None:
        assert finding.path == (directory / "torch-cpu" / "twice.py").resolve()


def test_a_module_of_the_project_cannot_be_imported_by_accident(make_kernel, monkeypatch):
    root = make_kernel(**{f"{PACKAGE}/twice.py": "import helper\n", "helper.py": ""})
    monkeypatch.setenv("PYTHONPATH", str(root))
    monkeypatch.chdir(root)
    assert codes(check(built(root))) == ["KP201"]


def test_a_module_of_kernelpress_itself_cannot_be_imported_by_accident(make_kernel):
    text = "import sys\nassert 'kernelpress' not in sys.modules\nimport variant\n"
    (finding,) = check(built(make_kernel(**{f"{PACKAGE}/twice.py": text})))
    assert "No module named 'variant'" in finding.message


def test_the_kernels_code_does_not_see_tokens(make_kernel, monkeypatch):
    leak = "import os\nassert not [key for key in os.environ if 'TOKEN' in key and key.startswith('HF')]\n"
    root = make_kernel(**{f"{PACKAGE}/ops/common.py": f"{leak}DEFAULT = 3.0\n"})
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert check(built(root)) == []


def test_a_dependency_that_is_not_installed_makes_a_warning(make_kernel):
    root = make_kernel()
    text = (
        (root / "build.toml")
        .read_text()
        .replace("edition = 5\n", 'edition = 5\npython-depends = ["tvm-ffi"]\n')
    )
    (root / "build.toml").write_text(text)
    (finding,) = check(built(root))
    assert (finding.code, finding.severity) == ("KP201", "warning")
    assert "tvm-ffi" in finding.message


def test_a_missing_dependency_of_one_backend_is_the_same_warning_in_every_variant(make_kernel):
    root = make_kernel(**{f"{PACKAGE}/twice.py": "import cutlass\n"})
    build_toml = (root / "build.toml").read_text()
    (root / "build.toml").write_text(f'{build_toml}[general.cuda]\npython-depends = ["nvidia-cutlass-dsl"]\n')
    findings = check(built(root, only=""))
    assert {finding.path.name for finding in findings} == {"torch-cpu", "torch-cuda", "torch-universal"}
    assert {(finding.code, finding.severity, finding.message) for finding in findings} == {
        ("KP201", "warning", "not tried, because this machine lacks nvidia-cutlass-dsl")
    }


@pytest.mark.usefixtures("without_torch")
def test_an_environment_without_torch_is_said_once(make_kernel):
    directory = built(make_kernel(), only="")
    (directory / "torch-cpu" / "added.py").write_text("")
    environment, file = check(directory)
    assert (environment.code, environment.severity, environment.path) == ("KP201", "error", directory)
    assert "lacks torch" in environment.message
    assert "`pip install torch`" in environment.fix
    assert (file.code, "added.py" in file.message) == ("KP102", True), "what needs no torch is examined"


def test_an_environment_in_which_torch_cannot_be_imported_is_said_once(make_kernel, monkeypatch, tmp_path):
    directory = built(make_kernel(), only="")
    venv.create(tmp_path / "broken", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "broken").glob("lib/python*/site-packages")
    (packages / "torch.py").write_text("raise OSError('libcudart.so: cannot open')\n")
    (packages / "kernels.py").write_text("")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "broken" / "bin" / "python"))
    (finding,) = check(directory)
    assert (finding.code, finding.severity, finding.path) == ("KP201", "error", directory)
    assert "libcudart.so: cannot open" in finding.message


def test_a_package_without_all_is_found(make_kernel):
    assert codes(check(built(make_kernel(**{f"{PACKAGE}/__init__.py": "x = 1\n"})))) == ["KP202"]


def test_a_public_name_that_is_not_there_is_found(make_kernel):
    text = "from .twice import twice\n__all__ = ['twice', 'thrice']\n"
    (finding,) = check(built(make_kernel(**{f"{PACKAGE}/__init__.py": text})))
    assert finding.code == "KP202"
    assert "'thrice'" in finding.message


@pytest.mark.parametrize("text", ["[twice]", "'twice'", "{'twice'}"])
def test_a_list_of_public_names_that_is_none_is_found_where_it_stands(make_kernel, text):
    init = f"from .twice import twice\n__all__ = {text}\n"
    (finding,) = check(built(make_kernel(**{f"{PACKAGE}/__init__.py": init})))
    assert (finding.code, finding.path.name, finding.line) == ("KP202", "__init__.py", 2)
    assert "as strings" in finding.fix


def test_an_operator_outside_of_the_builds_namespace_is_found(make_kernel):
    hidden = 'import torch\nL = torch.library.Library("aten", "FRAGMENT")\nL.define("demo_extra(Tensor x) -> Tensor")\n'
    root = make_kernel(**{f"{PACKAGE}/ops/common.py": f"{hidden}DEFAULT = 3.0\n"})
    finding, beside = check(built(root))
    assert (finding.code, beside.code) == ("KP203", "KP206")
    assert "aten::demo_extra" in finding.message


def test_operators_that_torch_brings_along_are_not_blamed_on_the_kernel(make_kernel):
    root = make_kernel(**{f"{PACKAGE}/ops/common.py": "import torch._dynamo\nDEFAULT = 3.0\n"})
    assert check(built(root)) == []


def test_every_rule_that_examines_a_variant_is_explained():
    assert set(RULE_CHECKS) <= set(RULES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os\nos.environ['DEMO'] = '1'\n", "changes environment variable DEMO"),
        ("import torch\ntorch.set_default_dtype(torch.float64)\n", "changes torch's default dtype"),
        ("import torch\ntorch.backends.cuda.matmul.allow_tf32 = True\n", "changes TF32 in cuBLAS"),
        ("print('hello')\n", "prints 'hello'"),
        (
            "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError:\n    pass\n",
            "reaches for the network (socket.connect)",
        ),
    ],
)
def test_what_importing_does_to_the_caller_is_found(make_kernel, text, message):
    findings = check(built(make_kernel(**{f"{PACKAGE}/ops/common.py": f"{text}DEFAULT = 3.0\n"})))
    assert [(finding.code, finding.severity) for finding in findings if message in finding.message] == [
        ("KP205", "error")
    ]


def test_a_package_that_needs_triton_to_load_is_found(make_kernel):
    root = make_kernel(**{f"{PACKAGE}/ops/common.py": "import triton\nDEFAULT = 3.0\n"})
    (finding,) = check(built(root))
    assert (finding.code, finding.severity) == ("KP204", "warning")


def test_triton_imported_when_called_is_no_finding(make_kernel):
    lazy = "DEFAULT = 3.0\ndef f():\n    import triton\n"
    assert check(built(make_kernel(**{f"{PACKAGE}/ops/common.py": lazy}))) == []


def test_state_shared_with_another_build_is_found(make_kernel):
    shared = "import sys\nassert 'shared' not in sys.modules\nsys.modules['shared'] = sys\nDEFAULT = 3.0\n"
    (finding,) = check(built(make_kernel(**{f"{PACKAGE}/ops/common.py": shared})))
    assert finding.code == "KP206"
    assert "AssertionError" in finding.message


def test_an_operator_without_a_fake_implementation_is_found(make_kernel):
    text = (
        "import torch\n@torch.library.custom_op('demo_kernel::once', mutates_args=())\n"
        "def once(x: torch.Tensor) -> torch.Tensor:\n    return x.clone()\nDEFAULT = 3.0\n"
    )
    (finding,) = check(built(make_kernel(**{f"{PACKAGE}/ops/common.py": text})))
    assert (finding.code, finding.severity) == ("KP207", "warning")
    assert "'once'" in finding.message


def test_a_public_function_without_a_docstring_is_found(make_kernel):
    text = "def twice(x): return 2 * x\n"
    (finding,) = check(built(make_kernel(**{f"{PACKAGE}/twice.py": text})))
    assert (finding.code, finding.severity) == ("KP208", "warning")
    assert "twice" in finding.message


EFFECTS = {
    "import warnings; warnings.filterwarnings('ignore', 'demo')": "which warnings are shown (ignore Warning demo",
    "torch.manual_seed(0)": "changes torch's random numbers",
    "import random; random.seed(1)": "changes Python's random numbers",
    "import torch._dynamo; torch._dynamo.config.recompile_limit = 99": "changes torch._dynamo.config.recompile_limit",
    "import torch._inductor.config as c; c.max_autotune = True": "changes torch._inductor.config.max_autotune",
    "import sys; sys.setrecursionlimit(5000)": "changes Python's recursion limit",
    "print('told', file=sys.stderr)": "prints 'told' to the standard error stream",
    "import os; os.write(1, b'written')": "prints 'written'",
    "torch.nn.functional.silu = lambda x: x": "replaces torch.nn.functional.silu",
    "torch.Tensor.demo = 1": "adds torch.Tensor.demo",
    "torch.Tensor.__add__ = lambda a, b: a": "replaces torch.Tensor.__add__",
    "torch.set_printoptions(precision=2)": "changes how torch prints tensors",
    "torch.autograd.set_detect_anomaly(True)": "changes torch's detection of anomalies",
    "open('left', 'w').close()": "writes the file left",
    "os.makedirs('folder')": "does os.mkdir to the file folder",
    "import pathlib; pathlib.Path('moved').symlink_to('left')": "does os.symlink to the file",
    "import subprocess; subprocess.run([sys.executable, '-c', ''])": "starts another process (subprocess.Popen)",
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)": "changes the handlers of signals",
    "import socket; socket.setdefaulttimeout(3)": "changes the time-out of sockets",
}


def test_everything_that_importing_does_is_found_at_its_line(make_kernel):
    lines = ["import torch", *EFFECTS, "DEFAULT = 3.0"]
    findings = [
        finding
        for finding in check(built(make_kernel(**{f"{PACKAGE}/ops/common.py": "\n".join(lines)})))
        if finding.code == "KP205"
    ]
    missing = [
        effect for effect in EFFECTS.values() if not any(effect in finding.message for finding in findings)
    ]
    assert missing == []
    assert len(findings) == len(EFFECTS), [finding.message for finding in findings]
    for finding in findings:
        assert (finding.path.name, finding.line is None) == ("common.py", False), finding
        assert EFFECTS[lines[(finding.line or 0) - 1]] in finding.message


def test_functions_that_are_compiled_when_first_called_are_no_side_effect(make_kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    text = (
        "import torch\nfrom torch.nn.attention.flex_attention import flex_attention\n"
        "flex_attention = torch.compile(flex_attention)\nSQUARE = torch.compile(torch.nn.ReLU())\n"
        "@torch.compile(mode='max-autotune', dynamic=True)\ndef double(x):\n    return 2 * x\n"
        "@torch.compile(fullgraph=True, options={'triton.cudagraphs': True})\ndef triple(x):\n    return 3 * x\n"
        "@torch.compile(backend='eager')\ndef half(x):\n    return x / 2\n"
        "@torch.compiler.disable\ndef same(x):\n    return x\n"
        "DEFAULT = 3.0\n"
    )
    assert check(built(make_kernel(**{f"{PACKAGE}/ops/common.py": text}))) == []


def test_what_the_modules_do_that_a_kernel_imports_is_not_blamed_on_it(make_kernel):
    text = (
        "import os, tempfile, warnings\nimport torch._dynamo, torch._inductor.compile_fx, torch.onnx\n"
        "import torch.distributed.tensor, torch.utils.cpp_extension, transformers.activations\n"
        "warnings.warn('shown to whoever wants to see it')\nopen(os.devnull, 'w').close()\nopen(__file__).close()\n"
        "os.makedirs(os.path.join(os.environ['XDG_CACHE_HOME'], 'demo'), exist_ok=True)\nDEFAULT = 3.0\n"
    )
    findings = check(built(make_kernel(**{f"{PACKAGE}/ops/common.py": text})))
    assert [finding.message for finding in findings if finding.code == "KP205"] == []
