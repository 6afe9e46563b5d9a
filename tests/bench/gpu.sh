#!/usr/bin/env bash
# Everything there is to measure on one GPU, in one command:
#
#     bash tests/bench/gpu.sh OUT            # 40 minutes at most; the same command goes on where it stopped
#
# The tests; train.py with the large model's defaults; the update's speed; vLLM beside the trainer; the
# embedded model on the GPU and on the CPU; and knapsack against uniform for as many seeds as the time allows.
# Each stage writes OUT/STAGE.log and what it measured, and OUT/STAGE.done when it is through; a stage that
# fails or runs out of time does not stop the next. OUT/summary.txt has a line for each.
#
# From the environment: PYTHON [python3], MINUTES [40] for all of it, STEPS [100] of a training run, SEEDS
# [20], TMPDIR [/tmp] with 50 GB of disk for the large model. Without a GPU the shapes are toys. A rehearsal:
#     STEPS=2 SEEDS=1 bash tests/bench/gpu.sh OUT
set -uo pipefail
out=$(realpath -m "${1:?usage: bash tests/bench/gpu.sh OUT}")
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3} end=$((SECONDS + 60 * ${MINUTES:-40}))
mkdir -p "$out"
# The large model's run is too big for OUT, and goes even when its stage is cut.
TMPDIR=$(mktemp -d) && export TMPDIR && trap 'rm -rf "$TMPDIR"' EXIT

note() { echo "$*" | tee -a "$out/summary.txt"; }

stage() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 log="$out/$1.log" start=$SECONDS left=$((end - SECONDS)) code took last
    shift 2
    if [ -e "$out/$name.done" ]; then return; fi
    if ((left < 10)); then note "$name: no time left" && return; fi
    timeout --kill-after=10 $((limit < left ? limit : left)) "$@" >"$log" 2>&1
    code=$? took="$((SECONDS - start)) s" last=$(tail -n 1 "$log")
    case $code in
    0) touch "$out/$name.done" && note "$name: done in $took: $last" ;;
    124 | 137) note "$name: cut after $took" ;;
    *) note "$name: failed with $code after $took: $last" ;;
    esac
}

train() { # NAME SECONDS FLAGS...: a new run in OUT/NAME, or on with the one that is there
    local name=$1 limit=$2 run="$out/$1"
    shift 2
    if [ -e "$run/config.json" ]; then set -- --resume "$run"; else set -- "$@" --out "$run"; fi
    stage "$name" "$limit" "$python" train.py "$@"
}

learn() { # ALLOCATOR SEED SECONDS [NAME]
    train "${4:-learn-$1-$2}" "$3" --engine hf --steps "${STEPS:-100}" --allocator "$1" --seed "$2"
}

note "$(date -u +%FT%TZ) $("$python" -c '
import torch
print("torch", torch.__version__, "on", torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU")')"
if ! "$python" -c "import math_verify, transformers"; then
    note "not everything of requirements.txt is installed: nothing run" && exit 1
fi
stage tests 180 "$python" -m pytest tests/test_gpu.py -m "not slow" -ra
stage bench_gpu_train 600 "$python" tests/bench/bench_gpu_train.py "$out/bench_gpu_train.json"
stage bench_gpu 600 "$python" tests/bench/bench_gpu.py "$out/bench_gpu.json"
stage bench_gpu_vllm 600 "$python" tests/bench/bench_gpu_vllm.py "$out/bench_gpu_vllm.json"
train train-vllm 120 --engine vllm --steps 3
# The same run on the GPU and on the CPU, at the same time.
learn knapsack 0 300 &
CUDA_VISIBLE_DEVICES="" learn knapsack 0 300 cpu-knapsack-0 &
wait
if [ -e "$out/learn-knapsack-0.done" ] && [ -e "$out/cpu-knapsack-0.done" ]; then
    stage bench_gpu_learn 60 "$python" tests/bench/bench_gpu_learn.py \
        "$out/learn-knapsack-0" "$out/cpu-knapsack-0" "$out/bench_gpu_learn.json"
fi
for ((seed = 0; seed < ${SEEDS:-20} && SECONDS + 10 < end; seed++)); do
    learn knapsack $seed 900 &
    learn uniform $seed 900 &
    wait
done
