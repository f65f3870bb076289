#!/bin/sh
# Benchmark one CPU in one sitting: every precision beside the fastest peers, in the base and the large shape. On a CPU
# with AMX, the base shape is measured again with ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI, which torch and this package obey.
# Peers with kernels of their own may ignore it. All of it takes one to two hours on two cores. The last line that each
# command prints contains its results as JSON.
#     pip install "bge-rerank-integrations[bench]"
#     sh benchmarks/cpu.sh
#     BEIR=scifact/ sh benchmarks/cpu.sh                  # also real text: workload F with the embedded model
#     SHAPES=base REPEATS=5 sh benchmarks/cpu.sh
#     SHAPES=tiny NUM_PAIRS=8 sh benchmarks/cpu.sh        # the same commands in a few minutes
set -eu
if [ -n "${BEIR:-}" ]; then
    BEIR=$(cd "$BEIR" && pwd)
fi
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES=
contenders="ours-int8 ours-bfloat16 ours-float32 openvino-int8 openvino-bfloat16 openvino-float32 onnx-int8 onnx-float32
cross-encoder-default"
status=0

speed() {
    # shellcheck disable=SC2086  # the contenders are separate words
    "${PYTHON:-python3}" -m benchmarks speed --device cpu --num-pairs "${NUM_PAIRS:-24}" --repeats "${REPEATS:-3}" \
        --contenders $contenders "$@" || status=1
}

for shape in ${SHAPES:-base large}; do
    echo "== $shape"
    speed --shape "$shape" --workload A C D
    if [ "$shape" != large ] && grep -qw amx_int8 /proc/cpuinfo 2>/dev/null; then
        echo "== $shape, without AMX"
        (export ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI && speed --shape "$shape" --workload A C D && exit $status) || status=1
    fi
done
if [ -n "${BEIR:-}" ]; then
    echo "== embedded, real text"
    speed --model embedded --workload F --beir "$BEIR"
fi
exit $status
