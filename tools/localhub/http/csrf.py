"""Protection against cross-site request forgery, where no token shows that a browser's user wants a write.

A Hub on a loopback address is reached by every page that its user looks at. A page's request to another
site carries ``Origin`` or ``Sec-Fetch-Site``, which the page cannot leave out; one whose own name was made
to lead here (DNS rebinding) carries that name as ``Host``. Programs send none of the first two.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.requests import Request


def cross_site_reason(request: Request, host: str | None = None) -> str | None:
    """The reason to think that a page of another site sent a request, or None for one that may write.

    Args:
        request: The request.
        host: The name or address that the Hub was told to listen on.
    """
    named = request.headers.get("host", "")
    hostname = _hostname(f"//{named}")
    if hostname is None or not (_is_loopback(hostname) or hostname == (host or "").lower()):
        return "its Host header names another machine"
    origin = request.headers.get("origin")
    if origin is not None and origin.lower() != f"{request.scope['scheme']}://{named}".lower():
        return "its Origin header names another site"
    if request.headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return "its Sec-Fetch-Site header says that another site sent it"
    return None


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
