#!/usr/bin/env bash
# Trains the shipped model on a GPU, asks it 1,000 unseen problems per bucket, writes its card, and leaves everything in $OUT.
# A second call on the same machine goes on from the checkpoints in $CHECKPOINTS.
set -euo pipefail
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
OUT=${OUT:-build/out} WORK=${WORK:-/tmp/ledger-r1} CHECKPOINTS=${CHECKPOINTS:-/tmp/ckpt}
SECONDS_LIMIT=${SECONDS_LIMIT:-450} PROBLEMS=${PROBLEMS:-1000} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3}
mkdir -p "$OUT" "$WORK"

pack() { # what is there so far: the weights in parts small enough to send (cat joins them), the rest in one archive
  split -b 14M "$WORK/model/model.safetensors" "$OUT/model.safetensors."
  tar -czf "$OUT/rest.tar.gz" -C "$WORK" --exclude='*.safetensors' .
}

# shellcheck disable=SC2086
$PYTHON -m labkit.cli train --preset ledger-r1 --device "$DEVICE" --max-seconds "$SECONDS_LIMIT" \
  --out "$WORK/model" --checkpoints "$CHECKPOINTS" --runs "$WORK/runs" --resume ${TRAIN_OPTIONS:-}
pack
$PYTHON -m labkit.cli evaluate "$WORK/model" --device "$DEVICE" --problems "$PROBLEMS" --result "$WORK/evaluation.json"
$PYTHON -m labkit.training.card "$WORK/model" --run "$WORK/runs" --evaluation "$WORK/evaluation.json"
pack
