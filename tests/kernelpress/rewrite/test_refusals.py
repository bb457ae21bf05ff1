"""Names that the rewriter cannot follow: what it refuses, what it warns of, and what is neither."""

from __future__ import annotations

import pytest
from kernelpress.errors import SourceError
from kernelpress.rewrite.rewrite import rewrite
from kernelpress.syntax.source_file import SourceFile
from rewriting import DEFINES, HERE, rewritten


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
        "torch.ops.__getattr__('demo').one",
        "co = torch.library.custom_op if torch else f",
        "co = getattr(torch.library, 'no_such', torch.library.custom_op)",
        "co = hasattr(torch.library, 'custom_op') and torch.library.custom_op or f",
        "co, rf = torch.library.custom_op, torch.library.register_fake",
        "rf = f or torch.library.register_fake",
        "co = functools.partial(torch.library.custom_op, mutates_args=())",
        'functools.partial(torch.library.custom_op, "demo::two", mutates_args=())',
        'functools.partial(torch.library.Library, "demo")("DEF")',
        "if (co := torch.library.custom_op): pass",
        "x = [co := torch.library.custom_op for _ in 'x']",
        'R = {"op": torch.library.custom_op}; R["op"]("demo::two")',
        "def get(): return torch.library.custom_op",
        "class C: define = torch.library.define",
        'L = x or torch.library.Library("demo", "FRAGMENT"); L.impl("demo::one", f)',
        'L, M = torch.library.Library("demo", "FRAGMENT"), 1; L.impl("demo::one", f)',
        'if (L := torch.library.Library("demo", "FRAGMENT")): L.impl("demo::one", f)',
        'def reg(l: torch.library.Library): l.impl("demo::one", f)',
        'def reg(lib): lib.impl("demo::one", f)',
        'libs[0].define("demo::two(Tensor x) -> Tensor")',
        'self.lib = torch.library.Library("demo", "DEF"); self.lib.impl("demo::one", f)',
        'with torch.library._scoped_library("demo", "FRAGMENT") as sc: sc.impl("demo::one", f)',
        'def f(torch): return torch.library.impl("demo::one")',
    ],
)
def test_a_namespace_known_only_at_run_time_is_refused_with_its_line(text):
    with pytest.raises(SourceError) as caught:
        rewritten(f"{DEFINES}import torch\n{text}\n")
    assert (caught.value.path, caught.value.line) == (HERE / "__init__.py", 4)


@pytest.mark.parametrize(
    "text",
    [
        'torch._C._jit_get_operation("demo::one")',
        'torch._library.utils.lookup_op("demo::one")',
        'rf = getattr(torch.library, "register_fake", None) or f; rf("demo::one")',
        'has_kernel("demo::one.out", "CUDA")',
        'm = LIB.impl; m("demo::one", f)',
        'reg(f"demo::{name}")',
        'reg("demo::" + name)',
        "import importlib; importlib.import_module('torch').ops.demo.one",
        "class A:\n    from torch import ops; one = lambda self: self.ops.demo.one",
        'assert op.name() == "demo::one"',
        'ours = op.namespace == "demo"',
        'ours = op.name().split("::")[0] in ("demo", "other")',
        'ours = op.name().startswith("demo")',
        'G = "demo::one"; ours = op.name() == G',
        'G = "demo::one"; F = G; f = TABLE[F]',
        'G = "demo::one"; ours = op.name() in ("aten::mm", G)',
        'match op.namespace:\n    case "demo": pass',
        'eval("torch.ops.demo.one(x)")',
        'exec(f"y = torch.ops.demo.one({x})")',
        "exec(\"n = 'demo::one'\")",
        'OURS = "demo"; ours = op.namespace == OURS',
        'OURS = "demo"; ours = op.namespace in (OURS, "other")',
        'OURS = ("demo", "other"); ours = op.namespace in OURS',
        'OURS = frozenset({"demo"}) | OTHERS; ours = op.namespace in OURS',
        'class C: OURS = "demo"; ours = op.namespace == OURS',
        'def is_ours(op, ours="demo"): return op.namespace == ours',
        'ours = {"demo": 1}.get(op.namespace)',
        'TABLE = {"demo": 1}; x = TABLE[op.namespace]',
        'SAFE = ("aten::mm", "demo::one"); ours = op.name() in SAFE',
        'for name in ("demo::one",): LIB.impl(name, f)',
        'p = re.compile(r"^demo::\\w+$")',
        'ours = re.match("(aten|demo)::one", op.name()) or fnmatch(op.name(), "demo::*")',
        'ours = op.name().startswith(("demo::", "other::"))',
        'key = "demo::" + name',
        'SRC = "torch.ops.demo.one(x)"; eval(SRC)',
        'eval(compile("torch.ops.demo.one(x)", "x", "eval"))',
        'exec(textwrap.dedent("y = torch.ops.demo.one(x)"), names)',
        'LINES = ["import torch", "y = torch.ops.demo.one(x)"]; exec("\\n".join(LINES))',
        'SRC = "torch.ops.demo.one({})"; code = SRC.format(x); eval(code)',
    ],
)
def test_an_operator_named_where_nothing_is_known_to_take_it_is_a_warning_with_its_line(text):
    file = SourceFile("__init__.py", f"{DEFINES}import torch\n{text}\n".encode())
    (finding,) = rewrite([file], "demo", HERE).findings
    assert (finding.code, finding.severity, finding.line) == ("KP304", "warning", 4 + text.count("\n"))


