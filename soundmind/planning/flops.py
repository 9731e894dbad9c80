"""Floating-point operations of the thinker: language model and audio tower, forward and training.

What is counted, and by which convention:

* a multiplication and an addition are two operations, as everywhere;
* **language model**: all matrix products of the layers for every token, and of the output head at
  the positions where logits are computed: those that predict a response token.
  Looking up an embedding is no product and counts nothing; verl's own estimate for Qwen2 counts
  the embedding table like a second output head, 7 % more for the 7B;
* **attention** of the language model: half of the full square, since it is causal, and one square
  per sequence however sequences are packed. This is verl's convention;
* **audio tower**, per clip: both convolutions, attention within windows of `2 * n_window` mel
  frames (full squares: it is not causal), feed-forward, and the projector. Padding is not counted;
* **training** costs three forwards: the backward pass has two products (for the input's and the
  weight's gradient) for each one of the forward. A frozen part costs its forward only. Under LoRA
  the base weights cost two (no weight gradient) and the adapters three.

These are *model* operations: work that the mathematics asks for. Gradient checkpointing runs the
forward of every layer again, so the hardware does up to four forwards; utilisation (MFU) counts
three all the same, otherwise recomputing would look like progress.

verl calls `estimate_thinker_flops` once a mini-batch (see `soundmind.training.utilisation.thinker_flops`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from soundmind.planning.sizes import AudioSize, OmniSize, TextSize

FULL_TRAINING = 3  # forward, gradient of the input, gradient of the weight
ACTIVATION_ONLY = 2  # forward and gradient of the input: weights that LoRA keeps fixed
FROZEN = 1  # forward


@dataclass(frozen=True)
class Trained:
    """What a training step changes. `lora_rank` 0: the language model's own weights."""

    audio_tower: bool = True
    projector: bool = True
    lora_rank: int = 0


# Dense bf16 operations a second that the maker promises, as verl's counter has them (0.9.1).
DENSE_PEAK = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "H200": 989e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362.05e12,
}


def dense_peak(device: str) -> float | None:
    """Dense bf16 operations a second of a device by its name; None for one that is not known."""
    return next((peak for name, peak in DENSE_PEAK.items() if name in device), None)


# --- language model -------------------------------------------------------------------------------


def layer_products(text: TextSize) -> int:
    """Weights of one decoder layer that take part in matrix products."""
    attention = text.hidden * (2 * text.hidden + 2 * text.kv_width)
    return attention + 3 * text.hidden * text.intermediate


def text_linear(text: TextSize, tokens: int, logits: int | None = None) -> int:
    """Operations of one forward's matrix products for `tokens` tokens.

    `logits`: positions at which the output head is computed; None: at every token.
    """
    head = tokens if logits is None else logits
    return 2 * (tokens * text.layers * layer_products(text) + head * text.embedding_parameters)


def text_attention(text: TextSize, lengths: Iterable[int]) -> int:
    """Operations of one forward's causal attention over sequences of `lengths` tokens."""
    return 2 * sum(length * length for length in lengths) * text.hidden * text.layers


def lora_parameters(text: TextSize, rank: int) -> int:
    """Parameters of LoRA adapters on the seven linear layers of every decoder layer."""
    hidden, kv, ffn = text.hidden, text.kv_width, text.intermediate
    attention = 2 * (hidden + hidden) + 2 * (hidden + kv)  # queries, output; keys, values
    return text.layers * rank * (attention + 3 * (hidden + ffn))


# --- audio tower ----------------------------------------------------------------------------------


def encoder_frames(audio: AudioSize, mel_frames: int) -> list[int]:
    """Positions of each attention window after the stride-2 convolution, for one clip."""
    window = 2 * audio.n_window
    starts = range(0, mel_frames, window)
    return [(min(window, mel_frames - start) - 1) // 2 + 1 for start in starts]


def audio_tokens(audio: AudioSize, mel_frames: int) -> int:
    """Embeddings that a clip becomes, after the stride-2 pooling: 25 a second."""
    return max(0, (sum(encoder_frames(audio, mel_frames)) - 2) // 2 + 1)


def tower_forward(audio: AudioSize, frames: Iterable[int]) -> int:
    """Operations of the audio tower without its projector, for clips of `frames` mel frames."""
    total = 0
    for mel_frames in frames:
        windows = encoder_frames(audio, mel_frames)
        positions = sum(windows)
        total += 2 * audio.kernel * audio.width * audio.mel_bins * mel_frames
        total += 2 * audio.kernel * audio.width * audio.width * positions
        products = 4 * audio.width * audio.width + 2 * audio.width * audio.ffn
        attention = 4 * audio.width * sum(length * length for length in windows)
        total += audio.layers * (2 * products * positions + attention)
    return total


def projector_forward(audio: AudioSize, frames: Iterable[int]) -> int:
    """Operations of the projector for clips of `frames` mel frames."""
    return sum(2 * audio.width * audio.output * audio_tokens(audio, clip) for clip in frames)


# --- a pass of the thinker ------------------------------------------------------------------------


def forward_flops(
    size: OmniSize, lengths: Sequence[int], frames: Sequence[int], logits: int | None = None
) -> int:
    """Operations of one forward: sequences of `lengths` tokens, clips of `frames` mel frames.

    `logits`: positions of the output head, over all sequences; None: every token.
    """
    return (
        text_linear(size.text, sum(lengths), logits)
        + text_attention(size.text, lengths)
        + tower_forward(size.audio, frames)
        + projector_forward(size.audio, frames)
    )


def training_flops(
    size: OmniSize,
    lengths: Sequence[int],
    frames: Sequence[int],
    trained: Trained,
    logits: int | None = None,
) -> int:
    """Operations of forward and backward; see the module for what is counted.

    `lengths`: tokens of each sequence, prompt and response. `frames`: mel frames of each clip that
    the tower encodes, once however many rollouts share it. `logits` as in `forward_flops`.
    """
    return text_training_flops(size.text, lengths, trained, logits) + audio_training_flops(
        size.audio, frames, trained
    )


def text_training_flops(
    text: TextSize, lengths: Sequence[int], trained: Trained, logits: int | None = None
) -> int:
    """The language model's share of `training_flops`."""
    tokens = sum(lengths)
    products = text_linear(text, tokens, logits)
    attention = FULL_TRAINING * text_attention(text, lengths)
    if not trained.lora_rank:
        return FULL_TRAINING * products + attention
    adapters = FULL_TRAINING * 2 * tokens * lora_parameters(text, trained.lora_rank)
    return ACTIVATION_ONLY * products + attention + adapters


def audio_training_flops(audio: AudioSize, frames: Sequence[int], trained: Trained) -> int:
    """The audio tower's and projector's share of `training_flops`."""
    tower = tower_forward(audio, frames) * (FULL_TRAINING if trained.audio_tower else FROZEN)
    projector = projector_forward(audio, frames)
    if not trained.projector:
        # A trained tower below a frozen projector still needs the gradient of its input.
        return tower + projector * (ACTIVATION_ONLY if trained.audio_tower else FROZEN)
    # Below a trained projector, a frozen tower spares the gradient of the projector's input.
    return tower + projector * (FULL_TRAINING if trained.audio_tower else ACTIVATION_ONLY)
