#!/usr/bin/env bash
# Everything that waits for a GPU, for one that is at hand for minutes only.
#
#     scripts/on_gpu.sh [--dry-run] BUDGET OUT [STAGE ...]
#
# BUDGET: seconds for all of it. OUT: a folder; log.txt, stages.tsv and results.tar.gz there are rewritten after every
# stage, so that nothing is lost when this is cut off. STAGE: names below, "first" or "second" for one of the two calls
# that they are meant for; all by default. Every stage has a time limit, the most telling come first, and one that fails
# does not keep the next from running, unless it is the build.
#
# Needed: a CUDA torch, transformers, nvcc, cmake, ninja, pybind11, pytest, pytest-xdist, hypothesis; no network. PYTHON
# chooses the Python (python3). Nothing is installed: the module is built into specbranch_ext/. --dry-run runs every
# stage's command at tiny sizes without a GPU: on the emulated kernels, on a recording device, or on the CPU.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2

first_stages=(probe build qwen decoding_tests ops op_tests profile memcheck)
second_stages=(build amx qwen_draft_first llama llama_weak qwen_weak deepseek vicuna ncu)
declare -A limits=(
    [probe]=30 [build]=120 [qwen]=110 [decoding_tests]=60 [ops]=50 [op_tests]=60 [profile]=40 [memcheck]=60
    [qwen_draft_first]=45 [llama]=60 [llama_weak]=50 [qwen_weak]=50 [deepseek]=90 [vicuna]=60 [ncu]=40
    [amx]=45)

usage() {
    sed -n '2,14s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    echo "stages: ${!limits[*]}" >&2
    exit 2
}

# ---- Stages. $dry is set in a dry run, $work is the folder for results.

