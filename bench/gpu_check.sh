#!/usr/bin/env bash
# Builds, tests and measures everything on a machine with a CUDA GPU, without a network, in less than nine and a half minutes.
#
#   bash bench/gpu_check.sh [output folder]
#
# Every stage has a share of the time; what one leaves over the next may use. A stage that fails is reported, the later ones still run,
# and the exit status is 1. Results go to the folder given, else to bench/results/<gpu>. Logs of all stages go there too.
set -u -o pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
export PYTHONUNBUFFERED=1 RSLOSS_TEST_EXAMPLES="${RSLOSS_TEST_EXAMPLES:-15}"
python="${PYTHON:-python3}"
begin=$SECONDS
shares=0
failures=0
summary=""

slug="$("$python" -c 'from bench.harness import machine_slug; print(machine_slug("cuda"))' 2>/dev/null || echo no-gpu)"
out="${1:-bench/results/$slug}"
mkdir -p "$out"
log="$out/gpu_check.log"
: > "$log"

# stage NAME SHARE_IN_SECONDS COMMAND...: runs the command within its share plus what earlier stages left over.
stage() {
  local name="$1" share="$2"
  shift 2
  shares=$((shares + share))
  local limit=$((shares - (SECONDS - begin)))
  [ "$limit" -lt 5 ] && limit=5
  local from=$SECONDS status=0
  printf '\n=== %s (limit %d s)\n' "$name" "$limit" | tee -a "$log"
  timeout --kill-after=5 "$limit" "$@" > "$out/stage.log" 2>&1 || status=$?
  cat "$out/stage.log" >> "$log"
  tail -n "${LINES_SHOWN:-12}" "$out/stage.log"
  rm -f "$out/stage.log"
  local verdict=pass
  [ "$status" -ne 0 ] && verdict="FAIL (exit status $status)" && failures=$((failures + 1))
  [ "$status" -eq 124 ] || [ "$status" -eq 137 ] && verdict="FAIL (out of time)"
  summary+="$(printf '%-34s %4d s  %s' "$name" "$((SECONDS - from))" "$verdict")"$'\n'
}

# leave_out NAME REASON: a stage that cannot run here is a failure too; nothing that was promised is passed over in silence.
leave_out() {
  failures=$((failures + 1))
  summary+="$(printf '%-34s %4d s  %s' "$1" 0 "FAIL ($2)")"$'\n'
}

# pass_over NAME REASON: a stage that takes what not every machine has or allows; told, not counted.
pass_over() {
  summary+="$(printf '%-34s %4d s  %s' "$1" 0 "passed over ($2)")"$'\n'
}

environment() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv || return 1
  "$python" -c 'import sys, torch, triton; print(sys.version); print("torch", torch.__version__, "triton", triton.__version__)
assert torch.cuda.is_available(), "torch sees no CUDA device"
print(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0))'
}

build() {
  # One architecture only, the one that is here.
  TORCH_CUDA_ARCH_LIST="$("$python" -c 'import torch; print("{}.{}".format(*torch.cuda.get_device_capability(0)))')" || return 1
  export TORCH_CUDA_ARCH_LIST RSLOSS_FORCE_CUDA=1
  MAX_JOBS="$(nproc)"
  export MAX_JOBS
  if ! "$python" -m pip install --no-build-isolation --no-deps --no-index --verbose -e .; then
    # An environment that cannot be installed into: libraries beside the sources, the package from here.
    "$python" setup.py build_ext --inplace || return 1
  fi
  "$python" -c 'import rsloss_kernels; print(rsloss_kernels.__file__); print(rsloss_kernels.backend_report())
from rsloss_kernels import _backends
from rsloss_kernels._library import defined
for name in defined:
    for backend in ("cuda", "triton"):
        reason = _backends.why_not(name, backend, "cuda")
        assert reason is None, f"{name}, {backend}: {reason}"'
}

# tests BACKENDS: the suite; in parallel processes where pytest-xdist is there. Tests of the packaging build wheels and of the GPU
# kernels compile for other machines; neither needs this one. The adapters' frameworks are not there.
tests() {
  local workers=() without=()
  "$python" -c 'import xdist' 2>/dev/null && workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))" --dist load)
  for file in tests/test_packaging.py tests/test_cuda_compile.py tests/test_triton_compile.py tests/test_train_detector.py; do
    [ -e "$file" ] && without+=(--ignore="$file")
  done
  RSLOSS_TEST_WITHOUT_FRAMEWORKS=1 RSLOSS_TEST_BACKENDS="$1" "$python" -m pytest -q -p no:cacheprovider --durations=5 "${workers[@]}" "${without[@]}" tests
}

sanitizer() {
  # Without the caching allocator every tensor is an allocation of its own, so that reads past its end are seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$compute_sanitizer" --tool "$1" --error-exitcode 9 --print-limit 20 \
    "$python" bench/gpu_capture.py --sweep --backends cuda
}

benchmark() {
  "$python" bench/run.py rank_sort --device cuda --metric both --timing both --budget 0.15 --out "$out"
  local status=$?
  "$python" bench/run.py ghm --device cuda --metric both --timing both --budget 0.1 --seeds 0 --out "$out" \
    --form index --sizes 1e6 2e7 --bins 10 30 || status=1
  "$python" bench/run.py focal --device cuda --metric both --timing both --budget 0.1 --seeds 0 --out "$out" \
    --form index --sizes 1e6 2e7 --classes 80 || status=1
  "$python" bench/run.py group_softmax --device cuda --metric both --timing both --budget 0.1 --seeds 0 --out "$out" \
    --rows 512 8192 || status=1
  return "$status"
}

