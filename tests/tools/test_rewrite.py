from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kernelpress.errors import SourceError
from kernelpress.files import SourceFile
from kernelpress.rewrite import examine, rewrite

HERE = Path("torch-ext/demo")
DEFINES = 'from torch.library import define\ndefine("demo::one", "(Tensor x) -> Tensor")\n'


def rewritten(text: str, path: str = "__init__.py", namespace: str = "NEW", package: str = "demo") -> str:
    result = rewrite([SourceFile(path, text.encode())], package, HERE)
    return result.files[0].render(namespace).decode()


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
        ('import torch\nNS: str = "demo"\nL = torch.library.Library(NS, "FRAGMENT")', 'NS: str = "NEW"'),
    ],
)
def test_a_registration_gets_the_new_namespace_in_every_form(before, after):
    assert after in rewritten(before)


@pytest.mark.parametrize(
    "function",
    [
        "co = torch.library.custom_op if torch else f",
        "co = getattr(torch.library, 'custom_op', None) or f",
        "co = hasattr(torch.library, 'custom_op') and torch.library.custom_op or f",
        "co = getattr(torch.library, 'new_name', torch.library.custom_op)",
        "co, rf = torch.library.custom_op, torch.library.register_fake",
        "co = functools.partial(torch.library.custom_op, mutates_args=())",
        "if (co := torch.library.custom_op): pass",
        "x = [co := torch.library.custom_op for _ in 'x']",
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
        'L = x or torch.library.Library("demo", "FRAGMENT"); L.impl("demo::one", f)',
        'L, M = torch.library.Library("demo", "FRAGMENT"), 1; L.impl("demo::one", f)',
        'if (L := torch.library.Library("demo", "FRAGMENT")): L.impl("demo::one", f)',
        'L = torch.library.Library("demo", "FRAGMENT"); K = L; K.impl("demo::one", f)',
        'from torch.library import Library as Lib; L = Lib("demo", "FRAGMENT"); L.impl("demo::one", f)',
        'torch.library.Library("demo", "FRAGMENT").impl("demo::one", f)',
        'L = (torch.library\n  .Library("demo", "DEF")); L.impl("demo::one", f)',
        'def reg(l: Optional[torch.library.Library]): l.impl("demo::one", f)',
        'def reg(l: "None | Library"): (l or K).impl("demo::one", f)',
        'L = torch.library.Library("demo", "DEF"); L.impl(op_name="demo::one", fn=f)',
        'L = torch.library.Library("demo", "DEF"); L.define(schema="demo::one() -> ()")',
        'L = torch.library.Library("demo", "DEF"); torch.library.impl(L, "demo::one", "CPU")',
        'functools.partial(torch.library.custom_op, "demo::one", mutates_args=())',
        'functools.partial(torch.library.Library, "demo")("DEF")',
        'torch.library.define(schema="(Tensor x) -> Tensor", qualname="demo::one")',
        'torch._C._jit_get_operation("demo::one")',
        'torch._library.utils.lookup_op("demo::one")',
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
        ('torch._C._jit_get_operation("demo::one")', '("NEW::one")'),
        ("def f():\n    import torch as tt\n    return tt.ops.demo.one", "tt.ops.NEW.one"),
        ("ops = torch.ops\nops.demo.one(x)", "ops.NEW.one(x)"),
        ("ops: object = torch.ops\ndef f(): return ops.demo.one(x)", "ops.NEW.one(x)"),
        ("def f():\n    a = b = torch.ops\n    return b.demo.one(x)", "b.NEW.one(x)"),
        ("def f():\n    o = torch.ops\n    return lambda: o.demo.one(x)", "o.NEW.one(x)"),
        (
            "one = torch.ops\nclass C:\n    def f(self):\n        two = one\n        return two.demo.one(x)",
            "two.NEW.one(x)",
        ),
        ("torch._ops.ops.demo.one", "ops.NEW.one"),
        ('getattr(torch, "ops").demo.one', '"ops").NEW.one'),
        ('torch.ops.__getattr__("demo").one', '__getattr__("NEW").one'),
        ('ops = torch.ops\nops.__getattr__("demo").one', '__getattr__("NEW").one'),
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
            'class C:\n    def __init__(self):\n        self.lib = torch.library.Library("demo", "DEF")\n'
            '        self.lib.impl("demo::one", f)',
            'self.lib.impl("NEW::one", f)',
        ),
        (
            'with torch.library._scoped_library("demo", "FRAGMENT") as sc:\n    sc.impl("demo::one", f)',
            'sc.impl("NEW::one", f)',
        ),
        ('def f(lb: torch.library.Library):\n    lb.impl("demo::one", f)', 'lb.impl("NEW::one", f)'),
        (
            'L = torch.library.Library("demo", "IMPL")\ntorch.library.impl(L, "demo::one", "CPU")',
            '(L, "NEW::one", "CPU")',
        ),
    ],
)
def test_a_use_gets_the_new_namespace_in_every_form(before, after):
    made = rewritten(f"{DEFINES}import torch\n{before}\n")
    assert after in made
    assert "demo" not in made


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
        'def f(torch):\n    return torch.ops.demo.one, torch.library.impl("demo::one")',
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
    result = rewrite(files, "demo", HERE)
    assert result.namespaces == ("demo",)
    assert result.files[1].render("NEW") == b"import torch\ntorch.ops.NEW.one\n"


