"""The published data set from the Hugging Face Hub: the part that a run needs, resumed where it stopped."""

from __future__ import annotations

from pathlib import Path

from soundmind.data.sources import SourceError
from soundmind.system.hub import hub_is_reachable
from soundmind.task.schema import Mode, Split


def fetch_dataset(
    repo_id: str, target: Path, splits: list[Split], mode: Mode, with_answers: bool
) -> Path:
    """Download the wanted part of a Hub data set into `target`, resuming what is there.

    Text mode fetches annotations only (megabytes); questions are about 20 GB, answers 180 GB.
    """
    from huggingface_hub import snapshot_download

    if not hub_is_reachable():
        raise SourceError(
            f"cannot fetch {repo_id}: the Hugging Face Hub is not reachable from here. Fetch the "
            "files elsewhere as scripts/download_data.sh describes and pass their folder as "
            "--data-dir"
        )
    patterns = []
    for split in splits:
        patterns += [f"{split}/metadata.jsonl", f"{split}/*/annotation.json", f"{split}.jsonl"]
        if mode != "text":
            patterns += [f"{split}/*/question.*"]
            patterns += [f"{split}/*/answer_*"] if with_answers else []
    try:
        snapshot_download(repo_id, repo_type="dataset", local_dir=target, allow_patterns=patterns)
    except Exception as error:  # the Hub client raises a dozen kinds; all mean "not fetched"
        raise SourceError(
            f"cannot fetch {repo_id} from the Hugging Face Hub ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}). Check the name and "
            "the network and run the same command again: it goes on where it stopped"
        ) from error
    return target
