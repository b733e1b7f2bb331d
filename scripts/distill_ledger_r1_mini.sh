#!/usr/bin/env bash
# Teaches candidates for the shipped student on a GPU, one after the other, asks each 1,000 unseen problems per bucket,
# writes its card, and leaves $OUT/<candidate>.tar.gz. A second call on the same machine goes on from the checkpoints.
# CANDIDATES names some of those below, or others as NAME:OPTIONS with options of `labkit distill`, separated by semicolons.
set -euo pipefail
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
OUT=${OUT:-build/out} WORK=${WORK:-/tmp/ledger-r1-mini} TEACHER=${TEACHER:-data/models/ledger-r1}
CANDIDATES=${CANDIDATES:-4x192} SECONDS_LIMIT=${SECONDS_LIMIT:-500} TIME_LIMIT=${TIME_LIMIT:-590}
PROBLEMS=${PROBLEMS:-1000} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3}
declare -A SHAPES=(
  [4x192]="" # the preset
  [4x256]="--layers 4 --hidden 256 --heads 8 --kv-heads 2 --intermediate 512"
  [3x256]="--layers 3 --hidden 256 --heads 8 --kv-heads 2 --intermediate 512"
)
mkdir -p "$OUT" "$WORK"

pack() { tar -czf "$OUT/$1.tar.gz" -C "$WORK/$1" --exclude=checkpoints .; }

IFS=';' read -ra chosen <<<"$CANDIDATES"
for candidate in "${chosen[@]}"; do
  name=${candidate%%:*} options=${candidate#*:} at=$WORK/${candidate%%:*}
  if [[ $candidate != *:* ]]; then options=${SHAPES[$name]?no candidate $name}; fi
  mkdir -p "$at"
  # a candidate that fails leaves the others their turn
  # shellcheck disable=SC2086
  if ! $PYTHON -m labkit.cli distill "$TEACHER" $options --device "$DEVICE" --max-seconds "$SECONDS_LIMIT" \
    --out "$at/ledger-r1-mini" --checkpoints "$at/checkpoints" --runs "$at/runs" --resume ${DISTILL_OPTIONS:-}; then
    echo "$name failed" >&2
    continue
  fi
  pack "$name"
  if ((SECONDS > TIME_LIMIT - 30)); then
    echo "$name: no time left to evaluate it" >&2
    continue
  fi
  $PYTHON -m labkit.cli evaluate "$at/ledger-r1-mini" --device "$DEVICE" --problems "$PROBLEMS" \
    --result "$at/evaluation.json" || echo "$name: the evaluation did not end" >&2
  # what was counted before it failed is there
  [[ -s $at/evaluation.json ]] || continue
  $PYTHON -m labkit.training.card "$at/ledger-r1-mini" --run "$at/runs" --evaluation "$at/evaluation.json"
  pack "$name"
done
