"""Whether the Hugging Face Hub can be reached; asked first, since its client retries for long."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies


def hub_is_reachable(timeout: float = 5.0) -> bool:
    """One connection attempt to the configured endpoint; behind a proxy the answer is yes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    if endpoint.scheme in getproxies() and not _bypasses_proxy(endpoint.hostname or ""):
        return True
    address = (
        endpoint.hostname or "",
        endpoint.port or (443 if endpoint.scheme == "https" else 80),
    )
    try:
        with socket.create_connection(address, timeout=timeout):
            return True
    except OSError:
        return False


def _bypasses_proxy(host: str) -> bool:
    excluded = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    return any(name and host.endswith(name.strip()) for name in excluded.split(","))


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(data_dir: str) -> bool:
    """`org/name` that is no local path; anything in `data` or another local folder is a path."""
    path = Path(data_dir)
    local = path.exists() or path.parent.exists() or path.parts[:1] == ("data",)
    return not local and _HUB_ID.fullmatch(data_dir) is not None
