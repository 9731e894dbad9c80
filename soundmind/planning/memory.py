"""Memory of a training step, as arithmetic. No torch needed.

A step is followed moment by moment: encode, forward, loss, backward layer by layer, optimizer. At
every moment the bytes alive are listed by part; the peak is the largest of them. The same functions
plan the 7B on eight GPUs (`soundmind.plan`) and are compared with measured peaks of small models
(`benchmarks/plan.py`). docs/planning.md has every formula and what stands behind it.

Bytes everywhere; one GB is 10^9 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil

from soundmind.planning import flops
from soundmind.planning.flops import Trained
from soundmind.planning.sizes import AudioSize, OmniSize, TextSize

FP32 = 4
ENTROPY_CHUNK = 2048  # positions; verl's `entropy_from_logits_with_chunking`


@dataclass(frozen=True)
class Training:
    """How the thinker is trained: what a peak depends on besides the micro-batch.

    `weight_bytes`: of the stored weights, their gradients and Adam's state, in bytes a value. What
    is trained under LoRA is kept in fp32 whatever the base is.
    `compute_bytes`: of the weights gathered for computing and of the activations.
    `flash`: attention and cross entropy of flash-attention (GPU); otherwise PyTorch's own.
    `fsdp`: weights are gathered layer by layer from `ranks` shards; False: plain PyTorch.
    `banned_tokens`: logits are masked, which costs a copy of their gradient.
    `scaled_logits`: a temperature other than 1, by which verl divides a view of the logits in place;
    PyTorch differentiates that through three copies more.
    """

    size: OmniSize
    trained: Trained = field(default_factory=Trained)
    ranks: int = 1
    weight_bytes: int = FP32
    compute_bytes: int = 2
    reduce_bytes: int = FP32
    checkpointing: bool = True
    flash: bool = True
    fsdp: bool = True
    forward_prefetch: bool = False
    reshard_after_forward: bool = True
    keep_gradients_whole: bool = False  # use_no_sync_for_gradient_accumulation
    optimizer: str = "foreach"  # how AdamW runs: foreach (PyTorch's choice on GPUs), loop or fused
    banned_tokens: bool = True
    scaled_logits: bool = False
    vision: bool = False  # whether the (frozen) vision tower is in memory


@dataclass(frozen=True)
class MicroBatch:
    """Tokens that go through the model at once. `rows` of `length` tokens each.

    `packed`: as one row without padding. `clips`: mel frames of each distinct clip. `logits`:
    positions at which the output head is computed, None for every token.
    """

    rows: int
    length: int
    clips: tuple[int, ...] = ()
    packed: bool = True
    logits: int | None = None

    @property
    def logit_positions(self) -> int:
        """Positions of the output head."""
        return self.tokens if self.logits is None else self.logits

    @property
    def tokens(self) -> int:
        """Positions that the language model computes."""
        return self.rows * self.length


@dataclass(frozen=True)
class Moment:
    """Bytes that are alive at a moment of the step, by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Sum over the parts."""
        return sum(self.parts.values())


# --- counts of weights ----------------------------------------------------------------------------


def loaded_weights(setup: Training) -> int:
    """Values of the weights in memory: thinker without vision, and LoRA adapters."""
    size = setup.size
    audio = size.audio.tower_parameters + size.audio.projector_parameters
    adapters = flops.lora_parameters(size.text, setup.trained.lora_rank)
    vision = size.vision.parameters if setup.vision else 0
    return size.text.parameters + audio + adapters + vision


def trained_weights(setup: Training) -> int:
    """Values of the weights that have a gradient and an optimizer state."""
    size, trained = setup.size, setup.trained
    if trained.lora_rank:
        total = flops.lora_parameters(size.text, trained.lora_rank)
    else:
        total = size.text.parameters
    total += size.audio.tower_parameters if trained.audio_tower else 0
    return total + (size.audio.projector_parameters if trained.projector else 0)


def weight_shard_bytes(setup: Training) -> int:
    """Stored weights on one rank."""
    adapters = flops.lora_parameters(setup.size.text, setup.trained.lora_rank)
    base = loaded_weights(setup) - adapters
    return shard(base, setup.ranks) * setup.weight_bytes + shard(adapters, setup.ranks) * FP32


def trained_bytes(setup: Training) -> int:
    """Bytes of one value of a gradient or of one of Adam's two moments."""
    return FP32 if setup.trained.lora_rank else setup.weight_bytes


def gradient_shard_bytes(setup: Training) -> int:
    """All gradients on one rank; Adam's state takes twice that."""
    return shard(trained_weights(setup), setup.ranks) * trained_bytes(setup)


