#!/bin/sh
# Drop a quarter of the experts of any BF16 Gemma 4 mixture, quantize what stays to INT8 and serve it.
#
#     examples/prune_and_serve_int8.sh CHECKPOINT TEXT [flags of vllm serve]
#
# TEXT is a file of what the model is for. It decides which experts stay, and the ones that stay are refitted on it.
# Beside CHECKPOINT, with KEEP=98, come CHECKPOINT-statistics.safetensors, CHECKPOINT-98e and CHECKPOINT-98e-int8.
# Environment, with defaults: KEEP=98 experts a layer that stay; SAMPLES=512 cuts of TEXT, of LENGTH=2048 tokens at
# most, for the statistics; REFIT_SAMPLES=64 for the refit; DEVICE=cpu, or cuda.
#
# Sizes, of the 26B-A4B with 98 of its 128 experts: BF16 40.90 GB, which becomes INT8 of 21.83 GB. Those and a
# refit's work (15.23 GB, and 23 KB a token) are what the disk must hold. One layer at a time is in memory until
# vLLM loads the INT8 checkpoint. Run again, an unfinished step resumes and a finished one is not repeated.
#
# Measured: on a CPU, with the small mixture in examples/small_gemma4 and KEEP=12, up to an answered chat.
# NOT measured: the real 26B-A4B, any GPU.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: $0 CHECKPOINT TEXT [flags of vllm serve]" >&2
    exit 2
fi
checkpoint=${1%/}
text=$2
shift 2
keep=${KEEP:-98}
device=${DEVICE:-cpu}
statistics=$checkpoint-statistics.safetensors
pruned=$checkpoint-${keep}e

gemma4q calibrate "$checkpoint" "$statistics" --text "$text" \
    --samples "${SAMPLES:-512}" --max-length "${LENGTH:-2048}" --device "$device"
gemma4q prune "$checkpoint" "$pruned" --statistics "$statistics" --keep "$keep" --text "$text" \
    --samples "${REFIT_SAMPLES:-64}" --device "$device"
gemma4q quantize "$pruned" "$pruned-int8" --scheme quark-int8
exec vllm serve "$pruned-int8" "$@"
