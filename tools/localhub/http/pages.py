"""Web pages for people: repositories, cards, versions, commits and differences. No script runs on them."""

from __future__ import annotations

import difflib
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from urllib.parse import quote

import jinja2
import tomli
from markdown_it import MarkdownIt
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from ..git.objects import ObjectCache
from ..git.refs import PULLS
from ..git.repository import DEFAULT_BRANCH, Repository
from ..names import RESERVED_NAMESPACES
from .context import WEB_REPOS, Target, hub_of
from .messages import iso_time, number, segment
from .problems import entry_not_found
from .pull_requests import load_all, load_named
from .trees import folder_path

_HEADERS = {
    # The second wall behind escaping: even markup that got through could load and run nothing.
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
# An address that does not begin beside the card.
_ABSOLUTE = re.compile(r"[a-z][a-z0-9+.-]*:|/|#|$", re.IGNORECASE)
_FRONT_MATTER = re.compile(r"\A---[ \t]*\r?\n.*?^---[ \t]*$", re.DOTALL | re.MULTILINE)
# Markdown of nothing but brackets takes time by the square of its length.
_MAX_CARD = 128 << 10
_MAX_TEXT = 256 << 10
_MAX_LINES = 5000
_MAX_FILES = 200
_LISTED = 200
_COMMITS = 50
_TEMPLATES = Path(__file__).parent / "templates"
_STYLE = (_TEMPLATES / "style.css").read_bytes()
_markdown = MarkdownIt("js-default")
# Everything put into a template is escaped, except a card that `render_card` has made.
_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_TEMPLATES),
    autoescape=True,
    auto_reload=False,
    undefined=jinja2.StrictUndefined,
)
# By the blob that a card was made of, and where its pictures are: the same for everybody.
_cards = ObjectCache(max_bytes=16 << 20)
_rendering = threading.Lock()
_templates.filters["day"] = lambda seconds: iso_time(seconds)[:10]


@dataclass(frozen=True)
class FileChange:
    """A file that differs between two trees.

    Args:
        path: Its path.
        kind: ``added``, ``removed`` or ``changed``.
        lines: The lines of a unified diff, each with its CSS class; None where they are not shown.
    """

    path: str
    kind: str
    lines: list[tuple[str, str]] | None


def render_card(text: str, files: str = "") -> Markup:
    """A card as HTML that is safe to show: its own HTML is shown as text, and only web links are links.

    Pictures' relative addresses begin at ``files``.
    """
    blocks = _markdown.parse(_FRONT_MATTER.sub("", text, count=1))
    for token in (child for block in blocks for child in block.children or ()):
        if token.type == "image" and not _ABSOLUTE.match(str(token.attrs["src"])):
            token.attrs["src"] = f"{files}{token.attrs['src']}"
    return Markup(_markdown.renderer.render(blocks, _markdown.options, {}))


def _card(git: Repository, commit: str, files: str) -> Markup | None:
    """The rendered card of a commit; None if it has none."""
    info = git.path_info(commit, "README.md")
    if info is None or not info.entry.is_file:
        return None
    if info.large is not None or (info.size or 0) > _MAX_CARD:
        return Markup("<p>The card is longer than {} KiB; it is shown among the files only.</p>").format(
            _MAX_CARD >> 10
        )
    # One at a time, so that no card is rendered twice, and none keeps more than one thread busy.
    with _rendering:
        card = _cards.get((info.entry.oid, files))
        if card is None:
            card = render_card(git.read(info.entry.oid).decode("utf-8", "replace"), files)
            _cards.put((info.entry.oid, files), card, len(card))
    assert isinstance(card, Markup)
    return card


def style(request: Request) -> Response:
    return Response(_STYLE, media_type="text/css", headers={"Cache-Control": "max-age=3600"})


def index(request: Request) -> Response:
    hub = hub_of(request)
    caller = hub.caller(request)
    search = request.query_params.get("search", "")
    repositories = sorted(hub.listed(caller, search), key=lambda item: (-item[1].time, str(item[0].id)))
    return _page("list", title="Hub", search=search, repositories=repositories[:_LISTED])


def repository(request: Request) -> Response:
    target = _target(request)
    git = target.git
    branches = git.branches()
    names = sorted((name for name in branches if re.fullmatch(r"v\d+", name)), key=lambda name: int(name[1:]))
    pairs = zip(names, ["", *names], strict=False)
    versions = [_version(git, name, branches[name], before) for name, before in pairs]
    return _page(
        "repo",
        target,
        versions=versions[::-1],
        pulls=list(islice(load_all(git), _LISTED)),
        card=_card(git, git.resolve(DEFAULT_BRANCH), f"/{target.id.web_path}/resolve/{DEFAULT_BRANCH}/"),
    )


def tree(request: Request) -> Response:
    target = _target(request)
    revision = segment(request, "ref")
    path = folder_path(request)
    entries = []
    for info in target.git.describe(target.git.walk(target.git.resolve(revision), path, recursive=False)):
        verb = "tree" if info.entry.is_folder else "resolve"
        quoted = quote(info.path.encode("utf-8", "surrogateescape"))
        href = f"/{target.id.web_path}/{verb}/{quote(revision, safe='')}/{quoted}"
        name = info.path.rsplit("/", 1)[-1] + ("/" if info.entry.is_folder else "")
        entries.append({"name": name, "href": href, "size": info.size})
    return _page("tree", target, path=path, revision=revision, entries=entries)