@pytest.mark.parametrize(
    "text",
    [
        'ours = __name__ == "kk.a"',
        'ours = f.__module__ == "kk"',
        'class C:\n    __module__ = "kk"',
        'f.__module__ = "kk"',
        'mock.patch("kk.a.v", 1)',
        '@patch("kk.a.v")\ndef f(): ...',
        'exec("import kk.a")',
        'exec(f"from kk.a import {name}")',
        'eval("kk.a.v")',
        'operator.attrgetter("kk.a")',
        'pkgutil.resolve_name("kk.a:v")',
        'SRC = "import kk.a"; exec(SRC)',
        'exec(textwrap.dedent(" from kk import a"))',
        'NAME = "kk.a.v"; mock.patch(NAME, 1)',
        'OURS = ("kk", "kk.a"); ours = f.__module__ in OURS',
        'ours = __name__.startswith("kk")',
    ],
)
def test_a_module_named_in_text_is_a_warning_with_its_line(text):
    (finding,) = rewrite([SourceFile("a.py", f"x = 1\n{text}\n".encode())], "kk", HERE).findings
    line = 3 if text.startswith("class") else 2
    assert (finding.code, finding.severity, finding.line) == ("KP305", "warning", line)


def test_text_that_only_looks_like_a_module_of_the_project_is_no_warning():
    text = 'if __name__ == "__main__": eval("kkk.a"), log("kk.a"), f.__name__ == "kk_a"\nexec("x = akk.a")\n'
    assert rewrite([SourceFile("a.py", text.encode())], "kk", HERE).findings == ()


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
        'log.warning("demo::one is slow")\nlog.info("demo::one")',
        '__all__ = ["demo"]\nlogging.getLogger("demo")',
        'NS = "demo"\ntorch.library.Library(NS, "IMPL")\nours = op.namespace in (NS, "aten")',
        'x = {"demo": 1}["demo"]',
        'p = re.compile("a::b")',
    ],
)
def test_what_names_no_operator_of_the_package_or_is_renamed_is_no_warning(text):
    file = SourceFile("__init__.py", f"{DEFINES}import torch\n{text}\n".encode())
    assert rewrite([file], "demo", HERE).findings == ()


SHARED = "import torch\nNS = 'demo'\nLIB = torch.library.Library(NS, 'FRAGMENT')\n"


@pytest.mark.parametrize(
    "text",
    [
        "log = logging.getLogger(NS)",
        "os.environ['NAMESPACE'] = NS",
        "path = Path.home() / NS / 'cache'",
        "OTHER = NS\nos.environ.get(OTHER)",
        "def f(): return f'{NS}: failed'",
        "for x in [NS]: print(x)",
        "setattr(module, NS + '_cache', 1)",
    ],
)
def test_a_constant_of_a_namespace_that_is_used_for_something_else_is_refused_there(text):
    with pytest.raises(SourceError, match="takes a namespace of operators for something else") as caught:
        rewritten(f"{SHARED}{text}\n")
    assert (caught.value.path, caught.value.line) == (HERE / "__init__.py", 4 + text.count("\n"))
    files = [
        SourceFile("names.py", SHARED.encode()),
        SourceFile("use.py", f"from .names import *\n{text}".encode()),
    ]
    (finding,) = rewrite(files, "demo", HERE).findings
    assert (finding.path.name, finding.line) == ("use.py", 2 + text.count("\n"))


@pytest.mark.parametrize(
    "text",
    [
        "ours = op.namespace == NS",
        "torch.library.custom_op(f'{NS}::two', g)",
        "print(f'{NS}::two', NS + '::two')",
        "OTHER = NS\ntorch.library.Library(OTHER, 'IMPL')\ngetattr(torch.ops, OTHER)",
        "ours = op.name().startswith(NS)",
    ],
)
def test_a_constant_of_a_namespace_may_be_used_as_one_again(text):
    assert rewritten(f"{SHARED}{text}\n") == f"{SHARED}{text}\n".replace("'demo'", "'NEW'")


