"""Any module answers the same before and after a rewrite."""

from __future__ import annotations

import ast
import itertools

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kernelpress.syntax.source_file import SourceFile
from rewriting import rewrite_or_raise

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
    '        self.lib.impl("{op}", lambda x: x * {k}, "CPU")\nkept_{op} = R_{op}()\n',
    'LIB.define("{op}(Tensor x) -> Tensor")\nLIB.impl("{op}", lambda x: x * {k}, "CPU")\n',
    'LIB.define("{op}(Tensor x) -> Tensor")\nLIB.impl("{ns}::{op}", lambda x: x * {k}, "CPU")\n',
    'LIB.define(schema="{op}(Tensor x) -> Tensor")\n'
    'LIB.impl(op_name="{ns}::{op}", fn=lambda x: x * {k}, dispatch_key="CPU")\n',
    'any_{op} = getattr(torch.library, "no_such", None)\nany_{op} = torch.library.custom_op\n'
    '@any_{op}("{ns}::{op}", mutates_args=())\ndef {op}(x: torch.Tensor) -> torch.Tensor:\n    return x * {k}\n',
    'if X is not None: def_{op} = lib.define\n'
    'lib.define("{ns}::{op}", "(Tensor x) -> Tensor"); lib.impl("{ns}::{op}", "cpu", lambda x: x * {k})\n',
    'd_{op} = lib.define; i_{op} = lib.impl\n'
    'd_{op}("{ns}::{op}", "(Tensor x) -> Tensor"); i_{op}("{ns}::{op}", "cpu", lambda x: x * {k})\n',
    'ä = "ü"; _ = co("{ns}::" "{op}", mutates_args=())(lambda: None) if not ä else None\n'
    '@co(\n\t"{ns}::{op}",  # ö\n\tmutates_args=())\ndef {op}(x: torch.Tensor) -> torch.Tensor:\n\treturn x * {k}\n',
    'if lib.define("{ns}::{op}", "(Tensor x) -> Tensor") is None:\n'
    '    ö = "{op}"; lib.impl(f"{ns}::{{ö}}", "cpu", lambda x: x * {k})\n',
    'class C_{op}:\n    @staticmethod\n    @co("{ns}::{op}", mutates_args=())\n'
    '    def run(x: torch.Tensor) -> torch.Tensor:\n        return x * {k}\n',
    'OTHER_{op} = LIB\nOTHER_{op}.define("{op}(Tensor x) -> Tensor")\n'
    'OTHER_{op}.impl("{ns}::{op}", lambda x: x * {k}, "CPU")\n',
)  # fmt: skip
USES = (
    "OUT.append(torch.ops.{ns}.{op}(X))\n",
    "OUT.append(ops.{ns}.{op}.default(X))\n",
    'OUT.append(getattr(getattr(torch.ops, "{ns}"), "{op}")(X))\n',
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
        f"{head}import torch\nfrom torch import library as lib, ops\n"
        "from torch.library import custom_op as co\n"
        f'LIB = torch.library.Library("{ns}", "FRAGMENT")\n'
    )
    for index, (registration, others, factor) in enumerate(pieces):
        for piece in (registration, *others):
            text += piece.format(ns=ns, op=f"op{index}", k=factor)
    before = text.replace("\n", newline).encode()
    (file,) = rewrite_or_raise([SourceFile("__init__.py", before)]).files
    after = file.render(new)
    assert after.count(newline.encode()) == before.count(newline.encode())
    assert ast.dump(ast.parse(after.replace(new.encode(), ns.encode()))) == ast.dump(ast.parse(before))
    assert run_module(after) == run_module(before)
    registered = {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert {ns, new} <= registered
