from __future__ import annotations

import pytest
from kernelpress.api.baseline import read_variant
from kernelpress.api.compare import compare
from kernelpress.builder.build import build
from kernelpress.builder.model import Variant
from kernelpress.errors import CheckError
from kernelpress.spec.load import load_spec

OVERLOADS = (
    "from typing import overload\n@overload\ndef f(a: int) -> int: ...\n@overload\ndef f(a: str) -> str: ...\n"
    "def f(a): ...\n"
)
PROPERTY = "class C:\n    @property\n    def p(self): ...\n    @p.setter\n    def p(self, value): ...\n"


def contents(variant: Variant) -> dict[str, bytes]:
    return {file.path: file.data for file in variant.files}


def changes(old: str, new: str) -> list[tuple[str, str]]:
    def files(text: str) -> dict[str, bytes]:
        head = 'from .m import *\nfrom .m import f, C, X\n__all__ = ["f", "C", "X"]\n'
        return {
            "__init__.py": head.encode(),
            "m.py": (f"X: int = 1\nclass C:\n    pass\ndef f(): ...\n{text}\n").encode(),
        }

    return [(change.effect, str(change)) for change in compare(files(old), files(new))]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def f(a, b): ...", "def f(a): ...", "f: parameter 'b' removed"),
        ("def f(a): ...", "def f(a, b): ...", "f: required parameter 'b' added"),
        ("def f(a, b): ...", "def f(b, a): ...", "f: parameter 'a' moved"),
        ("def f(a, b=1): ...", "def f(a, b=2): ...", "f: default of 'b' changed from 1 to 2"),
        ("def f(a=1): ...", "def f(a): ...", "f: parameter 'a' is now required"),
        ("def f(a): ...", "def f(*, a): ...", "f: parameter 'a' was positional or keyword and is now keyword-only"),
        ("def f(*a): ...", "def f(): ...", "f: no longer takes *a"),
        ("def f(**a): ...", "def f(): ...", "f: no longer takes **a"),
        ("def f() -> int: ...", "def f() -> str: ...", "f: return annotation changed from int to str"),
        ("def f() -> int: ...", "def f(): ...", "f: return annotation changed from int to none"),
        ("def f(): ...", "f = 3", "f: was a function and is now an attribute"),
        ("class C:\n    def m(self): ...", "class C: ...", "C.m: removed"),
        ("class C:\n    def m(self, a): ...", "class C:\n    def m(self): ...", "C.m: parameter 'a' removed"),
        ("class C:\n    def __init__(self): ...", "class C:\n    def __init__(self, a): ...",
         "C.__init__: required parameter 'a' added"),
        ("class B: ...\nclass C(B): ...", "class B: ...\nclass C: ...", "C: no longer derives from B"),
        ("", "X: str = ''", "X: type changed from int to str"),
        ("def f(): ...", "async def f(): ...", "f: is now awaited"),
        ("async def f(): ...", "def f(): ...", "f: need no longer be awaited"),
        ("class C:\n    @staticmethod\n    def m(a): ...", "class C:\n    def m(a): ...",
         "C.m: is no longer a static method"),
        ("class C:\n    def m(a): ...", "class C:\n    @classmethod\n    def m(a): ...", "C.m: is now a class method"),
        (PROPERTY, PROPERTY.partition("    @p.setter")[0], "C.p: can no longer be set"),
        ("class B:\n    def m(self, a): ...\nclass C(B): ...", "class B: ...\nclass C(B): ...", "C.m: removed"),
        ("class C:\n    def m(self, a): ...", "class B:\n    def m(self): ...\nclass C(B): ...",
         "C.m: parameter 'a' removed"),
        (OVERLOADS, OVERLOADS.replace("@overload\ndef f(a: str) -> str: ...\n", ""), "f: overload (a: str) removed"),
        ("class C:\n    def __len__(self): ...", "class C: ...", "C.__len__: removed"),
        (OVERLOADS, OVERLOADS.replace("a: str", "a: bytes"), "f: overload (a: str) removed"),
        (OVERLOADS, "def f(a): ...", "f: overload (a: int) removed"),
    ],
)  # fmt: skip
def test_a_break_is_named(old, new, message):
    assert ("breaks", message) in changes(old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def f(a): ...", "def f(a, b=1): ..."),
        ("def f(a, /): ...", "def f(a): ..."),
        ("def f(*, a): ...", "def f(a): ..."),
        ("def f(a): ...", "def f(a, *args, **kwargs): ..."),
        ("class C: ...", "class C:\n    def m(self): ..."),
        ("class C:\n    def m(self): ...", "class B:\n    def m(self): ...\nclass C(B): ..."),
        ("def f(): return 1", "def f(): return 2"),
        ("def hidden(): ...", ""),
        (OVERLOADS, OVERLOADS.replace("@overload", "@overload\ndef f(a: bytes) -> int: ...\n@overload", 1)),
        (OVERLOADS, OVERLOADS.replace("a: str", "a: str, b: int = 0")),
        ("class C:\n    p = 1", PROPERTY),
        ("class C:\n    def __add__(self, a): ...", "class C:\n    def __add__(self, b): ..."),
        ("class C:\n    def _own(self): ...\n    def __repr__(self): ...", "class C: ..."),
    ],
)
def test_what_every_caller_survives_is_no_break(old, new):
    assert [change for change in changes(old, new) if change[0] == "breaks"] == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("class L: ...", "class M: ...", [("adds", "layers.M: new"), ("breaks", "layers.L: removed")]),
        ("def f(a): ...", "def f(a, b): ...", [("breaks", "layers.f: required parameter 'b' added")]),
        ("__all__ = ['f']\ndef f(): ...", "__all__ = []\ndef f(): ...",
         [("breaks", "layers.f: removed from __all__")]),
        ("import os\ndef f(): ...\ndef _g(): ...", "import re\ndef f(): ...", []),
    ],
)  # fmt: skip
def test_what_a_public_module_holds_is_public(old, new, message):
    head = b"__all__ = ['layers']\nfrom . import layers\n"
    api_changes = compare(
        {"__init__.py": head, "layers.py": old.encode()}, {"__init__.py": head, "layers.py": new.encode()}
    )
    assert sorted((change.effect, str(change)) for change in api_changes) == message


