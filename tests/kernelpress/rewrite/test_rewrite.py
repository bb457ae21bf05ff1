"""Namespaces in one file: registrations and uses in every form, and what only looks alike."""

from __future__ import annotations

import pytest
from kernelpress.errors import SourceError
from kernelpress.rewrite.rewrite import rewrite
from kernelpress.syntax.source_file import SourceFile
from rewriting import DEFINES, HERE, rewrite_or_raise, rewritten


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('import torch\ntorch.library.custom_op("demo::one", f)', '"NEW::one"'),
        ('import torch.library\ntorch.library.triton_op("demo::one", f)', '"NEW::one"'),
        ('from torch.library import custom_op as co\n@co("demo::one")\ndef f(): ...', '@co("NEW::one")'),
        ("from torch import library as lib\nlib.define('demo::one', '() -> ()')", "lib.define('NEW::one'"),
        ('import torch.library as tl\ntl.define(qualname="demo::one", schema="")', 'qualname="NEW::one"'),
        ('import torch as t\nt.library.custom_op(("demo::one"), f)', '(("NEW::one"), f)'),
        ('import torch\ntorch.library.custom_op(r"""demo::one""", f)', 'r"""NEW::one"""'),
        ('import torch\ntorch.library.custom_op("demo::" "one", f)', '"NEW::" "one"'),
        ('import torch\ntorch.library.custom_op("demo::" + name, f)', '"NEW::" + name'),
        ('import torch\ntorch.library.custom_op(f"demo::{name}", f)', 'f"NEW::{name}"'),
        ('import torch\ntorch.library.custom_op("demo::{}".format(name), f)', '"NEW::{}".format'),
        ('import torch\nOP = "demo::one"\ntorch.library.custom_op(OP, f)', 'OP = "NEW::one"'),
        ('from torch.library import Library\nlib = Library("demo", "DEF")', 'Library("NEW", "DEF")'),
        ('import torch\nNS = "demo"\ntorch.library.custom_op(f"{NS}::one", f)', 'NS = "NEW"'),
        ('import torch\nNS = "demo"\ntorch.library.custom_op(NS + "::one", f)', 'NS = "NEW"'),
        ('import torch\nNS = "demo"\ntorch.library.custom_op("%s::%s" % (NS, name), f)', 'NS = "NEW"'),
        ('import torch\nNS = "demo"\ntorch.library.custom_op("{}::one".format(NS), f)', 'NS = "NEW"'),
        ('import torch\nNS = "demo"\ntorch.library.custom_op("{0}::{n}".format(NS, n=1), f)', 'NS = "NEW"'),
        ('import torch\nNS = "demo"\nP = NS + "::"\ntorch.library.custom_op(P + name, f)', 'NS = "NEW"'),
        ('import torch\nP = "demo" "::"\nQ = f"{P}{name}"\ntorch.library.custom_op(Q, f)', 'P = "NEW" "::"'),
        ('import torch\nNS: str = "demo"\nL = torch.library.Library(NS, "FRAGMENT")', 'NS: str = "NEW"'),
    ],
)
def test_a_registration_gets_the_new_namespace_in_every_form(before, after):
    assert after in rewritten(before)


@pytest.mark.parametrize(
    "function",
    [
        "co = torch.library.custom_op",
        "a = b = torch.library.custom_op; co = b",
        "co = getattr(torch.library, 'custom_op', None)",
        "co = getattr(getattr(torch, 'library', None), 'custom_op', None)\nassert co is not None",
        "if torch:\n    co = torch.library.custom_op\nelse:\n    co = None",
        "from torch._library.custom_ops import custom_op as co",
        "from torch._library.triton import triton_op as co",
        "from torch import *; co = torch.library.custom_op",
        "ö = torch.library.custom_op; co = ö",
    ],
)
def test_a_function_that_registers_is_known_by_whatever_name_it_is_given(function):
    head = "from somewhere import *\n" if "*;" in function else "import torch, functools\n"
    assert 'co("NEW::one", f)' in rewritten(f'{head}{function}\nco("demo::one", f)\n')


