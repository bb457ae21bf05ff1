from __future__ import annotations

import json
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from kernelpress.check.variants import RULE_CHECKS, check
from kernelpress.errors import CheckError
from kernelpress.findings.model import Finding
from kernelpress.findings.rules import RULES
from sample_kernel import BUILD_TOML, PACKAGE, make

TWICE, COMMON, INIT = (f"{PACKAGE}/{name}.py" for name in ("twice", "ops/common", "__init__"))


def codes(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings]


def test_a_good_build_has_no_findings_in_any_variant_and_stays_as_it_is(make_kernel):
    directory = make(make_kernel()).directory
    before = sorted(directory.rglob("*"))
    assert check(directory) == []
    assert sorted(directory.rglob("*")) == before


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_without_a_build_there_is_one_message(tmp_path, where):
    with pytest.raises(CheckError, match="there is no build here"):
        check(tmp_path / where)


def without_field(name: str, value: object = None) -> Callable[[Path], None]:
    """Take a field from a variant's metadata, or give it another value."""

    def spoil(directory: Path) -> None:
        fields = json.loads((directory / "metadata.json").read_bytes())
        del fields[name]
        (directory / "metadata.json").write_text(
            json.dumps(fields if value is None else {**fields, name: value})
        )

    return spoil


@pytest.mark.parametrize(
    (),
    [
        pytest.param(marks=pytest.mark.kernel({}, spoil=spoil))
        for spoil in (
            without_field("backend", {"type": "universal"}),
            without_field("id"),
            without_field("python-depends"),
            lambda directory: (directory / "metadata.json").unlink(),
        )
    ],
    ids=["backend", "id", "python-depends", "missing"],
)
def test_metadata_that_the_loader_refuses_or_that_is_missing_is_found(checked):
    (finding,) = checked.findings
    assert (finding.code, finding.path) == ("KP101", checked.directory / "metadata.json")


def change_remove_and_add(directory: Path) -> None:
    (directory / "ops" / "common.py").write_text("DEFAULT = 4.0\n")
    (directory / "_ops.py").unlink()
    (directory / "added.py").write_text("")


@pytest.mark.kernel({}, spoil=change_remove_and_add)
def test_a_changed_a_missing_and_an_added_file_are_found(findings):
    assert codes(findings) == ["KP102"] * 3
    messages = " ".join(finding.message for finding in findings)
    assert all(name in messages for name in ("ops/common.py", "_ops.py", "added.py"))


def add_what_must_not_ship(directory: Path) -> None:
    (directory / "__pycache__").mkdir()
    (directory / "__pycache__" / "twice.cpython-311.pyc").write_bytes(b"")
    (directory / ".hidden").write_text("")
    (directory / "link.py").symlink_to("twice.py")


@pytest.mark.kernel({}, spoil=add_what_must_not_ship)
def test_bytecode_links_and_hidden_files_are_found(checked):
    findings = [finding for finding in checked.findings if finding.code == "KP103"]
    assert {finding.path for finding in findings} == {
        checked.directory / name
        for name in ("__pycache__", "__pycache__/twice.cpython-311.pyc", ".hidden", "link.py")
    }


@pytest.mark.parametrize(
    ("message", "line"),
    [
        pytest.param(message, line, marks=pytest.mark.kernel({TWICE: text}))
        for text, message, line in (
            ("import torch\nimport module_of_the_project\n", "No module named 'module_of_the_project'", 2),
            ("x = 1\nraise RuntimeError('on import')\n", "RuntimeError: on import", 2),
            ("import sys\nsys.exit(3)\n", "SystemExit: 3", 2),
            ("import os\nos._exit(4)\n", "ended with status 4", None),
        )
    ],
)
def test_a_variant_that_does_not_load_is_found_with_the_line(checked, message, line):
    (finding,) = checked.findings
    assert (finding.code, finding.severity, finding.line) == ("KP201", "error", line)
    assert message in finding.message
    if line is not None:
        assert finding.path.is_absolute()
        assert finding.path.parts[-2:] == (checked.directory.name, "twice.py")


# Beside the build, where the check runs, and on its PYTHONPATH.
@pytest.mark.kernel({TWICE: "import helper\n", "../helper.py": ""})
def test_a_module_of_the_project_cannot_be_imported_by_accident(findings):
    assert codes(findings) == ["KP201"]


