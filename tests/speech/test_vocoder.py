"""The vocoder: weights, windows, tail, codebook."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from soundmind.model.folder import ModelError
from soundmind.speech import vocoder as module
from soundmind.speech.vocoder import CODE_SAMPLES, CONTEXT_CODES, Vocoder


class Echo(torch.nn.Module):  # type: ignore[name-defined,misc]
    """Samples that are each their code's own number."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = 0

    def forward(self, codes: Any, **_: Any) -> Any:
        self.longest = max(self.longest, codes.shape[1])
        return codes.repeat_interleave(CODE_SAMPLES).float()


@pytest.fixture
def echo(random_stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Vocoder, Echo]:
    model = Echo()
    monkeypatch.setattr(module, "_published", lambda folder: model)
    return Vocoder(random_stand_in, "Chelsie", window=100), model


def test_windows_join_to_the_sound_of_one_piece(echo: tuple[Vocoder, Echo]) -> None:
    vocoder, model = echo
    for total in (0, 1, 99, 100, 101, 150, 151, 200, 777):
        codes = list(range(total))
        assert np.array_equal(vocoder.sound(codes), np.repeat(codes, CODE_SAMPLES))
        assert model.longest <= 100 + 2 * CONTEXT_CODES


@pytest.mark.parametrize("total", [0, 3, 50, 51, 70, 400])
def test_the_tail_is_the_end_of_the_whole(echo: tuple[Vocoder, Echo], total: int) -> None:
    vocoder, model = echo
    codes = list(range(total))
    tail = vocoder.tail(codes, 1.0)
    assert np.array_equal(tail, np.repeat(codes[-50:], CODE_SAMPLES))
    assert model.longest <= 50 + CONTEXT_CODES


def test_short_answers_sound_as_the_complete_model_makes_them(random_stand_in: Path) -> None:
    from transformers import Qwen2_5OmniForConditionalGeneration

    omni: Any = Qwen2_5OmniForConditionalGeneration.from_pretrained(random_stand_in)
    voice = omni.speaker_map["Ethan"]
    codes = [7, 6000, 33, 512, 12, 7]
    torch.manual_seed(5)
    with torch.no_grad():
        wanted = omni.token2wav.float()(
            torch.tensor([codes]), conditioning=voice["cond"], reference_mel=voice["ref_mel"]
        )
    ours = Vocoder(random_stand_in, "Ethan").sound(codes, seed=5)
    # Where the weights lie in memory may move the last digit.
    reference = wanted.reshape(-1).float().numpy()
    assert np.abs(ours - reference).max() < 1e-4 * np.abs(reference).max()
    assert ours.size == len(codes) * CODE_SAMPLES


def test_sound_does_not_disturb_the_process_generator(random_stand_in: Path) -> None:
    state = torch.get_rng_state()
    Vocoder(random_stand_in, "Ethan").sound([1, 2])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", ["lost", "misshapen"])
def test_a_folder_without_every_tensor_of_the_vocoder_is_refused(
    random_stand_in: Path, tmp_path: Path, change: str
) -> None:
    from safetensors.torch import load_file, save_file

    name = "token2wav.code2wav_bigvgan_model.conv_pre.weight"
    poor = tmp_path / "poor"
    shutil.copytree(random_stand_in, poor)
    tensors = load_file(poor / "model.safetensors")
    tensors[name] = tensors[name][:-1].contiguous()
    if change == "lost":
        del tensors[name]
    save_file(tensors, poor / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=name):
        Vocoder(poor, "Ethan")


def test_a_codebook_speaks_in_the_vocoders_place(random_stand_in: Path, tmp_path: Path) -> None:
    folder = tmp_path / "book"
    shutil.copytree(random_stand_in, folder)
    book = np.random.default_rng(0).normal(size=(9, CODE_SAMPLES)).astype(np.float32)
    np.save(folder / module.CODEBOOK, book)
    sound = Vocoder(folder, "Ethan").sound([3, 8, 9, 3])
    assert np.array_equal(sound, np.concatenate([book[3], book[8], 0 * book[0], book[3]]))
    np.save(folder / module.CODEBOOK, book.T)
    with pytest.raises(ModelError, match="expected float32"):
        Vocoder(folder, "Ethan")