@pytest.mark.parametrize(
    "call",
    [
        'L = torch.library.Library("demo", "FRAGMENT"); K = L; K.impl("demo::one", f)',
        'from torch.library import Library as Lib; L = Lib("demo", "FRAGMENT"); L.impl("demo::one", f)',
        'torch.library.Library("demo", "FRAGMENT").impl("demo::one", f)',
        'L = torch.library.Library("demo", "FRAGMENT"); m = L.impl; m("demo::one", f)',
        'L = (torch.library\n  .Library("demo", "DEF")); L.impl("demo::one", f)',
        'L = torch.library.Library("demo", "DEF"); L.impl(op_name="demo::one", fn=f)',
        'L = torch.library.Library("demo", "DEF"); L.define(schema="demo::one() -> ()")',
        'L = torch.library.Library("demo", "DEF"); torch.library.impl(L, "demo::one", "CPU")',
        'torch.library.define(schema="(Tensor x) -> Tensor", qualname="demo::one")',
    ],
)
def test_a_library_and_a_function_of_pytorch_are_known_in_every_form(call):
    assert "demo" not in rewritten(f"{DEFINES}import torch, functools\n{call}\n")


def test_one_string_for_a_namespace_and_for_a_module_is_refused_with_its_line():
    text = "import importlib, torch\nPKG = 'demo'\ntorch.library.Library(PKG, 'DEF')\nimportlib.import_module(PKG)\n"
    with pytest.raises(SourceError, match="namespace of operators here") as caught:
        rewritten(text)
    assert (caught.value.path, caught.value.line) == (HERE / "__init__.py", 2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("torch.ops.demo.one(x)", "torch.ops.NEW.one(x)"),
        ("t = torch.ops.demo.one.default", "t = torch.ops.NEW.one.default"),
        ("torch . ops . demo . one", "torch . ops . NEW . one"),
        ('getattr(torch.ops, "demo").one', 'getattr(torch.ops, "NEW").one'),
        ('hasattr(torch.ops, "demo")', 'hasattr(torch.ops, "NEW")'),
        ("from torch import ops as o\no.demo.one", "o.NEW.one"),
        ("import torch as t\nt.ops.demo", "t.ops.NEW"),
        ('@torch.library.register_fake("demo::one")\ndef f(x): ...', '("NEW::one")'),
        ('torch.library.register_autograd("demo::one", b)', '("NEW::one", b)'),
        ('torch.library.register_kernel("demo::one", "cpu", f)', '("NEW::one", "cpu"'),
        ('torch.library.register_autocast("demo::one", "cuda", torch.half)', '("NEW::one", "cuda"'),
        ('torch.library.impl("demo::one", "CPU", f)', '("NEW::one", "CPU"'),
        ('torch.library.opcheck("demo::one", ())', '("NEW::one", ())'),
        ('L = torch.library.Library("demo", "IMPL")\nL.impl("demo::one", f)', 'L.impl("NEW::one", f)'),
        ('torch._C._dispatch_has_kernel("demo::one")', '("NEW::one")'),
        ("def f():\n    import torch as tt\n    return tt.ops.demo.one", "tt.ops.NEW.one"),
        ("ops = torch.ops\nops.demo.one(x)", "ops.NEW.one(x)"),
        ("ops: object = torch.ops\ndef f(): return ops.demo.one(x)", "ops.NEW.one(x)"),
        ("a = b = torch.ops\nb.demo.one(x)", "b.NEW.one(x)"),
        ("def f():\n    a = b = torch.ops\n    return b.demo.one(x)", "b.NEW.one(x)"),
        ("def f():\n    o = torch.ops\n    return lambda: o.demo.one(x)", "o.NEW.one(x)"),
        (
            "one = torch.ops\nclass C:\n    def f(self):\n        two = one\n        return two.demo.one(x)",
            "two.NEW.one(x)",
        ),
        ("torch._ops.ops.demo.one", "ops.NEW.one"),
        ('getattr(torch, "ops").demo.one', '"ops").NEW.one'),
        (
            'def f():\n    name = "demo::one"\n    torch.library.register_autograd(name, b)',
            'name = "NEW::one"',
        ),
        (
            'def f():\n    NAME: str = "demo::one"\n    return torch.library.opcheck(NAME, ())',
            'str = "NEW::one"',
        ),
        ('class C:\n    N = "demo::one"\n    torch.library.register_fake(N)(b)', 'N = "NEW::one"'),
        ('A = "demo::one"\nB = A\ntorch.library.register_fake(B)(b)', 'A = "NEW::one"'),
        (
            'L = torch.library.Library("demo", "IMPL")\ntorch.library.impl(L, "demo::one", "CPU")',
            '(L, "NEW::one", "CPU")',
        ),
    ],
)
def test_a_use_gets_the_new_namespace_in_every_form(before, after):
    output = rewritten(f"{DEFINES}import torch\n{before}\n")
    assert after in output
    assert "demo" not in output


