"""The embedded Hub: enough of the Hugging Face Hub's HTTP API for its own clients, on plain git repositories.

``running_hub`` starts one in a separate process and stops it again; ``serve`` runs one in this process;
``fsck`` examines one, and ``clean`` removes objects that nothing in it refers to.
"""

from .errors import HubError
from .fsck import FsckReport, fsck
from .gc import CleanReport, clean
from .process import RunningHub, running_hub
from .server import serve
from .tokens import Token, create_token, list_tokens, revoke_tokens

__all__ = [
    "CleanReport",
    "FsckReport",
    "HubError",
    "RunningHub",
    "Token",
    "clean",
    "create_token",
    "fsck",
    "list_tokens",
    "revoke_tokens",
    "running_hub",
    "serve",
]