must_show() {
  "$python" bench/run.py rank_sort --device cuda --must-show --budget 0.5 --out "$out"
  local status=$?
  local loss
  for loss in ghm focal group_softmax seesaw smooth_l1; do
    "$python" bench/run.py "$loss" --device cuda --must-show --budget 0.4 --seeds 0 --out "$out" || status=1
  done
  return "$status"
}

# Around the 2^20 elements from which on the CUDA kernels count and look up 16-bit logits by value (kFewestByValue).
narrow_types() {
  for dtype in float32 bfloat16 float16; do
    printf '%s\n' "$dtype"
    "$python" bench/bench_rank_sort.py --device cuda --metric speed --timing captured --cache warm --budget 0.05 --seeds 0 \
      --providers '[cuda]' '[triton]' --dtype "$dtype" --distribution trained --positives 1000 \
      --negatives 5e5 1040000 1050000 2e6 4e6 || return 1
  done
}

# The few figures that decide: warps at work, conflicts in shared memory, issue slots, memory. Counters may be closed to users.
kernel_profile() {
  local metrics="gpu__time_duration.sum,sm__warps_active.avg.pct_of_peak_sustained_active"
  metrics+=",l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum,sm__inst_issued.avg.pct_of_peak_sustained_active"
  metrics+=",dram__throughput.avg.pct_of_peak_sustained_elapsed,launch__registers_per_thread,launch__shared_mem_per_block"
  local log="$out/ncu.log" status=0
  mkdir -p "$out/gpu"
  "$ncu" --profile-from-start off --kernel-name 'regex:ranking_|rank_sort_' --metrics "$metrics" --csv --log-file "$log" \
    "$python" bench/gpu_latency.py --once || status=$?
  if grep -q ERR_NVGPUCTRPERM "$log"; then
    echo "the counters of this GPU are closed to this user"
    rm -f "$log"
    return 0
  fi
  grep -v '^==' "$log" > "$out/gpu/ranking_kernels.csv" && rm -f "$log"
  head -n 3 "$out/gpu/ranking_kernels.csv"
  return "$status"
}

# Whether another machine gives the same bits: python -m tests.output_hashes --compare FILE.
output_hashes() {
  "$python" -m tests.output_hashes --backends cpp,cuda --out "$out/bits"
}

plots() {
  "$python" bench/plot.py "$out/rank_sort.json" "$out/ghm.json"
}

# `timeout` runs programs, not functions: every stage is a fresh bash that knows them.
export python out
export -f environment build tests sanitizer benchmark must_show narrow_types kernel_profile output_hashes plots
inside() { stage "$1" "$2" bash -c "$3"; }

compute_sanitizer="$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)"
ncu="$(command -v ncu || ls /usr/local/cuda/bin/ncu 2>/dev/null || true)"
export compute_sanitizer ncu

inside "environment" 12 environment
inside "build" 105 build
LINES_SHOWN=60 inside "capture, replay, no host sync" 55 '"$python" bench/gpu_capture.py'
inside "very many positives" 20 '"$python" bench/gpu_capture.py --many'
inside "tests, cuda and triton required" 100 'tests cuda,triton'
LINES_SHOWN=120 inside "ways to launch" 55 '"$python" bench/gpu_variants.py --out "$out/gpu"'
LINES_SHOWN=40 inside "host, replays, own focal" 25 '"$python" bench/gpu_latency.py --out "$out/gpu"'
if [ -n "$compute_sanitizer" ]; then
  inside "compute-sanitizer memcheck" 38 'sanitizer memcheck'
  inside "compute-sanitizer racecheck" 30 'sanitizer racecheck'
else
  leave_out "compute-sanitizer" "not installed"
fi
LINES_SHOWN=90 inside "rows that must hold" 50 must_show
inside "benchmark" 30 benchmark
LINES_SHOWN=60 inside "16-bit logits" 15 narrow_types
if [ -n "$ncu" ]; then
  inside "profile of the ranking kernels" 20 kernel_profile
else
  pass_over "profile of the ranking kernels" "ncu is not installed"
fi
inside "hashes of outputs" 10 output_hashes
inside "plots" 5 plots

printf '\n=== results in %s after %d s\n' "$out" "$((SECONDS - begin))" | tee -a "$log"
"$python" - "$out"/{rank_sort,ghm,focal,group_softmax,seesaw,smooth_l1}.json <<'PYTHON' 2>&1 | tee -a "$log"
import json, sys
from bench import targets
for path in sys.argv[1:]:
    try:
        sections = json.load(open(path))["sections"]
    except OSError as error:
        print(f"no results: {error}")
        continue
    for record in sections.get("speed", {"records": []})["records"]:
        if record["median_ms"] is not None and record["provider"].startswith(("rank_sort", "ghm", "sigmoid_focal", "equalized", "eqlv2", "group_softmax", "focal, torch")):
            names = ("loss", "distribution", "positives", "negatives", "size", "bins", "form")
            problem = " ".join(str(record[name]) for name in names if name in record)
            print(f"{problem:<42} {record['timing']:<9} {record['provider']:<28} {record['median_ms'] * 1e3:10.1f} us "
                  f"{record['ratio_to_floor']:7.2f} x floor")
    for record in sections.get("targets", {"records": []})["records"]:
        print(targets.verdict(record), record["target"], record["got"], record["unit"], "limit", record["limit"], "aim", record["aim"])
PYTHON
printf '\n%s' "$summary" | tee -a "$log"
printf '%d stage(s) failed\n' "$failures" | tee -a "$log"
exit "$((failures > 0))"
