from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from kernelpress.builder.build import build
from kernelpress.errors import CheckError
from kernelpress.findings.format import render, summary
from kernelpress.findings.model import Finding
from kernelpress.findings.rules import RULES, explain, page
from kernelpress.lint.sources import optional_packages
from kernelpress.spec.load import load_spec
from sample_kernel import source_findings

PACKAGE = "torch-ext/demo_kernel"


def found_in(make_kernel, text: str) -> list[Finding]:
    return source_findings(make_kernel(**{f"{PACKAGE}/extra.py": text}))


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        ("import torch\nimport numpy\n", "KP303", 2),
        ("if True:\n    x = 1\nfrom peft.tuners import x\n", "KP303", 3),
        ("match 1:\n    case 1:\n        pass\ntry:\n    pass\nexcept* OSError:\n    pass\n", "KP301", 6),
        # Newer than the Python that runs this, perhaps.
        ("x = 1\ndef f[T](a: T) -> T: return a\n", "KP301", 2),
        ("y = t'{1}'\n", "KP301", 1),
        ('import torch\nns = "x".upper()\ntorch.library.define(f"{ns}::a", "()")\n', "KP304", 3),
        ("def f(n):\n    return n.name() == 'demo_kernel::twice'\n", "KP304", 2),
        ("def f(n):\n    return str(n) in ('a', 'demo_kernel.twice.default')\n", "KP304", 2),
        ("def f(n):\n    return n.startswith('demo_kernel::')\n", "KP304", 2),
        ("x = {\n    'demo_kernel::twice': 1}\n", "KP304", 2),
        ("import importlib\nimportlib.import_module(f'demo_kernel.{1}')\n", "KP305", 2),
        ("import importlib\ndef f(name):\n    return importlib.import_module(name)\n", "KP305", 3),
        ('import torch.library as t\nt.define("a::twice", "()")\n', "KP306", None),
        ("TOKEN = 'hf_" + "a" * 34 + "'\n", "KP104", 1),
        ("x = 1\nTOKEN = 'kp_" + "0a" * 20 + "'\n", "KP104", 2),
        ("x = 1\nKEY = '''-----BEGIN RSA PRIVATE KEY-----'''\n", "KP104", 2),
        ("PATH = '/home/me/tiles.json'\n", "KP105", 1),
        ("X = '" + "x" * 1_000_001 + "'\n", "KP106", None),
        ("from . import other\n", "KP307", None),
    ],
)  # fmt: skip
def test_a_breach_is_found_where_it_stands(make_kernel, text, code, line):
    other = {f"{PACKAGE}/other.py": "from . import extra\n"} if code == "KP307" else {}
    findings = source_findings(make_kernel(**{f"{PACKAGE}/extra.py": text}, **other))
    assert [finding.code for finding in findings] == [code]
    assert findings[0].severity in ("error", RULES[code].severity, "warning")
    if line is not None:
        assert (findings[0].path.name, findings[0].line) == ("extra.py", line)


@pytest.mark.parametrize(
    "text",
    [
        "import torch, triton, json\nfrom triton import language as tl\n",
        "def f():\n    import transformers\n",
        "try:\n    import peft\nexcept ImportError:\n    peft = None\n",
        "import contextlib\nwith contextlib.suppress(ImportError):\n    import peft\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy\n",
        "import importlib\nimportlib.import_module(f'{__name__}.x')\n",
        "TOKEN = 'hf_short'\nPATH = '/homework/x'\n",
        "def f():\n    from . import other\n",
        "def f(n):\n    return n == 'aten::mul' or n != 'demo_kernels::twice' or 'demo_kernel.twice' in n\n",
        "import torch\ndef f(n):\n    return torch._C._dispatch_has_kernel('demo_kernel::twice')\n",
        "NAME = 'demo_kernel::twice'\nprint('in', NAME, 'demo_kernel::twice')\n",
    ],
)
def test_what_is_allowed_is_no_finding(make_kernel, text):
    other = {f"{PACKAGE}/other.py": "from . import extra\n"}
    assert source_findings(make_kernel(**{f"{PACKAGE}/extra.py": text}, **other)) == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="an older Python refuses it by itself")
