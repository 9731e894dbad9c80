"""Features in transit: packing, one fetch a step, what is dropped when, and the bound on prompts."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

from soundmind.model.features import wrap_extractor
from soundmind.model.processor import load_processor
from soundmind.training import feature_store
from soundmind.training.agent_loop import (
    EncodedPrompt,
    PromptEncodings,
)
from soundmind.training.feature_store import (
    CLIP_KEY,
    STEP,
    ClipReader,
    StoredClips,
    clip_inputs,
    pack,
)


def stored(*lengths: int, seed: int = 0) -> StoredClips:
    generator = torch.Generator().manual_seed(seed)
    return StoredClips(torch.randn(sum(lengths), 128, generator=generator), torch.tensor(lengths))


def row(uid: str, step: int = 1) -> dict[str, Any]:
    return {CLIP_KEY: uid, STEP: step}


class Shelf:
    """A store in this process that counts what is fetched from it."""

    def __init__(self, **clips: StoredClips) -> None:
        self.clips = clips
        self.fetched: list[str] = []

    def __call__(self, uids: Any) -> dict[str, StoredClips]:
        self.fetched.extend(uids)
        return {uid: self.clips[uid] for uid in uids}


def test_what_the_model_gets_equals_the_stock_extraction_bit_for_bit(
    random_stand_in: Path,
) -> None:
    import transformers

    extractor = load_processor(str(random_stand_in)).feature_extractor
    call = transformers.WhisperFeatureExtractor.__call__
    stock = call.__closure__[0].cell_contents if call.__name__ == "call" else call
    options = {
        "padding": "max_length",
        "sampling_rate": 16_000,
        "return_attention_mask": True,
        "return_tensors": "np",
    }
    generator = np.random.default_rng(0)
    clips = {
        name: (0.1 * generator.standard_normal(samples)).astype(np.float32)
        for name, samples in (("a", 8_000), ("b", 12_345))
    }
    shelf = Shelf()
    for name, clip in clips.items():
        output = wrap_extractor(stock)(extractor, [clip], **options)
        features = {
            "input_features": output["input_features"],
            "feature_attention_mask": output["attention_mask"],
        }
        shelf.clips[name] = pack(features, torch.float32)
    inputs = clip_inputs([row("b"), row("a"), row("b")], ClipReader(shelf), "cpu")
    assert inputs["clip_index"].tolist() == [0, 1, 0]
    for slot, name in enumerate("ba"):
        expected = stock(extractor, [clips[name]], **options)
        frames = int(expected["attention_mask"].sum())
        assert int(inputs["feature_attention_mask"][slot].sum()) == frames
        np.testing.assert_array_equal(
            inputs["input_features"][slot, :, :frames].numpy(),
            expected["input_features"][0, :, :frames],
        )


def test_packing_keeps_valid_frames_only_in_the_type_asked_for() -> None:
    batch = torch.randn(2, 128, 30)
    mask = (torch.arange(30) < torch.tensor([[30], [12]])).long()
    packed = pack({"input_features": batch, "feature_attention_mask": mask}, torch.bfloat16)
    assert packed.frames.shape == (42, 128)
    assert packed.frames.dtype == torch.bfloat16
    assert packed.lengths.tolist() == [30, 12]
    assert torch.equal(packed.clips[1], batch[1, :, :12].T.to(torch.bfloat16))


def test_a_prompt_with_two_clips_is_heard_in_its_own_order() -> None:
    shelf = Shelf(one=stored(10), two=stored(20, 30, seed=1))
    rows = [row("two"), {}, row("one"), row("two")]
    inputs = clip_inputs(rows, ClipReader(shelf), "cpu")
    assert inputs["clip_index"].tolist() == [0, 1, 2, 0, 1]
    assert inputs["feature_attention_mask"].sum(-1).tolist() == [20, 30, 10]
    expected = shelf.clips["two"].clips[1].T
    assert torch.equal(inputs["input_features"][1], expected)


def test_rows_without_clips_need_no_features() -> None:
    assert clip_inputs([{}, {}], ClipReader(Shelf()), "cpu") == {}


def test_a_clip_is_fetched_once_for_all_phases_of_a_step() -> None:
    shelf = Shelf(a=stored(5), b=stored(6))
    reader = ClipReader(shelf)
    for _ in range(3):  # old log-probabilities, reference, update
        for rows in ([row("a"), row("a"), row("b")], [row("b"), row("a")]):
            clip_inputs(rows, reader, "cpu")
    assert shelf.fetched == ["a", "b"]


def test_a_new_step_drops_the_clips_of_the_last() -> None:
    shelf = Shelf(a=stored(5), b=stored(6))
    reader = ClipReader(shelf)
    reader.get(["a"], 1)
    reader.get(["b"], 2)
    assert len(reader) == 1
    reader.get(["a"], 2)
    assert shelf.fetched == ["a", "b", "a"]


def config(actor: str | None, ref: str | None) -> Any:
    from omegaconf import OmegaConf

    def engine(dtype: str | None) -> dict[str, Any]:
        return {"fsdp_config": {"mixed_precision": dtype and {"param_dtype": dtype}}}

    return OmegaConf.create({"actor_rollout_ref": {"actor": engine(actor), "ref": engine(ref)}})


@pytest.mark.parametrize(
    ("actor", "ref", "expected"),
    [
        (None, None, torch.bfloat16),  # verl's default
        ("fp16", "fp16", torch.float16),
        ("fp32", "fp32", torch.float32),
        ("bf16", "fp32", torch.float32),
        ("bf16", "fp16", torch.float32),
    ],
)
def test_features_travel_in_the_type_that_all_engines_compute_in(
    actor: str | None, ref: str | None, expected: torch.dtype
) -> None:
    assert feature_store.transit_dtype(config(actor, ref)) == expected


class Queue:
    """TransferQueue's three calls that the store makes, over one dict."""

    def __init__(self) -> None:
        self.partitions: dict[str, dict[str, Any]] = {}

    def kv_list(self, partition_id: str) -> dict[str, dict[str, Any]]:
        found = self.partitions.get(partition_id)
        return {} if found is None else {partition_id: dict(found)}

    def kv_clear(self, keys: list[str], partition_id: str) -> None:
        for key in keys:
            del self.partitions[partition_id][key]