def test_the_library_of_another_file_is_recognized():
    files = [
        SourceFile("a.py", b'import torch.library as t\nLIB = t.Library("demo", "DEF")\n'),
        SourceFile("b.py", b'from .a import LIB\nLIB.impl("demo::one", f)\n'),
    ]
    assert (
        rewrite(files, "demo", HERE).files[1].render("NEW")
        == b'from .a import LIB\nLIB.impl("NEW::one", f)\n'
    )


@pytest.mark.parametrize(
    "text",
    [
        'torch.library.custom_op(f"{ns}::one", f)',
        'torch.library.custom_op(ns + "::one", f)',
        'torch.library.custom_op("::".join(parts), f)',
        "torch.library.custom_op(make_name(), f)",
        "torch.library.define(NAME, '()')",
        'torch.library.register_fake(f"{ns}::one")',
        'torch.library.register_fake("%s::one" % ns)',
        "torch.library.Library(ns, 'DEF')",
        "getattr(torch.ops, ns)",
        'def f(name): torch.library.impl(name, "CPU")',
        'def f(OP): torch.library.impl(OP, "CPU")\n\nOP = "demo::one"',
        'for name in ("demo::one",): torch.library.register_fake(name)',
        "class C: ops = torch.ops",
        "a = b = torch.ops",
        "def f(o=torch.ops): ...",
        "ops, x = torch.ops, 1",
        "f(getattr(torch, 'ops'))",
        "torch.ops.__dict__['demo'].one",
        "torch.ops.__getattr__(ns).one",
        'N = {"f": "demo::one"}; torch.library.register_fake(N["f"])',
        "torch.library.register_fake(make_name())",
        "torch.library.register_fake(self.op)",
        "torch.library.register_fake(nowhere)",
        "NAME = 3; torch.library.register_fake(NAME)",
        'NAME = "demo::one"; x = (NAME := "demo::two"); torch.library.register_fake(NAME)',
        'NAME = "demo::one"; [NAME := "demo::two" for _ in x]; torch.library.register_fake(NAME)',
        'NAME = "demo::one"; f(lambda y=(NAME := "demo::two"): y); torch.library.register_fake(NAME)',
        "torch.library.custom_op(*names)",
        'torch.library.custom_op(**{"name": "demo::two"})',
        "torch.library.Library(*x)",
        "torch.ops.\uff44emo.one",
        'NAME = "demo::one"; NAME = "demo::two"; torch.library.register_fake(NAME)',
        'NAME = "demo"; NAME += "::one"; torch.library.register_fake(NAME)',
        "vars(torch.ops)",
        "from torch.ops import demo",
        "from torch.library import *",
    ],
)
def test_a_namespace_known_only_at_run_time_is_refused_with_its_line(text):
    with pytest.raises(SourceError) as caught:
        rewritten(f"{DEFINES}import torch\n{text}\n")
    assert (caught.value.path, caught.value.line) == (HERE / "__init__.py", 4)


