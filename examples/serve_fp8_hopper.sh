#!/bin/sh
# Serve an FP8 static Gemma 4 31B on one Hopper card (H100 80 GB, H200) with 131072 tokens, images and tool calls.
#
#     examples/serve_fp8_hopper.sh CHECKPOINT [more flags of vllm serve]
#
# Memory, in GiB:
#   weights   33.26 GB = 30.98: FP8 linears 27.28, BF16 embedding and norms 2.63, vision tower 1.07; and the global
#             layers' keys, which vLLM stores a second time as values, 0.10. Together 31.08.
#   card      H100: 81559 MiB = 79.65; 79.65 * 0.90 = 71.68; less weights: 40.60; less 4 for activations, graphs
#             and one image's encoder (a guess): 36.60 for the KV cache.
#   KV cache  of one sequence: 81920 bytes a token in the global layers, and in the sliding ones 819200 a token for
#             at most 1023 tokens + the 8192 in flight + a block of 16 (vLLM's admission rule); FP8 halves both.
#
#             tokens     BF16     FP8
#              32768     9.54    4.77
#             131072    17.04    8.52
#             262144    27.04   13.52
#
# So two full sequences of 131072 at once with BF16 KV, and even one of 262144. An H200 has 60.8 GiB more.
#
# No flag names the quantization: config.json and the files decide. Linears run on vLLM's FP8 kernels with a scale a
# row, so that q, k, v, gate and up keep their own. Prompts are read in chunks of 8192 tokens between decoding steps.
# Tools: the model's own call syntax, parsed by vLLM's `gemma4` parser; thoughts are split off by `gemma4` too.
#
# Checked by tests: these sizes, from the published configuration; the flags, with vLLM 0.32's own parser.
# NOT measured: this has not run on such a card. Speed and the 4 GiB above are unproven.
set -eu

if [ $# -eq 0 ]; then
    echo "usage: $0 CHECKPOINT [more flags of vllm serve]" >&2
    exit 2
fi
checkpoint=$1
shift

exec vllm serve "$checkpoint" \
    --tensor-parallel-size 1 \
    --max-model-len 131072 \
    --enable-chunked-prefill \
    --max-num-batched-tokens 8192 \
    --gpu-memory-utilization 0.90 \
    --limit-mm-per-prompt '{"image": 1, "video": 0, "audio": 0}' \
    --enable-auto-tool-choice \
    --tool-call-parser gemma4 \
    --reasoning-parser gemma4 \
    "$@"