def shard(values: int, ranks: int) -> int:
    """Values that one rank stores of `values`."""
    return ceil(values / ranks)


# --- activations ----------------------------------------------------------------------------------


def norm_bytes(width: int, compute: int) -> int:
    """Saved by a norm for one position: its input in fp32, the normalised and the scaled output."""
    return width * (FP32 + 2 * compute)


def decoder_layer_bytes(text: TextSize, batch: MicroBatch, compute: int, flash: bool) -> int:
    """Saved for the backward pass of one decoder layer.

    Two norms; queries, keys, values and output of attention (keys and values repeated for every
    head without flash-attention, and the mask as numbers); the rotary table; gate, its activation,
    up, and their product.
    """
    heads_kv = text.kv_width if flash else text.hidden
    attention = (2 * text.hidden + 2 * heads_kv + 2 * text.head_dim) * compute + text.heads * FP32
    products = 4 * text.intermediate * compute
    per_token = 2 * norm_bytes(text.hidden, compute) + attention + products
    return batch.tokens * per_token + (0 if flash else mask_values(batch) * compute)


def mask_values(batch: MicroBatch) -> int:
    """Entries of the attention mask that PyTorch's attention needs."""
    if batch.packed:
        return batch.tokens * batch.tokens
    return batch.rows * batch.length * batch.length


def decoder_backward_bytes(text: TextSize, tokens: int, compute: int) -> int:
    """Gradients alive at once in the backward pass of one decoder layer: of the product, gate, up
    and the residual stream."""
    return tokens * (3 * text.intermediate + 2 * text.hidden) * compute


def encoder_positions(audio: AudioSize, clips: Sequence[int]) -> int:
    """Positions of all clips in the audio tower's layers: 50 a second."""
    return sum(sum(flops.encoder_frames(audio, clip)) for clip in clips)


def encoder_layer_bytes(audio: AudioSize, positions: int, compute: int) -> int:
    """Saved for the backward pass of one layer of the audio tower."""
    norms = 2 * audio.width * (FP32 + compute)
    attention = 5 * audio.width * compute + audio.heads * FP32
    return positions * (norms + attention + 2 * audio.ffn * compute)


def convolution_bytes(audio: AudioSize, clips: Sequence[int], compute: int) -> int:
    """Saved by the two convolutions and their activations."""
    windows = sum(len(flops.encoder_frames(audio, clip)) for clip in clips)
    padded = windows * 2 * audio.n_window
    return int(padded * (2.5 * audio.width + audio.mel_bins) * compute)


def logits_bytes(text: TextSize, tokens: int, compute: int) -> int:
    """The logits of `tokens` positions."""
    return tokens * text.vocab * compute


# --- a training step ------------------------------------------------------------------------------


