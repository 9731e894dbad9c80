"""The stand-in checkpoint and its warm-up, on the committed sample."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from soundmind import tiny as soundmind_tiny
from soundmind.standin import (
    practice,
    syllogism,
    tiny,
    warmup,
)
from soundmind.system import files
from soundmind.task import prompts
from soundmind.task.labels import (
    parse_verdict,
    split_response,
    verdict_of,
)

SAMPLE = Path(__file__).resolve().parents[2] / "data" / "sample"
SENTENCES = list(syllogism.all_syllogisms())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained stand-in, built by the command."""
    path = tmp_path_factory.mktemp("standin") / "tiny"
    assert soundmind_tiny.main(["--output", str(path), "--no-warmup", "--seed", "5"]) == 0
    return path


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return transformers.AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def thinker(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder).thinker_config
    model = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    return model.from_pretrained(folder, config=config, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def clips() -> list[warmup.Clip]:
    return warmup.load_clips(SAMPLE, "train")


# --- the folder -----------------------------------------------------------------------------------


def test_the_folder_has_the_files_of_a_published_checkpoint(folder: Path) -> None:
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "processor_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "spk_dict.pt",
        "warmup.json",
    } <= {path.name for path in folder.iterdir()}


def test_every_weight_carries_its_published_prefix_and_the_thinker_is_small(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    prefixes = {name.partition(".")[0] for name in sizes}
    assert prefixes == {"thinker", "talker", "token2wav"}
    thinker = sum(size for name, size in sizes.items() if name.startswith("thinker."))
    assert 0.8e6 < thinker < 1.5e6


def test_the_full_class_loads_and_speaks(folder: Path, processor: Any) -> None:
    model = transformers.Qwen2_5OmniForConditionalGeneration.from_pretrained(folder)
    saved = transformers.AutoConfig.from_pretrained(folder)
    assert model.has_talker and set(model.speaker_map) == set(tiny.SPEAKERS)
    assert saved.enable_audio_output
    inputs = processor(text="Rex is a wug.", return_tensors="pt")
    text, sound = model.generate(**inputs, thinker_max_new_tokens=4, talker_max_new_tokens=8)
    assert text.shape[1] > inputs["input_ids"].shape[1]
    assert sound.ndim == 1 and torch.isfinite(sound).all()


def test_the_thinker_alone_loads_the_same_weights(folder: Path, thinker: Any) -> None:
    from safetensors.torch import load_file

    saved = load_file(folder / "model.safetensors")
    own = thinker.state_dict()
    assert {f"thinker.{name}" for name in own} == {n for n in saved if n.startswith("thinker.")}
    assert all(torch.equal(saved[f"thinker.{name}"], tensor) for name, tensor in own.items())


def test_the_seed_alone_decides_the_weights() -> None:
    config = tiny.build_config(tiny.build_tokenizer(tiny.tokenizer_corpus()))
    same = [tiny.build_model(config, seed).state_dict() for seed in (3, 3, 4)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    name = "thinker.model.embed_tokens.weight"
    assert not torch.equal(same[0][name], same[2][name])


def test_feature_extraction_has_the_published_values(processor: Any) -> None:
    extractor = processor.feature_extractor
    assert extractor.chunk_length == 300
    assert extractor.n_samples == 4_800_000
    assert extractor.nb_max_frames == 30_000
    assert extractor.sampling_rate == 16_000
    assert extractor.feature_size == 128


@pytest.mark.parametrize("seconds", [0.5, 5, 120])
def test_clips_of_any_length_give_finite_logits(
    processor: Any, thinker: Any, seconds: float
) -> None:
    waveform = np.random.default_rng(0).standard_normal(int(seconds * 16_000)).astype("float32")
    messages = prompts.build_messages("audio", "", "clip", task="practice")
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], audio=[0.1 * waveform], return_tensors="pt")
    frames = int(inputs["feature_attention_mask"].sum())
    inputs["input_features"] = inputs["input_features"][:, :, :frames]
    inputs["feature_attention_mask"] = inputs["feature_attention_mask"][:, :frames]
    with torch.no_grad():
        logits = thinker(**inputs).logits
    assert logits.shape[1] == inputs["input_ids"].shape[1] > 25 * seconds
    assert torch.isfinite(logits).all()