@pytest.mark.parametrize(
    "text",
    [
        '"""demo::one and torch.ops.demo.one"""',
        "# demo::one, torch.ops.demo.one, custom_op('demo::one')",
        'print("demo::one")',
        'x = {"demo::one": "demo"}',
        "torch.ops.aten.mm(x, x)",
        "torch.ops.demonstration.one(x)",
        'torch.library.impl("aten::mm", "CPU", f)',
        'torch.library.register_fake("torchvision::nms")',
        'torch.library.Library("aten", "IMPL")',
        'torch.library.Library("theirs", "IMPL")\ntorch.ops.theirs.one(x)',
        "demo = 1; demo.one",
        "other.ops.demo.one",
        'other.custom_op("demo::one")',
        'def f(torch):\n    return torch.ops.demo.one, torch.library.register_fake("demo::one")',
    ],
)
def test_what_only_looks_alike_stays(text):
    before = f"{DEFINES}import torch\n{text}\n"
    assert rewritten(before) == before.replace('define("demo::one"', 'define("NEW::one"')


def test_the_namespace_of_an_operator_defined_elsewhere_stays():
    text = 'import torch\ntorch.ops.demo.one(x)\ntorch.library.register_fake("demo::one")(f)\n'
    assert rewritten(text) == text


def test_a_use_follows_a_definition_in_another_file():
    files = [SourceFile("a.py", DEFINES.encode()), SourceFile("b.py", b"import torch\ntorch.ops.demo.one\n")]
    result = rewrite_or_raise(files)
    assert result.namespaces == ("demo",)
    assert result.files[1].render("NEW") == b"import torch\ntorch.ops.NEW.one\n"


def test_the_library_of_another_file_is_recognized():
    files = [
        SourceFile("a.py", b'import torch.library as t\nLIB = t.Library("demo", "DEF")\n'),
        SourceFile("b.py", b'from .a import LIB\nLIB.impl("demo::one", f)\n'),
    ]
    assert rewrite_or_raise(files).files[1].render("NEW") == b'from .a import LIB\nLIB.impl("NEW::one", f)\n'


def test_a_local_name_hides_one_of_the_module():
    text = (
        f"{DEFINES}import torch\nNAME = 'demo::one is a text'\n"
        "def f():\n    NAME = 'demo::one'\n    torch.library.register_fake(NAME)\n"
        "def g(NAME='demo::one'):\n    return NAME\n"
    )
    output = rewritten(text)
    assert "NAME = 'demo::one is a text'" in output
    assert "    NAME = 'NEW::one'" in output
    assert "g(NAME='demo::one')" in output


def test_variables_assigned_over_and_over_from_one_another_take_no_time():
    names = "abcdefgh"
    again = "".join(f"{x} = {y}.t\n{x} = {y}\n" for _ in range(4) for x in names for y in names)
    text = f"{DEFINES}import torch\na = torch.ops\nb = torch.library\n{again}h.demo.one\n"
    assert b"h.NEW.one" in rewrite([SourceFile("a.py", text.encode())], "demo", HERE).files[0].render("NEW")


def test_two_namespaces_become_one():
    text = 'import torch.library as t\nt.define("a::one", "()")\nt.define("b::two", "()")\n'
    assert rewritten(text) == text.replace("a::", "NEW::").replace("b::", "NEW::")


def test_two_namespaces_with_an_operator_of_one_name_are_refused():
    with pytest.raises(SourceError, match="defined in 'a' and in 'b'") as caught:
        rewritten('import torch.library as t\nt.define("a::one", "()")\nt.define("b::one", "()")\n')
    assert caught.value.line == 3


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('A.define("one() -> ()")\nB.define("one() -> ()")', 5),
        ('A.define("one.out(Tensor x) -> ()")\nB.define("one.out() -> ()")', 5),
        ('S = "one() -> ()"\ndefine = B.define\ndefine(S)\nA.define(schema=S)', 7),
        ('t.define("a::one", "()")\ndef f():\n    B.define("one() -> ()")', 6),
    ],
)
def test_an_operator_that_libraries_of_two_namespaces_define_is_refused(text, line):
    head = 'import torch.library as t\nA = t.Library("a", "FRAGMENT")\nB = t.Library("b", "FRAGMENT")\n'
    with pytest.raises(SourceError, match=r"operator 'one.* is defined in '[ab]' and in '[ab]'") as caught:
        rewritten(head + text)
    assert caught.value.line == line


