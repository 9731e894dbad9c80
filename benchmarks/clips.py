"""Damage headers of every container that is read: does a check accept what training cannot read?

    python benchmarks/clips.py                       # 100,000 files, some two minutes on one core
    python benchmarks/clips.py --count 1000 --seed 3

Each file is a third of a second of sound in one of the encodings that libsndfile writes, with one
to three bytes of its first 16 to 512 set to other values; some are also cut, lengthened, or have a
few bytes put into the header. `probe_clip` and `load_waveform` must both refuse it, with the same
kind of ClipError, or both accept it at the same length.

Prints the counts of each outcome and what disagreed; exit status 1 if anything did. What libmpg123
says to the error stream of damaged MP3s is its own.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections import Counter
from collections.abc import Iterator

import numpy as np
import soundfile

from soundmind.data.audio import ClipError, load_waveform, probe_clip
from soundmind.data.containers import READ_FORMATS

SECONDS = 0.3
RATES = (16_000, 8_000)  # some encodings know one of them only
VALUES = (0, 1, 2, 3, 0x7F, 0x80, 0xFF)  # besides random ones


def encodings() -> dict[str, bytes]:
    """A short clip in every container and encoding that is read and that libsndfile writes."""
    time_axis = np.arange(int(SECONDS * RATES[0])) / RATES[0]
    sound = (
        0.3 * np.sin(2 * np.pi * 220 * time_axis) * (1 + 0.5 * np.sin(2 * np.pi * 9 * time_axis))
    )
    found = {}
    for container in READ_FORMATS:
        for subtype in soundfile.available_subtypes(container):
            if subtype.startswith("DWVW"):
                continue  # libsndfile writes it and cannot read it
            for endian in ("FILE", "LITTLE", "BIG"):
                for rate in RATES:
                    content = io.BytesIO()
                    keys = {"format": container, "subtype": subtype, "endian": endian}
                    try:
                        soundfile.write(content, sound, rate, **keys)
                    except (soundfile.LibsndfileError, ValueError, TypeError):
                        continue  # no such combination
                    if content.getvalue() not in found.values():
                        found[f"{container} {subtype} {endian}"] = content.getvalue()
                    break
    return found


def damaged(count: int, seed: int, whole: dict[str, bytes]) -> Iterator[tuple[str, bytes]]:
    """`count` files with damaged headers, and what they were."""
    random = np.random.default_rng(seed)
    names = sorted(whole)
    for number in range(count):
        name = names[number % len(names)]
        content = bytearray(whole[name])
        head = min(len(content), int(random.choice([16, 64, 160, 512])))
        for _ in range(int(random.integers(1, 4))):
            value = int(random.choice([*VALUES, int(random.integers(256))]))
            content[int(random.integers(head))] = value
        chance = random.random()
        noise = random.integers(0, 256, 2000, dtype=np.uint8).tobytes()
        if chance < 0.05:
            del content[int(random.integers(len(content))) :]
        elif chance < 0.1:
            content += noise[: int(random.integers(1, 2000))]
        elif chance < 0.13:
            at = int(random.integers(head))
            content[at:at] = noise[: int(random.integers(1, 9))]
        yield name, bytes(content)


def outcomes(content: bytes) -> tuple[str, str]:
    """What the check and the reader say: a length in samples, or the kind of refusal."""
    said = []
    for read in (lambda: probe_clip(content).num_samples, lambda: len(load_waveform(content))):
        try:
            said.append(f"{read()} samples")
        except ClipError as error:
            said.append(error.kind)
        except Exception as error:  # any other family is a finding
            said.append(f"raised {type(error).__name__}: {error}")
    return said[0], said[1]


def disagreements(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Counts by outcome, and a line for each file on which the two disagree or raise."""
    counts: Counter[str] = Counter()
    found = []
    for name, content in damaged(count, seed, encodings()):
        probed, loaded = outcomes(content)
        counts["read" if probed.endswith(" samples") else probed] += 1
        if probed != loaded or probed.startswith("raised"):
            found.append(f"{name}: probe_clip {probed}, load_waveform {loaded}")
    return counts, found


def main() -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description="Damage clips' headers, compare check and reader.")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.monotonic()
    counts, found = disagreements(arguments.count, arguments.seed)
    for outcome, number in counts.most_common():
        print(f"{number:8,}  {outcome}")
    print(f"{len(found):8,}  disagreements, in {time.monotonic() - started:.0f} s")
    print("\n".join(found[:20]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