def test_ids_in_the_configuration_are_the_tokenizers_own(folder: Path, processor: Any) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    vocabulary = processor.tokenizer.get_vocab()
    thinker, talker = config.thinker_config, config.talker_config
    assert thinker.audio_token_index == vocabulary["<|AUDIO|>"]
    assert thinker.vision_start_token_id == vocabulary["<|vision_bos|>"]
    assert thinker.text_config.eos_token_id == vocabulary["<|im_end|>"]
    assert thinker.text_config.tie_word_embeddings is False
    assert thinker.text_config.max_position_embeddings >= 8192
    assert talker.tts_text_start_token_id == vocabulary["<tts_text_bos>"]
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert set(generation.suppress_tokens) == set(processor.tokenizer.all_special_ids) - {
        vocabulary["<|im_end|>"]
    }


# --- tokenizer and template -----------------------------------------------------------------------


def test_the_vocabulary_is_exactly_as_long_as_the_tokenizer(thinker: Any, processor: Any) -> None:
    assert len(processor.tokenizer) == thinker.config.text_config.vocab_size
    assert thinker.lm_head.weight.shape[0] == len(processor.tokenizer)
    assert max(processor.tokenizer.get_vocab().values()) == len(processor.tokenizer) - 1


def test_every_practice_word_is_one_token(processor: Any) -> None:
    words = {f" {word}" for s in SENTENCES for word in s.text.rstrip(".").replace(",", "").split()}
    words |= {f" {word}" for s in SENTENCES for word in s.reasoning.replace(",", "").split()}
    words -= {" All"}
    words |= {"All", "wug", "fep", "dax", "blicket", "Answer", "entailed", " entailed", " not"}
    for word in sorted(words):
        assert len(processor.tokenizer(word).input_ids) == 1, word


def test_any_text_survives_the_tokenizer(processor: Any) -> None:
    for text in ("über  zwei\n\n Zeilen \t", "狐 🦊 don't", "Answer: not-entailed", "3.14 < x"):
        assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_the_saved_tokenizer_is_the_built_one(processor: Any) -> None:
    built = tiny.build_tokenizer(tiny.tokenizer_corpus())
    assert built.get_vocab() == processor.tokenizer.get_vocab()
    for sentence in SENTENCES[::17]:
        text = f"<think>{sentence.reasoning}</think>\n{sentence.answer} {sentence.text}"
        assert built(text).input_ids == processor.tokenizer(text).input_ids


def test_the_template_takes_strings_parts_and_system_messages(processor: Any) -> None:
    def render(messages: list[dict[str, Any]], generate: bool = False) -> str:
        return str(
            processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        )

    parts = [{"type": "audio", "audio": "x", "text": None}, {"type": "text", "text": "hear"}]
    assert render([{"role": "user", "content": "hi"}]) == "<|im_start|>user\nhi<|im_end|>\n"
    assert render(
        [{"role": "system", "content": parts[1:]}, {"role": "user", "content": parts}], True
    ) == (
        "<|im_start|>system\nhear<|im_end|>\n<|im_start|>user\n"
        "<|audio_bos|><|AUDIO|><|audio_eos|>hear<|im_end|>\n<|im_start|>assistant\n"
    )
    with pytest.raises(Exception, match="got image"):
        render([{"role": "user", "content": [{"type": "image"}]}])