def test_operators_of_other_names_or_overloads_may_stand_in_two_namespaces():
    text = (
        'import torch.library as t\nA = t.Library("a", "DEF")\nB = t.Library("b", "FRAGMENT")\n'
        'A.define("one() -> ()")\nB.define("one.out() -> ()")\nA.define("two() -> ()")\n'
        'A.impl("one", f)\nB.impl("one", f)\n'
    )
    assert rewritten(text) == text.replace('"a"', '"NEW"').replace('"b"', '"NEW"')


@pytest.mark.parametrize("kind", ['"DEF"', 'kind="DEF"'])
def test_two_libraries_that_open_namespaces_that_become_one_are_refused(kind):
    text = f'import torch.library as t\nA = t.Library("a", "DEF")\nB = t.Library("b", {kind})\n'
    with pytest.raises(SourceError, match=r"KP306 .* opens 'a' and another one 'b'.* \"FRAGMENT\"") as caught:
        rewritten(text)
    assert caught.value.line == 3
    mended = text.replace(f'"b", {kind}', '"b", "FRAGMENT"')
    assert rewritten(mended) == mended.replace('"a"', '"NEW"').replace('"b"', '"NEW"')


@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("__init__.py", "from demo import x", "from . import x"),
        ("__init__.py", "from demo.a import x", "from .a import x"),
        ("a.py", "from demo.b import (\n    x,  # why\n    y,\n)", "from .b import (\n    x,  # why\n    y,\n)"),
        ("a/__init__.py", "from demo import x", "from .. import x"),
        ("a/b.py", "from demo.c import *", "from ..c import *"),
        ("a/b/c.py", "from demo . d import x", "from ...d import x"),
        ("a.py", "from demo \\\n    .b import x", "from .b \\\n import x"),
        ("a.py", "import demo.b.c as d", "from .b.c import __name__ as d; from .b import c as d"),
        ("a/b.py", "import demo.c as d, os as o",
         "from ..c import __name__ as d; from .. import c as d; import os as o"),
        ("a.py", "from demonstration import x", "from demonstration import x"),
        ("a.py", "from .demo import x", "from .demo import x"),
        ("a.py", "import demonstration.demo", "import demonstration.demo"),
    ],
)  # fmt: skip
def test_an_import_of_the_package_becomes_relative(path, before, after):
    assert rewritten(before + "\n", path) == after + "\n"


def test_an_import_that_binds_the_package_finds_it_under_any_name(tmp_path, run_clean):
    files = {
        "__init__.py": "from demo.a import f\n",
        "a/__init__.py": "import demo.b.c, os\nimport demo as me\ndef f(): return demo.b.c.X, me.b.c.X, os.sep\n",
        "b/__init__.py": "",
        "b/c.py": "X = 5\n",
    }
    result = rewrite_or_raise([SourceFile(path, text.encode()) for path, text in files.items()])
    for file in result.files:
        (tmp_path / "_demo_1" / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "_demo_1" / file.path).write_bytes(file.render("NEW"))
    process = run_clean(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import _demo_1; print(_demo_1.f())"
    )
    assert process.stdout == "(5, 5, '/')\n", process.stderr


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_offsets_hold_behind_non_ascii_text_and_other_line_ends(newline, bom):
    text = f'{bom}# ä€😀{newline}import torch  # ü{newline}s = "é"; torch.library.custom_op("demo::one", f){newline}'
    assert rewritten(text) == text.replace("demo::", "NEW::")


def test_a_file_with_nothing_to_change_is_one_piece():
    data = "if x:  # ä\n\ty=2 \x0c\n".encode()
    assert rewrite_or_raise([SourceFile("a.py", data)]).files[0].chunks == (data,)


@pytest.mark.parametrize(
    "helper",
    [
        "def reg(name, fn): LIB.impl(name, fn, 'Meta')\nreg('demo::one', f)",
        "def reg(fn, name='one'): LIB.impl(name, fn, 'Meta')\nreg(f, name='demo::one')\nreg(f)\nuse(reg)",
        "def reg(name): LIB.define(name + '(Tensor x) -> Tensor')\nreg('demo::one')\nreg('one')",
    ],
)
def test_a_name_that_a_function_hands_to_a_library_is_changed_where_it_is_given(helper):
    text = f"import torch\nLIB = torch.library.Library('demo', 'FRAGMENT')\n{helper}\n"
    assert rewritten(text) == text.replace("demo", "NEW")


def test_a_function_that_hands_names_to_a_library_may_be_passed_on():
    text = "import torch\nLIB = torch.library.Library('demo', 'FRAGMENT')\ndef reg(name): LIB.impl(name, f)\nuse(reg)\n"
    assert rewritten(text) == text.replace("demo", "NEW")
