from __future__ import annotations

from pathlib import Path

import pytest
import tomli
from kernelpress.builder.build import build
from kernelpress.errors import SourceError
from kernelpress.publish.card import PublicName, describe, render_card
from kernelpress.spec.load import load_spec


def card(root: Path) -> str:
    return render_card(build(load_spec(root)), "org/demo-kernel")


def functions(root: Path) -> list[PublicName]:
    return describe({file.path: file.data for file in build(load_spec(root)).variants[0].files})[0]


def test_public_functions_are_found_through_imports_with_signature_and_summary(make_kernel):
    names = {member.name: member for member in functions(make_kernel())}
    assert list(names) == ["label", "scale", "twice"]
    assert names["twice"].signature == "twice(x: torch.Tensor) -> torch.Tensor"
    assert names["twice"].summary == "Twice ``x``."
    assert names["label"].signature == "label() -> str"
    assert names["scale"].signature == "scale(x, by: float=common.DEFAULT)"


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("See :func:`twice`.", "See `twice`."),
        ("Like :py:meth:`~torch.Tensor.mul` twice.", "Like `mul` twice."),
        ("A :class:`tensor <torch.Tensor>` and :ref:`more`.", "A `tensor` and `more`."),
        ("Of :math:`x^2`, no :obj:`!None`.", "Of `x^2`, no `None`."),
        (
            "By `the paper <https://example.org/a_b>`_ on it.",
            "By [the paper](https://example.org/a_b) on it.",
        ),
        ("``x`` in `y`: ``a:b`` at 10:30.", "``x`` in `y`: ``a:b`` at 10:30."),
    ],
)
def test_a_summary_is_markdown(make_kernel, docstring, summary):
    text = f'def twice(x):\n    """{docstring}"""\n'
    root = make_kernel(**{"torch-ext/demo_kernel/twice.py": text})
    assert [function.summary for function in functions(root) if function.name == "twice"] == [summary]


def test_a_name_that_is_no_function_stands_by_itself(make_kernel):
    text = "from .nowhere import lost\nSIZE = 3\n__all__ = ('SIZE', 'lost')\n"
    members = functions(make_kernel(**{"torch-ext/demo_kernel/__init__.py": text}))
    assert [(member.name, member.signature) for member in members] == [("SIZE", ""), ("lost", "")]


def test_names_that_are_put_into_all_or_assigned_are_described(make_kernel):
    text = (
        "from .twice import twice as double\nagain = double\n__all__ = ['double']\n__all__.append('again')\n"
    )
    members = functions(make_kernel(**{"torch-ext/demo_kernel/__init__.py": text}))
    assert [str(member) for member in members] == ["double", "again"]
    assert members[1].signature == "again(x: torch.Tensor) -> torch.Tensor"


def test_the_default_card_says_how_to_use_the_kernel_and_what_it_holds(make_kernel):
    root = make_kernel()
    kernel = build(load_spec(root))
    text = render_card(kernel, "org/demo-kernel")
    assert text.startswith("---\nlibrary_name: kernels\nlicense: mit\ntags:\n  - kernels\n")
    assert 'get_kernel("org/demo-kernel", version=1)' in text
    assert "`twice(x: torch.Tensor) -> torch.Tensor`: Twice ``x``." in text
    assert kernel.content_hash in text
    assert all(variant.id in text for variant in kernel.variants)


def test_a_card_of_the_kernels_own_replaces_or_extends_the_default(make_kernel):
    assert card(make_kernel("own", **{"CARD.md": "# {{ name }} v{{ version }}\n"})) == "# demo-kernel v1\n"
    extended = card(
        make_kernel("more", **{"CARD.md": '{% extends "card.md" %}{% block about %}Mine.\n{% endblock %}'})
    )
    assert "Mine.\n" in extended
    assert "## Builds" in extended


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("# x\n{% if %}\n", 2, "no valid template"),
        ("{{ nonsense }}\n", None, "nonsense"),
        ('{% extends "other.md" %}\n', None, "other.md"),
    ],
)
def test_a_card_that_is_no_template_is_refused(make_kernel, text, line, part):
    with pytest.raises(SourceError, match=part) as caught:
        card(make_kernel(**{"CARD.md": text}))
    assert caught.value.path is not None
    assert (caught.value.path.name, caught.value.line) == ("CARD.md", line)


@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("none.png", "none.png, which cannot be read: No such file"),
        ("../other.png", "outside of the project"),
        ("link.png", "outside of the project"),
        ("chart.svg", "no picture"),
        ("build/time.png", "outside of build/"),
    ],
)
def test_a_card_that_shows_what_cannot_be_published_is_refused(make_kernel, tmp_path, address, part):
    root = make_kernel(**{"CARD.md": f"# x\n\n![Time]({address})\n"})
    (tmp_path / "other.png").write_bytes(b"x")
    (root / "link.png").symlink_to(tmp_path / "other.png")
    with pytest.raises(SourceError, match=part) as caught:
        card(root)
    assert caught.value.path == root / "CARD.md"


def test_the_repositorys_own_card_renders(tmp_path):
    root = Path(__file__).parents[3]
    version = tomli.loads((root / "build.toml").read_text())["general"]["version"]
    assert f"version={version}" in render_card(
        build(load_spec(root), out=tmp_path / "build"), "org/scattermoe-lora"
    )


def test_a_card_in_upstreams_own_variables_renders(make_kernel):
    template = (
        "{{ repo_id }} {{ license }} {{ functions[0] }} {% for each in layers %}[{{ each }}]{% endfor %} "
        "{{ has_benchmark }} {{ upstream }}"
    )
    layers = 'import torch\n\n\nclass Twice(torch.nn.Module):\n    """Twice."""\n'
    init = "from . import layers\nfrom .twice import twice\n__all__ = ['twice', 'layers']\n"
    root = make_kernel(
        **{
            "CARD.md": template,
            "torch-ext/demo_kernel/__init__.py": init,
            "torch-ext/demo_kernel/layers.py": layers,
            "benchmarks/benchmark.py": "",
        }
    )
    assert card(root) == "org/demo-kernel MIT twice [Twice] True None"


def test_the_default_card_lists_layers_and_benchmarks(make_kernel):
    init = "from . import layers\n__all__ = ['layers']\n"
    layers = 'class Twice:\n    """Doubles."""\n'
    text = card(
        make_kernel(
            **{
                "torch-ext/demo_kernel/__init__.py": init,
                "torch-ext/demo_kernel/layers/__init__.py": layers,
                "benchmarks/benchmark_twice.py": "",
            }
        )
    )
    assert "- `Twice`: Doubles." in text
    assert "- `benchmarks/benchmark_twice.py`" in text
    assert "kernels benchmark" not in text