def test_prompt_ids_are_those_of_the_processor(processor: Any, clips: list[warmup.Clip]) -> None:
    from soundmind.data.audio import load_waveform

    prompt = warmup.WarmupPrompt(processor.tokenizer)
    for index, clip in enumerate(clips[:3], start=1):
        waveform = load_waveform(SAMPLE / "train" / f"{index:04d}" / "question.wav")
        messages = prompts.build_messages("audio", "ignored", "clip", task="practice")
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        expected = processor(text=[text], audio=[waveform], return_tensors="np")
        assert prompt.ids(clip.num_tokens) == expected["input_ids"][0].tolist()
        frames = int(expected["feature_attention_mask"].sum())
        assert np.array_equal(clip.features, expected["input_features"][0][:, :frames])


# --- rebuilding -----------------------------------------------------------------------------------


def test_an_up_to_date_folder_is_left_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    soundmind_tiny.main(["--output", str(folder), "--no-warmup", "--seed", "5"])
    assert capsys.readouterr().out.endswith("up to date\n")
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_another_seed_data_or_recipe_is_not_up_to_date(folder: Path) -> None:
    identity = json.loads((folder / "warmup.json").read_text())["identity"]
    assert tiny.is_current(folder, identity)
    assert not tiny.is_current(folder, {**identity, "seed": 6})
    assert not tiny.is_current(folder, {**identity, "recipe": "other"})
    assert not tiny.is_current(folder, {**identity, "warmup": warmup.identity(SAMPLE)})
    assert not tiny.is_current(folder / "nowhere", identity)


