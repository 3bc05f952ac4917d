#!/bin/sh
# Quantize any BF16 Gemma 4 checkpoint to INT8 and serve it: CHECKPOINT becomes CHECKPOINT-int8 beside it.
#
#     examples/quantize_and_serve.sh CHECKPOINT [flags of vllm serve]
#
# Any machine: a GPU that vLLM supports, or a CPU with vLLM's CPU build (there, set VLLM_CPU_KVCACHE_SPACE).
# Memory: quantizing holds a few rows at a time. The output takes half the disk of the source and a little more,
# as the embedding and the vision tower stay BF16; the device needs that much, and room for the KV cache.
# Run again, an unfinished quantization resumes and a finished one is not repeated.
#
# Measured: on a CPU, with the small checkpoints in examples/small_gemma4 (`make demo` reports what comes out).
# NOT measured: the real 31B and 26B-A4B, any GPU.
set -eu

if [ $# -eq 0 ]; then
    echo "usage: $0 CHECKPOINT [flags of vllm serve]" >&2
    exit 2
fi
checkpoint=${1%/}
shift

gemma4q quantize "$checkpoint" "$checkpoint-int8" --scheme quark-int8
exec vllm serve "$checkpoint-int8" "$@"