def training_moments(
    setup: Training, batch: MicroBatch, accumulated: bool = False
) -> Iterator[Moment]:
    """The moments of a forward, backward and optimizer step of one micro-batch.

    `accumulated`: an earlier micro-batch has left its gradients. Yields one `Moment` per event that
    can be the peak, in order. Everything is bytes on one rank, but for `positions` and `*_values`.
    """
    text, audio, compute = setup.size.text, setup.size.audio, setup.compute_bytes
    lora, backwards = setup.trained.lora_rank, trained_bytes(setup)
    # Alive at every moment: shards of weights and of Adam's two moments, and the inputs.
    weights, all_gradients = weight_shard_bytes(setup), gradient_shard_bytes(setup)
    inputs = _input_bytes(setup, batch)
    states = {"weights": weights, "optimizer": 2 * all_gradients, "inputs": inputs}

    # What one layer of the ears saves: everything, or its input alone where it is computed again; a
    # frozen tower saves nothing, and neither does its stem of two convolutions.
    positions = encoder_positions(audio, batch.clips)
    tower_backward = setup.trained.audio_tower or setup.trained.projector
    encoder_layer = encoder_layer_bytes(audio, positions, compute)
    encoder_boundary = positions * audio.width * compute
    saved_per_encoder = encoder_boundary if setup.checkpointing else encoder_layer
    if not setup.trained.audio_tower:
        saved_per_encoder = 0
    convolutions = convolution_bytes(audio, batch.clips, compute)
    stem = convolutions if setup.trained.audio_tower else 0

    # What one decoder layer saves, and what stands around the stack.
    layer = decoder_layer_bytes(text, batch, compute, setup.flash)
    boundary = batch.tokens * text.hidden * compute
    saved_per_layer = boundary if setup.checkpointing else layer
    recomputed = layer if setup.checkpointing else 0
    head = text.embedding_parameters
    rotary_and_mask = 0 if setup.flash else mask_values(batch)
    # Hidden states around the stack: embeddings, those with audio in place, and the last norm.
    around = batch.tokens * (norm_bytes(text.hidden, compute) + 2 * text.hidden * compute)

    # Weights that FSDP gathers for the layer at work; trained values, whose gradients grow.
    layer_gather = _gathered(setup, text.layer_parameters)
    adapters = flops.lora_parameters(text, lora) // text.layers
    layer_values, head_values = (adapters, 0) if lora else (text.layer_parameters, head)
    encoder_gather = _gathered(setup, audio.layer_parameters)

    def moment(name: str, gradients: int, **parts: int) -> Moment:
        kept = all_gradients if accumulated else gradients
        if setup.keep_gradients_whole and accumulated:
            kept += trained_weights(setup) * setup.reduce_bytes
        return Moment(name, {**states, "gradients": kept, **parts})

    # 1. Forward through the ears: the working set of one layer beside what is kept.
    yield moment(
        "audio forward",
        0,
        audio_activations=stem + saved_per_encoder * audio.layers + encoder_layer + convolutions,
        gathered=encoder_gather,
    )
    # 2. Forward through the language model, the ears' activations waiting for the backward pass.
    kept_audio = stem + saved_per_encoder * audio.layers
    kept_text = saved_per_layer * text.layers + around + rotary_and_mask
    yield moment(
        "text forward",
        0,
        audio_activations=kept_audio,
        activations=kept_text + recomputed,
        gathered=layer_gather,
    )
    # 3. Logits, the loss on them, and back through the head: its gradient is whole for a moment.
    logits = logits_bytes(text, batch.logit_positions, compute)
    yield moment(
        "loss",
        0,
        audio_activations=kept_audio,
        activations=kept_text,
        logits=loss_copies(setup) * logits,
        gathered=_gathered(setup, head, prefetch=False),
    )
    gradients = shard(head_values, setup.ranks) * backwards
    computed = _computed_gradient(setup, head_values)
    sent = _sent_gradient(setup, head_values)
    # The head's gradient is computed beside the logits, sent once they are gone, and stays until the
    # next module has its own: FSDP2 waits for one reduction at a time.
    ahead = layer_gather // 2 if setup.ranks > 1 and setup.reshard_after_forward else 0
    yield moment(
        "head backward",
        0 if setup.fsdp else gradients,
        audio_activations=kept_audio,
        activations=kept_text + boundary,
        logits=head_copies(setup) * logits,
        gathered=_gathered(setup, head, prefetch=False) + ahead + computed,
    )
    yield moment(
        "head reduced",
        gradients,
        audio_activations=kept_audio,
        activations=kept_text + boundary,
        gathered=ahead + computed + sent,
    )
    # 4. Back through the layers: each frees what it saved, and leaves a shard of its gradient.
    working = decoder_backward_bytes(text, batch.tokens, compute)
    for index in range(text.layers, 0, -1):
        gradients += shard(layer_values, setup.ranks) * backwards
        kept = saved_per_layer * index + around + rotary_and_mask
        yield moment(
            f"layer {index} backward",
            gradients,
            audio_activations=kept_audio,
            activations=kept + recomputed + working,
            gathered=layer_gather + _computed_gradient(setup, layer_values) + sent,
        )
        sent = _sent_gradient(setup, layer_values)
    if not lora and not text.tied:
        gradients += shard(head, setup.ranks) * backwards
        yield moment(
            "embedding backward",
            gradients,
            audio_activations=kept_audio,
            activations=2 * boundary,
            gathered=_computed_gradient(setup, head) + _sent_gradient(setup, head),
        )
    # 5. Back through the ears, where anything of them is trained.
    if tower_backward and batch.clips:
        projector = shard(audio.projector_parameters, setup.ranks) * backwards
        gradients += projector if setup.trained.projector else 0
        if setup.trained.audio_tower:
            encoder_working = positions * (2 * audio.ffn + 2 * audio.width) * compute
            for index in range(audio.layers, 0, -1):
                gradients += shard(audio.layer_parameters, setup.ranks) * backwards
                again = encoder_layer if setup.checkpointing else 0
                yield moment(
                    f"audio layer {index} backward",
                    gradients,
                    audio_activations=stem + saved_per_encoder * index + again + encoder_working,
                    gathered=encoder_gather
                    + _computed_gradient(setup, audio.layer_parameters)
                    + _sent_gradient(setup, audio.layer_parameters),
                )
    # 6. Adam, with every gradient and nothing of the passes.
    yield moment("optimizer", all_gradients, optimizer_temporary=optimizer_temporary(setup))


