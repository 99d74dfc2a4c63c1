#!/usr/bin/env bash
# Test and measure everything that needs a GPU, on one H100 or H200, in under ten minutes.
#
#   benchmarks/gpu.sh               # on the GPU machine
#   benchmarks/gpu.sh --rehearse    # the same parts with tiny shapes on a CPU, in two to three minutes
#   benchmarks/gpu.sh --pack        # put pydantic and pytest into build/gpu-packages, to carry to a machine without
#   benchmarks/gpu.sh --list        # print name, expected seconds, limit and command of each part; run nothing
#
# Needs torch 2.11 or later with Triton, torchvision, transformers, peft, safetensors, pydantic and pytest.
# Ray, boto3 and open_clip are not needed. A machine that has torch, transformers and peft alone gets the rest from
# build/gpu-packages, if that folder is carried there; it must have the same Python version. Nothing is installed or
# downloaded there: all weights are random, except those of the embedded model.
#
# The parts run one after the other, the cheapest first. Each runs in a process of its own under a time limit and writes
# its results before the next one starts, so an interrupted run keeps what it has measured. A part that fails does not
# stop the later ones. A part that is expected to take longer than the time left is skipped.
#
# Results in OUT: captured_tests.xml (JUnit), one JSON file for each benchmark, and summary.json with the status,
# seconds and command of each part.
#
# Environment (paths are relative to the repository):
#   OUT         folder for the results; default docs/results/gpu, for a rehearsal build/gpu-rehearsal
#   BUDGET_S    seconds for the whole script; default 570
#   PYTHON      Python interpreter; default .venv/bin/python if it exists, else python3
#
# Exit code 0: no part failed (parts skipped for lack of time are named in the summary). 1: a part failed or ran into
# its time limit. 2: wrong usage, a missing package, or no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."

packages=build/gpu-packages
rehearse=false list=false pack=false
for argument in "$@"; do
    case $argument in
        --rehearse) rehearse=true ;;
        --list) list=true ;;
        --pack) pack=true ;;
        *) sed -n '4,7s/^# *//p' "$0" >&2; exit 2 ;;
    esac
done
started=$SECONDS
budget=${BUDGET_S:-570}
python=${PYTHON:-$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python3)}
if $pack; then
    exec "$python" -m pip install --quiet --upgrade --target "$packages" --constraint constraints.txt pydantic pytest
fi
if $rehearse; then
    out=${OUT:-build/gpu-rehearsal}
    llamagen=llamagen-cut janus_1b=emoji-world janus_7b=emoji-world
    batches=2 compared=2 dtype=float32 rounds=1 train="--pairs 2 --keep 2 --steps 1"
    export CUDA_VISIBLE_DEVICES="" TRITON_INTERPRET=1 # the kernels then run on the CPU, in Triton's interpreter
else
    out=${OUT:-docs/results/gpu}
    llamagen=llamagen-xl janus_1b=janus-pro-1b janus_7b=janus-pro-7b
    # 32 images for the comparison: both loops keep their caches at once, which at 64 would not fit on an H100.
    batches="1 16 64 128" compared=32 dtype=bfloat16 rounds=2 train="--steps 3"
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
names=() statuses=() seconds=() commands=() failures=0

# part NAME EXPECTED_S LIMIT_S COMMAND...: run one part if there is time for it, and record how it ended.
part() {
    local name=$1 expected=$2 limit=$3 left begin status code
    shift 3
    ! $rehearse || limit=180 # the usual limits are for a GPU machine that does nothing else
    if $list; then
        printf '%s\t%s\t%s\t%s\n' "$name" "$expected" "$limit" "$*"
        return
    fi
    left=$((budget - SECONDS + started))
    begin=$SECONDS
    if ((left < expected)); then
        status=skipped
        printf '\n== %s: skipped, it is expected to take %d s and %d s of %d s are left\n' \
            "$name" "$expected" "$left" "$budget"
    else
        ((limit < left)) || limit=$left
        printf '\n== %s (limit %d s): %s\n' "$name" "$limit" "$*"
        timeout --kill-after=5 "$limit" "$@" & # it leads a process group of its own and stops all of it
        child=$!
        wait "$child"
        code=$?
        child=
        case $code in
            0) status=passed ;;
            124 | 137) status="timed out" ;;
            *) status="failed with exit code $code" ;;
        esac
        [[ $status == passed ]] || failures=$((failures + 1))
    fi
    names+=("$name") statuses+=("$status") seconds+=($((SECONDS - begin))) commands+=("$*")
    write_summary
}

