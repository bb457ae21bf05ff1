from __future__ import annotations

import importlib
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kernelpress.rewrite.rewrite import rewrite
from kernelpress.source.module_map import ModuleMap
from kernelpress.source.vendor import vendor
from kernelpress.syntax.source_file import SourceFile

# A project `{top}` with the package `{top}.nn.fast`; each form leaves one value in OUT.
FORMS = (
    "from {top}.nn.fast.core import X as got",
    "from {top}.nn.fast import core as mod; got = mod.X",
    "import {top}.nn.fast.core as mod; got = mod.X",
    "import {top}.nn.fast.core, os; got = {top}.nn.fast.core.X",
    "import os as o, {top}.nn.fast.core; got = {top}.nn.fast.core.X + o.sep",
    "import {top}.nn.fast as whole; got = whole.MARK",
    "from {top}.nn import fast as whole; got = whole.MARK",
    "from {top}.nn import fast; got = fast.MARK",
    "from .. import deep; got = deep.MARK",
    "from ..core import (\n    X,  # kept\n    Y as got,\n)",
    "from {top}.nn.fast.core import (X,\n    Y as got)",
    "from {top}.nn.fast \\\n    .core import X as got",
    "from {top}.tools.shape import WIDE as got",
    "from ....tools.shape import WIDE as got",
    "from {top}.tools import shape; got = shape.WIDE",
    "import {top}.tools.shape; got = {top}.tools.shape.up.HIGH",
    "import {top}.tools.shape as sh; got = sh.up.HIGH",
    "import importlib; got = importlib.import_module('{top}.nn.fast.core').X",
    "from importlib import import_module as im; got = im('{top}.tools.shape').WIDE",
    "import {top}.nn.fast.later as mod; got = mod.MARK",
    "import {top}.tools.shape, {top}.nn.fast.later as mod; got = mod.MARK",
    "import importlib; got = importlib.import_module(name='{top}.nn.fast.core').X",
    "import importlib; got = importlib.import_module('.core', '{top}.nn.fast').X",
    "import importlib; got = importlib.import_module('.core', package='{top}.nn.fast').X",
    "import sys, {top}.nn.fast.core; got = sys.modules['{top}.nn.fast.core'].X",
    "import sys, {top}.nn.fast.core; M = '{top}.nn.fast.core'; got = sys.modules[M].X + sys.modules.get(M).X",
    "import sys as s, {top}.nn.fast.core; got = s.modules.get('{top}.nn.fast.core').X",
    "from sys import modules; got = ('{top}.nn.fast' in modules, not '{top}.nn.fast' in modules)",
    "from importlib import resources; got = resources.files('{top}.nn.fast').joinpath('core.py').is_file()",
    "import importlib.resources as r; got = r.files('{top}.tools').joinpath('up.py').is_file()",
    "from importlib.util import find_spec; got = find_spec('{top}.nn.fast.core').origin[-7:]",
    "import pkgutil; got = pkgutil.get_data('{top}.nn.fast', 'core.py')",
    "import importlib as i; got = i.import_module(\n    '{top}.nn.fast'\n).MARK",
    "é = 'ü'; import {top}.nn.fast.core as ñ, os; got = ñ.X + é",
    "é = 'ü'; from {top}.nn.fast . core import (X as ñ,  # \u2028 ö\n    Y); got = é + ñ + Y",
    "from\t{top}.nn.fast.core\\\n\timport X; got = X; import {top}.tools.up as u; got += u.HIGH",
    "from ..core import X, Y; from {top}.nn.fast import (core as c,); got = [each.X for each in (c,)][0] + X",
    "import {top}.nn.fast.core as \\\n    m, \\\n    os; got = m.Y",
    "import importlib; im = importlib.import_module; M = '{top}.tools.up'; got = im(M).HIGH",
    "import importlib as i\nif OUT: M = '{top}.nn'\nelse: M = '{top}.tools'\ngot = i.import_module(M).__file__[-3:]",
    "import importlib\nmatch OUT:\n    case _: got = importlib.import_module(name=('{top}.nn'\n '.fast.core')).X",
    "import sys, {top}.tools.up; got = '{top}.tools.up' in sys.modules and '{top}.nn.fast' not in sys.modules or 1",
    "import {top}.tools as t, importlib; got = (importlib.import_module('{top}.tools.up') if t else None).HIGH",
    "import {top}.nn.fast.core as core; got = core.X",
    "import {top}.nn.fast.later as later; got = later.MARK",
    "import {top}.nn.fast.deep.leaf as leaf, {top}.nn.fast.core as core; got = leaf.MARK + core.X",
    "import {top}.tools.up as tools, {top}.nn.fast.deep as deep; got = tools.HIGH + deep.MARK",
)
# Modules of the package that hold the forms.
PLACES = ("deep/case.py", "deep/__init__.py", "__init__.py")
WRAPS = (
    "{form}\n",
    "def f():\n    {inner}\n    return got\ngot = f()\n",
    "try:\n    {inner}\nexcept ImportError:\n    got = 'not there'\n",
    "if True:\n    {inner}\n",
    "class C:\n    {inner}\n    kept = got\ngot = C.kept\n",
    "async def f():\n    {inner}\n    return got\nimport asyncio; got = asyncio.run(f())\n",
    "with __import__('contextlib').nullcontext():\n    {inner}\nran = 1\n",
    "import {top}.nn.fast.core as core, {top}.nn.fast.deep.leaf as leaf\n"
    "def f():\n    {inner}\n    return got, core.X, leaf.MARK\ngot = f()\n",
    "def f():\n    global core, leaf, later\n    {inner}\n    return got\ngot = f()\n",
)
HEADS = st.sampled_from(
    ("", "\ufeff", "# coding: utf-8\n", "\x0c\n# ä\n", '"""ü"""; from __future__ import annotations\n')
)