@pytest.mark.parametrize(
    "text",
    [
        'R = {"op": torch.library.custom_op}; R["op"]("demo::two")',
        'def reg(lib): lib.impl("demo::one", f)',
        'has_kernel("demo::one.out", "CUDA")',
        'm = LIB.impl; m("demo::one", f)',
        'libs[0].define("demo::two(Tensor x) -> Tensor")',
        'reg(f"demo::{name}")',
        'reg("demo::" + name)',
        "import importlib; importlib.import_module('torch').ops.demo.one",
        "class A:\n    from torch import ops; one = lambda self: self.ops.demo.one",
        'assert op.name() == "demo::one"',
    ],
)
def test_an_operator_named_where_nothing_is_known_to_take_it_is_a_warning_with_its_line(text):
    file = SourceFile("__init__.py", f"{DEFINES}import torch\n{text}\n".encode())
    (found,) = examine([file], "demo", HERE).findings
    assert (found.code, found.severity, found.line) == ("KP304", "warning", 4 + text.count("\n"))


@pytest.mark.parametrize(
    "text",
    [
        '"""demo::one"""',
        "# demo::one, torch.ops.demo.one",
        'raise ValueError("demo::one needs a GPU")',
        'print(f"{x} demo::one")',
        'x = "aten::mm", "theirs::one", torch.ops.aten.mm, other.ops.theirs.one',
        "x = torch.ops.demo.one, getattr(torch.ops, 'demo').one",
        'FWD = "demo::one"\ntorch.library.register_fake(FWD)',
    ],
)
def test_what_names_no_operator_of_the_package_or_is_renamed_is_no_warning(text):
    file = SourceFile("__init__.py", f"{DEFINES}import torch\n{text}\n".encode())
    assert examine([file], "demo", HERE).findings == ()


def test_names_made_by_the_generated_helper_are_left_to_it():
    text = (
        "import torch\nfrom ._ops import add_op_namespace_prefix as p\ntorch.library.custom_op(p('one'), f)\n"
    )
    assert rewritten(text) == text


def test_an_operator_itself_may_be_handed_on():
    text = f"{DEFINES}import torch\nfrom other import op\ntorch.library.register_fake(op)(f)\n"
    assert rewritten(text).endswith("torch.library.register_fake(op)(f)\n")


@pytest.mark.parametrize(
    "text",
    [
        "@torch.library.custom_op('demo::two')\ndef op(): ...\ntorch.library.register_fake(op)",
        "op = torch.library.custom_op('demo::two', g)\ntorch.library.register_fake(op)",
        "op = torch.library.custom_op('demo::two')(g)\ntorch.library.register_fake(op)",
        "torch.library.register_fake(torch.ops.demo.one.default)",
        "op = torch.ops.demo.one\ntorch.library.register_fake(op)",
        "try:\n    op = torch.ops.demo.one\nexcept AttributeError:\n    op = torch.ops.demo.two\n"
        "torch.library.opcheck(op.default, ())",
    ],
)
def test_an_operator_of_the_module_may_be_handed_on(text):
    assert "register_fake(op" in (made := rewritten(f"{DEFINES}import torch\n{text}\n")) or "demo" not in made


def package(**files: str) -> dict[str, str]:
    """The files of a package after a rewrite; keywords are modules' names, with `__` for a dot."""
    sources = [
        SourceFile(f"{name.replace('__', '/').replace('init', '__init__')}.py", f"{text}\n".encode())
        for name, text in files.items()
    ]
    return {file.path: file.render("NEW").decode() for file in rewrite(sources, "demo", HERE).files}


@pytest.mark.parametrize(
    ("names", "ops", "written"),
    [
        ('FWD = "demo::one"', "from .names import FWD\nregister_fake(FWD)", 'FWD = "NEW::one"'),
        ('FWD = "demo::one"', "from demo.names import FWD as F\nregister_fake(F)", 'FWD = "NEW::one"'),
        ('FWD = "demo::one"', "from . import names\nregister_fake(names.FWD)", 'FWD = "NEW::one"'),
        ('FWD = "demo::one"', "import demo.names as n\nregister_fake(n.FWD)", 'FWD = "NEW::one"'),
        ('FWD = "demo::two"', "from .names import FWD\ncustom_op(FWD)", 'FWD = "NEW::two"'),
        ('NS = "demo"', "from .names import NS\nLibrary(NS, 'FRAGMENT')", 'NS = "NEW"'),
        ('NS = "demo"', "from .names import NS\ngetattr(torch.ops, NS)", 'NS = "NEW"'),
        ('N = "demo::one"', "from .names import N\nlib = Library('demo', 'IMPL')\nlib.impl(N, f)", 'N = "NEW::one"'),
        ('N = "one"', "from .names import N\nlib = Library('demo', 'IMPL')\nlib.impl(N, f)", 'N = "one"'),
    ],
)  # fmt: skip
def test_a_name_from_another_module_is_changed_where_it_is_written(names, ops, written):
    head = "import torch\nfrom torch.library import Library, custom_op, register_fake\n"
    assert package(init=DEFINES, names=names, ops=head + ops)["names.py"] == f"{written}\n"


