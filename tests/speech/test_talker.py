"""Codec tokens of the batched talker against transformers' own `generate`, in float32."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from soundmind.model.folder import ModelError
from soundmind.speech.decoding import SAID_NOTHING, SpeechSettings, choose
from soundmind.speech.states import (
    TalkerInputs,
    mark_embeddings,
    thinker_states,
)
from soundmind.speech.talker import Talker, Unspeakable
from soundmind.speech.weights import load_voice

GREEDY = SpeechSettings(temperature=0.0, max_seconds=1.2)  # 60 codes
ROWS = 6


class Oracle:
    """The complete model; its vocoder is replaced by one that keeps the codes."""

    def __init__(self, folder: Path) -> None:
        from transformers import Qwen2_5OmniForConditionalGeneration, Qwen2_5OmniProcessor

        self.processor = Qwen2_5OmniProcessor.from_pretrained(folder)
        self.omni: Any = Qwen2_5OmniForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32
        ).eval()

        class Spy(torch.nn.Module):  # type: ignore[name-defined,misc]
            dtype = torch.float32

            def forward(spy, codes: Any, **_: Any) -> Any:
                self.codes = tuple(codes[0].tolist())
                return torch.zeros(1)

        self.omni.token2wav = Spy()
        self.marks = (self.omni.talker.text_eos_token, self.omni.talker.text_pad_token)
        self.start = self.omni.speaker_map["Ethan"]["bos_token"]

    def encode(self, seconds: float | None) -> dict[str, Any]:
        """A prompt of this many seconds of noise, or of text."""
        content: list[dict[str, Any]] = [{"type": "text", "text": "all wugs are feps"}]
        clip = None
        if seconds is not None:
            content.insert(0, {"type": "audio", "audio": ""})
            noise = np.random.default_rng(int(seconds * 1000)).normal(0, 0.1, int(seconds * 16_000))
            clip = [noise.astype(np.float32)]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = self.processor(text=text, audio=clip, sampling_rate=16_000, return_tensors="pt")
        return dict(inputs)

    def generate(
        self, inputs: dict[str, Any], new_tokens: int
    ) -> tuple[list[int], tuple[int, ...]]:
        """Greedy response and codes of transformers."""
        ids, _ = self.omni.generate(
            **inputs,
            generation_mode="audio",
            speaker="Ethan",
            thinker_max_new_tokens=new_tokens,
            thinker_do_sample=False,
            thinker_eos_token_id=self.processor.tokenizer.eos_token_id,
            thinker_pad_token_id=self.processor.tokenizer.pad_token_id,
            talker_do_sample=False,
            talker_max_new_tokens=GREEDY.max_codes,
        )
        return ids[0, inputs["input_ids"].shape[1] :].tolist(), self.codes

    def inputs(self, talker: Talker, prompt: dict[str, Any], response: list[int]) -> Any:
        """The talker's inputs, from one forward pass."""
        length = prompt["input_ids"].shape[1]
        ids = torch.cat([prompt["input_ids"], torch.tensor([response[:-1]], dtype=torch.long)], 1)
        more = {k: v for k, v in prompt.items() if k not in ("input_ids", "attention_mask")}
        states = thinker_states(self.omni.thinker, ids, **more)
        marks = mark_embeddings(self.omni.thinker, self.start, talker.mark_ids)
        return talker.inputs(states, length, marks)


PROMPTS = (None, 0.5, 1.1, 2.3, None, 1.7)  # seconds of sound, or text


