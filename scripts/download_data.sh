#!/usr/bin/env bash
# Fetch the published ALR data set into data/alr. MIT licence, English, about 200 GB in all.
#
#   bash scripts/download_data.sh                     # all splits, questions and answers: ~200 GB
#   PARTS=questions bash scripts/download_data.sh     # without recorded answers:           ~20 GB
#   PARTS=text bash scripts/download_data.sh          # annotations only, for text mode:   ~40 MB
#   PARTS=questions bash scripts/download_data.sh dev test
#
# Two sources hold the same 6,446 rows (5,184 train, 606 dev, 656 test):
#
#   Hugging Face   SoundMind-RL/SoundMindDataset       what this script fetches; resumes by itself
#                  {split}/metadata.jsonl, {split}/NNNN/{question.wav,answer_{0|1}.wav,annotation.json}
#   GitHub         xid32/SoundMind                     annotations: dataset-annotation-json/{split}.jsonl
#                  sound: audio_dataset.zip on Dropbox, linked from the README there (~200 GB); unpack
#                  it so that audio_dataset/{split}/{id}/ lies beside dataset-annotation-json/
#
# soundmind.preprocess recognises either layout. Sizes are estimates from file listings: 24 kHz 16-bit
# mono, 3 MB a question and 28 MB an answer. Training from audio to text needs no recorded answers.
set -euo pipefail
cd "$(dirname "$0")/.."

PARTS=${PARTS:-all}
DATA_DIR=${DATA_DIR:-data/alr}
DATASET=${DATASET:-SoundMind-RL/SoundMindDataset}
PYTHON=${PYTHON:-python}

splits=("$@")
[[ $# -gt 0 ]] || splits=(train dev test)
for split in "${splits[@]}"; do
  [[ $split =~ ^(train|dev|test)$ ]] || { echo "no split '$split'; choose from: train dev test" >&2; exit 2; }
done
case $PARTS in
  all | questions | text) ;;
  *) echo "PARTS=$PARTS; choose from: all questions text" >&2; exit 2 ;;
esac

"$PYTHON" - "$DATASET" "$DATA_DIR" "$PARTS" "${splits[@]}" <<'PYTHON'
import sys
from pathlib import Path

from soundmind.data.sources import SourceError, fetch_dataset

dataset, target, parts, *splits = sys.argv[1:]
mode = "text" if parts == "text" else "audio"
try:
    fetch_dataset(dataset, Path(target), splits, mode, with_answers=parts == "all")
except SourceError as error:
    sys.exit(f"error: {error}")
PYTHON

mode=audio
[[ $PARTS != text ]] || mode=text
echo "fetched ${splits[*]} ($PARTS) into $DATA_DIR. Next:"
echo "  python -m soundmind.preprocess --mode $mode --data-dir $DATA_DIR --splits ${splits[*]}"
