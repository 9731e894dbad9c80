"""Predicted against measured peak memory of a training step: the plan's own functions on the CPU.

    python benchmarks/plan.py                          # every case, about ten minutes, below 4 GB
    python benchmarks/plan.py --case wide --json FILE

A case is a thinker of real structure with random weights in fp32, trained for two steps as the
policy is: forward with clips, log-probabilities, backward, AdamW. Two things are measured in a
process of its own: the bytes of all live tensors (every operation is watched, each storage counted
once, until it is freed) and the growth of the resident memory. Only what lies inside one operation
escapes the first; the second also has the allocator's rounding and the libraries' working space.

The prediction is `soundmind.planning.memory.training_peak`, which `soundmind.plan` uses for the 7B. Between
the two lie bf16, flash-attention and FSDP, which a CPU does not show.

Reads   nothing (`stand-in`: checkpoints/tiny, if it is there)
Writes  a table; with --json also a file
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from soundmind.planning import (
    memory,
    sizes,
)
from soundmind.planning.flops import (
    Trained,
    audio_tokens,
)

STAND_IN = REPOSITORY / "checkpoints" / "tiny"


@dataclass(frozen=True)
class Case:
    """One measured training step. `text`: layers and widths; None: the stand-in's folder."""

    name: str
    text: tuple[int, int, int, int, int, int] | None  # hidden, layers, heads, kv, ffn, vocab
    audio: tuple[int, int, int, int] | None  # width, layers, heads, ffn
    rows: int
    length: int
    clip: int  # mel frames of the clip in every row; 0: text only
    packed: bool = True
    checkpointing: bool = True
    micro_batches: int = 1
    audio_tower: bool = True


WIDE = (512, 8, 8, 2, 1536, 8192)
EARS = (256, 4, 4, 1024)
CASES = [
    Case("wide", WIDE, EARS, rows=4, length=256, clip=400),
    Case("wide, not packed", WIDE, EARS, rows=4, length=256, clip=400, packed=False),
    Case("wide, all activations kept", WIDE, EARS, 4, 256, 400, checkpointing=False),
    Case("wide, two micro-batches", WIDE, EARS, 4, 256, 400, micro_batches=2),
    Case("wide, frozen audio tower", WIDE, EARS, 4, 256, 400, audio_tower=False),
    Case("wide, text", WIDE, EARS, rows=8, length=256, clip=0),
    Case("long clip", WIDE, EARS, rows=1, length=1700, clip=6000),
    Case("large vocabulary", (256, 4, 4, 2, 768, 32_768), EARS, 4, 256, 400),
    Case("deep", (384, 24, 6, 2, 1152, 4096), EARS, 2, 256, 400),
    Case("ears larger than the rest", (256, 4, 4, 2, 512, 2048), (512, 12, 8, 2048), 2, 512, 1200),
    Case("stand-in", None, None, rows=32, length=200, clip=400, checkpointing=False),
    Case("stand-in, not packed", None, None, 64, 200, 400, packed=False, checkpointing=False),
]


def size_of(case: Case) -> sizes.OmniSize:
    """Dimensions of the case's thinker."""
    if case.text is None or case.audio is None:
        return sizes.from_folder(STAND_IN)
    hidden, layers, heads, kv, ffn, vocab = case.text
    width, encoder_layers, encoder_heads, encoder_ffn = case.audio
    return sizes.OmniSize(
        case.name,
        sizes.TextSize(hidden, layers, heads, kv, ffn, vocab),
        sizes.AudioSize(width, encoder_layers, encoder_heads, encoder_ffn, hidden),
        sizes.VisionSize(hidden=16, layers=1, intermediate=16, output=hidden),
        source="benchmarks/plan.py",
    )


def predicted(case: Case) -> memory.Moment:
    """The peak that `soundmind.planning.memory` expects for the case on a CPU."""
    setup = memory.Training(
        size=size_of(case),
        trained=Trained(audio_tower=case.audio_tower, projector=case.audio_tower),
        compute_bytes=memory.FP32,
        checkpointing=case.checkpointing,
        flash=False,
        fsdp=False,
        optimizer="loop",
    )
    clips = (case.clip,) * (case.rows if case.clip else 0)
    batch = memory.MicroBatch(case.rows, case.length, clips, case.packed)
    return memory.training_peak(setup, batch, case.micro_batches)


# --- measured, in a process of its own ------------------------------------------------------------


def live_bytes_mode() -> Any:
    """A dispatch mode that counts the bytes of live tensors and remembers the largest sum."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class LiveBytes(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.known: dict[int, int] = {}
            self.now = self.peak = 0
            self.references: dict[int, Any] = {}

        def note(self, tensor: Any) -> None:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.known:
                return
            self.known[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            self.references[key] = weakref.ref(storage, lambda _, key=key: self.forget(key))

        def forget(self, key: int) -> None:
            self.now -= self.known.pop(key)
            del self.references[key]

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.note(leaf)
            return result

    return LiveBytes()


class ResidentPeak(threading.Thread):
    """Largest resident memory of this process while it runs, in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = resident_bytes()
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.is_set():
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.002)

    def grown(self) -> int:
        """Bytes above the start."""
        self.stopping.set()
        self.join()
        return self.peak - self.start_bytes


def resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def build(case: Case) -> Any:
    """The case's policy with random weights, in fp32, as the engine has it: without vision."""
    from soundmind.standin.random_thinker import random_thinker
    from soundmind.training.policy import as_policy

    model = random_thinker(size_of(case))
    del model.visual
    model = as_policy(model, banned_token_ids=[3, 5])
    model.audio_tower.requires_grad_(case.audio_tower)
    if case.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def micro_batch(case: Case, model: Any) -> dict[str, Any]:
    """Inputs of one micro-batch, as verl's engine hands them to the forward."""
    import torch

    size = size_of(case)
    ids = torch.randint(10, 200, (case.rows, case.length))
    positions = torch.arange(case.length).expand(case.rows, -1)
    inputs: dict[str, Any] = {}
    if case.clip:
        ids[:, 1 : 1 + audio_tokens(size.audio, case.clip)] = model.config.audio_token_id
        inputs["input_features"] = torch.randn(case.rows, size.audio.mel_bins, case.clip)
        inputs["feature_attention_mask"] = torch.ones(case.rows, case.clip, dtype=torch.long)
    if case.packed:
        ids, positions = ids.reshape(1, -1), positions.reshape(1, -1)
        return {**inputs, "input_ids": ids, "position_ids": positions, "attention_mask": None}
    mask = torch.ones_like(ids)
    return {**inputs, "input_ids": ids, "position_ids": positions, "attention_mask": mask}


def train_step(case: Case, model: Any, optimizer: Any) -> None:
    """One mini-batch: forward, log-probabilities, backward per micro-batch, then the update."""
    import torch

    optimizer.zero_grad()
    for _ in range(case.micro_batches):
        loss(case, model, micro_batch(case, model)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def loss(case: Case, model: Any, inputs: dict[str, Any]) -> Any:
    """Minus the mean log-probability of the next tokens, as verl's engine takes it."""
    import torch

    logits = model(**inputs, use_cache=False).logits
    # verl cuts padding out of a padded micro-batch's logits, which copies them.
    logits = logits.squeeze(0) if case.packed else torch.cat(list(logits.unbind()))
    labels = torch.roll(inputs["input_ids"].reshape(-1), -1)
    # soundmind.plugin.patches.vectorised_logprobs
    chosen = torch.gather(logits, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
    return -(chosen - torch.logsumexp(logits, dim=-1)).mean()


def measure(case: Case, watch: str) -> int:
    """Peak bytes of the second step (the first one makes Adam's state), as `watch` counts them."""
    import torch

    torch.set_num_threads(1)
    warm = build(replace(CASES[0], text=(64, 1, 1, 1, 64, 256), audio=(64, 1, 1, 64)))
    train_step(replace(CASES[0], rows=1, length=128, clip=200), warm, adamw(warm))
    del warm  # what the libraries set up at first use belongs to no case
    if watch == "resident":
        before = resident_bytes()
        model = build(case)
        optimizer = adamw(model)
        train_step(case, model, optimizer)
        peak = ResidentPeak()
        peak.start()
        train_step(case, model, optimizer)
        return peak.peak + 0 * peak.grown() - before
    with live_bytes_mode() as live:
        model = build(case)
        for tensor in [*model.parameters(), *model.buffers()]:
            live.note(tensor)
        optimizer = adamw(model)
        train_step(case, model, optimizer)
        live.peak = live.now
        train_step(case, model, optimizer)
        return live.peak


def adamw(model: Any) -> Any:
    """The optimizer of the run, over what is trained."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-6, foreach=False)


def measured(case: Case, watch: str) -> int:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--measure", case.name, "--watch", watch]
    # Freed blocks go back to the system at once, so that resident memory follows the tensors.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        raise RuntimeError(f"{case.name}: {result.stderr[-2000:]}")
    return int(result.stdout.strip().splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--watch", choices=("tensors", "resident"), default="tensors")
    arguments = parser.parse_args(argv)
    if arguments.measure:
        case = next(case for case in CASES if case.name == arguments.measure)
        print(measure(case, arguments.watch))
        return 0
    rows = []
    header = f"{'case':34s} {'predicted':>10s} {'tensors':>10s} {'ratio':>6s} {'resident':>10s}"
    print(header + "  peak at")
    for case in CASES:
        if arguments.case and arguments.case not in case.name:
            continue
        if case.text is None and not STAND_IN.is_dir():
            print(f"{case.name:34s} skipped: no {STAND_IN}")
            continue
        moment = predicted(case)
        tensors, resident = measured(case, "tensors"), measured(case, "resident")
        rows.append(
            {
                **asdict(case),
                "predicted": moment.total,
                "parts": moment.parts,
                "peak": moment.name,
                "tensors": tensors,
                "resident": resident,
                "ratio": moment.total / tensors,
            }
        )
        mega = [f"{value / 1e6:8.1f}MB" for value in (moment.total, tensors, resident)]
        ratio = moment.total / tensors
        print(
            f"{case.name:34s} {mega[0]} {mega[1]} {ratio:6.3f} {mega[2]}  {moment.name}", flush=True
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
