"""Metadata blocks of cards, which anybody may have checked."""

from __future__ import annotations

import httpx2
import pytest
from localhub import RunningHub
from localhub.http.card_metadata import metadata_fault


def bomb(merge: bool) -> str:
    lines = ["a0: &a0 {" + ", ".join(f"k{number}: 1" for number in range(10)) + "}"]
    for number in range(1, 9):
        references = ", ".join([f"*a{number - 1}"] * 9)
        lines.append(f"a{number}: &a{number} " + (f"{{<<: [{references}]}}" if merge else f"[{references}]"))
    return "\n".join(lines)


@pytest.mark.parametrize("merge", [False, True])
def test_a_block_that_stands_for_more_than_it_holds_is_refused_at_once(hub: RunningHub, merge: bool) -> None:
    body = {"content": f"---\n{bomb(merge)}\n---\n"}
    answer = httpx2.post(f"{hub.endpoint}/api/validate-yaml", json=body, timeout=60)
    assert answer.status_code == 400
    assert "aliases are not taken" in answer.text


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("a: 1\nb: *a", "aliases are not taken"),
        ("a: {<<: {b: 1}}", "merge keys are not taken"),
        ("a: b\n" * 20_000, "longer than 64 KiB"),
        ("[" * 20_000, "not valid YAML"),
        ("- a", "must be a YAML mapping"),
    ],
)
def test_what_is_wrong_with_a_block_is_said(block: str, reason: str) -> None:
    assert reason in str(metadata_fault(f"---\n{block}\n---\ntext"))


@pytest.mark.parametrize(
    "block", ["", "license: mit\ntags: [kernel, 'a&b']\n", "a: &unused b\n", "date: 2026-01-01"]
)
def test_an_ordinary_block_is_taken(block: str) -> None:
    assert metadata_fault(f"---\n{block}\n---\ntext") is None


def test_a_block_after_blank_lines_is_one() -> None:
    assert "must be an array" in str(metadata_fault("\n\n---\nmodel-index: foo\n---\n"))


RESULT = "{task: {type: t}, dataset: {type: d, name: D}, metrics: [{type: m, value: 1}]}"


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("foo", "must be an array"),
        ("{name: m, results: []}", "must be an array"),
        ("[foo]", 'needs a "name"'),
        ("[{results: []}]", 'needs a "name"'),
        ("[{name: m, results: foo}]", "lack something"),
        ("[{name: m, results: [{task: {type: t}}]}]", "lack something"),
        (f"[{{name: m, results: [{RESULT.replace('value: 1', 'x: 1')}]}}]", "lack something"),
    ],
)
def test_a_model_index_that_cannot_be_read_back_is_refused(index: str, reason: str) -> None:
    fault = metadata_fault(f"---\nmodel-index: {index}\n---\n")
    assert fault is not None
    assert reason in fault


@pytest.mark.parametrize(
    "index", ["[]", "[{name: m, results: []}]", f"[{{name: m, results: [{RESULT}]}}]", ""]
)
def test_a_model_index_that_is_whole_is_taken(index: str) -> None:
    assert metadata_fault(f"---\nmodel-index: {index}\n---\n") is None


def test_a_card_without_metadata_is_taken_with_a_warning(hub: RunningHub) -> None:
    answer = httpx2.post(
        f"{hub.endpoint}/api/validate-yaml", json={"content": "# Title", "repoType": "model"}
    )
    assert (answer.status_code, len(answer.json()["warnings"])) == (200, 1)