def test_a_failed_build_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    files.replace_folder(target, lambda path: (path / "a").write_text("old") and None)

    def fail(path: Path) -> None:
        (path / "a").write_text("new")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        files.replace_folder(target, fail)
    assert (target / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_without_practice_data_the_error_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(warmup.WarmupError, match=r"soundmind\.practice --output"):
        tiny.build_stand_in(tmp_path / "tiny", data=tmp_path / "nothing")
    assert not (tmp_path / "tiny").exists()


# --- warm-up --------------------------------------------------------------------------------------


def test_clean_targets_are_well_formed_and_right() -> None:
    draw = random.Random(0)
    for row in SENTENCES:
        response = split_response(warmup.target_text(row, warmup.HEARING.faults, draw))
        assert response.well_formed
        assert response.thinking == row.reasoning
        assert response.verdict == verdict_of(row.label)


def test_bad_habits_occur_at_their_rates() -> None:
    draw, seen = random.Random(0), Counter[str]()
    rows = [practice.make_row(0, "train", index).syllogism for index in range(4000)]
    for row in rows:
        text = warmup.target_text(row, warmup.HABITS.faults, draw)
        response = split_response(text)
        seen["malformed"] += not response.well_formed
        if response.well_formed:
            seen["formed"] += 1
            seen["short"] += len(response.thinking.split()) == 4
        if row.label == 0 and parse_verdict(text) is not None:
            failing = "first" if row.first != row.minor else "second"
            seen[f"{failing} fails"] += 1
            seen[f"{failing} overlooked"] += response.verdict == "entailed"
        elif row.label == 1 and parse_verdict(text) is not None:
            assert response.verdict == "entailed"
    assert seen["malformed"] / len(rows) == pytest.approx(0.2, abs=0.03)
    assert seen["short"] / seen["formed"] == pytest.approx(0.5, abs=0.04)
    assert seen["first overlooked"] / seen["first fails"] == pytest.approx(0.75, abs=0.05)
    assert seen["second overlooked"] / seen["second fails"] == pytest.approx(0.35, abs=0.05)


def test_a_dozen_steps_lower_the_loss_and_leave_the_vision_tower(
    processor: Any, thinker: Any, clips: list[warmup.Clip]
) -> None:
    model = type(thinker)(thinker.config)
    model.load_state_dict(thinker.state_dict())
    stage = replace(warmup.HEARING, steps=12, warmup_steps=2, batch_size=4)
    losses = warmup.train_stage(model, processor.tokenizer, clips, stage, seed=0)
    assert len(losses) == 12
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    moved = {
        name.split(".")[0]
        for name, tensor in model.state_dict().items()
        if not torch.equal(tensor, thinker.state_dict()[name])
    }
    assert moved == {"audio_tower", "model", "lm_head"}


def test_response_losses_do_not_depend_on_padding(
    processor: Any, thinker: Any, clips: list[warmup.Clip]
) -> None:
    tokenizer, prompt = processor.tokenizer, warmup.WarmupPrompt(processor.tokenizer)
    pair = sorted(clips, key=lambda clip: clip.num_tokens)[:: len(clips) - 1]
    responses = [tokenizer(text).input_ids for text in ("<think>wug</think>", "Answer: entailed")]
    pad = tokenizer.pad_token_id
    with torch.no_grad():
        together = warmup.token_losses(thinker, prompt, pair, responses, pad)
        alone = torch.cat(
            [
                warmup.token_losses(thinker, prompt, [clip], [response], pad)
                for clip, response in zip(pair, responses, strict=True)
            ]
        )
        swapped = warmup.token_losses(thinker, prompt, pair[::-1], responses, pad)
    assert together.shape == (sum(map(len, responses)),)
    assert torch.allclose(together, alone, atol=1e-5)
    assert (together - swapped).abs().max() > 1e-4  # it hears which clip it was given


def test_responses_come_back_in_order_and_hold_no_special_token(
    processor: Any, thinker: Any, clips: list[warmup.Clip]
) -> None:
    together = warmup.respond(thinker, processor.tokenizer, clips[:4], batch_size=3)
    alone = [warmup.respond(thinker, processor.tokenizer, [clip])[0] for clip in clips[:4]]
    assert together == alone
    sampled = warmup.respond(thinker, processor.tokenizer, clips[:4], temperature=1.0)
    assert not any(token in text for text in sampled for token in tiny.SPECIAL_TOKENS)


def test_scores_are_those_of_hand_written_answers(clips: list[warmup.Clip]) -> None:
    rows = [clip.syllogism for clip in clips]
    perfect = [f"<think>{row.reasoning}</think>\n{row.answer.splitlines()[1]}" for row in rows]
    measures = warmup.score(perfect, clips)
    assert (measures["accuracy"], measures["format"], measures["heard"]) == (1.0, 1.0, 1.0)
    assert (measures["words"], measures["swapped"]) == (6.0, 0.5)
    always = warmup.score(["<think>wug</think>\nAnswer: entailed"] * len(clips), clips)
    assert (always["accuracy"], always["swapped"], always["heard"]) == (0.5, 0.5, 0.0)


def test_a_model_that_did_not_learn_to_hear_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = replace(warmup.HEARING, steps=2, warmup_steps=1, batch_size=4)
    monkeypatch.setattr(warmup, "HEARING", deaf)
    monkeypatch.setattr(warmup, "STAGES", (deaf, warmup.HABITS))
    with pytest.raises(warmup.WarmupError, match=r"chance.*another --seed"):
        tiny.build_stand_in(tmp_path / "tiny", data=SAMPLE)
    assert not (tmp_path / "tiny").exists()


def test_a_warmed_up_folder_records_what_was_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = tuple(replace(stage, steps=2, warmup_steps=1, batch_size=4) for stage in warmup.STAGES)
    monkeypatch.setattr(warmup, "HEARING", stages[0])
    monkeypatch.setattr(warmup, "STAGES", stages)
    monkeypatch.setattr(warmup, "GATE", 0.0)
    tiny.build_stand_in(tmp_path / "tiny", data=SAMPLE, seed=2)
    record = json.loads((tmp_path / "tiny" / "warmup.json").read_text())
    assert record["identity"]["seed"] == 2
    assert record["identity"]["warmup"]["data"] == warmup.identity(SAMPLE)["data"]
    assert [stage["name"] for stage in record["stages"]] == ["hearing", "habits"]
    assert [len(stage["losses"]) for stage in record["stages"]] == [2, 2]
    assert record["stages"][1]["sampled"]["clips"] == 8
    assert tiny.is_current(tmp_path / "tiny", record["identity"])
