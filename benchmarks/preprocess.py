"""Measure preprocessing and loading: every figure that the data part promises, in one table.

    python benchmarks/preprocess.py                         # minutes; 3 GB of scratch disk
    python benchmarks/preprocess.py --sizes 600 6446        # without the large one
    python benchmarks/preprocess.py --tokenizer checkpoints/Qwen2.5-Omni-7B

Texts are the real dev annotations (SOUNDMIND_ALR_DIR, or --annotations), repeated under new ids.
Clips are generated: headers and sizes of 62 s questions and 590 s answers, 24 kHz 16-bit mono, of
which only the beginning is written and the rest is a hole in the file, as preprocessing reads no
more; beyond 6,446 rows they are hard links. Clips that are decoded (comparison, loading) are full.

    rows/s    rows over the wall time of the whole command, start of Python included; the CPU
              seconds beside it hardly change when the machine is busy with something else
    memory    highest sum of resident memory over the command's processes, polled 20 times a second
              (pages that processes share are counted in each of them)
    decoded   rows as the released scripts store them, through a `datasets` pipeline: the question's
              samples in prompt, column and extra_info, the answer's samples twice

The comparison is between the two ways of storing on the same few rows, after imports; its memory
grows with the rows for the decoded way (they are batched by the thousand) and not for ours.

Prints the table; `--json FILE` writes it too. Nothing is asserted: read the numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile

from soundmind import preprocess
from soundmind.data import statistics, token_count
from soundmind.task.schema import MODES

RATE = 24_000  # Hz, of the published clips
QUESTION_SECONDS, ANSWER_SECONDS = 62, 590  # means of the published set
PUBLISHED_ROWS = 6_446
COMPARED_ROWS = 4  # stored decoded, `datasets` needs about 1 GB of memory for each
LOADED_CLIPS, ROLLOUTS = 48, 8

Figure = tuple[str, str, str]  # claim, measured, wanted


def main(argv: Sequence[str] | None = None) -> int:
    """Run all measurements and print the table."""
    default = Path(__file__).resolve().parents[1] / "../shared/data/alr"
    parser = argparse.ArgumentParser(description="Measure preprocessing and loading.")
    add = parser.add_argument
    folder = Path(os.environ.get("SOUNDMIND_ALR_DIR", default))
    add("--annotations", type=Path, default=folder / "dev.jsonl", help="real dev annotations")
    add("--tokenizer", help="counted with (default: a 32,000-piece BPE trained on the texts)")
    add("--sizes", type=int, nargs="+", default=[600, PUBLISHED_ROWS, 10 * PUBLISHED_ROWS])
    add("--scratch", type=Path, help="folder for generated clips (default: a temporary one)")
    add("--json", type=Path, help="write the figures here too")
    add("--child", help=argparse.SUPPRESS)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.child:
        return CHILDREN[arguments.child](*rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if not arguments.annotations.is_file():
        parser.error(f"{arguments.annotations} not found; set SOUNDMIND_ALR_DIR")
    lines = arguments.annotations.read_text("utf-8").splitlines()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        root = Path(scratch)
        tokenizer = arguments.tokenizer or str(train_tokenizer(lines, root / "tokenizer"))
        figures = [
            *real_text(arguments.annotations, tokenizer, root),
            *speed_and_memory(lines, tokenizer, arguments.sizes, root),
            *against_decoded(lines, tokenizer, root),
            *loading(lines, tokenizer, root),
        ]
    print(statistics.text_table(["claim", "measured", "wanted"], figures))
    print(
        f"\n{platform.machine()}, {len(os.sched_getaffinity(0))} cores, load "
        f"{os.getloadavg()[0]:.1f}, Python {platform.python_version()}, tokenizer "
        f"{arguments.tokenizer or 'trained here'}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1), "utf-8")
    return 0


# -- measurements ---------------------------------------------------------------------------------


def real_text(annotations: Path, tokenizer: str, root: Path) -> Iterator[Figure]:
    """Counts over the real dev annotations, and the size of a row."""
    folder = root / "real"
    folder.mkdir()
    shutil.copy(annotations, folder / "dev.jsonl")
    run_preprocess(folder, "text", tokenizer, "--splits", "dev")
    dev = json.loads((folder / "parquet/text/report.json").read_text("utf-8"))["splits"]["dev"]
    counts = dev["labels"]
    found = (
        f"{dev['rows']} rows, {counts['not-entailed']} not-entailed, "
        f"{counts['entailed']} entailed, {dev['teacher']['disagreements']} disagreements"
    )
    yield "real text, dev", found, "606, 342, 264, 33"
    write_clips(folder, "dev", dev["rows"], annotations.read_text("utf-8").splitlines())
    for mode in MODES:
        run_preprocess(folder, mode, tokenizer, "--splits", "dev")
        size = (folder / f"parquet/{mode}/dev.parquet").stat().st_size / dev["rows"]
        wanted = "at most 12 kB a row"
        yield f"size, {mode}, real dev annotations", f"{size / 1000:.2f} kB a row", wanted


def speed_and_memory(
    lines: Sequence[str], tokenizer: str, sizes: Sequence[int], root: Path
) -> Iterator[Figure]:
    """Audio mode with references, at several sizes; one run each, all cores."""
    for size in sizes:
        folder = root / f"rows{size}"
        make_rows(folder, "train", lines, size)
        write_clips(folder, "train", size, lines, linked_to=root / f"rows{PUBLISHED_ROWS}")
        before = cpu_seconds()
        seconds, peak = run_preprocess(folder, "audio", tokenizer, "--splits", "train")
        speed = f"{size / seconds:,.0f} rows/s ({cpu_seconds() - before:.1f} CPU s)"
        wanted = "at least 1,000 rows/s" if size == PUBLISHED_ROWS else ""
        yield f"speed, {size:,} rows, start-up included", speed, wanted
        wanted = "under 1,000 MB" if size == PUBLISHED_ROWS else "flat from 600 to 64,460"
        yield f"memory, {size:,} rows", f"{peak / 1e6:,.0f} MB", wanted
        if size == PUBLISHED_ROWS:
            one, _ = run_preprocess(
                folder, "audio", tokenizer, "--splits", "train", "--workers", "1",
                "--output-dir", str(folder / "one"),
            )  # fmt: skip
            yield f"speed, {size:,} rows, one worker", f"{size / one:,.0f} rows/s", ""
            same = (folder / "one/audio/train.parquet").read_bytes() == (
                folder / "parquet/audio/train.parquet"
            ).read_bytes()
            yield "one worker and all cores, same bytes", str(same), "True"
            again, _ = run_preprocess(folder, "audio", tokenizer, "--splits", "train")
            yield "second run of the same", f"{again:.1f} s", "reuses finished work"
        if size > PUBLISHED_ROWS:
            shutil.rmtree(folder)


def against_decoded(lines: Sequence[str], tokenizer: str, root: Path) -> Iterator[Figure]:
    """The same rows, with references and with decoded samples, each in a process of its own."""
    folder = root / "compared"
    make_rows(folder, "train", lines, COMPARED_ROWS)
    write_clips(folder, "train", COMPARED_ROWS, lines, full=True)
    figures = {}
    for name in ("references", "decoded"):
        out = folder / name
        result, peak = run_child(name, str(folder), str(out), tokenizer)
        size = sum(path.stat().st_size for path in out.rglob("*.parquet"))
        figures[name] = (COMPARED_ROWS / result["seconds"], peak, size / COMPARED_ROWS)
    (ours, theirs) = figures["references"], figures["decoded"]
    for index, (claim, unit, scale) in enumerate(
        [("rows/s", "rows/s", 1.0), ("peak memory", "MB", 1e6), ("bytes a row", "kB", 1e3)]
    ):
        ratio = max(ours[index], theirs[index]) / min(ours[index], theirs[index])
        values = f"{ours[index] / scale:,.1f} against {theirs[index] / scale:,.1f} {unit}"
        yield f"references against decoded, {claim}", f"{values} ({ratio:,.1f}x)", ""


def loading(lines: Sequence[str], tokenizer: str, root: Path) -> Iterator[Figure]:
    """The data set class on 60 s clips: first and second request, and decodes of an epoch."""
    folder = root / "loaded"
    make_rows(folder, "train", lines, LOADED_CLIPS)
    write_clips(folder, "train", LOADED_CLIPS, lines, full=True, question_seconds=60)
    run_preprocess(folder, "audio", tokenizer, "--splits", "train")
    parquet = str(folder / "parquet/audio/train.parquet")
    result, _ = run_child("load", parquet, tokenizer)
    yield "loading 60 s clips, decoded", f"{result['miss']:,.0f} rows/s", ""
    yield "loading 60 s clips, cache hit", f"{result['hit']:,.0f} rows/s", ""
    epoch = f"{result['decodes']} decodes of {LOADED_CLIPS} clips x {ROLLOUTS} rollouts at once"
    yield "decodes in an epoch", epoch, "one a clip"
    yield "opening 6,446 rows, no clip decoded", f"{result['open']:.2f} s", ""


# -- processes of their own -----------------------------------------------------------------------


def child_references(folder: str, out: str, tokenizer: str) -> int:
    """Ours: what the command does, in this process."""
    started = time.perf_counter()
    arguments = ["--mode", "audio", "--data-dir", folder, "--splits", "train", "--output-dir", out]
    with open(os.devnull, "w") as nowhere:
        shown, sys.stdout = sys.stdout, nowhere
        status = preprocess.main([*arguments, "--tokenizer", tokenizer, "--workers", "1"])
        sys.stdout = shown
    print(json.dumps({"seconds": time.perf_counter() - started}))
    return status


def child_decoded(folder: str, out: str, tokenizer: str) -> int:
    """Decoded samples in the rows, as the released scripts store them, by `datasets`."""
    import datasets

    from soundmind.data.audio import load_waveform

    del tokenizer
    root = Path(folder)
    Path(out).mkdir(parents=True)

    def rows() -> Iterator[dict[str, Any]]:
        for index, line in enumerate((root / "train.jsonl").read_text("utf-8").splitlines()):
            record = json.loads(line)
            place = root / "train" / record["id"]
            question = load_waveform(place / "question.wav")
            answer = load_waveform(place / f"answer_{record['label']}.wav")
            yield {
                "data_source": "alr",
                "prompt": [{"role": "user", "audio": question}],
                "ability": "logic",
                "reward_model": {"style": "rule", "ground_truth": record["answer"]},
                "extra_info": {"index": index, "question": question, "answer": answer},
                "question_audio": question,
                "answer_audio": answer,
            }

    samples = datasets.Sequence(datasets.Value("float32"))
    text = datasets.Value("string")
    features = datasets.Features(
        {
            "data_source": text,
            "prompt": [{"role": text, "audio": samples}],
            "ability": text,
            "reward_model": {"style": text, "ground_truth": text},
            "extra_info": {
                "index": datasets.Value("int64"),
                "question": samples,
                "answer": samples,
            },
            "question_audio": samples,
            "answer_audio": samples,
        }
    )
    datasets.disable_progress_bars()
    started = time.perf_counter()
    table = datasets.Dataset.from_generator(rows, features=features, cache_dir=f"{out}/cache")
    table.to_parquet(f"{out}/train.parquet")
    print(json.dumps({"seconds": time.perf_counter() - started}))
    return 0


def child_load(parquet: str, tokenizer: str) -> int:
    """Requests to the data set class as the agent loop makes them, from a pool of threads."""
    from omegaconf import OmegaConf
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from soundmind.model.processor import CHAT_TEMPLATE
    from soundmind.training.dataset import AudioRLHFDataset

    file = Tokenizer.from_file(str(token_count.find_tokenizer_file(tokenizer)))
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_object=file, chat_template=CHAT_TEMPLATE)
    config = OmegaConf.create({"max_prompt_length": 4096, "filter_overlong_prompts": False})
    rows = AudioRLHFDataset([parquet], hf_tokenizer, config)
    cache = AudioRLHFDataset.clips
    cache.capacity = 1 << 30

    def pass_over() -> float:
        started = time.perf_counter()
        for index in range(len(rows)):
            AudioRLHFDataset._extract_audio_info(rows[index]["raw_prompt"])
        return len(rows) / (time.perf_counter() - started)

    miss, hit = pass_over(), pass_over()
    cache.clear()
    with ThreadPoolExecutor(ROLLOUTS) as threads:
        for index in range(len(rows)):
            messages = [rows[index]["raw_prompt"]] * ROLLOUTS
            list(threads.map(AudioRLHFDataset._extract_audio_info, messages))
    repeated = [parquet] * (PUBLISHED_ROWS // len(rows) + 1)
    started = time.perf_counter()
    AudioRLHFDataset(repeated, hf_tokenizer, config, max_samples=PUBLISHED_ROWS)
    opened = time.perf_counter() - started
    result = {"miss": miss, "hit": hit, "decodes": cache.decodes, "open": opened}
    print(json.dumps(result))
    return 0


CHILDREN: dict[str, Callable[..., int]] = {
    "references": child_references,
    "decoded": child_decoded,
    "load": child_load,
}


def run_child(name: str, *arguments: str) -> tuple[dict[str, Any], int]:
    """Run one of CHILDREN; its last line of output as JSON, and its peak memory in bytes."""
    _, peak, output = run([sys.executable, __file__, "--child", name, *arguments])
    return json.loads(output.splitlines()[-1]), peak


def run_preprocess(folder: Path, mode: str, tokenizer: str, *arguments: str) -> tuple[float, int]:
    """Run the command; wall seconds and peak memory in bytes."""
    command = [sys.executable, "-m", "soundmind.preprocess", "--mode", mode]
    command += ["--data-dir", str(folder), "--tokenizer", tokenizer, *arguments]
    seconds, peak, _ = run(command)
    return seconds, peak


def run(command: Sequence[str]) -> tuple[float, int, str]:
    """Run a command to its end: wall seconds, peak memory of its processes in bytes, output."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = psutil.Popen(command, stdout=output)
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident_bytes(process))
            time.sleep(0.05)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{text}")
    return seconds, peak, text


