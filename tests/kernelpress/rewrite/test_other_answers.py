"""Whatever answers otherwise in the build than in place has a finding."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from kernelpress.rewrite.rewrite import rewrite
from kernelpress.syntax.source_file import SourceFile
from rewriting import HERE

HEAD = (
    "import re, textwrap, torch\nL = torch.library.Library('{ns}', 'FRAGMENT')\nL.define('one() -> int')\n"
    "L.impl('one', lambda: 1, 'CompositeExplicitAutograd')\nOP = torch.ops.{ns}.one.default\nOUT = []\n"
)
# Statements, and the expression that then has the text.
HOLDERS = (
    ("", "{text}"),
    ("H = {text}\n", "H"),
    ("H = {text}\nK = H\n", "K"),
    ("H: str = (\n  {text}\n)\n", "H"),
    ("if OP: H = {text}\nelse: H = 'other'\n", "H"),
)
COMPARISONS = (
    "{name} == {text}",
    "{name} != {text}",
    "{name} in ({text}, 'x')",
    "{name} in {{{text}}}",
    "{name} in frozenset(['x', {text}])",
    "{name}.startswith({text})",
    "{{{text}: 1}}.get({name})",
    "(lambda n, h={text}: n == h)({name})",
    "bool(re.match({text}, {name}))",
)
CONTAINERS = (
    ("H = ({text}, 'x')\n", "{name} in H"),
    ("H = ['x']\nH = H + [{text}]\n", "{name} in H"),
    ("G = ({text},)\nH = frozenset(G)\n", "{name} in H"),
    ("H = {{{text}: 1}}\n", "H.get({name})"),
    ("H = {{{text}: 1, **{{}}}}\n", "{name} in H and H[{name}]"),
    ("H = [({text},), ('x',)]\n", "{name} in H[0]"),
)
CODES = (
    "eval({text})",
    "eval(compile({text}, 'x', 'eval'))",
    "exec('OUT.append(' + {text} + ')')",
    "exec(textwrap.dedent(' OUT.append({{}})').format({text}))",
    "exec('\\n'.join(['x = 1', 'OUT.append(%s)' % {text}]))",
)
LIBRARIES = (
    "A.define('{op}() -> int')",
    "for lib in (A, B): lib.define('{op}() -> int')",
    "def add(lib, schema): lib.define(schema)\nadd(A, '{op}() -> int')",
    "def add(schema): B.define(schema + '() -> int')\nadd('{op}')",
    "class R:\n    lib = B\n    def add(self): self.lib.define('{op}() -> int')\nR().add()",
    "define = B.define\ndefine(schema='{op}() -> int')",
    "t.define('{b}::{op}', '() -> int')",
    "ALL = [A, B]\nALL[1].define('{op}() -> int')",
    "def make(ns, kind='DEF'): return t.Library(ns, kind)\nKEPT.append(make('{b}'))",
    "KEPT.append(t.Library('{a}', 'DEF'))",
)
NUMBER = itertools.count()
LOADED: list[dict[str, object]] = []  # a Library takes its operators with it when it goes


def run_module(text: str) -> dict[str, object]:
    scope: dict[str, object] = {}
    exec(text, scope)
    LOADED.append(scope)
    return scope


@st.composite
def statements(draw: st.DrawFn) -> str:
    names = (("OP.namespace", "'{ns}'"), ("OP.name()", "'{ns}::one'"), ("OP.name()", "'{ns}::'"))
    name, text = draw(st.sampled_from(names))
    holder, variable = draw(st.sampled_from(HOLDERS))
    form = draw(st.sampled_from(COMPARISONS + CONTAINERS + CODES))
    if isinstance(form, tuple):
        return f"{form[0].format(text=text)}OUT.append({form[1].format(name=name)})\n"
    if form in CODES:
        text = "'torch.ops.{ns}.one()'"
    use = form.format(name=name, text=variable.format(text=text))
    return f"{holder.format(text=text)}OUT.append({use})\n"


@given(statements())
@settings(max_examples=150, deadline=None)
def test_what_answers_otherwise_in_the_build_has_a_finding(statement):
    number = next(NUMBER)
    text = (HEAD + statement).replace("{ns}", f"other{number}")
    result = rewrite([SourceFile("__init__.py", text.encode())], "demo", HERE)
    before = run_module(text)["OUT"]
    try:
        after = run_module(result.files[0].render(f"_other{number}_new").decode())["OUT"]
    except AttributeError as error:
        after = error
    findings = [finding for finding in result.findings if (finding.line or 0) > HEAD.count("\n")]
    assert before == after or "KP304" in {finding.code for finding in findings}


@given(
    st.lists(st.tuples(st.sampled_from(LIBRARIES), st.sampled_from(("one", "two"))), min_size=1, max_size=3)
)
@settings(max_examples=80, deadline=None)
def test_what_loads_in_place_and_not_in_the_build_is_refused(parts):
    number = next(NUMBER)
    a, b = f"lib{number}a", f"lib{number}b"
    text = f"import torch.library as t\nKEPT = []\nA = t.Library('{a}', 'FRAGMENT')\n"
    text += f"B = t.Library('{b}', 'FRAGMENT')\n"
    text += "".join(form.format(op=op, a=a, b=b) + "\n" for form, op in parts)
    try:
        run_module(text)
    except RuntimeError:
        return
    result = rewrite([SourceFile("__init__.py", text.encode())], "demo", HERE)
    if not any(finding.severity == "error" for finding in result.findings):
        run_module(result.files[0].render(f"_lib{number}_new").decode())
