#!/usr/bin/env bash
# Everything that waits for a GPU. In an environment with a CUDA torch, nvcc, cmake, ninja, pybind11, pytest, hypothesis:
#
#     scripts/on_gpu.sh OUT [STAGE …]      stages: build tests sanitizers ops decoding (default: all, in this order)
#
# Results go to the folder OUT, one file a stage and benchmark. A stage that fails does not keep the next from running.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/on_gpu.sh OUT [STAGE ...]}
shift
mkdir -p "$out"
stages=("$@")
if [ ${#stages[@]} = 0 ]; then stages=(build tests sanitizers ops decoding); fi

build() {
    SPECBRANCH_CUDA=1 python -m pip install -q --no-build-isolation --no-deps -e . && python -m specbranch.cli doctor
}

tests() {
    python -m pytest -q -m cuda tests/test_cuda.py tests/test_capturable.py
    local first=$?
    python -m pytest -q tests -k "cuda and not emulated" && return $first
}

# The tests of the ops on the device alone; what a sanitizer makes slow is left out as in scripts/sanitize.py.
sanitizers() {
    local selected failed=0
    selected=$(python -c 'import sys; sys.path.insert(0, "scripts"); import sanitize; print(sanitize.SELECTED)')
    for tool in memcheck racecheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 9 python -m pytest -q -k "${selected/emulated/cuda}" \
            tests/test_device_data.py tests/test_kv_commit.py tests/test_verify.py tests/test_draft_sample.py \
            tests/test_tree_attention.py tests/test_verify_rejection.py || failed=1
    done
    return $failed
}

ops() {
    python benchmarks/bench_ops.py --device cuda --json "$out/ops.json"
}

decoding() {
    local failed=0
    while read -r target draft trace; do
        python benchmarks/bench_gpu.py --target "$target" --draft "$draft" \
            --trace "benchmarks/records/coder_${trace}_t0.safetensors" \
            --out "$out/decoding_${target}_${draft}_${trace}.json" || failed=1
    done <<< "llama-7b llama-68m good
llama-7b llama-68m weak
qwen2.5-7b qwen2.5-0.5b good
qwen2.5-7b qwen2.5-0.5b weak
vicuna-13b vicuna-68m good
deepseek-coder-33b deepseek-coder-1.3b good"
    return $failed
}

status=0
for stage in "${stages[@]}"; do
    echo "== $stage"
    "$stage" 2>&1 | tee "$out/$stage.log" || status=1
done
exit $status