NAMED = "import torch\nNS = 'demo'\nNAME = NS + '::two'\nONE = 'demo::one'\ndef op(name, f):\n    {}\n"
NAMED += "    return torch.library.custom_op(name, f)\nop(NAME, g), op(ONE, g)\n{}\n"


@pytest.mark.parametrize(
    "text",
    [
        "KEYS[NAME] = g",
        "KEYS = {ONE: g}",
        "text = NAME.replace('::', '_')",
        "os.environ.get(ONE + '_debug')",
        "KEYS[f'{NS}::cache'] = 1",
        "def key(x): return NS + '::' + x",
        "name[0]",
        "KEYS[name] = f",
        "NAMES.append(name.split('::')[0])",
        "f.key = f'{name}/autotune'",
    ],
)
def test_an_operator_s_name_that_is_used_as_a_key_or_as_text_is_a_warning_there(text):
    inside = "name" in text
    module = NAMED.format(text, "") if inside else NAMED.format("pass", text)
    (finding,) = rewrite([SourceFile("__init__.py", module.encode())], "demo", HERE).findings
    assert "operator's name for something else" in finding.message
    assert (finding.code, finding.severity, finding.line) == ("KP304", "warning", 6 if inside else 9)


@pytest.mark.parametrize(
    "text",
    [
        "ours = x.name() == NAME or x.name() in (NAME, ONE) or NAME.startswith(NS)",
        "print(NAME, f'{NS}::cache'); log.info('%s', ONE)",
        "if bad: raise ValueError(f'{NAME} is slow')",
        "OTHER = NAME; torch.library.register_fake(OTHER)",
    ],
)
def test_an_operator_s_name_may_be_compared_with_one_and_shown(text):
    assert (
        rewrite([SourceFile("__init__.py", NAMED.format("pass", text).encode())], "demo", HERE).findings == ()
    )


TWO = "import torch.library as t\nA = t.Library('a', 'FRAGMENT')\nB = t.Library('b', 'FRAGMENT')\n"


@pytest.mark.parametrize(
    "text",
    [
        "for lib in (A, B): lib.define('one() -> ()')",
        "def add(lib): lib.define('one() -> ()')",
        "def add(lib, schema): lib.define(schema)",
        "class C:\n  def add(self): self.lib.define(schema='one() -> ()')",
        "def add(schema): A.define(schema)",
        "A.define(f'{name}() -> ()')",
        "A.define('one_' + name + '() -> ()')",
        "LIBS[0].define('one() -> ()')",
        "define = A.define; define = B.define; define('one() -> ()')",
    ],
)
def test_an_operator_of_an_unknown_library_or_name_is_refused_in_namespaces_that_become_one(text):
    (finding,) = rewrite([SourceFile("__init__.py", f"{TWO}{text}\n".encode())], "demo", HERE).findings
    assert (finding.code, finding.severity, finding.line) == ("KP306", "error", 4 + text.count("\n"))
    one = f"{TWO}{text}\n".replace("'b'", "'a'")
    assert rewritten(one) == one.replace("'a'", "'NEW'")


def test_what_defines_no_operator_is_none_of_an_unknown_library():
    text = f"{TWO}parser.define('verbose')\nimport other\nother.lib.define('one() -> ()')\n"
    assert rewritten(text) == text.replace("'a'", "'NEW'").replace("'b'", "'NEW'")


@pytest.mark.parametrize(
    "helper",
    [
        "def reg(lib, name): lib.impl(name, f, 'Meta')\nreg(LIB, '{}')",
        "def reg(lib, name): lib.define(name + '(Tensor x) -> Tensor')\nreg(LIB, name='{}')",
        "class C:\n    def reg(self, name): self.lib.impl(name, f)\nC().reg('{}')",
    ],
)
def test_a_name_with_a_namespace_that_a_function_hands_to_an_unknown_library_is_refused(helper):
    head = "import torch\nLIB = torch.library.Library('demo', 'FRAGMENT')\n"
    with pytest.raises(SourceError, match="leave the namespace out") as caught:
        rewritten(head + helper.format("demo::one"))
    assert caught.value.line == 3 + helper.count("\n")
    text = head + helper.format("one")
    assert rewritten(text) == text.replace("demo", "NEW")


