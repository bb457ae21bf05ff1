from __future__ import annotations

import pytest
from kernelpress.contract import compare, compare_files
from kernelpress.errors import CheckError
from kernelpress.spec import load_spec
from kernelpress.variant import build


def changes(old: str, new: str) -> list[tuple[str, str]]:
    def files(text: str) -> dict[str, bytes]:
        head = 'from .m import *\nfrom .m import f, C, X\n__all__ = ["f", "C", "X"]\n'
        return {
            "__init__.py": head.encode(),
            "m.py": (f"X: int = 1\nclass C:\n    pass\ndef f(): ...\n{text}\n").encode(),
        }

    return [(each.effect, str(each)) for each in compare_files(files(old), files(new))]


@pytest.mark.parametrize(
    ("old", "new", "said"),
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
        ("def f(): ...", "f = 3", "f: was a function and is now a attribute"),
        ("class C:\n    def m(self): ...", "class C: ...", "C.m: removed"),
        ("class C:\n    def m(self, a): ...", "class C:\n    def m(self): ...", "C.m: parameter 'a' removed"),
        ("class C:\n    def __init__(self): ...", "class C:\n    def __init__(self, a): ...",
         "C.__init__: required parameter 'a' added"),
        ("class B: ...\nclass C(B): ...", "class B: ...\nclass C: ...", "C: no longer derives from B"),
        ("", "X: str = ''", "X: type changed from int to str"),
    ],
)  # fmt: skip
def test_a_break_is_named(old, new, said):
    assert ("breaks", said) in changes(old, new)


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
    ],
)
def test_what_every_caller_survives_is_no_break(old, new):
    assert [each for each in changes(old, new) if each[0] == "breaks"] == []


def test_a_name_taken_from_all_breaks_and_one_put_in_adds():
    old = {"__init__.py": b"def a(): ...\ndef b(): ...\n__all__ = ['a']\n"}
    new = {"__init__.py": b"def a(): ...\ndef b(): ...\n__all__ = ['b']\n"}
    assert [(each.effect, each.name) for each in compare_files(old, new)] == [("breaks", "a"), ("adds", "b")]


def test_an_addition_says_where_it_stands():
    new = {"__init__.py": b"from .m import f\n__all__ = ['f']\n", "m.py": b"\ndef f(): ...\n"}
    (added,) = compare_files({"__init__.py": b"__all__ = []\n"}, new)
    assert (added.effect, added.path, added.line) == ("adds", "m.py", 2)


def test_a_build_has_the_api_of_itself_in_every_form(make_kernel):
    made = build(load_spec(make_kernel()))
    for old in (made.directory, *(made.directory / variant.name for variant in made.variants)):
        assert compare(old, made) == ()
    nested = {file.path: file.data for file in made.variants[-1].files}
    assert compare(nested, made) == ()


def test_a_build_that_lost_a_function_is_compared_through_its_files(make_kernel):
    root = make_kernel()
    published = {file.path: file.data for file in build(load_spec(root)).variants[0].files}
    path = root / "torch-ext/demo_kernel/twice.py"
    path.write_text(path.read_text().replace("def twice(x: torch.Tensor)", "def twice(x: torch.Tensor, y)"))
    assert [str(each) for each in compare(published, build(load_spec(root)))] == [
        "twice: required parameter 'y' added"
    ]


def test_files_without_a_package_are_refused(make_kernel):
    with pytest.raises(CheckError, match="no Python package"):
        compare({"metadata.json": b"{}"}, build(load_spec(make_kernel())))
