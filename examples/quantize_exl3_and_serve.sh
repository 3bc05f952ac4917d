#!/bin/sh
# Quantize any BF16 Gemma 4 checkpoint to EXL3 by what it sees in a text, and serve it.
#
#     examples/quantize_exl3_and_serve.sh CHECKPOINT TEXT [flags of vllm serve]
#
# TEXT is a file of what the model is for: the errors that matter least to it are where bits are saved.
# Beside CHECKPOINT come CHECKPOINT-hessians.safetensors and, with BITS=3.5, CHECKPOINT-3.5bpw-exl3.
# Environment, with defaults: BITS=3.5 a weight in all layers, and HEAD_BITS=6 in the output layer; SAMPLES=256 cuts of
# TEXT, of LENGTH=2048 tokens at most; DEVICE=cpu, or cuda.
#
# Sizes, of the 31B at 3.5 bits: Hessians 149.13 GB, which may go when all is done, and the checkpoint 17.85 GB, of
# which the embedding in BF16 takes 2.82. One linear is in memory at a time, with its Hessian; the output layer, of 1.4
# billion weights, takes most.
# Time: 119.9 million tiles for the 31B. At 2 ms a tile and core (see benchmarks/exl3.py) that is 67 core hours.
# Run again, an unfinished step resumes, losing at most a layer, and a finished one is not repeated.
#
# Measured: on a CPU, with the small checkpoints in examples/small_gemma4, up to the finished checkpoint.
# NOT measured: the real 31B and 26B-A4B, any GPU.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: $0 CHECKPOINT TEXT [flags of vllm serve]" >&2
    exit 2
fi
checkpoint=${1%/}
text=$2
shift 2
bits=${BITS:-3.5}
device=${DEVICE:-cpu}
hessians=$checkpoint-hessians.safetensors
quantized=$checkpoint-${bits}bpw-exl3

gemma4q calibrate "$checkpoint" "$hessians" --hessians --text "$text" \
    --samples "${SAMPLES:-256}" --max-length "${LENGTH:-2048}" --device "$device"
gemma4q quantize "$checkpoint" "$quantized" --scheme exl3 --bits "$bits" --head-bits "${HEAD_BITS:-6}" \
    --codebook mcg --statistics "$hessians" --device "$device"
exec vllm serve "$quantized" "$@"
