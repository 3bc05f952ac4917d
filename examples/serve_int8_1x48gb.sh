#!/bin/sh
# Serve a Quark INT8 Gemma 4 31B on one 48 GB card with INT8 tensor cores (RTX 6000 Ada, L40S, RTX A6000), with images.
#
#     examples/serve_int8_1x48gb.sh CHECKPOINT [more flags of vllm serve]
#
# Memory, in GiB:
#   weights   33.28 GB = 30.99: INT8 linears 27.28, their scales 0.02, BF16 embedding and norms 2.63, vision tower
#             1.08; and the global layers' keys, which vLLM stores a second time as values, 0.10. Together 31.09.
#   card      46068 MiB (ECC on) = 44.99; 44.99 * 0.92 = 41.39; less weights: 10.30; less 2 for activations, graphs
#             and one image's encoder (a guess): 8.30 for the KV cache.
#   KV cache  of one sequence: 81920 bytes a token in the global layers, and in the sliding ones 819200 a token for
#             at most 1023 tokens + the 2048 in flight + a block of 16 (vLLM's admission rule); FP8 halves both.
#
#             tokens     BF16     FP8
#              32768     4.86    2.43
#              65536     7.36    3.68
#             131072    12.36    6.18
#             262144    22.36   11.18
#
# So BF16 KV reaches 65536 tokens, and FP8 KV 131072: add `--kv-cache-dtype fp8 --max-model-len 131072`, on a card
# with FP8 (Ada or newer). What FP8 KV costs in accuracy is not measured here. 32768 leaves room for two sequences.
#
# Checked by tests: these sizes, from the published configuration; the flags, with vLLM 0.32's own parser.
# NOT measured: this has not run on such a card. Speed and the 2 GiB above are unproven.
set -eu

if [ $# -eq 0 ]; then
    echo "usage: $0 CHECKPOINT [more flags of vllm serve]" >&2
    exit 2
fi
checkpoint=$1
shift

exec vllm serve "$checkpoint" \
    --max-model-len 32768 \
    --max-num-batched-tokens 2048 \
    --gpu-memory-utilization 0.92 \
    --limit-mm-per-prompt '{"image": 1, "video": 0, "audio": 0}' \
    "$@"