def project(top: str, module: str, place: str) -> dict[str, str]:
    """The files of a project, one of which goes on with the text of ``module``."""
    files = {
        f"{top}/__init__.py": "",
        f"{top}/nn/__init__.py": "",
        f"{top}/nn/fast/__init__.py": "MARK = 'fast'\nlater = None\n",
        f"{top}/nn/fast/later.py": "MARK = 'later'\n",
        f"{top}/nn/fast/core.py": "X, Y = 'x', 'y'\n",
        f"{top}/nn/fast/deep/__init__.py": "MARK = 'deep'\n",
        f"{top}/nn/fast/deep/leaf.py": "MARK = 'leaf'\n",
        f"{top}/nn/fast/deep/case.py": "",
        f"{top}/tools/__init__.py": "",
        f"{top}/tools/shape.py": f"from {top}.tools import up\nWIDE = 'wide'\n",
        f"{top}/tools/up.py": "HIGH = 'high'\n",
    }
    before = files[f"{top}/nn/fast/{place}"].splitlines()
    # Names that the other forms bind or read are there first, on the line behind the docstring and the imports.
    return files | {f"{top}/nn/fast/{place}": module.replace("OUT = []", "; ".join(["OUT = []", *before]))}


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


@settings(
    deadline=None,
    max_examples=40,
    # Shrinking takes minutes, and a failure names its form.
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    pieces=st.lists(st.tuples(st.sampled_from(FORMS), st.sampled_from(WRAPS)), min_size=1, max_size=5),
    head=HEADS,
    newline=st.sampled_from(("\n", "\r\n", "\r")),
    place=st.sampled_from(PLACES),
)
def test_a_module_imports_the_same_in_place_and_in_the_kernel(
    tmp_path, monkeypatch, pieces, head, newline, place
):
    if place == "__init__.py":
        # Nothing is above it, and it is no attribute of the package around it before it is done with loading.
        pieces = [
            (form, wrap) for form, wrap in pieces if "from .." not in form and "got = {top}." not in form
        ]
    # Names that are new to this process, but the same when hypothesis comes back to an example.
    number = zlib.crc32(repr((pieces, head, newline, place)).encode())
    dotted = {"deep/case.py": ".deep.case", "deep/__init__.py": ".deep", "__init__.py": ""}[place]
    top, kernel, root = f"proj{number}", f"_kernel{number}", tmp_path / f"{number}"
    module = f"{head}OUT = []\n"
    for form, wrap in pieces:
        inner = form.replace("\n", "\n    ")
        module += (
            wrap.replace("{form}", form).replace("{inner}", inner).replace("{top}", top) + "OUT.append(got)\n"
        )
    module = module.replace("\n", newline)
    write(root / "place", {name: text.encode() for name, text in project(top, module, place).items()})
    package = root / "place" / top / "nn" / "fast"
    own = [
        SourceFile(path.relative_to(package).as_posix(), path.read_bytes(), path)
        for path in sorted(package.rglob("*.py"))
    ]
    module_map, vendored = vendor([f"{top}/tools/shape.py"], f"{top}.nn.fast", (root / "place",), own)
    result = rewrite([*own, *vendored], module_map, package)
    assert result.findings == ()
    write(root / "kernel" / kernel, {file.path: file.render("NEW") for file in result.files})
    after = {file.path: file.render("NEW").decode() for file in result.files}[place]
    assert after.count(newline) == module.count(newline)
    monkeypatch.syspath_prepend(str(root / "place"))
    in_place = importlib.import_module(f"{top}.nn.fast{dotted}").OUT
    sys.path.remove(str(root / "place"))
    forget(top)
    monkeypatch.syspath_prepend(str(root / "kernel"))
    in_kernel = importlib.import_module(f"{kernel}{dotted}").OUT
    forget(kernel)
    assert in_kernel == in_place
    assert not [name for name in sys.modules if name.partition(".")[0] == top]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("import p.other\n", 1),
        ("\nfrom p import other\n", 2),
        ("from p.q.deep import nothing\nfrom p.other import *\n", 2),
        ("from ..other import x\n", 1),
        ("def f():\n    import p.other as o\n", 2),
        ("import importlib\nimportlib.import_module('p.other')\n", 2),
        ("from ... import x\n", 1),
        ("import sys\nsys.modules['p.other']\n", 2),
        ("import importlib.resources as r\nx = r.files('p.other')\n", 2),
        ("import importlib\nimportlib.import_module(name='p.other')\n", 2),
    ],
)
def test_a_module_of_the_project_that_does_not_ship_is_found(text, line):
    findings = rewrite([SourceFile("a.py", text.encode())], ModuleMap("p.q"), Path("q")).findings
    assert [(finding.code, finding.line) for finding in findings] == [("KP302", line)]