@pytest.mark.kernel({TWICE: "import sys\nassert 'kernelpress' not in sys.modules\nimport variant\n"})
def test_a_module_of_kernelpress_itself_cannot_be_imported_by_accident(findings):
    (finding,) = findings
    assert "No module named 'variant'" in finding.message


@pytest.mark.kernel(
    {"build.toml": BUILD_TOML.replace("edition = 5\n", 'edition = 5\npython-depends = ["tvm-ffi"]\n')}
)
def test_a_dependency_that_is_not_installed_makes_a_warning(findings):
    (finding,) = findings
    assert (finding.code, finding.severity) == ("KP201", "warning")
    assert "tvm-ffi" in finding.message


def test_a_missing_dependency_of_one_backend_is_the_same_warning_in_every_variant(make_kernel):
    depends = f'{BUILD_TOML}[general.cuda]\npython-depends = ["nvidia-cutlass-dsl"]\n'
    root = make_kernel(**{TWICE: "import cutlass\n", "build.toml": depends})
    findings = check(make(root).directory)
    assert {finding.path.name for finding in findings} == {"torch-cpu", "torch-cuda", "torch-universal"}
    assert {(finding.code, finding.severity, finding.message) for finding in findings} == {
        ("KP201", "warning", "not tried, because this machine lacks nvidia-cutlass-dsl")
    }


@pytest.mark.usefixtures("without_torch")
def test_an_environment_without_torch_is_said_once(make_kernel):
    directory = make(make_kernel()).directory
    (directory / "torch-cpu" / "added.py").write_text("")
    environment, file = check(directory)
    assert (environment.code, environment.severity, environment.path) == ("KP201", "error", directory)
    assert "lacks torch" in environment.message
    assert "`pip install torch`" in environment.fix
    assert (file.code, "added.py" in file.message) == ("KP102", True), "what needs no torch is examined"


def test_an_environment_in_which_torch_cannot_be_imported_is_said_once(make_kernel, monkeypatch, tmp_path):
    directory = make(make_kernel()).directory
    venv.create(tmp_path / "broken", with_pip=False, symlinks=True)
    (packages,) = (tmp_path / "broken").glob("lib/python*/site-packages")
    (packages / "torch.py").write_text("raise OSError('libcudart.so: cannot open')\n")
    (packages / "kernels.py").write_text("")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "broken" / "bin" / "python"))
    (finding,) = check(directory)
    assert (finding.code, finding.severity, finding.path) == ("KP201", "error", directory)
    assert "libcudart.so: cannot open" in finding.message


@pytest.mark.kernel({INIT: "x = 1\n"})
def test_a_package_without_all_is_found(findings):
    assert codes(findings) == ["KP202"]


@pytest.mark.kernel({INIT: "from .twice import twice\n__all__ = ['twice', 'thrice']\n"})
def test_a_public_name_that_is_not_there_is_found(findings):
    (finding,) = findings
    assert finding.code == "KP202"
    assert "'thrice'" in finding.message


@pytest.mark.parametrize(
    (),
    [
        pytest.param(
            marks=pytest.mark.kernel({INIT: f"from .twice import twice\n__all__ = {text}\n"}), id=text
        )
        for text in ("[twice]", "'twice'", "{'twice'}")
    ],
)
def test_a_list_of_public_names_that_is_none_is_found_where_it_stands(findings):
    (finding,) = findings
    assert (finding.code, finding.path.name, finding.line) == ("KP202", "__init__.py", 2)
    assert "as strings" in finding.fix


HIDDEN = 'import torch\nL = torch.library.Library("aten", "FRAGMENT")\nL.define("demo_extra(Tensor x) -> Tensor")\n'


@pytest.mark.kernel({COMMON: f"{HIDDEN}DEFAULT = 3.0\n"})
def test_an_operator_outside_of_the_builds_namespace_is_found(findings):
    finding, beside = findings
    assert (finding.code, beside.code) == ("KP203", "KP206")
    assert "aten::demo_extra" in finding.message


@pytest.mark.kernel({COMMON: "import torch._dynamo\nDEFAULT = 3.0\n"})
def test_operators_that_torch_brings_along_are_not_blamed_on_the_kernel(findings):
    assert findings == []


