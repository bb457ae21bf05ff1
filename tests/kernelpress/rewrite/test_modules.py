"""Names that one module of a package takes from another."""

from __future__ import annotations

import pytest
from kernelpress.errors import SourceError
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
