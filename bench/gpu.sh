#!/usr/bin/env bash
# Everything that waits for a GPU, in at most ten minutes: a part that fails or runs out of its time does not stop the
# others. Logs and JSON go to $OUT; a table of the parts comes last.
#
#   bash bench/gpu.sh                     all parts
#   bash bench/gpu.sh tests kernels       some of: compile tests kernels sanitize ncu
#   bash bench/gpu.sh step                one more, of five minutes: whole steps, also from a cache, beside diffusers'
#   bash bench/gpu.sh foreground          one more, of five minutes: steps of the foreground alone, beside the whole
#
# OUT=FOLDER (out/gpu), PYTHON=COMMAND (python3), COMMIT=HASH where git cannot say, WHEELS=FOLDER (.whl): wheels that
# this machine lacks are installed from there into a folder of their own, without a network. BUDGET=SECONDS (150) for
# the kernels' timing, which alone would take about ten minutes: rows left over are written as unmeasured.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
OUT=${OUT:-out/gpu} PYTHON=${PYTHON:-python3} WHEELS=${WHEELS:-.whl} BUDGET=${BUDGET:-150}
PARTS=("$@"); [ $# -gt 0 ] || PARTS=(compile tests kernels sanitize ncu)
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2

if compgen -G "$WHEELS/*.whl" >/dev/null; then
    site=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi

table=() entries=() failed=0
# part NAME SECONDS COMMAND...: run it within its time, keep what it says, note how it ended.
part() {
    local name=$1 limit=$2 begun=$SECONDS status; shift 2
    timeout -k 10 "$limit" "$@" >"$OUT/$name.log" 2>&1; status=$?
    [ $status -eq 0 ] || failed=1
    local word=ok; case $status in 0) ;; 124 | 137) word="out of time" ;; 127) word="not installed" ;; *) word="failed ($status)" ;; esac
    table+=("$(printf '%-12s %-14s %5d s  %s' "$name" "$word" $((SECONDS - begun)) "$(grep -v '^ *$' "$OUT/$name.log" | tail -n 1 | cut -c1-100)")")
    entries+=("$(printf '{"part": "%s", "result": "%s", "seconds": %d}' "$name" "$word" $((SECONDS - begun)))")
    echo "${table[-1]}"
}

gpu_tests() { grep -rl --include='test_*.py' "mark\.gpu" tests; }
architecture() { "$PYTHON" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())'; }

for name in "${PARTS[@]}"; do
    case $name in
    compile) # what ships for this GPU, by all cores; it then lies in Triton's cache for the other parts
        part compile 80 "$PYTHON" -m kvlock_fast.cli kernels --arch "$(architecture)" --json "$OUT/compile.json" ;;
    tests)
        # shellcheck disable=SC2046
        # Each test compiles on the host: several at once, where pytest-xdist is there.
        "$PYTHON" -c 'import xdist' 2>/dev/null && many=(-n 6) || many=()
        part tests 130 "$PYTHON" -m pytest -q -m gpu ${many[@]+"${many[@]}"} -p no:cacheprovider --junitxml="$OUT/tests.xml" $(gpu_tests) ;;
    kernels)
        part kernels $((BUDGET + 40)) "$PYTHON" -m bench.kernels --budget "$BUDGET" --output "$OUT/kernels.json" ${COMMIT:+--commit "$COMMIT"}
        "$PYTHON" -m bench.kernels.tables "$OUT/kernels.json" >"$OUT/tables.md" 2>&1
        "$PYTHON" -m bench.kernels.plot "$OUT/kernels.json" "$OUT" >/dev/null 2>&1 ;;
    sanitize) # tiny launches; without torch's pool, or a read past a tensor's end would stay unseen
        for tool in memcheck racecheck; do
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 part "$tool" 50 compute-sanitizer --tool "$tool" --error-exitcode 9 \
                --target-processes all "$PYTHON" -m pytest -q -m gpu -p no:cacheprovider -k tiny_launch tests/gpu/test_kernels.py
        done ;;
    ncu)
        metrics=gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed
        metrics+=,gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed,dram__bytes_read.sum,dram__bytes_write.sum
        metrics+=,sm__warps_active.avg.pct_of_peak_sustained_active,launch__registers_per_thread
        part ncu 70 ncu --clock-control none --target-processes all --csv --page raw --metrics "$metrics" \
            --kernel-name regex:'^_.*_kernel$' --log-file "$OUT/ncu.csv" "$PYTHON" -m bench.kernels --once \
            --parts locked prologue epilogue blend quantize dequantize guidance --shapes wan-1.3b
        [ ! -f "$OUT/ncu.csv" ] || "$PYTHON" -m bench.kernels.ncu "$OUT/ncu.csv" "$OUT/ncu.json" ;;
    step) # whole denoising steps beside diffusers', captured and not
        part step 270 "$PYTHON" -m bench.steps --steps 8 --output "$OUT/step.json" ${COMMIT:+--commit "$COMMIT"} ;;
    foreground)
        part foreground 270 "$PYTHON" -m bench.steps.foreground --device cuda --shape "wan-1.3b 81f" --mask-share 0.2 0.4 \
            --steps 6 --batches 1 2 --json "$OUT/foreground.json" ${COMMIT:+--commit "$COMMIT"} ;;
    *)
        echo "error: unknown part '$name': compile, tests, kernels, sanitize, ncu, step or foreground" >&2; exit 2 ;;
    esac
done

[ ! -s "$OUT/tables.md" ] || sed -n '1,20p' "$OUT/tables.md"
printf '\n%s\n' "part         result           time  last line"
printf '%s\n' "${table[@]}" | tee "$OUT/summary.txt"
(IFS=,; printf '[%s]\n' "${entries[*]}") >"$OUT/summary.json"
exit $failed
