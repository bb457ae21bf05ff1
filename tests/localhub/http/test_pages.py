"""The web pages: what they show, and that nothing of what they show can act."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, HfApi
from hypothesis import given
from hypothesis import strategies as st
from localhub import RunningHub
from localhub.http import pages
from localhub.http.app import create_app
from localhub.http.pages import render_card
from localhub.names import RepoId
from markupsafe import Markup
from starlette.testclient import TestClient

NewRepo = Callable[..., str]
HOSTILE = (
    "---\nlicense: mit\n---\n# Title\n\n<script>document.title='owned'</script>\n\n"
    "[click](javascript:alert(1)) <img src=x onerror=\"document.title='owned'\"> ![i](javascript:alert(1))\n"
)


class Tags(HTMLParser):
    """Every element and attribute of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def harmless(text: str) -> bool:
    for tag, attributes in Tags(text).elements:
        if tag in {"script", "iframe", "object", "embed", "style", "form", "base", "svg"}:
            return False
        for name, value in attributes.items():
            link = (value or "").strip().lower()
            if name.startswith("on") or (
                name in {"href", "src"} and link.startswith(("javascript:", "vbscript:"))
            ):
                return False
    return True


@given(st.text() | st.lists(st.sampled_from([
    "<script>", "</script>", "[a](", "javascript:", "java\nscript:", "alert(1))", "<img src=x onerror=1>", "&#106;",
    "```", "`", "\n", "> ", "<a href='javascript:1'>", "![", "](", "\"", "'", "<!--", "-->", "<svg/onload=1>",
])).map("".join))  # fmt: skip
def test_no_card_renders_to_anything_that_acts(card: str) -> None:
    assert harmless(render_card(card))


def page(hub: RunningHub, path: str) -> str:
    answer = httpx2.get(f"{hub.endpoint}{path}")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    return answer.text


def test_a_repository_without_a_version_has_a_page(hub: RunningHub, new_repo: NewRepo) -> None:
    assert "main" in page(hub, f"/kernels/{new_repo()}")


def published(api: HfApi, repo: str) -> None:
    for version, text in ((1, b"old line\n"), (2, b"new <b>line</b>\n")):
        operations = [
            CommitOperationAdd("build/torch-cpu/__init__.py", text),
            CommitOperationAdd("README.md", HOSTILE.encode()),
        ]
        api.create_commit(repo, operations, commit_message=f"Build <{version}>", repo_type="kernel")
        api.create_branch(repo, branch=f"v{version}", repo_type="kernel")


def test_the_pages_show_versions_variants_card_commits_and_changes(
    hub: RunningHub, api: HfApi, new_repo: NewRepo
) -> None:
    repo = new_repo()
    published(api, repo)
    assert f'href="/kernels/{repo}"' in page(hub, f"/?search={repo[:8].upper()}")
    shown = page(hub, f"/kernels/{repo}")
    assert "<h1>Title</h1>" in shown
    assert "torch-cpu" in shown
    assert "license: mit" not in shown
    assert f"/kernels/{repo}/compare/v1...v2" in shown
    changed = page(hub, f"/kernels/{repo}/compare/v1...v2")
    assert '<span class="del">-old line' in changed
    assert "+new &lt;b&gt;line&lt;/b&gt;" in changed
    listed = page(hub, f"/kernels/{repo}/commits/v2")
    assert "Build &lt;2&gt;" in listed
    oid = api.list_repo_commits(repo, repo_type="kernel")[0].commit_id
    assert "+new &lt;b&gt;" in page(hub, f"/kernels/{repo}/commit/{oid}")
    assert "__init__.py" in page(hub, f"/kernels/{repo}/tree/v2/build/torch-cpu")


def test_a_card_is_rendered_once_and_a_long_one_never(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []

    def render(text: str, files: str) -> Markup:
        rendered.append(len(text))
        return render_card(text, files)

    monkeypatch.setattr(pages, "render_card", render)
    app = create_app(root, open_writes=True)
    client = TestClient(app)
    app.state.hub.store.create(RepoId("kernel", "org", "k"), private=False, author="a")

    def put(card: str) -> None:
        header = {"key": "header", "value": {"summary": "card"}}
        file = {"key": "file", "value": {"path": "README.md", "content": card}}
        answer = client.post("/api/kernels/org/k/commit/main", content=f"{json.dumps(header)}\n{json.dumps(file)}",
                             headers={"Host": "localhost"})  # fmt: skip
        assert answer.status_code == 200

    for card, shown in (("# One", "<h1>One</h1>"), ("# Two", "<h1>Two</h1>"), ("# One", "<h1>One</h1>")):
        put(card)
        for _ in range(3):
            assert shown in client.get("/kernels/org/k").text
    assert rendered == [5, 5]
    put("[" * (128 << 10) + "]")
    page = client.get("/kernels/org/k")
    assert (page.status_code, rendered) == (200, [5, 5])
    assert "longer than 128 KiB" in page.text


def test_what_is_not_there_is_not_found(hub: RunningHub, new_repo: NewRepo) -> None:
    repo = new_repo()
    for path in ("/kernels/org/none", f"/kernels/{repo}/tree/none", f"/kernels/{repo}/compare/v1", "/api/nothing",
                 f"/kernels/{repo}/discussions/9", f"/kernels/{repo}/discussions/x"):  # fmt: skip
        assert httpx2.get(f"{hub.endpoint}{path}").status_code == 404, path


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium here")
def test_a_browser_shows_the_page_on_a_phone_and_runs_nothing_of_the_card(
    hub: RunningHub, api: HfApi, new_repo: NewRepo, tmp_path: Path
) -> None:
    repo = new_repo()
    published(api, repo)
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
        "--window-size=390,800", "--virtual-time-budget=2000",
    ]  # fmt: skip
    address = f"{hub.endpoint}/kernels/{repo}"
    browser = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, timeout=90)
    assert "<h1>Title</h1>" in browser.stdout
    assert f"<title>{repo}</title>" in browser.stdout
    picture = tmp_path / "page.png"
    subprocess.run([*command, f"--screenshot={picture}", address], capture_output=True, timeout=90)
    assert picture.stat().st_size > 5000