@pytest.mark.parametrize("text", ["d[*a]", "d[1, *a]", "d[1:2, *a]", "d[(a), *(a)]", "d[\n  *a, # why\n]"])
def test_a_star_in_a_subscript_is_newer_syntax(make_kernel, text):
    findings = found_in(make_kernel, f"a, d = (1,), {{}}\n\n\ndef f():\n    return {text}\n")
    assert [(finding.code, finding.path.name) for finding in findings] == [("KP301", "extra.py")]
    assert findings[0].line in (5, 6)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="an older Python refuses it by itself")
def test_newer_syntax_is_found_wherever_temporary_files_are_kept(make_kernel, tmp_path, monkeypatch):
    temporary = tmp_path / "build" / ".venv"
    temporary.mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text("[tool.ruff]\ntarget-version = 'py313'\nexclude = ['*']\n")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    findings = found_in(make_kernel, "# ruff: noqa\na, d = (1,), {}\nx = d[*a]  # noqa\n")
    assert [(finding.code, finding.line) for finding in findings] == [("KP301", 3)]
    assert "syntax was added in Python 3.11" in findings[0].message


@pytest.mark.skipif(sys.version_info < (3, 11), reason="an older Python refuses it by itself")
def test_a_star_in_an_annotation_is_newer_syntax(make_kernel):
    findings = found_in(make_kernel, "x = 1\n\n\ndef f(*args: *tuple[int]):\n    pass\n")
    assert [(finding.code, finding.line) for finding in findings] == [("KP301", 4)]


@pytest.mark.parametrize(
    "text",
    [
        'f"{d["a"]}"',
        "f'{\", \".join(d['a'])}'",
        "f\"{'\\n'.join(a)}\"",
        'f"{a  # why\n}"',
        'f"{d[\n0]}"',
        'f"{f"{a}"}"',
        "f'''{a} {'''b'''}'''",
    ],
)
def test_what_fstrings_may_hold_since_python_3_12_is_newer_syntax(make_kernel, text):
    findings = found_in(make_kernel, f"a, d = (1,), {{}}\nx = {text}\n")
    assert {finding.code for finding in findings} == {"KP301"}
    assert findings[0].line in (2, 3)


@pytest.mark.parametrize(
    "text",
    [
        "d[(*a,)]",
        "d[(1, *a)]",
        "d[((*a,))]",
        "d[f(*a), 1]",
        "d[a, [*a]]",
        'f"{d[\'a\']}\\n{a!r:>{a}}\\""',
        "f'''{d[\"a\"]}{d['a']}\n{\n a}'''",
        'f"{\'#\'}" f\'{"x"}\'  # "why"',
        "rf\"\\d{f'{a}'}\"",
    ],
)
def test_what_python_3_10_reads_is_no_newer_syntax(make_kernel, text):
    assert found_in(make_kernel, f"a, d, f = (1,), {{}}, print\nx = lambda: {text}\n") == []


def test_names_that_differ_in_case_alone_are_found(make_kernel):
    findings = source_findings(make_kernel(**{f"{PACKAGE}/A.py": "", f"{PACKAGE}/a.py": ""}))
    assert [finding.code for finding in findings] == ["KP107"]


def test_sources_that_cannot_be_read_are_a_finding_too(make_kernel):
    (finding,) = found_in(make_kernel, "def f(:\n")
    assert (finding.code, finding.line) == ("KP002", 1)


def test_optional_integrations_are_listed(make_kernel):
    text = "def f():\n    import transformers.utils\ntry:\n    import peft\nexcept ImportError:\n    pass\n"
    kernel = build(load_spec(make_kernel(**{f"{PACKAGE}/extra.py": text})))
    assert optional_packages(kernel.outside, kernel.spec) == ("peft", "transformers")