@pytest.fixture(scope="module")
def folder(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in whose talker ends: at once in the second row, midway in those like the first.

    Random weights never end by themselves, so the end marks get the scores of codes it does say.
    """
    from safetensors.torch import load_file, save_file

    plain = Oracle(random_stand_in)
    first, second = (plain.generate(plain.encode(PROMPTS[i]), 4 + 5 * i)[1] for i in (0, 1))
    late = next(code for place, code in enumerate(first) if place > 5 and code not in first[:5])
    copy = tmp_path_factory.mktemp("talker") / "tiny"
    shutil.copytree(random_stand_in, copy)
    tensors = load_file(copy / "model.safetensors")
    head = tensors["talker.codec_head.weight"]
    head[8294], head[8292] = 1.02 * head[late], 1.2 * head[second[0]]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="module")
def talker(folder: Path) -> Talker:
    return Talker(folder)


@pytest.fixture(scope="module")
def rows(oracle: Oracle, talker: Talker) -> list[tuple[TalkerInputs, tuple[int, ...]]]:
    """Inputs and `generate`'s codes for text and for clips of several lengths."""
    found = []
    for number, seconds in enumerate(PROMPTS):
        prompt = oracle.encode(seconds)
        response, codes = oracle.generate(prompt, 4 + 5 * number)
        found.append((oracle.inputs(talker, prompt, response), codes))
    return found


def said(codes: Any) -> list[tuple[int, ...]]:
    return [code.tokens for code in codes]


def test_one_forward_pass_gives_the_codes_of_generate(talker: Talker, rows: Any) -> None:
    alone = [talker.speak([inputs], [0], GREEDY)[0].tokens for inputs, _ in rows]
    wanted = [codes for _, codes in rows]
    assert alone == wanted
    lengths = {len(codes) for codes in wanted}
    assert {0, GREEDY.max_codes - 1} < lengths  # one ends at once, some are cut, some end midway


@pytest.mark.parametrize("at_once", [2, 3, ROWS])
def test_a_batch_in_any_order_says_the_same(talker: Talker, rows: Any, at_once: int) -> None:
    order = [3, 0, 5, 2, 4, 1]
    codes = talker.speak([rows[i][0] for i in order], [0] * ROWS, GREEDY, rows=at_once)
    assert said(codes) == [rows[i][1] for i in order]


def test_a_cut_answer_is_told_from_one_that_ended(talker: Talker, rows: Any) -> None:
    for codes, (_, wanted) in zip(
        talker.speak([inputs for inputs, _ in rows], [0] * ROWS, GREEDY), rows, strict=True
    ):
        assert codes.ended == (len(wanted) < GREEDY.max_codes - 1)
        assert not codes.short_of_positions


def test_the_codes_follow_the_thinkers_weights(oracle: Oracle, talker: Talker, rows: Any) -> None:
    prompt = oracle.encode(1.1)
    weight = oracle.omni.thinker.model.layers[1].mlp.down_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(0.5 * torch.randn_like(weight, generator=None))
    try:
        response, codes = oracle.generate(prompt, 14)
        assert (
            talker.speak([oracle.inputs(talker, prompt, response)], [0], GREEDY)[0].tokens == codes
        )
        with torch.no_grad():
            weight.copy_(before)
        stale = oracle.inputs(talker, prompt, response)
        assert talker.speak([stale], [0], GREEDY)[0].tokens != codes
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_sampled_row_says_the_same_in_any_batch(talker: Talker, rows: Any) -> None:
    settings = replace(GREEDY, temperature=0.9)
    inputs = [entry for entry, _ in rows]
    together = said(talker.speak(inputs, range(ROWS), settings))
    backwards = said(talker.speak(inputs[::-1], range(ROWS)[::-1], settings, rows=2))[::-1]
    assert together == backwards
    assert said(talker.speak(inputs, range(1, ROWS + 1), settings)) != together


def test_the_choice_is_distributed_as_in_transformers() -> None:
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        SuppressTokensLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    torch.manual_seed(0)
    logits, said_before = 3 * torch.randn(1, 200), torch.tensor([[5, 9, 9, 17, 60]])
    stock = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.05),
            SuppressTokensLogitsProcessor([3]),
            TemperatureLogitsWarper(0.9),
            TopKLogitsWarper(40),
            TopPLogitsWarper(0.8),
        ]
    )
    wanted = stock(said_before, logits.clone()).softmax(-1)[0]
    seen = torch.zeros(1, 200, dtype=torch.bool)
    seen[0, said_before[0]] = True
    draws = (torch.arange(20_000) + 0.5).unsqueeze(1) / 20_000
    many = (tensor.expand(20_000, -1).clone() for tensor in (logits, seen))
    chosen = choose(*many, draws, 3, SpeechSettings())
    shares = torch.bincount(chosen[:, 0], minlength=200) / 20_000
    assert torch.allclose(shares, wanted, atol=2e-4)


def test_a_response_of_the_end_token_alone_is_silent(talker: Talker, rows: Any) -> None:
    states = torch.zeros(5, rows[0][0].prefix.shape[1])
    nothing = talker.inputs(states, 5, states[:3])
    assert nothing is None
    assert talker.speak([nothing, rows[0][0]], [0, 0], GREEDY)[0] == SAID_NOTHING


def test_an_answer_ends_where_the_positions_do(talker: Talker, rows: Any) -> None:
    inputs = max((entry for entry, codes in rows if len(codes) > 50), key=lambda e: len(e.prefix))
    positions, talker.max_positions = talker.max_positions, len(inputs.prefix) + 20
    try:
        codes = talker.speak([inputs], [0], GREEDY)[0]
        assert (len(codes.tokens), codes.ended, codes.short_of_positions) == (19, False, True)
        with pytest.raises(Unspeakable, match="leaves none of the talker's"):
            talker.inputs(torch.zeros(400, 8), 399, torch.zeros(3, 8))
    finally:
        talker.max_positions = positions


def test_states_that_are_not_finite_are_refused(talker: Talker) -> None:
    with pytest.raises(Unspeakable, match="not finite"):
        talker.inputs(torch.full((9, 4), torch.nan), 5, torch.zeros(3, 4))


@pytest.mark.parametrize("lost", ["talker.model.norm.weight", "talker.codec_head.weight"])
def test_a_folder_without_one_tensor_of_the_talker_is_refused(
    folder: Path, tmp_path: Path, lost: str
) -> None:
    refuse_without(folder, tmp_path, lost, Talker)


def refuse_without(folder: Path, tmp_path: Path, lost: str, load: Callable[[Path], object]) -> None:
    """`load` names the tensor that a copy of `folder` lacks."""
    from safetensors.torch import load_file, save_file

    poor = tmp_path / "poor"
    shutil.copytree(folder, poor)
    tensors = load_file(poor / "model.safetensors")
    del tensors[lost]
    save_file(tensors, poor / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 tensors") as caught:
        load(poor)
    assert lost in str(caught.value)


def test_weights_in_shards_are_read_too(folder: Path, talker: Talker, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded)
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    table = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for file in set(table.values()):
        part = {name: tensors[name] for name, where in table.items() if where == file}
        save_file(part, sharded / file, {"format": "pt"})
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    ours = Talker(sharded).model.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in talker.model.state_dict().items())


def test_an_unknown_voice_names_the_known_ones(folder: Path) -> None:
    with pytest.raises(ModelError, match="Chelsie"):
        load_voice(folder, "Nobody")
