"""Codec tokens a second of the batched talker, beside transformers' `generate` row by row.

    python benchmarks/speech.py checkpoints/tiny                       # any complete folder
    python benchmarks/speech.py checkpoints/Qwen2.5-Omni-7B --rows 1 8 32 64 --codes 2000   # on a GPU

Greedy, on prompts of text. On a CPU in float32, where the codes of both are compared; on a GPU in
bfloat16, where they may differ, with CUDA graphs and without.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from soundmind.speech.decoding import CODES_PER_SECOND, SpeechSettings
from soundmind.speech.states import mark_embeddings, thinker_states
from soundmind.speech.talker import Talker

QUESTION = "All wugs are daxes, Rex is a fep, so Rex is a dax. Think it through, number {}."


class KeptCodes(torch.nn.Module):
    """In the vocoder's place: keeps the codes."""

    dtype = torch.float32

    def forward(self, codes: torch.Tensor, **_: Any) -> torch.Tensor:
        self.codes = codes[0].tolist()
        return torch.zeros(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--codes", type=int, default=200, help="of an answer")
    parser.add_argument("--tokens", type=int, default=24, help="of a response")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    processor = transformers.Qwen2_5OmniProcessor.from_pretrained(arguments.model)
    omni: Any = transformers.Qwen2_5OmniForConditionalGeneration.from_pretrained(
        arguments.model, dtype=dtype
    )
    omni.eval().to(device)
    omni.token2wav = KeptCodes()
    talker = Talker(arguments.model, device, dtype)
    settings = SpeechSettings(
        temperature=0.0, max_seconds=arguments.codes / CODES_PER_SECOND, cuda_graphs=False
    )
    start = next(iter(omni.speaker_map.values()))["bos_token"]
    marks = mark_embeddings(omni.thinker, start, talker.mark_ids)
    prompts, inputs = [], []
    for number in range(max(arguments.rows)):
        text = f"<|im_start|>user\n{QUESTION.format(number)}<|im_end|>\n<|im_start|>assistant\n"
        ids = processor.tokenizer(text, return_tensors="pt").input_ids.to(device)
        said = torch.randint(
            0, 200, (1, arguments.tokens), generator=torch.Generator().manual_seed(number)
        )
        prompts.append(ids)
        states = thinker_states(omni.thinker, torch.cat([ids, said.to(device)[:, :-1]], 1))
        inputs.append(talker.inputs(states, ids.shape[1], marks))

    print(
        f"{arguments.model}, {device}, {torch.get_num_threads()} threads, {arguments.codes} codes"
    )
    # Other processes share a CPU; processor time of one thread is what is compared there.
    clock = time.monotonic if device == "cuda" else time.process_time
    started, count, few = clock(), 0, min(4, max(arguments.rows))
    for ids in prompts[:few]:
        omni.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_mode="audio",
            speaker=next(iter(omni.speaker_map)),
            thinker_max_new_tokens=4,
            thinker_do_sample=False,
            talker_do_sample=False,
            talker_max_new_tokens=settings.max_codes,
        )
        count += len(omni.token2wav.codes)
    base = count / (clock() - started)
    print(f"{'generate, row by row':<28}{base:>10.0f} codes/s")
    reference = None
    for graphs in (False, True)[: 2 if device == "cuda" else 1]:
        for rows in arguments.rows:
            started = clock()
            now = replace(settings, cuda_graphs=graphs)
            codes = talker.speak(inputs[:rows], [0] * rows, now, rows)
            speed = sum(len(found.tokens) for found in codes) / (clock() - started)
            if reference is not None:
                same = sum(a.tokens == b.tokens for a, b in zip(codes, reference, strict=False))
                told = f", {same} of {min(rows, len(reference))} as alone or in fewer"
            else:
                told = ""
            reference = codes
            what = f"{rows} rows{', CUDA graphs' if graphs else ''}"
            print(f"{what:<28}{speed:>10.0f} codes/s, {speed / base:5.1f} x{told}")


if __name__ == "__main__":
    main()
