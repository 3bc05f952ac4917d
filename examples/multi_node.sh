#!/bin/sh
# Serve one checkpoint with the GPUs of several machines, by vLLM's own tensor, pipeline and expert parallelism.
#
#     examples/multi_node.sh CHECKPOINT NODES RANK HEAD [more flags of vllm serve]
#
# Run it on every machine, with RANK 0 on HEAD and 1 .. NODES - 1 on the others; clients ask HEAD, port 8000.
#     GPUS=4 examples/multi_node.sh /models/gemma-4-31B-int8 2 0 10.0.0.1      on 10.0.0.1
#     GPUS=4 examples/multi_node.sh /models/gemma-4-31B-int8 2 1 10.0.0.1      on the other
#
# GPUS     of each machine, 8 where it is not set. Each layer is divided among them (tensor parallel), and layers among
#          machines (pipeline parallel): one row of activations a token goes from machine to machine, where dividing
#          layers over the network too would wait for it twice a layer. A small model on a very fast network may do
#          better with `--tensor-parallel-size` as many as there are GPUs in all, and `--pipeline-parallel-size 1`.
# mixture  `--enable-expert-parallel` gives each GPU whole experts rather than a part of each.
# by Ray   where a Ray cluster runs already (`ray start` on each machine), one command on its head does the same:
#              vllm serve CHECKPOINT --distributed-executor-backend ray --tensor-parallel-size 8 --pipeline-parallel-size 2
#          `VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY=GEMMA4Q_` before it takes the GEMMA4Q_* variables to its workers.
#
# The checkpoint lies under the same path on every machine, or is a copy, and every machine has the same vLLM and
# vllm-gemma4q. Ports: 29501 of HEAD for the start (`--master-port`), any that NCCL picks for the rest.
#
# Checked by tests: the flags, with vLLM 0.32's own parser, for each rank and by Ray. `gemma4q doctor -tp N` says how
# many GPUs a scheme can be divided among.
# NOT measured: this has not run on several machines, nor with pipeline parallelism.
set -eu

if [ $# -lt 4 ]; then
    echo "usage: $0 CHECKPOINT NODES RANK HEAD [more flags of vllm serve]" >&2
    exit 2
fi
checkpoint=$1 nodes=$2 rank=$3 head=$4
shift 4
if [ "$rank" -ne 0 ]; then
    set -- --headless "$@"
fi

exec vllm serve "$checkpoint" \
    --tensor-parallel-size "${GPUS:-8}" \
    --pipeline-parallel-size "$nodes" \
    --nnodes "$nodes" \
    --node-rank "$rank" \
    --master-addr "$head" \
    "$@"