@pytest.mark.parametrize(
    "text",
    [
        "import sys\nx = f'{sys.modules[\"p.q\"]}'\n",
        "import importlib.resources as r\nr.files('p.' + x)\n",
        "P = 'p.q' if x else 'p'\nimport sys; import importlib as i; i.import_module('p.' + P)\n",
        "import importlib\nimportlib.import_module('.x', 'p.' f'{q}')\n",
        "import importlib\nimportlib.import_module('p.q.a', None)\n",
        "import sys; M = 'p.q'\nsys.modules[M]\ndef f():\n    global M; M = x\n",
        "import sys; M = 'p.q.a'\nsys.modules[M]\nM = 'p.' + x\n",
        "import importlib; M = 'p.q.a' if x else 'm'\nimportlib.import_module(M)\n",
        "import importlib\nimportlib.import_module(M := 'p.q.a')\n",
        "import importlib; M = None or 'p.q.a'\nimportlib.import_module(M)\n",
        "import sys; M = 'm'\nsys.modules[M if M else 'p.q']\n",
    ],
)
def test_a_module_named_in_a_way_that_cannot_be_followed_is_refused(text):
    findings = rewrite([SourceFile("a.py", text.encode())], ModuleMap("p.q"), Path("q")).findings
    assert [(finding.code, finding.severity, finding.line) for finding in findings] == [("KP305", "error", 2)]


@pytest.mark.parametrize(
    "text",
    [
        "import importlib\nim = importlib.import_module if x else None; im('p.q.a')\n",
        "import functools, importlib\nim = functools.partial(importlib.import_module); im('p.q.a')\n",
        "import importlib\n(A, B), im = ('p.q.a', 1), importlib.import_module; im(A)\n",
        "from importlib import import_module\nlist(map(import_module, ['p.q.a']))\n",
    ],
)
def test_a_function_that_imports_and_is_passed_on_is_a_warning_with_its_line(text):
    findings = rewrite([SourceFile("a.py", text.encode())], ModuleMap("p.q"), Path("q")).findings
    assert [(finding.code, finding.severity, finding.line) for finding in findings] == [
        ("KP305", "warning", 2)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.other import x\n",
        "try:\n    import p.other\nexcept ImportError:\n    pass\n",
        "import importlib\nimportlib.import_module('pother')\n",
        "s = 'import p.other'  # from p.other import x\n",
        "import sys\nsys.modules['torch'], sys.path['p.other'], x.modules['p.other'], 'p.other' in sys.path\n",
        "import importlib.util\nimportlib.util.find_spec('peft')\n",
        "from importlib import resources\nresources.files(__package__), resources.files(f'{__name__}.x')\n",
    ],
)
def test_what_is_never_imported_or_done_without_needs_not_ship(text):
    result = rewrite([SourceFile("a.py", text.encode())], ModuleMap("p.q"), Path("q"))
    assert result.findings == ()
    assert result.files[0].chunks == (text.encode(),)
