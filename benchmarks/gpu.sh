#!/bin/sh
# Benchmark one GPU from a plain checkout in less than eight minutes. This needs torch, transformers, tokenizers,
# safetensors and sentence-transformers. The last line of the output contains all results as JSON.
#     sh benchmarks/gpu.sh
#     PYTHON=python3.11 sh benchmarks/gpu.sh --seconds 30
#     TOKENIZER=/folder/tokenizer.json sh benchmarks/gpu.sh   # with a real tokenizer, such as XLM-RoBERTa's
#     DEVICE=cpu SHAPE=tiny sh benchmarks/gpu.sh      # the same code on a machine without a GPU
set -eu
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
if [ "${SHAPE:-large}" = tiny ]; then
    set -- --shape tiny --also --num-pairs 16 --seconds 1 --matrix-size 256 "$@"
else
    set -- --shape "${SHAPE:-large}" "$@"
fi
if [ -n "${TOKENIZER:-}" ]; then
    set -- --tokenizer "$TOKENIZER" "$@"
fi
exec "${PYTHON:-python3}" -m benchmarks gpu --device "${DEVICE:-cuda}" "$@"
