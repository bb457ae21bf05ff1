"""The embedded Hub: enough of the Hugging Face Hub's HTTP API for its own clients, on plain git repositories.

``running_hub`` starts one in a separate process and stops it again; ``serve`` runs one in this process.
"""

from .running import RunningHub, running_hub
from .server import serve
from .tokens import create_token

__all__ = ["RunningHub", "create_token", "running_hub", "serve"]