def test_a_name_is_followed_through_modules_that_pass_it_on():
    made = package(
        init=DEFINES,
        a__b='X = "demo::one"',
        a__init="from .b import X as Y",
        c="from demo.a import Y\nZ = Y",
        d="from .c import Z\nfrom torch.library import register_fake\nregister_fake(Z)",
    )
    assert made["a/b.py"] == 'X = "NEW::one"\n'


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
        "from ._ops import ops as made\nregister_fake(op)\nregister_fake(o.op._opoverload)\n"
        "register_fake(made.two)\nregister_fake(_ops.ops.two)\n"
    )
    assert package(ops=ops, use=use)["use.py"] == f"{use}\n"


def test_another_module_may_take_a_name_for_all_operators():
    made = package(
        init=DEFINES,
        compat="import torch\nT = torch.ops",
        use="from .compat import T\nfrom . import compat\nT.demo.one(x), compat.T.demo.one(x)",
    )
    assert made["use.py"].endswith("T.NEW.one(x), compat.T.NEW.one(x)\n")


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
    made = package(init=DEFINES.replace("demo", "spot"), compat=compat, deep=deep, use=use)
    assert "spot" not in "".join(made.values())


def test_a_module_named_torch_in_the_package_is_not_pytorch():
    use = "from .torch import ops\nfrom . import torch as t\nops.demo.one, t.ops.demo.one\n"
    made = package(init=DEFINES, torch="class ops:\n    class demo:\n        one = 1", use=use)
    assert made["use.py"] == f"{use}\n"


def test_a_local_name_hides_one_of_the_module():
    text = (
        f"{DEFINES}import torch\nNAME = 'demo::one is a text'\n"
        "def f():\n    NAME = 'demo::one'\n    torch.library.register_fake(NAME)\n"
        "def g(NAME='demo::one'):\n    return NAME\n"
    )
    made = rewritten(text)
    assert "NAME = 'demo::one is a text'" in made
    assert "    NAME = 'NEW::one'" in made
    assert "g(NAME='demo::one')" in made


def test_variables_assigned_over_and_over_from_one_another_take_no_time():
    names = "abcdefgh"
    again = "".join(f"{x} = {y}.t if {y} else {x} or {y}\n" for _ in range(4) for x in names for y in names)
    text = f"{DEFINES}import torch\na = torch.ops\nb = torch.library\n{again}h.demo.one\nh.impl('demo::one', 'cpu')\n"
    assert b"h.NEW.one" in examine([SourceFile("a.py", text.encode())], "demo", HERE).files[0].render("NEW")


def test_two_namespaces_become_one():
    text = 'import torch.library as t\nt.define("a::one", "()")\nt.define("b::two", "()")\n'
    assert rewritten(text) == text.replace("a::", "NEW::").replace("b::", "NEW::")