# Rewritten after each part, so that an interrupted run has one too.
write_summary() {
    local i separator=
    {
        printf '[\n'
        for i in "${!names[@]}"; do
            printf '%s{"part": "%s", "status": "%s", "seconds": %d, "command": "%s"}' \
                "$separator" "${names[i]}" "${statuses[i]}" "${seconds[i]}" "${commands[i]}"
            separator=$',\n'
        done
        printf '\n]\n'
    } >"$out/summary.json"
}

child=
trap '[[ -z $child ]] || kill "$child"; exit 130' INT TERM

if ! $list; then
    modules="torch triton torchvision transformers peft safetensors pydantic pytest"
    find_missing() {
        "$python" -c 'import importlib.util as u, sys
print(*[name for name in sys.argv[1:] if u.find_spec(name) is None])' $modules
    }
    missing=$(find_missing) || exit 2
    if [[ -n $missing && -d $packages ]]; then
        export PYTHONPATH="$PWD/$packages${PYTHONPATH:+:$PYTHONPATH}"
        missing=$(find_missing) || exit 2
    fi
    if [[ -n $missing ]]; then
        echo "gpu.sh: $python has no ${missing// /, }: install with '$python -m pip install $missing'," \
            "or carry the folder that 'benchmarks/gpu.sh --pack' makes" >&2
        exit 2
    fi
    if ! $rehearse && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo "gpu.sh: torch finds no GPU: run on a machine with one, or try 'benchmarks/gpu.sh --rehearse'" >&2
        exit 2
    fi
    mkdir -p "$out"
fi

pytest="$python -m pytest --noconftest -p no:cacheprovider -q" # the tests' conftest starts servers for S3 and GCS
decode="$python -m benchmarks.decode --dtype $dtype --batches $batches"
# shellcheck disable=SC2086  # these are lists of words
{
    part captured_tests 40 150 $pytest --junitxml="$out/captured_tests.xml" tests/sampling/test_captured.py
    part decode_llamagen_xl 40 90 $decode --models $llamagen --rounds $rounds --ours-only \
        --out "$out/decode_llamagen_xl.json"
    part decode_janus_pro_1b 55 120 $decode --models $janus_1b --rounds $rounds --ours-only \
        --out "$out/decode_janus_pro_1b.json"
    part decode_janus_pro_7b 80 160 $decode --models $janus_7b --rounds 1 --ours-only \
        --out "$out/decode_janus_pro_7b.json"
    part decode_janus_pro_7b_fp8 80 160 $decode --models $janus_7b --rounds 1 --ours-only --kv-cache fp8 \
        --out "$out/decode_janus_pro_7b_fp8.json"
    part train_janus_pro_7b 80 160 $python -m benchmarks.train_step --models $janus_7b --dtype $dtype $train \
        --out "$out/train_janus_pro_7b.json"
    part compare_janus_pro_7b 90 180 $python -m benchmarks.decode --models $janus_7b --dtype $dtype \
        --batches $compared --rounds 1 --out "$out/compare_janus_pro_7b.json"
}
! $list || exit 0

printf '\n%-26s %7s  %s\n' part seconds status
for i in "${!names[@]}"; do
    printf '%-26s %7d  %s\n' "${names[i]}" "${seconds[i]}" "${statuses[i]}"
done
printf '%d of %d s, results in %s\n' $((SECONDS - started)) "$budget" "$out"
exit $((failures > 0))
