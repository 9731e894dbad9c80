"""One FSDP rank that speaks its rollouts: a real engine and `SpeakingWorker.speak` on rows by name.

    python tests/support/speech_rank.py --model DIR --rank 0 --ranks 1 --rendezvous FILE \
        --cases mixed mixed-packed --output out.pt [--lora]

The policy's weights are changed before it speaks. Writes the weights as the rollout would get them,
and by case what every row's speech was. Row 3 has no seed, as padding has none.
"""

from __future__ import annotations

import json
from typing import Any

from engine_rank import build_rows, open_engine, rank_parser, store_clips, to_batch

UNSPOKEN = 3
SETTINGS: dict[str, Any] = {
    "stage": "codes",
    "speaker": "Chelsie",
    "temperature": 0.0,
    "top_k": 40,
    "top_p": 0.8,
    "repetition_penalty": 1.05,
    "max_seconds": 0.5,
    "rows": 2,
    "cuda_graphs": True,
    "transcript": {"recogniser": "", "seconds": 20},
    "audit": {"every": 0, "rows": 0},
}
LORA = [
    "actor_rollout_ref.model.lora_rank=4",
    "actor_rollout_ref.model.target_modules=all-linear",
    "actor_rollout_ref.model.lora.merge=true",
]


class Actor:
    """What `SpeakingWorker` uses of verl's TrainingWorker, around a bare engine."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def infer_batch(self, data: Any) -> dict[str, Any]:
        with self.engine.eval_mode():
            output: dict[str, Any] = self.engine.infer_batch(data, loss_function=None)
        return output["model_output"]


def speak_case(engine: Any, case: str, settings: dict[str, Any], rank: int, ranks: int) -> Any:
    """JSON by row of this rank's share of a case."""
    import torch
    from verl.utils import tensordict_utils as tu

    from soundmind.training.speech import AUDIT, SEED, SPEECH, SpeakingWorker
    from soundmind.training.speech import SETTINGS as KEY

    batch, _, variant = case.partition("-")
    rows = build_rows(engine.model_config.processor, batch)
    if variant == "keyed":
        store_clips(rows)
    mine = rows[rank::ranks]
    data = to_batch(mine, 160 if variant == "split" else 4096, variant == "packed")
    seeds = [-1 if row["index"] == UNSPOKEN else row["index"] for row in mine]
    data[SEED] = torch.tensor(seeds)
    data[AUDIT] = torch.zeros(len(mine), dtype=torch.bool)
    tu.assign_non_tensor(data, **{KEY: json.dumps(settings)})
    worker = object.__new__(SpeakingWorker)
    worker.actor = Actor(engine)
    column = worker.speak(data)[SPEECH]
    texts = [getattr(item, "data", item) for item in column]
    return {row["index"]: text for row, text in zip(mine, texts, strict=True)}


def main() -> None:
    parser = rank_parser()
    parser.add_argument("--cases", nargs="+", required=True)
    parser.add_argument("--lora", action="store_true")
    arguments = parser.parse_args()
    engine, _ = open_engine(
        arguments.model,
        arguments.rank,
        arguments.ranks,
        arguments.rendezvous,
        LORA if arguments.lora else [],
    )
    import torch
    import torch.distributed as dist

    with torch.no_grad():
        for number, parameter in enumerate(engine.module.parameters()):
            if parameter.requires_grad:
                parameter.mul_(1.0 + 0.2 * (number % 3)).add_(0.003 * (number % 5))
    settings = {**SETTINGS, "model": arguments.model}
    results = {}
    for case in arguments.cases:
        gathered: list[Any] = [None] * arguments.ranks
        local = speak_case(engine, case, settings, arguments.rank, arguments.ranks)
        dist.all_gather_object(gathered, local)
        results[case] = {index: text for part in gathered for index, text in part.items()}
    parameters, _ = engine.get_per_tensor_param()
    weights = {name: tensor.clone() for name, tensor in parameters}
    if arguments.rank == 0:
        torch.save({"cases": results, "weights": weights}, arguments.output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