@pytest.mark.parametrize("kind", ["kind='DEF'", "kind=KIND", "*, kind='DEF'"])
def test_the_kind_of_a_library_is_read_from_a_parameter_s_default_or_its_argument(kind):
    text = "import torch.library as t\nKIND = 'DEF'\n"
    text += f"def lib(ns, {kind}): return t.Library(ns, kind)\nlib('a')\nlib('b')\n"
    with pytest.raises(SourceError, match=r"KP306 .* opens 'a' and another one 'b'") as caught:
        rewritten(text)
    assert caught.value.line == 5
    mended = text.replace("lib('b')", "lib('b', kind='FRAGMENT')")
    assert rewritten(mended) == mended.replace("'a'", "'NEW'").replace("'b'", "'NEW'")
    theirs = text.replace("lib('b')", "lib('theirs', kind='IMPL')")
    assert "'theirs'" in rewritten(theirs)


def test_a_parameter_used_for_something_else_is_one_finding():
    text = "import os, torch\ndef op(ns): return torch.library.Library(ns, os.environ[ns + ns], ns)\nop('demo')\n"
    (finding,) = rewrite([SourceFile("__init__.py", text.encode())], "demo", HERE).findings
    assert finding.line == 2


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
    assert (
        "register_fake(op" in (output := rewritten(f"{DEFINES}import torch\n{text}\n"))
        or "demo" not in output
    )


@pytest.mark.parametrize(
    "wrapper",
    [
        'def op(ns, name): return torch.library.custom_op(f"{ns}::{name}")',
        'def op(ns, name):\n    def wrap(f): return torch.library.custom_op(f"{ns}::{name}", f)\n    return wrap',
    ],
)
def test_names_known_only_at_run_time_are_refused_in_namespaces_that_become_one(wrapper):
    text = f'import torch\n{wrapper}\n@op("ka", "add")\ndef f(): ...\n'
    assert rewritten(text) == text.replace("ka", "NEW")
    text += '@op("kb", "add")\ndef g(): ...\n'
    findings = rewrite([SourceFile("__init__.py", text.encode())], "demo", HERE).findings
    assert {(finding.code, finding.severity) for finding in findings} == {("KP306", "error")}
    lines = text.splitlines()
    assert [lines[finding.line - 1] for finding in findings] == ['@op("ka", "add")', '@op("kb", "add")']


def test_a_name_that_begins_with_a_literal_is_not_known_either():
    text = 'import torch\ndef a(x): torch.library.custom_op("ka::" + x)\n'
    text += 'def b(x): torch.library.custom_op(f"kb::p_{x}")\n'
    findings = rewrite([SourceFile("__init__.py", text.encode())], "demo", HERE).findings
    assert [(finding.code, finding.line) for finding in findings] == [("KP306", 2), ("KP306", 3)]


@pytest.mark.parametrize("namespace", ["aten", "vllm"])
def test_a_constant_of_another_library_s_namespace_may_be_used_for_anything(namespace):
    text = f"{DEFINES}import torch\nNS = '{namespace}'\nfind_spec(NS)\nhasattr(torch.ops, NS)\n"
    text += (
        "torch.library.Library(NS, 'FRAGMENT')\n"
        if namespace == "aten"
        else "OWN = 'demo'\ngetattr(torch.ops, OWN)\n"
    )
    output = rewritten(text)
    assert f"NS = '{namespace}'" in output
    assert "'demo'" not in output


@pytest.mark.parametrize(
    "binding",
    [
        'NS: Final[str] = "demo"',
        'NS = \\\n  "demo"',
        'NS = (  # The namespace.\n  "demo"\n)',
        'BASE = "demo"\nNS: Final[str] = BASE',
    ],
)
def test_a_constant_of_a_namespace_is_seen_however_it_is_assigned(binding):
    text = f"import torch\n{binding}\ntorch.library.custom_op(NS + '::add', f)\nC = os.path.join('/c', NS)\n"
    with pytest.raises(SourceError) as caught:
        rewritten(text)
    assert "takes a namespace of operators for something else" in str(caught.value)
    assert caught.value.line == len(text.splitlines())


def test_a_parameter_that_takes_a_namespace_and_is_used_for_something_else_is_refused_there():
    wrapper = (
        "import torch\ndef op(ns, name):\n    {}\n    return torch.library.custom_op(f'{{ns}}::{{name}}')\n"
    )
    text = f"{wrapper}op('demo', 'two')\n"
    with pytest.raises(SourceError, match="takes a namespace of operators for something else") as caught:
        rewritten(text.format("os.environ.get(ns + '_DEBUG')"))
    assert caught.value.line == 3
    kept = text.format("torch.library.Library(ns, 'FRAGMENT')")
    assert rewritten(kept) == kept.replace("demo", "NEW")
