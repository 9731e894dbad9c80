"""Whether the Hugging Face Hub can be reached; asked first, since its client retries for long."""

from __future__ import annotations

import ipaddress
import re
import socket
from pathlib import Path
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hub_is_reachable(timeout: float = 5.0) -> bool:
    """One connection attempt to the configured endpoint; behind a proxy the answer is yes."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    endpoint = urlsplit(constants.ENDPOINT)
    if goes_through_a_proxy(endpoint):
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


def goes_through_a_proxy(url: SplitResult) -> bool:
    """Whether the environment sends `url` through a proxy, as the Hub's client (httpx) reads it.

    `<scheme>_proxy` and `all_proxy` name one; `no_proxy` lists hosts that are reached directly:
    `*` all, `name` the host and what is below it, `.name` only what is below it, an address or a
    URL (with scheme and port) itself alone.
    """
    proxies = getproxies()
    excluded = [name.strip() for name in proxies.get("no", "").split(",")]
    if "*" in excluded or not (proxies.get(url.scheme) or proxies.get("all")):
        return False
    return not any(name and _matches(name.lower(), url) for name in excluded)


def _matches(name: str, url: SplitResult) -> bool:
    host = url.hostname or ""
    if "://" in name:
        other = urlsplit(name)
        return (
            other.scheme in ("all", url.scheme)
            and other.hostname == host
            and other.port in (None, url.port)
        )
    if name == "localhost" or _is_address(name):
        return host == name.strip("[]")
    name, _, port = name.partition(":")
    if port and port != str(url.port):
        return False
    below = r".+\." if name.startswith(".") else r"(.+\.)?"
    return re.fullmatch(below + re.escape(name.removeprefix(".")), host) is not None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_network(name.strip("[]"), strict=False)
    except ValueError:
        return False
    return True


# Wherever a command is started: `checkpoints/tiny` is never asked of the Hub.
_OUR_FOLDERS = (("data",), ("checkpoints",), ("outputs",))


def is_hub_id(data_dir: str) -> bool:
    """`org/name` that is no local path; anything in a folder of ours or in one that exists is a path."""
    path = Path(data_dir)
    local = path.exists() or path.parent.exists() or path.parts[:1] in _OUR_FOLDERS
    return not local and _HUB_ID.fullmatch(data_dir) is not None