def test_a_declared_dependency_may_be_imported(make_kernel):
    root = make_kernel(**{f"{PACKAGE}/extra.py": "import einops\n"})
    assert [finding.code for finding in source_findings(root)] == ["KP303"]
    text = (root / "build.toml").read_text()
    (root / "build.toml").write_text(text.replace("edition = 5", 'edition = 5\npython-depends = ["einops"]'))
    assert source_findings(root) == []


def test_only_what_may_be_declared_is_advised_to_be(make_kernel):
    numpy, einops = found_in(make_kernel, "import numpy\nimport einops\n")
    assert "python-depends" not in numpy.fix
    assert einops.fix.endswith("or name its package in `python-depends`")


@pytest.mark.parametrize(
    ("imports", "codes"),
    [
        ("try:\n    from . import extra\nexcept ImportError:\n    extra = None\n", []),
        ("try:\n    from .extra import x\nexcept ImportError:\n    x = None\n", []),
        ("from . import extra\n", ["KP303"]),
        ("try:\n    from .extra import x\nexcept ImportError:\n    from . import extra\n", []),
        ("try:\n    from .extra import x\nexcept ImportError:\n    x = 1\nfrom . import extra\n", ["KP303"]),
        ("def f():\n    from . import extra\n", ["KP303"]),
    ],
)
def test_a_module_that_is_only_imported_where_that_may_fail_may_import_anything(make_kernel, imports, codes):
    files = {f"{PACKAGE}/extra.py": "import numpy\nx = 1\n", f"{PACKAGE}/other.py": imports}
    assert [finding.code for finding in source_findings(make_kernel(**files))] == codes


def test_the_arrows_of_a_circle_are_imports(make_kernel):
    files = {
        "a": "from . import d\nfrom . import b\n",
        "b": "from . import c\n",
        "c": "from . import a\n",
        "d": "from . import a\nfrom . import c\n",
    }
    (finding,) = source_findings(
        make_kernel(**{f"{PACKAGE}/{name}.py": text for name, text in files.items()})
    )
    assert finding.code == "KP307"
    route = [name.rpartition(".")[2] for name in finding.message.partition(": ")[2].split(" -> ")]
    assert route[0] == route[-1]
    assert all(f"import {target}" in files[module] for module, target in pairwise(route))


def test_a_circle_through_the_packages_own_init_is_no_finding(make_kernel):
    files = {"sub/__init__": "Y = 1\nfrom .a import X\n", "sub/a": "from . import Y\nX = Y\n"}
    assert (
        source_findings(make_kernel(**{f"{PACKAGE}/{name}.py": text for name, text in files.items()})) == []
    )


def test_every_rule_is_explained_and_a_near_miss_is_helped():
    for code, rule in RULES.items():
        assert explain(code.lower()) is rule
        assert rule.title
        assert len(rule.why) > 60
        assert rule.fix
    with pytest.raises(CheckError, match="KP301"):
        explain("KP3O1")


def test_findings_are_printed_by_file_as_json_and_as_annotations(make_kernel):
    findings = found_in(make_kernel, "import numpy\nimport scipy\n")
    text = render(findings, "text")
    assert text.count("[bold]") == 1
    assert "extra.py:2: KP303 scipy" in text
    assert [finding["line"] for finding in json.loads(render(findings, "json"))] == [1, 2]
    first = render(findings, "github").splitlines()[0]
    assert first.startswith("::error file=")
    assert ",line=1,title=KP303::numpy" in first
    assert summary(findings) == "2 errors"


def test_annotations_are_escaped():
    one = Finding("KP101", "error", Path("a,b:c"), None, "50%\nmore", "mend")
    assert render([one], "github") == "::error file=a%2Cb%3Ac,title=KP101::50%25%0Amore; mend"


def test_the_page_of_rules_is_todays():
    written = Path(__file__).parents[3] / "docs/publishing/rules.md"
    assert written.read_text("utf-8") == page() + "\n"