probe() {
    for tool in "$python" cmake ninja nvcc "$sanitizer" "$profiler"; do
        printf '%s: %s\n' "$tool" "$(command -v "$tool" || echo none)"
    done
    if command -v nvidia-smi > /dev/null; then
        nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total,memory.free,clocks.sm,clocks.mem --format=csv
    fi
    "$python" - << 'PYTHON'
import importlib.metadata as metadata
import torch

for name in ("torch", "transformers", "numpy", "pybind11", "pytest", "pytest-xdist", "hypothesis", "safetensors", "rich"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is missing")
print("CUDA of torch", torch.version.cuda, "available", torch.cuda.is_available())
if torch.cuda.is_available():
    free, total = torch.cuda.mem_get_info()
    print(torch.cuda.get_device_properties(0), f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
PYTHON
}

build() {
    local cuda=1 folder=build/on_gpu module=specbranch_ext
    if [ -n "$dry" ]; then cuda=0 folder=build/on_gpu_dry_run module=$work/built; mkdir -p "$module"; fi
    cmake -S . -B "$folder" -G Ninja -DSPECBRANCH_CUDA=$cuda -DPython_EXECUTABLE="$python" \
        -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DSPECBRANCH_MODULE_DIR="$(realpath "$module")" &&
        cmake --build "$folder" --target _C &&
        "$python" -m specbranch.cli doctor
}

# bench_gpu.py over a pair and a trace: target, draft, trace, then its options.
decode() {
    local target=$1 draft=$2 trace=benchmarks/records/coder_$3_t0.safetensors name=$4
    shift 4
    if [ -n "$dry" ]; then
        target=tiny-target draft=tiny-draft
        set -- "$@" --device recording --dtype float32 --limit 1 --tokens 16
    fi
    "$python" benchmarks/bench_gpu.py --target "$target" --draft "$draft" --trace "$trace" --out "$work/$name.json" "$@"
}

qwen() { decode qwen2.5-7b qwen2.5-0.5b good qwen --limit 3 --eager --peer-limit 1; }
qwen_weak() { decode qwen2.5-7b qwen2.5-0.5b weak qwen_weak --limit 3 --no-steps --peers none; }
qwen_draft_first() {
    decode qwen2.5-7b qwen2.5-0.5b good qwen_draft_first --limit 3 --no-steps --peers none --priority draft \
        --methods pearl,specbranch
}
llama() { decode llama-7b llama-68m good llama --limit 3 --peer-limit 1; }
llama_weak() { decode llama-7b llama-68m weak llama_weak --limit 3 --no-steps --peers none; }
deepseek() {
    decode deepseek-coder-33b deepseek-coder-1.3b good deepseek --limit 2 --peers greedy --peer-limit 1 \
        --methods pearl,specbranch
}
vicuna() { decode vicuna-13b vicuna-68m good vicuna --limit 2 --peers none --methods pearl,specbranch; }

ops() {
    local options=(--device cuda --seconds 0.3)
    if [ -n "$dry" ]; then options=(--device cpu --seconds 0.01 --op ancestor_mask --op kv_commit); fi
    "$python" benchmarks/bench_ops.py --quick "${options[@]}" --json "$work/ops.jsonl"
}

# As scripts/sanitize.py chooses them.
mapfile -t op_files < <(grep -l 'usefixtures("implementation")' tests/ops/test_*.py | grep -v test_exhaustive)

op_tests() {
    if [ -n "$dry" ]; then
        "$python" -m pytest -q -p no:cacheprovider -k "emulated and (test_walk or in_place or sees_nothing)" "${op_files[@]}"
        return
    fi
    "$python" -m pytest -q -p no:cacheprovider -n 10 -m cuda "${op_files[@]}"
}

decoding_tests() {
    local files=(tests/runtime/test_cuda.py tests/runtime/test_capturable.py)
    if [ -n "$dry" ]; then
        "$python" -m pytest -q -p no:cacheprovider --collect-only -m cuda "${files[@]}"
        return
    fi
    SPECBRANCH_TESTS=quick "$python" -m pytest -q -p no:cacheprovider -m cuda "${files[@]}"
}

profile() {
    local options=(--target qwen2.5-7b --draft qwen2.5-0.5b)
    if [ -n "$dry" ]; then
        options=(--target tiny-target --draft tiny-draft --device recording --dtype float32 --replays 2)
    fi
    "$python" benchmarks/profile_steps.py "${options[@]}" --out "$work/profile.json"
}

memcheck() {
    local tool=("$sanitizer" --tool memcheck --error-exitcode 9) selected="-m cuda"
    if [ -n "$dry" ]; then tool=(env) selected="-k emulated"; fi
    # Few and small: a sanitizer is slow. Not racecheck: races between blocks that only cost time are meant.
    "${tool[@]}" "$python" -m pytest -q -p no:cacheprovider $selected \
        tests/ops/test_device_data.py tests/ops/test_ancestor_mask.py --maxfail 3
}

ncu() {
    local tool=("$profiler" --clock-control none --set full --launch-skip 20 --launch-count 2) options=(--device cuda)
    if [ -n "$dry" ]; then tool=(env) options=(--device cpu); fi
    local op kernels
    for op in tree_attention verify; do
        kernels=()
        if [ -z "$dry" ]; then kernels=(--kernel-name "regex:$op|attend"); fi
        "${tool[@]}" "${kernels[@]}" "$python" benchmarks/bench_ops.py --quick "${options[@]}" --op $op --seconds 0.01 \
            > "$work/ncu_$op.txt" || return
    done
}

# The products of a processor with tiles, which nobody has run on one: a machine with a large GPU often has such.
amx() {
    local level levels=(bf16 amx) options=()
    if ! SPECBRANCH_ISA=amx "$python" -c 'import specbranch_ext; specbranch_ext.build_info()'; then
        echo "no tiles here"
        if [ -z "$dry" ]; then return; fi
        levels=(baseline)
    fi
    if [ -n "$dry" ]; then options=(-k test_empty); fi
    SPECBRANCH_ISA=${levels[-1]} "$python" -m pytest -q -p no:cacheprovider "${options[@]}" \
        tests/ops/test_linear.py tests/ops/test_packed_linear.py || return
    options=(--seconds 0.2 --limit-seconds 12)
    if [ -n "$dry" ]; then options=(--quick --seconds 0.01); fi
    for level in "${levels[@]}"; do
        SPECBRANCH_ISA=$level "$python" benchmarks/bench_ops.py --device cpu --op packed_linear "${options[@]}" \
            --json "$work/products_$level.jsonl" || return
    done
}

# ---- Running them.

find_tools() {
    local folder
    for folder in /usr/local/cuda/bin /usr/local/cuda/extras/compute-sanitizer /opt/nvidia/nsight-compute/*/; do
        if [ -d "$folder" ]; then PATH=$PATH:${folder%/}; fi
    done
    python=$(command -v "${PYTHON:-python3}") || { echo "on_gpu.sh: there is no ${PYTHON:-python3}" >&2; exit 2; }
    export PATH=$(dirname "$python"):$PATH # its environment may have cmake and ninja
    sanitizer=compute-sanitizer profiler=ncu
    export python sanitizer profiler
    export PYTHONPATH=$root:$root/python${PYTHONPATH:+:$PYTHONPATH}
    export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
}

# What was made so far, whole at every moment: a new archive takes the old one's place.
keep() {
    tar -czf "$out/results.part" -C "$work" --exclude ./built . -C "$out" log.txt stages.tsv && mv "$out/results.part" "$out/results.tar.gz"
}

if [ "${1:-}" = --stage ]; then # one stage, in a process of its own that `timeout` can end
    find_tools
    "$2"
    exit
fi

dry=
if [ "${1:-}" = --dry-run ]; then
    dry=yes
    export OMP_NUM_THREADS=1 # tiny models: two threads on a busy machine would wait for each other most of the time
    shift
fi
[[ "${1:-}" =~ ^[1-9][0-9]*$ && -n "${2:-}" ]] || usage
budget=$1
mkdir -p "$2" || exit 2
out=$(cd "$2" && pwd)
shift 2
stages=()
for name in "${@:-all}"; do
    case $name in
        first) stages+=("${first_stages[@]}") ;;
        second) stages+=("${second_stages[@]}") ;;
        all) stages+=("${first_stages[@]}" "${second_stages[@]:1}") ;;
        *) if [ -n "${limits[$name]:-}" ]; then stages+=("$name"); else
            echo "on_gpu.sh: there is no stage '$name'" >&2
            usage
        fi ;;
    esac
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export dry work
: > "$out/log.txt"
printf 'stage\tseconds\tstatus\n' > "$out/stages.tsv"

if [ -n "$dry" ]; then limits[build]=420; fi # on few cores, and others at work
status=0
for stage in "${stages[@]}"; do
    left=$((budget - SECONDS))
    if [ $left -lt 5 ]; then
        printf '%s\t0\tleft out: no time\n' "$stage" | tee -a "$out/stages.tsv"
        status=1
        continue
    fi
    limit=$((limits[$stage] < left ? limits[$stage] : left))
    begin=$SECONDS
    echo "== $stage (at most $limit s)" | tee -a "$out/log.txt"
    timeout -k 5 "$limit" bash "${BASH_SOURCE[0]}" --stage "$stage" 2>&1 | tee -a "$out/log.txt"
    code=${PIPESTATUS[0]}
    printf '%s\t%d\t%d\n' "$stage" $((SECONDS - begin)) "$code" >> "$out/stages.tsv"
    if [ "$code" != 0 ]; then status=1; fi
    keep
    if [ "$stage" = build ] && [ "$code" != 0 ]; then
        echo "the build failed: nothing else can run" | tee -a "$out/log.txt"
        break
    fi
done
keep
cat "$out/stages.tsv"
exit $status
