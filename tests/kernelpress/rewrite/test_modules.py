"""Names that one module of a package takes from another."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernelpress.errors import SourceError
from kernelpress.rewrite.rewrite import rewrite
from kernelpress.syntax.source_file import SourceFile
from rewriting import DEFINES, HERE, package


@pytest.mark.parametrize(
    ("names", "ops", "written"),
    [
        ('FWD = "demo::one"', "from .names import FWD\nregister_fake(FWD)", 'FWD = "NEW::one"'),
        ('FWD = "demo::one"', "from demo.names import FWD as F\nregister_fake(F)", 'FWD = "NEW::one"'),
        ('FWD = "demo::one"', "from . import names\nregister_fake(names.FWD)", 'FWD = "NEW::one"'),
        ('FWD = "demo::one"', "import demo.names as n\nregister_fake(n.FWD)", 'FWD = "NEW::one"'),
        ('FWD = "demo::two"', "from .names import FWD\ncustom_op(FWD)", 'FWD = "NEW::two"'),
        ('NS = "demo"', "from .names import NS\nLibrary(NS, 'FRAGMENT')", 'NS = "NEW"'),
        ('NS = "demo"', "from .names import NS\ncustom_op(f'{NS}::two')", 'NS = "NEW"'),
        ('NS = "demo"', "from . import names\ncustom_op('%s::two' % names.NS)", 'NS = "NEW"'),
        ('NS = "demo"', "from .names import NS\ngetattr(torch.ops, NS)", 'NS = "NEW"'),
        ('N = "demo::one"', "from .names import N\nlib = Library('demo', 'IMPL')\nlib.impl(N, f)", 'N = "NEW::one"'),
        ('N = "one"', "from .names import N\nlib = Library('demo', 'IMPL')\nlib.impl(N, f)", 'N = "one"'),
    ],
)  # fmt: skip
def test_a_name_from_another_module_is_changed_where_it_is_written(names, ops, written):
    head = "import torch\nfrom torch.library import Library, custom_op, register_fake\n"
    assert package(init=DEFINES, names=names, ops=head + ops)["names.py"] == f"{written}\n"


def test_a_name_is_followed_through_modules_that_pass_it_on():
    output = package(
        init=DEFINES,
        a__b='X = "demo::one"',
        a__init="from .b import X as Y",
        c="from demo.a import Y\nZ = Y",
        d="from .c import Z\nfrom torch.library import register_fake\nregister_fake(Z)",
    )
    assert output["a/b.py"] == 'X = "NEW::one"\n'


@pytest.mark.parametrize(
    "names",
    [
        "",
        "FWD = make()",
        'FWD = "demo::one"\nFWD = "demo::two"',
        "from .ops import FWD",
        "from .nowhere import FWD",
        "def make():\n    FWD = 'demo::one'",
        'N = {"f": "demo::one"}\nFWD = N["f"]',
    ],
)
def test_a_name_from_another_module_that_cannot_be_read_there_is_refused_where_it_is_used(names):
    ops = "from torch.library import register_fake\nfrom .names import FWD\nregister_fake(FWD)"
    with pytest.raises(SourceError, match=r"taken from another module") as caught:
        package(init=DEFINES, names=names, ops=ops)
    assert (caught.value.path, caught.value.line) == (HERE / "ops.py", 3)


def test_operators_of_another_module_and_of_the_generated_one_are_left_alone():
    ops = "import torch\n@torch.library.custom_op('demo::two')\ndef op(): ...\n"
    use = (
        "from torch.library import register_fake\nfrom .ops import op\nfrom . import ops as o, _ops\n"
        "from ._ops import ops as theirs\nregister_fake(op)\nregister_fake(o.op._opoverload)\n"
        "register_fake(theirs.two)\nregister_fake(_ops.ops.two)\n"
    )
    assert package(ops=ops, use=use)["use.py"] == f"{use}\n"


def test_another_module_may_take_a_name_for_all_operators():
    output = package(
        init=DEFINES,
        compat="import torch\nT = torch.ops",
        use="from .compat import T\nfrom . import compat\nT.demo.one(x), compat.T.demo.one(x)",
    )
    assert output["use.py"].endswith("T.NEW.one(x), compat.T.NEW.one(x)\n")


@pytest.mark.parametrize(
    ("compat", "use"),
    [
        ("from torch.library import custom_op", "from .compat import custom_op\ncustom_op('spot::two')"),
        ("from torch.library import (\n  custom_op as co,\n)", "from demo.compat import co as c\nc('spot::two')"),
        ("import torch\nrk = torch.library.register_kernel", "from . import compat as m\nm.rk('spot::one', 'cpu')"),
        ("import torch\ntry:\n  rf = torch.library.register_fake\nexcept AttributeError:\n  def rf(x): ...",
         "from .compat import *\nrf('spot::one')"),
        ("from .deep import *", "from .compat import Lib\nLib('spot', 'DEF')"),
        ("from .deep import lib, oops", "from .compat import lib as l\nl.define('spot::two', '')"),
        ("from .deep import oops as o", "from .compat import o\no.spot.one(x)"),
        ("from .deep import oops as o", "import demo.compat\ndemo.compat.o.spot.one(x)"),
        ("import torch", "from .compat import torch\ntorch.ops.spot.one(x)"),
        ("import torch", "from .compat import *\ntorch.ops.spot.one(x)"),
        ("import torch", "from . import compat\ncompat.torch.ops.spot.one(x)"),
        ("import torch\nL = torch.library.Library('spot', 'DEF')", "from .compat import L as M\nM.impl('spot::one')"),
        ("FWD = 'spot::one'", "import torch\nfrom .compat import *\ntorch.library.register_fake(FWD)"),
    ],
)  # fmt: skip
def test_what_a_module_hands_on_of_pytorchs_is_known_in_those_that_import_it(compat, use):
    deep = "from torch import library as lib, ops as oops\nLib = lib.Library"
    output = package(init=DEFINES.replace("demo", "spot"), compat=compat, deep=deep, use=use)
    assert "spot" not in "".join(output.values())


def test_a_module_named_torch_in_the_package_is_not_pytorch():
    use = "from .torch import ops\nfrom . import torch as t\nops.demo.one, t.ops.demo.one\n"
    output = package(init=DEFINES, torch="class ops:\n    class demo:\n        one = 1", use=use)
    assert output["use.py"] == f"{use}\n"


WRAPPER = """import torch
def my_op(name, fn=None, /, *, kind="", **kwargs):
    def decorate(fn):
        op = torch.library.custom_op(name, fn, **kwargs)
        op.register_fake(fn)
        return op
    return decorate if fn is None else decorate(fn)
