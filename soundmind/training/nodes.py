"""A machine that leaves the cluster ends the run, instead of letting it wait for ever.

verl waits for rollouts by asking its buffer again and again. Rollouts in flight on a machine that
is gone never arrive, and nothing tells the buffer: the run would stand still with the other
machines' GPUs taken. So the trainer's process looks at the cluster every few seconds and ends when
a machine is missing; the launcher then says so, and the same command continues from the last
checkpoint. A run uses every machine of its cluster (agent loops are spread over all), so any one
counts. [ours]
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray

logger = logging.getLogger(__name__)

INTERVAL = 3.0  # seconds between looks; Ray itself takes about 15 to give a machine up


def alive(nodes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Living machines of `ray.nodes()`: id -> address."""
    return {node["NodeID"]: node["NodeManagerAddress"] for node in nodes if node["Alive"]}


def end_process(missing: Mapping[str, str]) -> None:
    """End this process at once; its owner sees an actor that died."""
    logger.error("left the cluster: %s; the run ends", ", ".join(sorted(missing.values())))
    # Not an exception: the thread that waits for rollouts would never see it.
    os._exit(1)


def watch_nodes(
    on_loss: Callable[[Mapping[str, str]], None] = end_process, interval: float = INTERVAL
) -> threading.Thread:
    """Call `on_loss` once, with id -> address, when a machine that lives now has left."""
    before = alive(ray.nodes())

    def watch() -> None:
        pause = threading.Event()
        while True:
            now = alive(ray.nodes())
            if missing := {node: before[node] for node in before.keys() - now.keys()}:
                on_loss(missing)
                return
            pause.wait(interval)

    thread = threading.Thread(target=watch, name="soundmind-nodes", daemon=True)
    thread.start()
    return thread