def cpu_seconds() -> float:
    """CPU time of every process that this one has started and seen end."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def resident_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and its children now."""
    total = 0
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:  # ended between the listing and the question
            continue
    return total


# -- data to measure on ---------------------------------------------------------------------------


def make_rows(folder: Path, split: str, lines: Sequence[str], size: int) -> None:
    """`size` annotations with the texts of `lines`, repeated under new ids."""
    folder.mkdir(parents=True)
    with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as out:
        for index in range(size):
            record = json.loads(lines[index % len(lines)])
            out.write(json.dumps({**record, "id": f"{index:05d}"}) + "\n")


def write_clips(
    folder: Path,
    split: str,
    size: int,
    lines: Sequence[str],
    *,
    full: bool = False,
    question_seconds: float = QUESTION_SECONDS,
    linked_to: Path | None = None,
) -> None:
    """Clips of the rows' annotations; `full` ones can be decoded, the others only look real."""
    ids = [json.loads(line)["id"] for line in (folder / f"{split}.jsonl").open(encoding="utf-8")]
    random = np.random.default_rng(0)
    for index, row_id in enumerate(ids[:size]):
        label = json.loads(lines[index % len(lines)])["label"]
        place = folder / split / row_id
        place.mkdir(parents=True, exist_ok=True)
        lengths = {
            "question.wav": question_seconds * random.uniform(0.6, 1.4),
            f"answer_{label}.wav": ANSWER_SECONDS * random.uniform(0.4, 1.6),
        }
        if question_seconds != QUESTION_SECONDS:
            lengths["question.wav"] = question_seconds
        for name, seconds in lengths.items():
            twin = linked_to / split / f"{index % PUBLISHED_ROWS:05d}" / name if linked_to else None
            if twin is not None and index >= PUBLISHED_ROWS and twin.exists():
                os.link(twin, place / name)
            else:
                write_wav(place / name, round(seconds * RATE), random, full)


def write_wav(path: Path, num_frames: int, random: np.random.Generator, full: bool) -> None:
    """16-bit mono noise; unless `full`, 2,048 samples of it and a hole up to the full size."""
    written = num_frames if full else 2_048
    noise = (random.standard_normal(written) * 3_000).astype(np.int16)
    soundfile.write(path, noise, RATE, subtype="PCM_16")
    if full:
        return
    with path.open("r+b") as wav:
        num_bytes = 2 * num_frames
        wav.truncate(44 + num_bytes)
        wav.seek(4)
        wav.write((36 + num_bytes).to_bytes(4, "little"))
        wav.seek(40)
        wav.write(num_bytes.to_bytes(4, "little"))


def train_tokenizer(lines: Sequence[str], folder: Path) -> Path:
    """A byte-level BPE under the Qwen2 splitting rule, as large as the texts fill."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    from soundmind.data.token_count import QWEN2_SPLIT

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=32_000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    records = [json.loads(line) for line in lines]
    texts = [record[key] for record in records for key in ("user_content", "answer")]
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


if __name__ == "__main__":
    sys.exit(main())