def test_two_namespaces_with_an_operator_of_one_name_are_refused():
    with pytest.raises(SourceError, match="defined in 'a' and in 'b'") as caught:
        rewritten('import torch.library as t\nt.define("a::one", "()")\nt.define("b::one", "()")\n')
    assert caught.value.line == 3


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
    result = rewrite([SourceFile(path, text.encode()) for path, text in files.items()], "demo", HERE)
    for file in result.files:
        (tmp_path / "_demo_1" / file.path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "_demo_1" / file.path).write_bytes(file.render("NEW"))
    done = run_clean(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import _demo_1; print(_demo_1.f())")
    assert done.stdout == "(5, 5, '/')\n", done.stderr


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_offsets_hold_behind_non_ascii_text_and_other_line_ends(newline, bom):
    text = f'{bom}# ä€😀{newline}import torch  # ü{newline}s = "é"; torch.library.custom_op("demo::one", f){newline}'
    assert rewritten(text) == text.replace("demo::", "NEW::")


def test_a_file_with_nothing_to_change_is_one_piece():
    data = "if x:  # ä\n\ty=2 \x0c\n".encode()
    assert rewrite([SourceFile("a.py", data)], "demo", HERE).files[0].chunks == (data,)


# A module is put together from pieces of which each keeps to itself; run before and after, it must answer the same.
REGISTRATIONS = (
    '@torch.library.custom_op("{ns}::{op}", mutates_args=())\n'
    "def {op}(x: torch.Tensor) -> torch.Tensor:\n    return x * {k}\n",
    '@co("{ns}::{op}", mutates_args=())  # {ns}::{op}\n'
    "def {op}(x: torch.Tensor) -> torch.Tensor:\n    return x * {k}\n",
    'lib.define("{ns}::{op}", "(Tensor x) -> Tensor")\nlib.impl("{ns}::{op}", "cpu", lambda x: x * {k})\n',
    'N_{op} = "{ns}::{op}"\nlib.define(N_{op}, "(Tensor x) -> Tensor")\n'
    '@lib.impl(N_{op}, "cpu")\ndef {op}(x):\n    """{ns}::{op}"""\n    return x * {k}\n',
    'def reg_{op}():\n    name = "{ns}::{op}"\n    lib.define(name, "(Tensor x) -> Tensor")\n'
    '    lib.impl(name, "cpu", lambda x: x * {k})\nname = "{ns}::{op}"\nreg_{op}()\n',
    'class R_{op}:\n    def __init__(self):\n        self.lib = lib.Library("{ns}", "FRAGMENT")\n'
    '        self.lib.define("{op}(Tensor x) -> Tensor")\n'
    '        self.lib.impl("{ns}::{op}", lambda x: x * {k}, "CPU")\nkept_{op} = R_{op}()\n',
    'LIB.define("{op}(Tensor x) -> Tensor")\nLIB.impl("{op}", lambda x: x * {k}, "CPU")\n',
    'LIB.define("{op}(Tensor x) -> Tensor")\nLIB.impl("{ns}::{op}", lambda x: x * {k}, "CPU")\n',
    'LIB.define(schema="{op}(Tensor x) -> Tensor")\n'
    'LIB.impl(op_name="{ns}::{op}", fn=lambda x: x * {k}, dispatch_key="CPU")\n',
    'any_{op} = getattr(torch.library, "no_such", None) or torch.library.custom_op\n'
    '@any_{op}("{ns}::{op}", mutates_args=())\ndef {op}(x: torch.Tensor) -> torch.Tensor:\n    return x * {k}\n',
    'def_{op}, impl_{op} = (lib.define, lib.impl) if X is not None else (None, None)\n'
    'lib.define("{ns}::{op}", "(Tensor x) -> Tensor"); lib.impl("{ns}::{op}", "cpu", lambda x: x * {k})\n',
    'd_{op}, i_{op} = lib.define, lib.impl\n'
    'd_{op}("{ns}::{op}", "(Tensor x) -> Tensor"); i_{op}("{ns}::{op}", "cpu", lambda x: x * {k})\n',
    'part_{op} = functools.partial(co, mutates_args=())\n'
    'ä = "ü"; _ = part_{op}("{ns}::" "{op}")(lambda: None) if not ä else None\n'
    '@part_{op}(\n\t"{ns}::{op}"  # ö\n)\ndef {op}(x: torch.Tensor) -> torch.Tensor:\n\treturn x * {k}\n',
    'if (w_{op} := lib.define)("{ns}::{op}", "(Tensor x) -> Tensor") is None:\n'
    '    ö = "{op}"; w_{op}; lib.impl(f"{ns}::{{ö}}", "cpu", lambda x: x * {k})\n',
    'class C_{op}:\n    @staticmethod\n    @co("{ns}::{op}", mutates_args=())\n'
    '    def run(x: torch.Tensor) -> torch.Tensor:\n        return x * {k}\n',
    'OTHER_{op} = LIB\nOTHER_{op}.define("{op}(Tensor x) -> Tensor")\n'
    '(OTHER_{op} or None).impl("{ns}::{op}", lambda x: x * {k}, "CPU")\n',
)  # fmt: skip
USES = (
    "OUT.append(torch.ops.{ns}.{op}(X))\n",
    "OUT.append(ops.{ns}.{op}.default(X))\n",
    'OUT.append(getattr(getattr(torch.ops, "{ns}"), "{op}")(X))\n',
    'OUT.append(torch.ops.__getattr__("{ns}").{op}(X))\n',
    "def alias_{op}():\n    o = torch.ops\n    return [o.{ns}.{op}(X) for _ in [0]][0]\nOUT.append(alias_{op}())\n",
    'é = "ß"; OUT.append(torch.ops\\\n  .{ns} .{op}(X)); OUT.append(é)\n',
    "OUT.append(f'ä{{torch.ops.{ns}.{op}(X)}} {{ops.{ns}.{op}(X):}}{{\"é\"}}')\n",
    "match [X]:\n    case [x] if (o_{op} := torch.ops.{ns}.{op}): OUT.append(o_{op}(x))\n",
    'OUT.append([f(X) for f in (torch.ops.{ns}.{op}, getattr(ops, "{ns}").{op}) for _ in "ab"][1])\n',
    "OUT.append((lambda o=torch.ops.{ns}: o.{op}(X))())\n",
    'OUT.append(torch._C._dispatch_has_kernel("{ns}::{op}"))\n',
    "def use_{op}():\n    import torch as t\n    return t.ops.{ns}.{op}(X)\nOUT.append(use_{op}())\n",
)
LOOKALIKES = (
    'OUT.append("{ns}::{op}")\n',
    'OUT.append(f"{ns}::{{1 + 1}} torch.ops.{ns}.{op}")\n',
    '# torch.library.custom_op("{ns}::{op}")\n',
    '"""torch.ops.{ns}.{op}"""\n',
    "OUT.append('''\n{ns}::{op}\n''')\n",
    '{ns} = {{"{ns}": "{ns}::{op}"}}; OUT.append({ns}["{ns}"])\n',
)
PIECES = st.lists(
    st.tuples(
        st.sampled_from(REGISTRATIONS),
        st.lists(st.sampled_from(USES + LOOKALIKES), max_size=3),
        st.integers(2, 9),
    ),
    min_size=1,
    max_size=4,
)
HEADS = st.sampled_from(
    ("", "\ufeff", "# coding: utf-8\n", "#!/usr/bin/python ä\n# -*- coding: utf8 -*-\n", "\x0c\n")
)
COUNTER = itertools.count()


def run_module(text: bytes) -> list[object]:
    scope: dict[str, object] = {"X": torch.ones(2), "OUT": []}
    exec(compile(text, "module", "exec"), scope)  # the module's own code is what is compared
    KEPT.append(scope)
    return [item.tolist() if isinstance(item, torch.Tensor) else item for item in scope["OUT"]]  # type: ignore[attr-defined]


KEPT: list[object] = []  # a Library takes its operators with it when it goes


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(pieces=PIECES, head=HEADS, newline=st.sampled_from(("\n", "\r\n", "\r")))
@example(pieces=[(REGISTRATIONS[5], [], 2)], head="", newline="\r")
def test_a_module_answers_the_same_before_and_after(pieces, head, newline):
    number = next(COUNTER)
    ns, new = f"prop{number}", f"_prop{number}_new"
    text = (
        f"{head}import functools, torch\nfrom torch import library as lib, ops\n"
        "from torch.library import custom_op as co\n"
        f'LIB = torch.library.Library("{ns}", "FRAGMENT")\n'
    )
    for index, (registration, others, factor) in enumerate(pieces):
        for piece in (registration, *others):
            text += piece.format(ns=ns, op=f"op{index}", k=factor)
    before = text.replace("\n", newline).encode()
    (file,) = rewrite([SourceFile("__init__.py", before)], "demo", HERE).files
    after = file.render(new)
    assert after.count(newline.encode()) == before.count(newline.encode())
    assert ast.dump(ast.parse(after.replace(new.encode(), ns.encode()))) == ast.dump(ast.parse(before))
    assert run_module(after) == run_module(before)
    registered = {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert {ns, new} <= registered
