"""The documentation names only what exists: tests, files and headings."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md"))]
PROMISES = [page for page in PAGES if page.name == "promises.md"]


def defined_tests() -> set[str]:
    sources = (path.read_text("utf-8") for path in REPOSITORY.glob("tests/**/test_*.py"))
    return {
        name
        for source in sources
        for name in re.findall(r"^ *(?:async )?def (test_\w+)\(", source, re.MULTILINE)
    }


def anchors(page: Path) -> set[str]:
    """The fragments by which a page's headings are linked, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_promise_names_tests_that_exist() -> None:
    tests = defined_tests()
    rows = [
        (page, row)
        for page in PROMISES
        for row in page.read_text("utf-8").splitlines()
        if row.startswith("| ") and row != "| promise | test |"
    ]
    assert len({page for page, _ in rows}) == 2
    for page, row in rows:
        names = re.findall(r"`(test_\w+)`", row)
        assert names, f"{page}: no test: {row}"
        assert tests.issuperset(names), f"{page}: {set(names) - tests}"


def test_every_path_that_a_page_names_exists() -> None:
    missing = {
        f"{page.relative_to(REPOSITORY)}: {path}"
        for page in PAGES
        for path in re.findall(
            r"(?<![\w/.-])((?:tests|benchmarks|recipes|torch-ext)/[\w/.-]+\.py)\b", page.read_text("utf-8")
        )
        if not (REPOSITORY / path).is_file()
    }
    assert not missing


def test_every_link_between_pages_leads_somewhere() -> None:
    dead = set()
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
            if "://" in target:
                continue
            name, _, fragment = target.partition("#")
            linked = (page.parent / name).resolve() if name else page
            if not linked.exists() or (fragment and fragment not in anchors(linked)):
                dead.add(f"{page.relative_to(REPOSITORY)}: {target}")
    assert not dead