def commits(request: Request) -> Response:
    target = _target(request)
    revision = segment(request, "ref")
    start = number(request, "p", 0, lowest=0)
    history = target.git.history(target.git.resolve(revision))
    page = list(islice(history, start * _COMMITS, (start + 1) * _COMMITS + 1))
    following = f"?p={start + 1}" if len(page) > _COMMITS else None
    return _page("commits", target, revision=revision, commits=page[:_COMMITS], next=following)


def commit(request: Request) -> Response:
    target = _target(request)
    oid = target.git.resolve(segment(request, "ref"))
    info = target.git.commit_info(oid)
    parent = info.parents[0] if info.parents else None
    return _diff_page(target, info.title, parent, oid, info.description)


def compare(request: Request) -> Response:
    target = _target(request)
    before, dots, after = segment(request, "range").partition("...")
    if not dots:
        raise entry_not_found("name two revisions, as in v1...v2")
    return _diff_page(
        target, f"{before} → {after}", target.git.resolve(before), target.git.resolve(after), ""
    )


def pull_request(request: Request) -> Response:
    target = _target(request)
    pull = load_named(target.git, request)
    head = target.git.resolve(f"{PULLS}{pull.number}")
    heading = f"#{pull.number} {pull.title} ({pull.status}, by {pull.author})"
    return _diff_page(target, heading, pull.base, head, pull.description)


def _diff_page(target: Target, heading: str, before: str | None, after: str, text: str) -> Response:
    changes = list(islice(_changes(target.git, before, after), _MAX_FILES + 1))
    cut = "" if len(changes) <= _MAX_FILES else f", of which the first {_MAX_FILES} are shown"
    return _page("diff", target, title=heading, text=text, changes=changes[:_MAX_FILES], cut=cut)


def _changes(git: Repository, before: str | None, after: str) -> Iterable[FileChange]:
    old, new = ({} if commit is None else _blobs(git, commit) for commit in (before, after))
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            kind = "added" if path not in old else "removed" if path not in new else "changed"
            yield FileChange(path, kind, _lines(git, old.get(path), new.get(path)))


def _blobs(git: Repository, commit: str) -> dict[str, str]:
    return {path: entry.oid for path, entry in git.files(commit).items() if entry.is_file}


def _lines(git: Repository, old: str | None, new: str | None) -> list[tuple[str, str]] | None:
    texts = []
    for oid in (old, new):
        if oid is not None and git.size(oid) > _MAX_TEXT:
            return None
        data = b"" if oid is None else git.read(oid)
        if b"\0" in data:
            return None
        texts.append(data.decode("utf-8", "replace").splitlines())
    if sum(map(len, texts)) > _MAX_LINES:
        return None
    diff = islice(difflib.unified_diff(texts[0], texts[1], lineterm="", n=3), 2, None)
    return [({"+": "add", "-": "del"}.get(line[:1], ""), line) for line in diff]


def _version(git: Repository, name: str, oid: str, before: str) -> dict[str, object]:
    folder = git.entry(oid, "build")
    below = [] if folder is None or not folder.is_folder else git.walk(oid, "build", recursive=False)
    yanked = None
    text = _text(git, oid, "kernel-yanked.toml", _MAX_TEXT)
    if text is not None:
        try:
            yanked = str(tomli.loads(text).get("reason"))
        except tomli.TOMLDecodeError:
            yanked = "(the reason cannot be read)"
    return {
        "name": name,
        "commit": oid,
        "time": git.commit_info(oid).time,
        "variants": [path.removeprefix("build/") for path, entry in below if entry.is_folder],
        "yanked": yanked,
        "before": before,
    }


def _text(git: Repository, commit: str, path: str, most: int) -> str | None:
    info = git.path_info(commit, path)
    if info is None or not info.entry.is_file or info.large is not None or (info.size or 0) > most:
        return None
    return git.read(info.entry.oid).decode("utf-8", "replace")


def _target(request: Request) -> Target:
    if segment(request, "namespace") in RESERVED_NAMESPACES:
        raise HTTPException(404)
    return hub_of(request).readable(request, content=True)


def _page(name: str, target: Target | None = None, *, title: str | None = None, **values: object) -> Response:
    repo = None if target is None else target.id
    text = _templates.get_template(f"{name}.html").render(title=title or str(repo), repo=repo, **values)
    # A file name or a commit may hold what is no valid Unicode.
    return HTMLResponse(text.encode("utf-8", "replace"), headers=_HEADERS)


_PAGES = {
    "/tree/{ref}": tree,
    "/tree/{ref}/{path:path}": tree,
    "/commits/{ref}": commits,
    "/commit/{ref}": commit,
    "/compare/{range}": compare,
    "/discussions/{number}": pull_request,
    "": repository,
}

routes = [
    Route("/", index),
    Route("/style.css", style),
    *(Route(repo + path, page) for repo in WEB_REPOS for path, page in _PAGES.items()),
]