def test_clearing_spares_prompts_that_wait_for_a_later_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = Queue()
    monkeypatch.setattr(feature_store, "tq", queue)
    assert set(feature_store.clear_spent(["u1_0_0"]).values()) == {0}
    stored_ones = ["u1", "failed", "running", "waiting"]
    queue.partitions["features"] = {
        uid: {"encode_seconds": 2.0**power, "feature_bytes": 10**power}
        for power, uid in enumerate(stored_ones)
    }
    queue.partitions["train"] = dict.fromkeys(["u1_0_0", "u1_1_0", "running", "waiting_0_0"])
    assert feature_store.clear_spent(["u1_0_0", "u1_1_0"]) == {
        "features/prompts": 2,
        "features/left": 2,
        "features/seconds": 3.0,
        "features/bytes": 11,
    }
    assert sorted(queue.partitions["features"]) == ["running", "waiting"]


def test_a_clip_that_is_not_stored_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_store, "tq", Queue())
    with pytest.raises(LookupError, match=r"prompts \['lost'\] are not in TransferQueue"):
        feature_store.fetch(["lost"])


def encoded(nbytes: int) -> EncodedPrompt:
    return EncodedPrompt([1], [1], None, {}, nbytes)


def test_a_prompt_is_encoded_once_and_forgotten_with_its_last_session() -> None:
    async def scenario() -> None:
        encodings = PromptEncodings()
        calls = []

        async def encode() -> EncodedPrompt:
            calls.append(1)
            await asyncio.sleep(0)
            return encoded(10)

        sessions = [encodings.get("uid", encode) for _ in range(8)]
        assert len({id(prompt) for prompt in await asyncio.gather(*sessions)}) == 1
        assert (len(calls), encodings.held_bytes, len(encodings)) == (1, 10, 1)
        encodings.release("uid")
        encodings.release("uid")
        assert (encodings.held_bytes, len(encodings)) == (0, 0)

    asyncio.run(scenario())


def test_prompts_wait_for_room_and_never_hold_more_than_the_bound_and_one() -> None:
    async def scenario() -> None:
        encodings = PromptEncodings(max_bytes=100)
        highest = 0

        async def encode() -> EncodedPrompt:
            await asyncio.sleep(0)
            return encoded(40)

        async def session(uid: str) -> None:
            nonlocal highest
            await encodings.get(uid, encode)
            highest = max(highest, encodings.held_bytes)
            await asyncio.sleep(0.001)
            encodings.release(uid)

        await asyncio.gather(*(session(str(number)) for number in range(20)))
        assert highest == 120
        assert (encodings.held_bytes, len(encodings)) == (0, 0)

    asyncio.run(scenario())


def test_a_prompt_that_cannot_be_encoded_fails_its_sessions_and_blocks_nobody() -> None:
    async def scenario() -> None:
        encodings = PromptEncodings(max_bytes=1)

        async def broken() -> EncodedPrompt:
            raise ValueError("no such clip")

        async def encode() -> EncodedPrompt:
            return encoded(10)

        results = await asyncio.gather(
            *(encodings.get("broken", broken) for _ in range(2)), return_exceptions=True
        )
        assert [str(error) for error in results] == ["no such clip"] * 2
        encodings.release("broken")
        assert (await encodings.get("fine", encode)).nbytes == 10

    asyncio.run(scenario())


@pytest.mark.e2e
def test_through_transfer_queue_itself() -> None:
    """Clips of different length, put as the agent loop puts them, fetched and cleared."""
    import ray
    import transfer_queue as tq

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        tq.init()
        clips = {"u1": stored(50), "u2": stored(7, 9, seed=1), "u3": stored(50, seed=2)}
        half = {uid: StoredClips(c.frames.bfloat16(), c.lengths) for uid, c in clips.items()}

        async def put_all(entries: dict[str, StoredClips]) -> None:
            for uid, entry in entries.items():
                await feature_store.put(uid, 1, entry, 0.25)

        for entries in (clips, half):
            asyncio.run(put_all(entries))
            for uids in (["u2"], ["u3", "u1"], ["u1", "u2", "u3"]):
                found = feature_store.fetch(uids)
                assert list(found) == uids
                for uid in uids:
                    assert torch.equal(found[uid].frames, entries[uid].frames)
                    assert torch.equal(found[uid].lengths, entries[uid].lengths)
            with pytest.raises(LookupError, match="u4"):
                feature_store.fetch(["u1", "u4"])
            tq.kv_put(key="u2", partition_id="train", tag={"status": "running"})
            spent = feature_store.clear_spent(["u1_0_0"])
            assert (spent["features/prompts"], spent["features/left"]) == (2, 1)
            assert spent["features/seconds"] == 0.5
            assert spent["features/bytes"] == sum(
                entries[uid].frames.nbytes + entries[uid].lengths.nbytes for uid in ("u1", "u3")
            )
            assert list(tq.kv_list("features")["features"]) == ["u2"]
            tq.kv_clear("u2", "train")
            assert feature_store.clear_spent([])["features/prompts"] == 1
            assert tq.kv_list("features") == {"features": {}}
    finally:
        tq.close()
        ray.shutdown()
