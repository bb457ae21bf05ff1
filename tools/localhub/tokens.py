"""Access tokens, of which the Hub keeps only hashes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from .errors import HubError
from .git.objects import replace_durably
from .names import is_name

Scope = Literal["read", "write"]
_FILE = "tokens.json"


@dataclass(frozen=True)
class Token:
    """A token that was handed out.

    Args:
        name: User name of its holder.
        scope: ``"read"`` or ``"write"``.
        sha256: Hex digest of the secret.
        created: Seconds since the epoch.
        organizations: The only namespaces it is for; empty for all.
    """

    name: str
    scope: Scope
    sha256: str
    created: int
    organizations: tuple[str, ...] = ()

    def covers(self, namespace: str) -> bool:
        """True if it is for this namespace."""
        return not self.organizations or namespace in self.organizations


def create_token(root: Path, name: str, scope: Scope = "write", organizations: Sequence[str] = ()) -> str:
    """Hand out a new token for the Hub at ``root``, running or not.

    Args:
        root: The Hub's directory.
        name: User name of the holder.
        scope: ``"write"`` (which includes reading) or ``"read"``.
        organizations: The only namespaces that it may write to and whose private repositories it may read;
            all by default.

    Returns:
        The secret; it is shown this once and cannot be recovered.

    Raises:
        HubError: A bad name or scope, or a root that cannot be written.
    """
    if not is_name(name):
        raise HubError(f"{name!r} is no valid token name: use letters, digits, '-', '_' and '.'")
    for organization in organizations:
        if not is_name(organization):
            raise HubError(f"{organization!r} cannot be the name of an organization")
    if scope not in get_args(Scope):
        raise HubError(f"{scope!r} is no token scope: use 'read' or 'write'")
    secret = "kp_" + secrets.token_hex(20)
    new = Token(name, scope, _digest(secret), int(time.time()), tuple(sorted(set(organizations))))
    _change(root, lambda tokens: [*tokens, new])
    return secret


def list_tokens(root: Path) -> list[Token]:
    """The tokens of the Hub at ``root``, oldest first.

    Raises:
        HubError: The file is damaged.
    """
    path = root / _FILE
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["tokens"]
        return [Token(**item | {"organizations": tuple(item.get("organizations", ()))}) for item in items]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(
            "the token file is damaged; mend it or delete it and create new tokens", path=path
        ) from error


def revoke_tokens(root: Path, name: str) -> int:
    """Take back every token of ``name``, at once, also from a Hub that is running; returns how many.

    The file stays even without tokens in it: a Hub that once had some does not become open to everybody.

    Raises:
        HubError: The file is damaged or cannot be written.
    """
    before = len(list_tokens(root))
    if not before:
        return 0
    _change(root, lambda tokens: [token for token in tokens if token.name != name])
    return before - len(list_tokens(root))


def _change(root: Path, change: Callable[[list[Token]], list[Token]]) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / f"{_FILE}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = [asdict(token) for token in change(list_tokens(root))]
            replace_durably(root / _FILE, json.dumps({"tokens": tokens}, indent=2), 0o600)
    except OSError as error:
        raise HubError(f"cannot store the token: {error.strerror}", path=root) from error


class Tokens:
    """The tokens of a Hub, read again whenever their file changes, so that new ones work at once.

    Args:
        root: The Hub's directory.

    Raises:
        HubError: The file is damaged.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._by_digest: dict[str, Token] = {}
        self.any_exist()

    def find(self, secret: str) -> Token | None:
        """The token with this secret, if it is known."""
        return self._current().get(_digest(secret))

    def all(self) -> list[Token]:
        """Every token that is valid now."""
        return list(self._current().values())

    def any_exist(self) -> bool:
        """True if any token was ever handed out for this root."""
        return bool(self._current()) or self._stamp is not None

    def _current(self) -> dict[str, Token]:
        with self._lock:
            try:
                status = (self._root / _FILE).stat()
            except FileNotFoundError:
                self._stamp, self._by_digest = None, {}
                return self._by_digest
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            if stamp != self._stamp:
                self._by_digest = {token.sha256: token for token in list_tokens(self._root)}
                self._stamp = stamp
            return self._by_digest


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
