#!/bin/sh
# Drop a quarter of the experts of any BF16 Gemma 4 mixture and make a ContribDynamic GGUF of what stays, for Ollama.
#
#     examples/prune_to_gguf.sh CHECKPOINT TEXT...
#
# TEXT are files of what the model is for. They decide which experts stay, and the ones that stay are refitted on them.
# Beside CHECKPOINT, with KEEP=98, come CHECKPOINT-98e (a checkpoint) and CHECKPOINT-98e-gguf: the model in BF16, its
# importance matrix, the plan, the model of TIER, and a Modelfile: `ollama create NAME -f CHECKPOINT-98e-gguf/Modelfile`.
# The matrix is of the pruned model: tokens of dropped experts now go to others, and the refit moved what these answer.
#
# Environment, with defaults: KEEP=98 experts a layer that stay; TIER=cd-q4_k_m, or any recipe of `gguf-mixed plan`;
# SAMPLES=512 cuts of TEXT, of LENGTH=2048 tokens at most, for statistics; REFIT_SAMPLES=64 for the refit; DEVICE=cpu,
# or cuda; CONVERT, llama.cpp's convert_hf_to_gguf.py, and PYTHON=python3, which has what that needs.
# By default it is the script that environment/build_llama_cpp.py unpacks, whose programs gguf-mixed finds.
#
# Sizes, of the 26B-A4B with 98 of its 128 experts: BF16 40.90 GB as a checkpoint and about as much as GGUF.
# Run again, an unfinished step resumes or starts anew and a finished one is not repeated.
#
# Measured: on a CPU, with the small mixture in examples/small_gemma4 and KEEP=12; llama.cpp loads and runs the file.
# NOT measured: the real 26B-A4B, any GPU, Ollama.
set -eu

if [ $# -lt 2 ]; then
    echo "usage: $0 CHECKPOINT TEXT..." >&2
    exit 2
fi
checkpoint=${1%/}
shift
for text do
    set -- "$@" --text "$text"
    shift
done
keep=${KEEP:-98}
tier=${TIER:-cd-q4_k_m}
device=${DEVICE:-cpu}
samples=${SAMPLES:-512}
length=${LENGTH:-2048}
convert=${CONVERT:-${XDG_CACHE_HOME:-$HOME/.cache}/gemma4q/llama.cpp/source/convert_hf_to_gguf.py}
statistics=$checkpoint-statistics.safetensors
pruned=$checkpoint-${keep}e
folder=$pruned-gguf
name=$(basename "$pruned")
bf16=$folder/$name-bf16.gguf
imatrix=$folder/imatrix.gguf
plan=$folder/$tier.txt
output=$folder/$name-$tier.gguf

gemma4q calibrate "$checkpoint" "$statistics" "$@" --samples "$samples" --max-length "$length" --device "$device"
gemma4q prune "$checkpoint" "$pruned" --statistics "$statistics" --keep "$keep" "$@" \
    --samples "${REFIT_SAMPLES:-64}" --device "$device"

mkdir -p "$folder"
if [ ! -e "$bf16" ]; then
    "${PYTHON:-python3}" "$convert" "$pruned" --outtype bf16 --outfile "$bf16.partial"
    mv "$bf16.partial" "$bf16"
fi
gemma4q calibrate "$pruned" "$folder/statistics.safetensors" "$@" \
    --samples "$samples" --max-length "$length" --device "$device"
gguf-mixed imatrix "$folder/statistics.safetensors" --write "$imatrix"
gguf-mixed plan "$bf16" --recipe "$tier" --imatrix "$imatrix" --output "$plan"
if [ ! -e "$output" ]; then
    gguf-mixed quantize "$bf16" "$output" --overrides "$plan" --imatrix "$imatrix"
fi
gguf-mixed verify "$output" "$plan"
gguf-mixed modelfile "$output" > "$folder/Modelfile.partial"
mv "$folder/Modelfile.partial" "$folder/Modelfile"
