"""How often audio features are extracted and how many bytes of them travel: stock verl and ours.

    python benchmarks/features.py                      # one-minute clips, n = 2 and 8, 4 prompts
    python benchmarks/features.py --seconds 5 --n 8

Both sides run in this process, one after the other, on the same rows of white noise and the random
stand-in: verl's own `AgentLoopWorkerTQ` with its own `SingleTurnAgentLoop` and transformers' own
extractor, then our worker and loop; both through a real TransferQueue. Tokens come from a stub in
the place of the rollout server, rewards from a stub in the place of the reward worker; what is
counted happens around them:

    extractions   calls of the extractor's spectrogram code, one a clip
    CPU           seconds of this process's processor time within those calls
    put, fetched  bytes on TransferQueue's wires. Fetched are all fields of all rollouts once in each
                  of the three phases of a step (old log-probabilities, reference, update), as verl's
                  workers do, and the stored clips where rollouts carry keys
    to vLLM       pickled bytes of the waveforms that go to the rollout server
    inside vLLM   the same prompts, n requests each, through a vLLM engine in this process

Prints a table and writes outputs/benchmarks/features.json (--output). Nothing is asserted: read
the numbers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from soundmind.data.statistics import text_table
from soundmind.plugin.environment import select
from soundmind.system.files import write_json
from soundmind.system.machine import hardware

REPOSITORY = Path(__file__).resolve().parent.parent
RATE = 16_000
PHASES = 3  # of a step that fetch a rollout's fields
NEW_TOKENS = 16


class Counters:
    """What one side did, by name."""

    def __init__(self) -> None:
        self.extractions = 0
        self.cpu_seconds = 0.0
        self.put_bytes = 0
        self.fetched_bytes = 0
        self.waveform_bytes = 0


@contextmanager
def counted(counters: Counters) -> Iterator[None]:
    """Count extractions and TransferQueue's traffic in this process."""
    from transfer_queue.utils.zmq_utils import ZMQMessage, ZMQRequestType, frame_nbytes
    from transformers import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor._torch_extract_fbank_features
    serialize, deserialize = ZMQMessage.serialize, ZMQMessage.deserialize

    def extracting(self: Any, waveform: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        features = extract(self, waveform, *args, **kwargs)
        counters.cpu_seconds += time.thread_time() - started
        counters.extractions += len(features)
        return features

    def sending(self: Any) -> Any:
        frames = serialize(self)
        if self.request_type == ZMQRequestType.PUT_DATA:
            counters.put_bytes += sum(frame_nbytes(frame) or 0 for frame in frames)
        return frames

    def receiving(frames: Any) -> Any:
        message = deserialize(frames)
        if message.request_type == ZMQRequestType.GET_DATA_RESPONSE:
            counters.fetched_bytes += sum(frame_nbytes(frame) or 0 for frame in frames)
        return message

    WhisperFeatureExtractor._torch_extract_fbank_features = extracting
    ZMQMessage.serialize, ZMQMessage.deserialize = sending, staticmethod(receiving)
    try:
        yield
    finally:
        WhisperFeatureExtractor._torch_extract_fbank_features = extract
        ZMQMessage.serialize, ZMQMessage.deserialize = serialize, deserialize


@contextmanager
def extractor(stock: bool) -> Iterator[None]:
    """transformers' own extractor, or ours."""
    from transformers import WhisperFeatureExtractor

    ours = WhisperFeatureExtractor.__call__
    if stock:
        WhisperFeatureExtractor.__call__ = ours.__closure__[0].cell_contents
    try:
        yield
    finally:
        WhisperFeatureExtractor.__call__ = ours


class StubServer:
    """In the place of verl's client of the rollout server: random tokens, counted waveforms."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self.requests: list[dict[str, Any]] = []
        self._seen: set[Any] = set()

    async def generate(self, *_: Any, prompt_ids: Any, audio_data: Any, **kwargs: Any) -> Any:
        import ray
        from verl.workers.rollout.replica import TokenOutput

        shared = isinstance(audio_data, ray.ObjectRef)
        if not (shared and audio_data in self._seen):
            clips = ray.get(audio_data) if shared else audio_data
            self.counters.waveform_bytes += len(pickle.dumps(clips))
            self._seen.add(audio_data if shared else len(self.requests))
        clips = ray.get(audio_data) if shared else audio_data
        self.requests.append({"prompt_ids": prompt_ids, "clips": clips, **kwargs})
        tokens = np.random.default_rng(len(self.requests)).integers(0, 200, NEW_TOKENS).tolist()
        return TokenOutput(
            token_ids=tokens, log_probs=[-1.0] * NEW_TOKENS, stop_reason="length", extra_fields={}
        )


class StubReward:
    """In the place of the handle of verl's reward worker."""

    class compute_score:
        @staticmethod
        async def remote(_: Any) -> dict[str, Any]:
            return {"reward_score": 0.0, "reward_extra_info": {"acc": 0.0}}


def prompts(folder: Path, count: int, seconds: int, side: str) -> Any:
    """The batch that verl's trainer hands to a worker, one row a prompt."""
    import soundfile
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    from soundmind.task.prompts import build_messages

    rows = []
    for number in range(count):
        path = folder / f"{seconds}s-{number}.wav"
        if not path.exists():
            noise = 0.1 * np.random.default_rng(number).standard_normal(seconds * RATE)
            soundfile.write(path, noise.astype(np.float32), RATE, subtype="PCM_16")
        rows.append(
            {
                "raw_prompt": build_messages("audio", "", str(path), "practice"),
                "uid": f"{side}-{seconds}-{number}",
                "index": number,
                "data_source": "noise",
                "reward_model": {"ground_truth": "entailed", "style": "rule"},
                "extra_info": {"id": str(number)},
                "global_steps": 1,
            }
        )
    return list_of_dict_to_tensordict(rows)


async def roll_out(worker: Any, batch: Any, agent_loop: str) -> None:
    """One step's rollouts, to the end of the last session."""
    from tensordict import NonTensorData

    batch["agent_name"] = NonTensorData(agent_loop)
    batch["global_steps"] = NonTensorData(1)
    await worker.generate_sequences(batch)
    while worker.background_tasks:
        await asyncio.gather(*list(worker.background_tasks))


def measure(config: Any, folder: Path, seconds: int, n: int, count: int, stock: bool) -> Any:
    """One side's step; its counters and the requests it sent to the rollout server."""
    import transfer_queue as tq
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ

    from soundmind.training.agent_loop import AGENT_LOOP, AudioAgentLoopWorker
    from soundmind.training.feature_store import ClipReader, clear_spent, clip_inputs, clip_rows

    counters = Counters()
    server = StubServer(counters)
    config.actor_rollout_ref.rollout.n = n
    side = f"{'stock' if stock else 'ours'}-{n}"
    worker_class = AgentLoopWorkerTQ.__ray_actor_class__ if stock else AudioAgentLoopWorker
    with extractor(stock), counted(counters):
        worker = worker_class(config, server, None, [StubReward])
        loop = "single_turn_agent" if stock else AGENT_LOOP
        asyncio.run(roll_out(worker, prompts(folder, count, seconds, side), loop))
        keys = [key for key in tq.kv_list("train")["train"] if key.count("_") == 2]
        assert len(keys) == n * count, f"{len(keys)} of {n * count} rollouts arrived"
        reader = ClipReader()
        for _ in range(PHASES):
            batch = tq.kv_batch_get(keys=keys, partition_id="train")
            if not stock:
                clip_inputs(clip_rows(batch), reader, "cpu")
    tq.kv_clear(keys=list(tq.kv_list("train")["train"]), partition_id="train")
    clear_spent([])
    return counters, server.requests


def inside_vllm(model: Path, requests: Sequence[dict[str, Any]], stock: bool) -> Counters:
    """Extractions of a vLLM engine in this process over the requests of a step."""
    from vllm import LLM, SamplingParams

    global _ENGINE
    if _ENGINE is None:
        longest = max(len(request["prompt_ids"]) for request in requests)
        seconds = max(clip.size for request in requests for clip in request["clips"]) / RATE
        _ENGINE = LLM(
            model=str(model),
            dtype="float32",
            max_model_len=longest + int(25 * seconds) + 64,
            max_num_seqs=8,
            enforce_eager=True,
            limit_mm_per_prompt={"audio": 1, "image": 0, "video": 0},
            disable_log_stats=True,
        )
    _ENGINE.reset_mm_cache()
    counters = Counters()
    with extractor(stock), counted(counters):
        _ENGINE.generate(
            [
                {
                    "prompt_token_ids": request["prompt_ids"],
                    "multi_modal_data": {"audio": request["clips"]},
                    "mm_processor_kwargs": request["mm_processor_kwargs"],
                }
                for request in requests
            ],
            SamplingParams(max_tokens=1),
            use_tqdm=False,
        )
    return counters


_ENGINE: Any = None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both sides and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=60, help="of a clip")
    parser.add_argument("--n", type=int, nargs="+", default=[2, 8], help="rollouts a prompt")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--without-vllm", action="store_true", help="leave the engine out")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "outputs/benchmarks")
    options = parser.parse_args(argv)
    select(os.environ, cpu=True)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its extractions happen where we count
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / "tiny"
        make = [sys.executable, "-m", "soundmind.tiny", "--no-warmup", "--output", str(model)]
        subprocess.run(make, check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        results = compare(options, folder, model)
    sides = ("stock", "ours")
    head = [f"per prompt and step, clips of {options.seconds} s"]
    head += [f"{side}, n = {n}" for n in options.n for side in sides]
    lines = [
        [name, *(format(results[f"{side}-{n}"][name], form) for n in options.n for side in sides)]
        for name, form in ROWS.items()
        if name in results[f"ours-{options.n[0]}"]
    ]
    print(text_table(head, lines))
    for n in options.n:
        moved = "bytes put a rollout", "bytes fetched a rollout"
        ratios = [results[f"stock-{n}"][name] / results[f"ours-{n}"][name] for name in moved]
        print(
            f"n = {n}: {ratios[0]:.0f} times fewer bytes put, {ratios[1]:.0f} times fewer fetched"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    report = {"options": {"seconds": options.seconds, "prompts": options.prompts}, **results}
    write_json(options.output / "features.json", {**report, "hardware": hardware()})
    return 0


ROWS = {
    "extractions, trainer's side": ".2f",
    "extractions inside vLLM": ".2f",
    "CPU seconds of extraction, trainer's side": ".3f",
    "CPU seconds of extraction inside vLLM": ".3f",
    "bytes put a rollout": ",.0f",
    "bytes fetched a rollout": ",.0f",
    "waveform bytes to vLLM a rollout": ",.0f",
}


def compare(options: argparse.Namespace, folder: Path, model: Path) -> dict[str, Any]:
    """Figures by side and n."""
    import ray
    import transfer_queue as tq

    from soundmind.run.config import compose_config

    prompt_tokens = 25 * options.seconds + 128
    config = compose_config(
        "grpo_tiny_cpu",
        [
            f"actor_rollout_ref.model.path='{model}'",
            f"data.max_prompt_length={prompt_tokens}",
            f"actor_rollout_ref.rollout.max_model_len={prompt_tokens + NEW_TOKENS}",
        ],
    )
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    results = {}
    try:
        tq.init(config.transfer_queue)
        for n in options.n:
            for stock in (True, False):
                counters, requests = measure(
                    config, folder, options.seconds, n, options.prompts, stock
                )
                rollouts = n * options.prompts
                figures = {
                    "extractions, trainer's side": counters.extractions / options.prompts,
                    "CPU seconds of extraction, trainer's side": counters.cpu_seconds
                    / options.prompts,
                    "bytes put a rollout": counters.put_bytes / rollouts,
                    "bytes fetched a rollout": counters.fetched_bytes / rollouts,
                    "waveform bytes to vLLM a rollout": counters.waveform_bytes / rollouts,
                }
                if not options.without_vllm:
                    inside = inside_vllm(model, requests, stock)
                    figures |= {
                        "extractions inside vLLM": inside.extractions / options.prompts,
                        "CPU seconds of extraction inside vLLM": inside.cpu_seconds
                        / options.prompts,
                    }
                results[f"{'stock' if stock else 'ours'}-{n}"] = figures
    finally:
        tq.close()
        ray.shutdown()
    return results


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # past vLLM's leak warnings
