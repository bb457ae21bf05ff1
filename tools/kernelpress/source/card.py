"""Reading of the card's template, and of the pictures that it shows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from markdown_it import MarkdownIt

from kernelpress.errors import SourceError

CARD_TEMPLATE = "CARD.md"
# A Hub serves SVG as text, for it may have scripts.
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")


def read_card(root: Path) -> tuple[str | None, dict[str, bytes]]:
    """Read CARD.md, and the pictures that it shows by a relative address, each by its path in the project.

    Raises:
        SourceError: The card is not UTF-8, or shows a file that is missing, no picture, or outside of the project.
    """
    path = root / CARD_TEMPLATE
    if not path.is_file():
        return None, {}
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise SourceError("not UTF-8; save the file in that encoding", path=path) from None
    return text, {name: _picture(root, name) for name in sorted(set(_relative_images(text)))}


def _relative_images(text: str) -> Iterator[str]:
    for block in MarkdownIt().parse(text):
        for token in block.children or ():
            source = urlsplit(str(token.attrs.get("src", "")))
            if token.type == "image" and source.path and not (source.scheme or source.netloc):
                yield unquote(source.path)


def _picture(root: Path, name: str) -> bytes:
    path, card = root / name, root / CARD_TEMPLATE
    if not path.resolve().is_relative_to(root.resolve()) or ".." in Path(name).parts:
        raise SourceError(
            f"shows {name}, which is outside of the project; put the picture into it", path=card
        )
    if not name.lower().endswith(_PICTURES) or Path(name).parts[0] == "build":
        kinds = ", ".join(_PICTURES)
        raise SourceError(
            f"shows {name}, which is no picture ({kinds}) outside of build/; name one", path=card
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(
            f"shows {name}, which cannot be read: {error.strerror}; add it, or give a web address", path=card
        ) from None
