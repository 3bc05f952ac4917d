#!/bin/sh
# Serve a Quark INT8 Gemma 4 31B on four 24 GB RDNA3 cards (Radeon RX 7900 XTX, gfx1100), text only.
#
#     examples/serve_int8_4x24gb_rdna3.sh CHECKPOINT [more flags of vllm serve]
#
# Memory, in GiB:
#   weights   language model 29.92 + the global layers' keys, which vLLM stores a second time as values, 0.10;
#             a quarter a card: 7.51. No images, videos or audio: vLLM leaves out the vision tower (1.08).
#   card      24 * 0.90 = 21.60; less weights: 14.09; less 3 for activations, graphs and RCCL (a guess): 11.09.
#   KV cache  BF16, a quarter a card: one sequence of 8192 tokens takes 0.35 (81920 bytes a token in the global
#             layers, 819200 a token in the sliding ones, which keep the last 1024), while 2048 tokens are being
#             read 0.75. So about 31 full sequences at once; 8192 is a choice, not the limit of the memory.
#
# Kernels: RDNA3 has no AITER, so vLLM's automatic choice for INT8 is TritonInt8ScaledMMLinearKernel.
# `--linear-backend triton` would take this package's Triton kernels instead (not measured); together with
# GEMMA4Q_INT8_KERNELS=0 it names vLLM's own. Other layers keep the automatic choice either way.
# FP8 KV (`--kv-cache-dtype fp8`) is not set: these cards have no FP8 units and the memory is not needed.
#
# Checked by tests: these sizes, from the published configuration; the flags, with vLLM 0.32's own parser.
# NOT measured: this has not run on these cards. Speed, the 3 GiB above and the number of sequences are unproven.
set -eu

if [ $# -eq 0 ]; then
    echo "usage: $0 CHECKPOINT [more flags of vllm serve]" >&2
    exit 2
fi
checkpoint=$1
shift

exec vllm serve "$checkpoint" \
    --tensor-parallel-size 4 \
    --max-model-len 8192 \
    --max-num-batched-tokens 2048 \
    --gpu-memory-utilization 0.90 \
    --limit-mm-per-prompt '{"image": 0, "video": 0, "audio": 0}' \
    "$@"
