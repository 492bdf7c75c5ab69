#!/usr/bin/env bash
# One sitting on a machine with a GPU: install carried wheels, run the GPU tests, run the benchmarks.
# Each part runs only where its option is given, has a time limit of its own, and cannot stop the next one.
#
#   benchmarks/gpu_session.sh OUT [--wheels DIR] [--pytest "ARGS"] [--activations "ARGS"] [--mode-cost]
#                                 [--pytest-limit S] [--activations-limit S] [--commit SHA]
#
#   OUT                  folder for logs and results (made if missing)
#   --wheels DIR         install every wheel in DIR into a folder of its own, without network and without touching the
#                        Python that is there (for machines without a package index)
#   --pytest "ARGS"      python -m pytest -m gpu ARGS, for example "tests/activations -x"
#   --activations "ARGS" benchmarks/bench_activations.py ARGS; "" runs its default rows
#   --mode-cost          benchmarks/bench_mode_cost.py on this machine's CPU
#   --commit SHA         what the result files name where the tree is no git checkout
#
# Example: benchmarks/gpu_session.sh /tmp/results --pytest "tests" --activations "" --mode-cost
set -uo pipefail

usage() { sed -n '2,17p' "$0" | sed 's/^# \{0,1\}//'; }
fail() { echo "$1" >&2; usage >&2; exit 2; }

[ $# -ge 1 ] || fail "gpu_session.sh: OUT is missing"
case $1 in -h|--help) usage; exit 0 ;; -*) fail "gpu_session.sh: OUT comes first, not $1" ;; esac
OUT=$1; shift
WHEELS= PYTEST= ACTIVATIONS= MODE_COST= RUN_PYTEST= RUN_ACTIVATIONS=
PYTEST_LIMIT=180 ACTIVATIONS_LIMIT=480 INSTALL_LIMIT=90 MODE_COST_LIMIT=60
while [ $# -gt 0 ]; do
  case $1 in
    --mode-cost) MODE_COST=1; shift; continue ;;
    -h|--help) usage; exit 0 ;;
  esac
  [ $# -ge 2 ] || fail "gpu_session.sh: $1 needs a value"
  case $1 in
    --wheels) WHEELS=$2 ;;
    --pytest) PYTEST=$2; RUN_PYTEST=1 ;;
    --activations) ACTIVATIONS=$2; RUN_ACTIVATIONS=1 ;;
    --pytest-limit) PYTEST_LIMIT=$2 ;;
    --activations-limit) ACTIVATIONS_LIMIT=$2 ;;
    --commit) export MEMOPT_COMMIT=$2 ;;
    *) fail "gpu_session.sh: unknown option $1" ;;
  esac
  shift 2
done

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit 2
cd "$ROOT" || exit 2
PYTHON=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
SUMMARY=() WORST=0

# part NAME LIMIT COMMAND...: run, log, and keep one line for the summary.
part() {
  local name=$1 limit=$2 begin=$SECONDS status=0; shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$OUT/session.log" || status=$?
  local word="ok"
  [ "$status" -eq 0 ] || word="failed ($status)"
  [ "$status" -eq 124 ] && word="ended at its limit, $limit s"
  [ "$status" -gt "$WORST" ] && WORST=$status
  SUMMARY+=("$(printf "%-12s %-28s %4d s" "$name" "$word" $((SECONDS - begin)))")
}

if [ -n "$WHEELS" ]; then
  SITE=$(mktemp -d)
  trap 'rm -rf "$SITE"' EXIT
  part install "$INSTALL_LIMIT" "$PYTHON" -m pip install -q --disable-pip-version-check --no-index --no-deps \
    --no-compile --no-cache-dir --target "$SITE" "$WHEELS"/*.whl
  export PYTHONPATH="$SITE:$PYTHONPATH"
fi
if [ -n "$RUN_PYTEST" ]; then
  # shellcheck disable=SC2086 -- the options are several words
  part pytest "$PYTEST_LIMIT" "$PYTHON" -m pytest -m gpu -q -p no:cacheprovider $PYTEST
fi
if [ -n "$RUN_ACTIVATIONS" ]; then
  # The benchmark stops by itself, with its results written, before the limit here would end it.
  # shellcheck disable=SC2086
  part activations $((ACTIVATIONS_LIMIT + 15)) "$PYTHON" benchmarks/bench_activations.py \
    --out "$OUT/activations.json" --plans "$OUT/plans.json" --limit "$ACTIVATIONS_LIMIT" $ACTIVATIONS
fi
if [ -n "$MODE_COST" ]; then
  part mode-cost "$MODE_COST_LIMIT" "$PYTHON" benchmarks/bench_mode_cost.py --out "$OUT/mode_cost.json"
fi

echo
echo "commit ${MEMOPT_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}; results in $OUT"
[ ${#SUMMARY[@]} -eq 0 ] && echo "nothing was asked for: see --help"
[ ${#SUMMARY[@]} -gt 0 ] && printf '%s\n' "${SUMMARY[@]}"
exit "$WORST"
