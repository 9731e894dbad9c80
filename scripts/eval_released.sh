#!/usr/bin/env bash
# Evaluate the authors' published weights on the test split, in the paper's three configurations
# and in text to text, which nobody has reported.
#
#   bash scripts/eval_released.sh                                 # needs a GPU of 40 GB
#   MODEL=checkpoints/ours bash scripts/eval_released.sh          # any complete Qwen2.5-Omni folder
#   MODEL=Qwen/Qwen2.5-Omni-7B bash scripts/eval_released.sh      # the base
#   LIMIT=16 ONLY="audio-text" bash scripts/eval_released.sh      # a first look
#
# audio-text, text-text    vLLM, minutes
# text-speech, audio-speech    the same text, then talker, vocoder and Whisper in batches: hours each (docs/evaluation.md)
#
# Reads data/alr/parquet/{audio,text}/test.parquet (scripts/download_data.sh, then preprocess).
# Downloads the weights (about 22 GB) and the recogniser (about 3 GB) unless they are cached.
# Every evaluation continues where an interrupted one stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MODEL=${MODEL:-SoundMind-RL/SoundMindModel}
DATA=${DATA:-data/alr/parquet}
OUTPUT=${OUTPUT:-outputs/eval/$(basename "$MODEL")}
ONLY=${ONLY:-audio-text text-text text-speech audio-speech}
RECOGNISER=${RECOGNISER:-openai/whisper-large-v3}
PYTHON=${PYTHON:-python}

for configuration in $ONLY; do
  case $configuration in
    audio-text | text-text | text-speech | audio-speech) ;;
    *) echo "no configuration '$configuration'; choose from: audio-text text-text text-speech audio-speech" >&2; exit 2 ;;
  esac
  input=${configuration%-*}
  if [[ ! -f $DATA/$input/test.parquet ]]; then
    echo "$DATA/$input/test.parquet not found. Make it with:" >&2
    parts=$([[ $input == audio ]] && echo questions || echo text)
    echo "  PARTS=$parts bash scripts/download_data.sh test" >&2
    echo "  $PYTHON -m soundmind.preprocess --mode $input --splits test" >&2
    exit 2
  fi
done

for configuration in $ONLY; do
  arguments=(--model "$MODEL" --data "$DATA/${configuration%-*}/test.parquet")
  arguments+=(--output-modality "${configuration#*-}" --output-dir "$OUTPUT/$configuration")
  if [[ -n ${LIMIT:-} ]]; then
    arguments+=(--limit "$LIMIT")
    arguments[7]+="-first$LIMIT"
  fi
  if [[ $configuration == *-speech ]]; then
    arguments+=(--recogniser "$RECOGNISER")
  fi
  "$PYTHON" -m soundmind.evaluate "${arguments[@]}" "$@"
done