"""


@pytest.mark.parametrize(
    ("wrapper", "use"),
    [
        (WRAPPER, "from .wrap import my_op\n@my_op('spot::two', mutates_args=())\ndef f(x): ..."),
        (WRAPPER, "from . import wrap as w\nop = w.my_op('spot::two', print, **options)"),
        (WRAPPER, "from .wrap import my_op as m\nmine = m\nNAME = 'spot::two'\nmine(NAME)(print)"),
        (WRAPPER, "from .wrap import my_op\ndef outer(*, n): return my_op(n, kind=1)\nouter(n='spot::two')"),
        (WRAPPER, "from .wrap import *\n@my_op('spot::two')\ndef f(x): ...\nimport torch\n"
         "torch.library.register_autograd(f, b)"),
        ("from torch.library import Library\ndef fragment(kind, ns): return Library(ns, kind)",
         "from .wrap import fragment\nfragment('FRAGMENT', ns='spot')"),
        ("from torch.library import define\ndef add(ns, op, schema): define(f'{ns}::{op}', schema)",
         "from .wrap import add\nNS = 'spot'\nadd(NS, 'two', '()')"),
        ("NS = 'spot'\nimport torch\ndef op(name, ns=NS): return torch.library.custom_op(f'{ns}::{name}')",
         "from .wrap import op\n@op('two')\ndef f(x): ..."),
        ("import torch\ndef op(name, *, ns='spot'): return torch.library.custom_op(f'{ns}::{name}')",
         "from .wrap import op\n@op('two')\ndef f(x): ...\n@op('three', ns='spot')\ndef g(x): ..."),
        ("import torch\ndef op(f, name='spot::two'): return torch.library.custom_op(name, f)",
         "from .wrap import op\nop(print)"),
        ("from torch.library import register_fake\ndef fake(op): return register_fake(op)",
         "from .wrap import fake\nimport torch\nfake('spot::one')(f); fake(torch.ops.spot.one)(f)"),
    ],
)  # fmt: skip
def test_a_name_that_a_function_hands_on_is_followed_to_its_callers(wrapper, use):
    output = package(init=DEFINES.replace("demo", "spot"), use=use, wrap=wrapper)
    assert "spot" not in "".join(output.values())
    assert output["wrap.py"] == f"{wrapper}\n".replace("spot", "NEW")


def test_a_function_that_hands_names_on_may_be_exported_lazily():
    lazy = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .wrap import my_op\n"
        "def __getattr__(name):\n    if name == 'my_op':\n        from .wrap import my_op\n        return my_op\n"
    )
    output = package(wrap=WRAPPER, init=lazy, use="from . import my_op\n@my_op('demo::two')\ndef f(x): ...")
    assert "demo" not in "".join(output.values())


def test_a_name_made_by_the_helper_may_be_given_to_a_function_that_hands_it_on():
    use = (
        "from .wrap import my_op\nfrom ._ops import add_op_namespace_prefix\n"
        "@my_op(add_op_namespace_prefix('two'))\ndef f(x): ..."
    )
    assert package(wrap=WRAPPER, use=use)["use.py"] == f"{use}\n"


@pytest.mark.parametrize(
    "use",
    [
        "my_op(names[0])",
        "my_op(*names)",
        "my_op()",
        "list(map(my_op, ['demo::two']))",
        "class C:\n    make = staticmethod(my_op)",
        "import torch\nclass D:\n  def reg(self, name): torch.library.custom_op(name)\nD().reg('demo::two')",
        "import torch, functools\n@functools.cache\ndef reg(name): torch.library.custom_op(name)\nreg('demo::two')",
        "import torch\ndef reg(name):\n  name = name or 'demo::x'\n  torch.library.custom_op(name)\nreg('demo::two')",
        "import torch\ndef reg(*name): torch.library.custom_op(name[0])\nreg('demo::two')",
    ],
)
def test_a_name_that_reaches_a_function_in_a_way_that_cannot_be_followed_is_refused(use):
    with pytest.raises(SourceError) as caught:
        package(init=DEFINES, wrap=WRAPPER + "my_op('demo::three')", use=f"from .wrap import my_op\n{use}")
    assert caught.value.path == HERE / "use.py"


@pytest.mark.parametrize(
    "files",
    [
        {
            "init": "try:\n    from . import _C\nexcept ImportError:\n    _C = None\ny = _C.foo(x) if _C else x"
        },
        {"init": "from . import _ops\n_ops.ops.foo(x)"},
        {"init": "import demo._ops as _ops\n_ops.ops.foo(x)"},
        {"init": "from demo import missing", "a": "import demo\ndemo.missing.x"},
        {"a": "from .b import x\nx.y", "b": "from .a import x\nx.y"},
        {"a": "from .b import x\nx.y", "b": "import demo.b.x.x as x\nx.y.z"},
    ],
)
def test_a_name_that_no_module_defines_is_left_alone(files):
    sources = [
        SourceFile(f"{name.replace('init', '__init__')}.py", text.encode()) for name, text in files.items()
    ]
    result = rewrite(sources, "demo", HERE)
    assert [file.path for file in result.files] == [file.path for file in sources]
    assert not [finding for finding in result.findings if finding.code == "KP304"]


NAME = st.sampled_from(["a", "b", "c", "x", "_ops"])
STATEMENT = st.one_of(
    st.builds("import demo.{} as {}".format, NAME, NAME),
    st.builds("import demo.{}.{} as {}".format, NAME, NAME, NAME),
    st.builds("from . import {} as {}".format, NAME, NAME),
    st.builds("from .{} import {} as {}".format, NAME, NAME, NAME),
    st.builds("from .{} import *".format, NAME),
    st.builds("{} = {}.{}".format, NAME, NAME, NAME),
    st.builds("{}.{}.{}".format, NAME, NAME, NAME),
    st.builds("torch.library.register_fake({}.{})".format, NAME, NAME),
)


@given(st.lists(st.lists(STATEMENT, max_size=5), min_size=4, max_size=4))
@settings(max_examples=100, deadline=None)
def test_no_graph_of_imports_leads_in_a_circle(modules):
    paths = ("__init__.py", "a.py", "b.py", "c.py")
    files = [
        SourceFile(path, "\n".join(["import torch", *lines]).encode())
        for path, lines in zip(paths, modules, strict=True)
    ]
    assert [file.path for file in rewrite(files, "demo", HERE).files] == list(paths)