def optimizer_temporary(setup: Training) -> int:
    """Bytes that AdamW allocates while it updates.

    PyTorch's choice on GPUs takes the square root of all second moments at once, as much again as the
    gradients; a loop holds two tensors of the largest weight's size; the fused kernel none.
    """
    if setup.optimizer == "fused":
        return 0
    if setup.optimizer == "foreach":
        return gradient_shard_bytes(setup)
    text = setup.size.text
    largest = max(text.embedding_parameters, text.hidden * text.intermediate)
    if setup.trained.lora_rank:
        largest = setup.trained.lora_rank * text.intermediate
    return 2 * shard(largest, setup.ranks) * trained_bytes(setup)


def forward_moments(setup: Training, batch: MicroBatch, entropy: bool) -> Iterator[Moment]:
    """The moments of a forward without gradients: log-probabilities, old or of the reference.

    `entropy`: verl also takes the entropy of the old policy, on GPUs in chunks of positions.
    """
    size, compute = setup.size, setup.compute_bytes
    text = size.text
    weights = weight_shard_bytes(setup)
    states = {"weights": weights, "inputs": _input_bytes(setup, batch)}
    positions = encoder_positions(size.audio, batch.clips)
    audio = encoder_layer_bytes(size.audio, positions, compute)
    audio += convolution_bytes(size.audio, batch.clips, compute)
    yield Moment(
        "audio forward",
        {
            **states,
            "audio_activations": audio,
            "gathered": _gathered(setup, size.audio.layer_parameters),
        },
    )
    layer = decoder_layer_bytes(text, batch, compute, setup.flash)
    yield Moment(
        "text forward",
        {**states, "activations": layer, "gathered": _gathered(setup, text.layer_parameters)},
    )
    logits = logits_bytes(text, batch.logit_positions, compute)
    copies = 1 if setup.flash else 2
    copies += 0 if not entropy or setup.flash else 2
    # In fp32: a chunk of the logits, its softmax, and their product.
    chunk = min(ENTROPY_CHUNK, batch.logit_positions) if entropy and setup.flash else 0
    yield Moment(
        "loss",
        {
            **states,
            "activations": 2 * batch.tokens * text.hidden * compute,
            "logits": copies * logits + 3 * logits_bytes(text, chunk, FP32),
            "gathered": _gathered(setup, text.embedding_parameters, prefetch=False),
        },
    )


def peak(moments: Iterator[Moment]) -> Moment:
    """The moment with the most bytes."""
    return max(moments, key=lambda moment: moment.total)


def training_peak(setup: Training, batch: MicroBatch, micro_batches: int = 1) -> Moment:
    """The peak of a mini-batch of `micro_batches` micro-batches like `batch`."""
    return peak(training_moments(setup, batch, accumulated=micro_batches > 1))


def loss_copies(setup: Training) -> int:
    """Tensors of the logits' size alive while log-probabilities are taken and differentiated."""
    if setup.flash and setup.scaled_logits:
        return 4
    if setup.flash:
        return 2 if setup.banned_tokens else 1  # its gradient overwrites the logits
    return 4  # logits, exponentials, and the gradients through the sum and through the choice


def head_copies(setup: Training) -> int:
    """Tensors of the logits' size alive while the output head's gradient is computed."""
    return 2 if setup.banned_tokens else 1


def _gathered(setup: Training, values: int, prefetch: bool = True) -> int:
    """Bytes of weights that FSDP holds whole while a module computes; the next one is fetched."""
    if not setup.fsdp:
        return 0
    if not setup.reshard_after_forward:
        return loaded_weights(setup) * setup.compute_bytes
    return values * setup.compute_bytes * (2 if prefetch and setup.ranks > 1 else 1)


def _computed_gradient(setup: Training, values: int) -> int:
    """Bytes of a module's whole gradient as it is computed."""
    return values * setup.compute_bytes if setup.fsdp else 0


def _sent_gradient(setup: Training, values: int) -> int:
    """Bytes of a module's whole gradient as it is reduced to shards."""
    return values * setup.reduce_bytes if setup.fsdp else 0


def _input_bytes(setup: Training, batch: MicroBatch) -> int:
    """Features in fp32 with their mask, token ids and positions."""
    frames = sum(batch.clips)
    return frames * (setup.size.audio.mel_bins * FP32 + 8) + batch.tokens * 8 * 6