def test_a_public_module_that_imports_its_package_is_compared_once():
    head = b"__all__ = ['layers', 'f']\nfrom . import layers\ndef f(): ...\n"
    layers = b"__all__ = ['package', 'g']\nimport kernel as package\ndef g(): ...\n"
    new = {"__init__.py": head, "layers.py": layers.replace(b"g()", b"g(a)")}
    api_changes = compare({"__init__.py": head, "layers.py": layers}, new)
    assert ("breaks", "layers.g: required parameter 'a' added") in [
        (change.effect, str(change)) for change in api_changes
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("def g(a): ...\nf = g", "def g(a, b): ...\nf = g", ["f: required parameter 'b' added"]),
        ("def g(a): ...\nf = g", "def f(a): ...", []),
        ("D = 1\ndef f(a=D): ...", "D = 2\ndef f(a=D): ...", ["f: default of 'a' changed from 1 to 2"]),
        ("D = 1\ndef f(a=D): ...", "def f(a=1): ...", []),
        ("def f(a=None): ...\nclass C:\n    g = f", "def f(a=1): ...\nclass C:\n    g = f",
         ["C.g: default of 'a' changed from None to 1", "f: default of 'a' changed from None to 1"]),
    ],
)  # fmt: skip
def test_names_are_followed_to_what_they_stand_for(old, new, message):
    assert sorted(text for effect, text in changes(old, new) if effect == "breaks") == message


def test_a_name_taken_from_all_breaks_and_one_put_in_adds():
    old = {"__init__.py": b"def a(): ...\ndef b(): ...\n__all__ = ['a']\n"}
    new = {"__init__.py": b"def a(): ...\ndef b(): ...\n__all__ = ['b']\n"}
    assert [(change.effect, change.name) for change in compare(old, new)] == [("breaks", "a"), ("adds", "b")]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("def f(a): ...", "from torch import add as f",
         "f: is now taken from torch.add, where nothing can be compared"),
        ("def f(a): ...", "from .m import f", "f: is now taken from torch.add, where nothing can be compared"),
        ("from torch import add as f", "from torch import sub as f",
         "f: is now taken from torch.sub, where nothing can be compared"),
        ("def f(a): ...", "", "f: still in __all__ and no longer defined"),
    ],
)  # fmt: skip
def test_a_name_that_no_longer_stands_for_code_of_the_package_breaks(before, after, message):
    files = [
        {"__init__.py": f"__all__ = ['f']\n{text}\n".encode(), "m.py": b"from torch import add as f\n"}
        for text in (before, after)
    ]
    assert [(change.effect, str(change), change.path) for change in compare(*files)] == [
        ("breaks", message, "__init__.py")
    ]


@pytest.mark.parametrize(
    "text",
    ["from torch import add as f", "from .m import f", "from torch import *", "def __getattr__(n): ..."],
)
def test_a_name_taken_from_elsewhere_all_along_is_no_break(text):
    files = {"__init__.py": f"__all__ = ['f']\n{text}\n".encode(), "m.py": b"from torch import add as f\n"}
    assert compare(files, files) == ()


@pytest.mark.parametrize("grown", ["append('f')", "extend(['f'])", "insert(0, 'f')"])
def test_names_put_into_all_by_a_call_are_public(grown):
    old = {"__init__.py": f"__all__ = ['g']\n__all__.{grown}\ndef g(): ...\ndef f(a, b): ...\n".encode()}
    new = {name: data.replace(b"a, b", b"a") for name, data in old.items()}
    assert [str(change) for change in compare(old, new)] == ["f: parameter 'b' removed"]
    new = {"__init__.py": b"__all__ = ['g', 'f']\n__all__.remove('f')\ndef g(): ...\ndef f(a, b): ...\n"}
    assert [str(change) for change in compare(old, new)] == ["f: removed from __all__"]


def test_an_addition_says_where_it_stands():
    new = {"__init__.py": b"from .m import f\n__all__ = ['f']\n", "m.py": b"\ndef f(): ...\n"}
    (added,) = compare({"__init__.py": b"__all__ = []\n"}, new)
    assert (added.effect, added.path, added.line) == ("adds", "m.py", 2)


def test_a_build_has_the_api_of_itself_in_every_form(make_kernel):
    kernel = build(load_spec(make_kernel()))
    new = contents(kernel.variants[0])
    for old in (kernel.directory, *(kernel.directory / variant.name for variant in kernel.variants)):
        assert compare(read_variant(old), new) == ()
    for variant in kernel.variants:
        assert compare(contents(variant), new) == ()


def test_a_build_that_lost_a_function_is_compared_through_its_files(make_kernel):
    root = make_kernel()
    published = contents(build(load_spec(root)).variants[0])
    path = root / "torch-ext/demo_kernel/twice.py"
    path.write_text(path.read_text().replace("def twice(x: torch.Tensor)", "def twice(x: torch.Tensor, y)"))
    assert [str(change) for change in compare(published, contents(build(load_spec(root)).variants[0]))] == [
        "twice: required parameter 'y' added"
    ]


def test_files_without_a_package_are_refused():
    with pytest.raises(CheckError, match="no Python package"):
        compare({"metadata.json": b"{}"}, {"__init__.py": b""})
