#!/usr/bin/env bash
# The first ten minutes with an OpenCL device:  benchmarks/opencl_first.sh FOLDER [--quick]
#
# Runs five parts, each command under a time limit of its own, and keeps their output in FOLDER even
# if a later one fails or the script is stopped:
#
#   1-clinfo.txt   clinfo and, for NVIDIA's cards, nvidia-smi
#   1-device.txt   the limits that the library sees, compile times and the compiler's remarks
#   2-tests.txt    a selection of tests/csrc and tests/opencl that reaches every kernel
#   3-tables.txt   losses, products and LoRA steps at sizes for a GPU
#   4-peers.txt    torch, PEFT (float32, TF32 off) and Liger on the same card, where they are there
#   5-profile.txt  a LoRA step by kernel, from OpenCL's events
#   summary.txt    how each command ended, and the tables; also printed
#
# --quick runs the same commands at small sizes, to try the script on a processor with PoCL (some
# minutes on two cores, most of them for compiling). The core must have been built before, and
# nothing is downloaded: a part says what is missing, and the next one runs.
#
#   PYTHON           the interpreter (.venv/bin/python where that is there, else python3)
#   DEVICE           opencl:<number> (opencl:0)
#   OPENCL_LIBRARY   libOpenCL.so.1, where the loader is carried along and not installed
#   OCL_ICD_VENDORS  the loader's folder of .icd files; without one, NVIDIA's driver is looked for
#   CLINFO           the program clinfo, where it is carried along
#   SECONDS_IN_ALL   the time for everything (595)
set -u
usage="usage: benchmarks/opencl_first.sh FOLDER [--quick]"
quick=
[ "${2-}" = --quick ] && quick=--quick
if [ $# -lt 1 ] || [ $# -gt 2 ] || [ "${1#-}" != "$1" ] || { [ $# = 2 ] && [ -z "$quick" ]; }; then
    echo "$usage" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
device=${DEVICE:-opencl:0}
in_all=${SECONDS_IN_ALL:-595}
export PYTHONPATH=$PWD:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if [ -n "${OPENCL_LIBRARY-}" ]; then
    export PYLOSS_OPENCL_LIBRARY=$OPENCL_LIBRARY
    export LD_LIBRARY_PATH=$(dirname "$OPENCL_LIBRARY")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
# A driver without the file that names it to the loader, as in some containers.
if [ -z "${OCL_ICD_VENDORS-}" ] && ! ls /etc/OpenCL/vendors/*.icd > /dev/null 2>&1; then
    for driver in /usr/local/nvidia/lib64 /usr/lib/x86_64-linux-gnu /usr/lib64; do
        [ -e "$driver/libnvidia-opencl.so.1" ] || continue
        mkdir -p "$out/vendors"
        echo "$driver/libnvidia-opencl.so.1" > "$out/vendors/nvidia.icd"
        export OCL_ICD_VENDORS=$out/vendors
        break
    done
fi

rm -f "$out"/[1-5]-*.txt "$out/summary.txt"
: > "$out/ends"

# run FILE SECONDS TITLE COMMAND...: appends the output to the file; the status is the command's.
# $signal ends a command that takes too long, KILL five seconds later.
signal=TERM
run() {
    local file=$out/$1.txt limit=$2 title=$3 begin=$SECONDS code=0
    shift 3
    local left=$((in_all - SECONDS - 5))
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        printf '%-34s not run: the time is over\n' "$title" | tee -a "$out/ends"
        return 1
    fi
    printf '\n== %s: %s\n' "$title" "$*" >> "$file"
    timeout -s "$signal" -k 5 "$limit" "$@" >> "$file" 2>&1 || code=$?
    local end="ended with status $code"
    [ "$code" = 0 ] && end=complete
    [ "$code" = 124 ] || [ "$code" = 137 ] && end="stopped after its $limit s"
    [ "$code" = 126 ] || [ "$code" = 127 ] && end="missing: $1"
    printf '%-34s %4d s  %s\n' "$title" $((SECONDS - begin)) "$end" | tee -a "$out/ends"
    return "$code"
}

# A time limit: the first, or with --quick the second, since a processor compiles slowly.
limit() { [ -n "$quick" ] && echo "$2" || echo "$1"; }

has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

summary() {
    {
        echo "opencl_first.sh $quick, $(date -u '+%Y-%m-%d %H:%M'), $SECONDS s"
        cat "$out/ends"
        for file in "$out"/[1-5]-*.txt; do
            [ -e "$file" ] && [ "${file##*/}" != 1-clinfo.txt ] || continue
            printf '\n-- %s\n' "$(basename "$file")"
            case $file in
            */2-*) grep -E '^(FAILED|ERROR)| (passed|failed|error)|^operations that' "$file" ;;
            *) grep -vE '^(== |$)' "$file" ;;
            esac | cut -c1-200 | head -100
        done
    } > "$out/summary.txt"
    rm -f "$out/ends"
    cat "$out/summary.txt"
}
trap summary EXIT
trap 'exit 130' INT TERM

if ! "$python" -c 'import pyloss._core' 2> "$out/1-device.txt"; then
    cat "$out/1-device.txt" >&2
    echo "Build the core first: $python setup.py build_ext --inplace" >&2
    exit 2
fi

# ---- 1. the device
command -v nvidia-smi > /dev/null && run 1-clinfo 10 nvidia-smi nvidia-smi
run 1-clinfo 10 clinfo "${CLINFO:-clinfo}"
if ! run 1-device 30 "limits" "$python" benchmarks/opencl_check.py limits "$device"; then
    echo "No device $device: nothing else can run." | tee -a "$out/ends"
    exit 1
fi
run 1-device "$(limit 60 240)" "programs" "$python" benchmarks/opencl_check.py programs "$device"

# ---- 2. tests; after Ctrl-C pytest still says what it has found
signal=INT
processes=$(($(nproc) / 2 < 8 ? $(nproc) / 2 : 8))
if has pytest; then
    spread=()
    [ "$processes" -gt 1 ] && has xdist && spread=(-n "$processes")
    tests=(tests/csrc tests/opencl)
    [ -n "$quick" ] && tests=(tests/csrc/test_layers.py tests/csrc/test_matmul.py)
    OPENCL_VARIANTS=${quick:+1} run 2-tests "$(limit 180 60)" "tests" \
        "$python" -m pytest -q -rfE --tb=short -p no:cacheprovider -p opencl_selection \
        "${spread[@]}" "${tests[@]}"
else
    echo "tests: missing: pytest" | tee -a "$out/ends"
fi

signal=TERM

# ---- 3. and 4. tables
sizes=$([ -n "$quick" ] && echo small || echo gpu)
table() { run "$1" "$2" "$3" "$python" benchmarks/opencl.py --device "$device" --sizes "$sizes" \
    --quick --only "$3"; }
table 3-tables "$(limit 60 120)" losses
table 3-tables 45 products
table 3-tables 75 steps
table 4-peers 100 peers

# ---- 5. a step by kernel
if [ -n "$quick" ]; then
    run 5-profile 40 "profile" "$python" benchmarks/opencl_profile.py "$device" small q4_1 2 32
else
    run 5-profile 25 "profile, SmolLM2-135M" \
        "$python" benchmarks/opencl_profile.py "$device" SmolLM2-135M q4_1 8 512
    run 5-profile 25 "profile, Qwen3-0.6B" \
        "$python" benchmarks/opencl_profile.py "$device" Qwen3-0.6B q4_1 4 512
fi
