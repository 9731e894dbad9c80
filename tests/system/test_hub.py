from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from soundmind.system.hub import goes_through_a_proxy, hub_is_reachable, is_hub_id

PROXY = "http://proxy:3128"
CASES: list[dict[str, str]] = [
    {},
    {"HTTPS_PROXY": PROXY},
    {"https_proxy": "proxy:3128"},
    {"HTTP_PROXY": PROXY},
    {"ALL_PROXY": PROXY},
    {"HTTPS_PROXY": ""},
    *(
        {"HTTPS_PROXY": PROXY, "no_proxy": names}
        for names in (
            "*",
            "other.org, *",
            "huggingface.co",
            "HUGGINGFACE.CO",
            "huggingface.co:443",
            "localhost, huggingface.co",
            ".huggingface.co",
            "face.co",
            "co",
            ".co",
            "hub.huggingface.co",
            "https://huggingface.co",
            "http://huggingface.co",
            "all://huggingface.co",
            "127.0.0.1,::1,10.0.0.0/8",
            "",
        )
    ),
]
HOSTS = [
    "https://huggingface.co",
    "https://hub.huggingface.co",
    "http://huggingface.co",
    "https://mirror.example.org:8443",
    "http://127.0.0.1:8080",
    "http://localhost:8080",
]


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("environment", CASES, ids=str)
def test_proxies_are_read_as_the_hubs_client_reads_them(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    httpx = pytest.importorskip("httpx")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    client = httpx.Client()
    for url in HOSTS:
        proxied = client._transport_for_url(httpx.URL(url)) is not client._transport
        assert goes_through_a_proxy(urlsplit(url)) == proxied, url


def test_a_proxy_of_any_kind_is_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no way out")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    assert not hub_is_reachable()
    monkeypatch.setenv("all_proxy", "socks5h://proxy:1080")
    assert hub_is_reachable()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert not hub_is_reachable()


def test_a_folder_of_ours_is_no_hub_id_wherever_the_command_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("Qwen/Qwen2.5-Omni-7B")
    for path in ("checkpoints/tiny", "data/alr", "outputs/run", "./some/thing", "/org/name"):
        assert not is_hub_id(path), path
    (tmp_path / "Qwen").mkdir()
    assert not is_hub_id("Qwen/Qwen2.5-Omni-7B")