def test_every_rule_that_examines_a_variant_is_explained():
    assert set(RULE_CHECKS) <= set(RULES)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(message, marks=pytest.mark.kernel({COMMON: f"{text}DEFAULT = 3.0\n"}))
        for text, message in (
            ("import os\nos.environ['DEMO'] = '1'\n", "changes environment variable DEMO"),
            ("import torch\ntorch.set_default_dtype(torch.float64)\n", "changes torch's default dtype"),
            ("import torch\ntorch.backends.cuda.matmul.allow_tf32 = True\n", "changes TF32 in cuBLAS"),
            ("print('hello')\n", "prints 'hello'"),
            (
                "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 9), 1)\nexcept OSError:\n    pass\n",
                "reaches for the network (socket.connect)",
            ),
        )
    ],
)
def test_what_importing_does_to_the_caller_is_found(findings, message):
    assert [(finding.code, finding.severity) for finding in findings if message in finding.message] == [
        ("KP205", "error")
    ]


@pytest.mark.kernel({COMMON: "import triton\nDEFAULT = 3.0\n"})
def test_a_package_that_needs_triton_to_load_is_found(findings):
    (finding,) = findings
    assert (finding.code, finding.severity) == ("KP204", "warning")


@pytest.mark.kernel({COMMON: "DEFAULT = 3.0\ndef f():\n    import triton\n"})
def test_triton_imported_when_called_is_no_finding(findings):
    assert findings == []


@pytest.mark.kernel(
    {COMMON: "import sys\nassert 'shared' not in sys.modules\nsys.modules['shared'] = sys\nDEFAULT = 3.0\n"}
)
def test_state_shared_with_another_build_is_found(findings):
    (finding,) = findings
    assert finding.code == "KP206"
    assert "AssertionError" in finding.message


@pytest.mark.kernel(
    {
        COMMON: "import torch\n@torch.library.custom_op('demo_kernel::once', mutates_args=())\n"
        "def once(x: torch.Tensor) -> torch.Tensor:\n    return x.clone()\nDEFAULT = 3.0\n"
    }
)
def test_an_operator_without_a_fake_implementation_is_found(findings):
    (finding,) = findings
    assert (finding.code, finding.severity) == ("KP207", "warning")
    assert "'once'" in finding.message


@pytest.mark.kernel({TWICE: "def twice(x): return 2 * x\n"})
def test_a_public_function_without_a_docstring_is_found(findings):
    (finding,) = findings
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


EFFECT_LINES = ["import torch", *EFFECTS, "DEFAULT = 3.0"]


@pytest.mark.kernel({COMMON: "\n".join(EFFECT_LINES)})
def test_everything_that_importing_does_is_found_at_its_line(checked):
    findings = [finding for finding in checked.findings if finding.code == "KP205"]
    missing = [
        effect for effect in EFFECTS.values() if not any(effect in finding.message for finding in findings)
    ]
    assert missing == []
    assert len(findings) == len(EFFECTS), [finding.message for finding in findings]
    for finding in findings:
        assert (finding.path.name, finding.line is None) == ("common.py", False), finding
        assert EFFECTS[EFFECT_LINES[(finding.line or 0) - 1]] in finding.message


@pytest.mark.kernel(
    {
        COMMON: "import torch\nfrom torch.nn.attention.flex_attention import flex_attention\n"
        "flex_attention = torch.compile(flex_attention)\nSQUARE = torch.compile(torch.nn.ReLU())\n"
        "@torch.compile(mode='max-autotune', dynamic=True)\ndef double(x):\n    return 2 * x\n"
        "@torch.compile(fullgraph=True, options={'triton.cudagraphs': True})\ndef triple(x):\n    return 3 * x\n"
        "@torch.compile(backend='eager')\ndef half(x):\n    return x / 2\n"
        "@torch.compiler.disable\ndef same(x):\n    return x\n"
        "DEFAULT = 3.0\n"
    }
)
def test_functions_that_are_compiled_when_first_called_are_no_side_effect(findings):
    assert findings == []


@pytest.mark.kernel(
    {
        COMMON: "import os, tempfile, warnings\nimport torch._dynamo, torch._inductor.compile_fx, torch.onnx\n"
        "import torch.distributed.tensor, torch.utils.cpp_extension, transformers.activations\n"
        "warnings.warn('shown to whoever wants to see it')\nopen(os.devnull, 'w').close()\nopen(__file__).close()\n"
        "os.makedirs(os.path.join(os.environ['XDG_CACHE_HOME'], 'demo'), exist_ok=True)\nDEFAULT = 3.0\n"
    }
)
def test_what_the_modules_do_that_a_kernel_imports_is_not_blamed_on_it(findings):
    assert [finding.message for finding in findings if finding.code == "KP205"] == []
