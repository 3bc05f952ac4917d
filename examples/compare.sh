#!/bin/sh
# Compare what was made of one base: sizes, GPU memory and quality, in one table and one picture.
#
#     examples/compare.sh CHECKPOINT TEXT QUANTIZED..
#
# CHECKPOINT is the original, TEXT a file that nothing was calibrated on, QUANTIZED are checkpoint folders that vLLM
# serves, such as those that the other examples here write. Beside CHECKPOINT come CHECKPOINT-divergence.json and
# CHECKPOINT-comparison.png.
# Environment, with defaults: CHUNKS=16 windows of CONTEXT=512 tokens; MEMORY=8K, the request that GPU memory is for;
# RESULTS, more result files, such as RESULTS="gsm8k.json sweep.json".
#
# Disk: distributions of two models over the whole vocabulary, in the temporary folder while it runs. A position of
# Gemma 4's 262144 tokens takes 1 MB, and 16 windows of 512 have 4080 of them: 8.6 GB.
# GGUF files go into the same table with the results of llama.cpp, which stand apart from vLLM's:
#     gguf-mixed divergence F16.gguf MODEL.gguf --text TEXT --json > gguf.json
#     gemma4q compare CHECKPOINT QUANTIZED MODEL.gguf --result CHECKPOINT-divergence.json --result gguf.json
#
# Measured: on a CPU, with the small checkpoints in examples/small_gemma4.
# NOT measured: the real 31B and 26B-A4B, any GPU.
set -eu

if [ $# -lt 3 ]; then
    echo "usage: $0 CHECKPOINT TEXT QUANTIZED.." >&2
    exit 2
fi
checkpoint=${1%/}
text=$2
shift 2

gemma4q evaluate divergence "$checkpoint" "$@" --text "$text" --framing raw \
    --chunks "${CHUNKS:-16}" --context "${CONTEXT:-512}" --json > "$checkpoint-divergence.json"
set -- "$checkpoint" "$@" --result "$checkpoint-divergence.json"
for result in ${RESULTS:-}; do
    set -- "$@" --result "$result"
done
exec gemma4q compare "$@" --context "${MEMORY:-8K}" --plot "$checkpoint-comparison.png"
