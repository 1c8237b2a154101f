#!/usr/bin/env bash
# Runs every fuzzer with sizes that follow from FUZZ_SCALE, from the seed FUZZ_SEED on, compiled
# with the profile `fuzz` (optimised, with assertions). A failure names its seed and, for the
# engine, prints a history that was made small. Usage: make fuzz [FUZZ_SCALE=n] [FUZZ_SEED=n]
# [FUZZ_ONLY=engine]
set -uo pipefail
cd "$(dirname "$0")/.."

scale=${FUZZ_SCALE:-1}
seed=${FUZZ_SEED:-$(date +%s)}
only=${FUZZ_ONLY:-all}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0

run() { # title, then arguments of cargo test
  local title=$1 status
  shift
  echo "== $title"
  cargo test --profile fuzz --locked "$@" 2>&1 | tee -a "$log" \
    | grep -vE '^test .* ok$|^ok$|^running|^$'
  status=${PIPESTATUS[0]}
  if [ "$status" != 0 ]; then
    failed=1
    echo "FAILED: $title (FUZZ_SEED=$seed)" | tee -a "$log"
  fi
}

echo "make fuzz FUZZ_SEED=$seed FUZZ_SCALE=$scale"
# Runs of different seconds share no history.
export ZERORING_SEED=$((seed * 1000000))
export ZERORING_HISTORIES=$((200000 * scale))
export ZERORING_SKELETONS=$((scale >= 4 ? 1 : 4 / scale))
export ZERORING_REWRITES=$((20000 * scale))
export ZERORING_DATASETS=$((40 * scale))
export ZERORING_SQLITE_HISTORIES=$((5000 * scale))
export ZERORING_SQLITE_SKELETONS=$((scale >= 200 ? 1 : 200 / scale))
export ZERORING_SIM_SEEDS=$((500 * scale))
export CVR_SEED=$seed CVR_STEPS=$((400000 * scale))
export ZERORING_WIRE_SEED=$seed ZERORING_WIRE_STEPS=$((400 * scale))
export ZERORING_FUZZ_SEED=$seed ZERORING_FUZZ_ROUNDS=$((3 * scale))
export ZR_SEEDS=$ZERORING_SEED..$((ZERORING_SEED + 200 * scale))

run "engine over memory: histories, shapes, rewrites, data sets" \
  -p zeroring-core --lib -- --nocapture \
  ivm::tests::random ivm::tests::skeletons ivm::tests::metamorphic ivm::tests::datasets
run "engine over SQLite; SQL against the predicate" -p zeroring-storage \
  --test engine_over_sqlite --test sql_agrees_with_the_predicate -- --nocapture
if [ "$only" = all ]; then
  run "client groups" -p zeroring-core --lib -- --nocapture group::tests::simulation
  run "records of client groups" -p zeroring-storage --test cvr_store -- --nocapture \
    embedded::clients_converge
  run "queries against Postgres" -p zeroring --test postgres_agrees -- --nocapture
  run "clients that come and go" -p zeroring --test wire -- --nocapture fuzz
  run "the real client" -p zeroring --test e2e -- --nocapture fuzz
fi

echo "== compared, with seeds from $seed on"
grep -E 'agree$|^FAILED' "$log" | sed 's/^test [^ ]* \.\.\. //'
sed -nE 's/.* ([0-9]+) steps agree$/\1/p' "$log" \
  | awk '{ s += $1 } END { print s + 0 " engine steps without a difference" }'
exit $failed
