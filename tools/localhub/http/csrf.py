"""Protection against web pages of other sites, which make their reader's browser send requests.

A Hub on a loopback address is reached by every page that its user looks at. A page's request to another
site carries ``Origin`` or ``Sec-Fetch-Site``, which the page cannot leave out; one whose own name was made
to lead here (DNS rebinding) carries that name as ``Host``. Programs send none of the first two. A password that
a browser was told once it sends by itself, also for other sites' pages; a bearer token no page can know.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request

_GIT_PATHS = ("/info/refs", "/git-upload-pack", "/git-receive-pack", "/info/lfs/objects/batch")


def cross_site_reason(request: Request, host: str | None = None) -> str | None:
    """The reason to think that a page of another site sent a request, or None for one that may write.

    Args:
        request: The request.
        host: The name or address that the Hub was told to listen on.
    """
    if names_another_host(request, host):
        return "its Host header names another machine"
    named = request.headers.get("host", "")
    origin = request.headers.get("origin")
    if origin is not None and origin.lower() != f"{request.scope['scheme']}://{named}".lower():
        return "its Origin header names another site"
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return "its Sec-Fetch-Site header says that another site sent it"
    return None


def names_another_host(request: Request, host: str | None = None) -> bool:
    """True if a request's ``Host`` is neither a loopback name or address nor ``host``."""
    hostname = _hostname(f"//{request.headers.get('host', '')}")
    return hostname is None or not (_is_loopback(hostname) or hostname == (host or "").lower())


def takes_challenge(request: Request) -> bool:
    """True if a challenge leads to a user who wants this address: for git, and for a page that a browser opens.

    An image in a card, or a script's request, would raise the password prompt for everybody who looks at a page.
    """
    browser = request.headers.get("user-agent", "").startswith("Mozilla/")
    if not browser and request.scope["path"].endswith(_GIT_PATHS):
        return True
    # Browsers send the first of these to loopback addresses and over TLS only.
    destination = request.headers.get("sec-fetch-dest")
    if destination is not None:
        return destination == "document"
    return "text/html" in request.headers.get("accept", "")


def _hostname(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _is_loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
