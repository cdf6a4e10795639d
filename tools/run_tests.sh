#!/usr/bin/env bash
# run_tests.sh <build folder> <python> <PYTHONPATH> <jobs> [pytest argument...]
# Runs pytest and ctest, both even if the first one fails, and repeats their last lines at the end.
set -uo pipefail
build=$(realpath "$1")
python=$2
export PYTHONPATH=$3
jobs=$4
shift 4
root=$(cd "$(dirname "$0")/.." && pwd)

# Paths among the arguments are relative to the checkout.
arguments=()
paths=()
for argument in "$@"; do
  if [[ -e $root/${argument%%::*} ]]; then
    paths+=("$root/$argument")
  else
    arguments+=("$argument")
  fi
done
[[ ${#paths[@]} -eq 0 ]] && paths=("$root/tests/python")

# From the build folder: `python -m` puts the current folder first in the path, and the checkout's
# package may be built for another torch.
cd "$build" || exit 1
"$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -n "$jobs" --durations=10 \
  "${arguments[@]}" "${paths[@]}" 2>&1 | tee pytest.log
pytest_status=$?
ctest -j "$jobs" --output-on-failure --no-tests=error 2>&1 | tee ctest.log
ctest_status=$?

echo
echo "pytest: $(tail -n 1 pytest.log)"
echo "ctest:  $(grep -E '^[0-9]+% tests passed|No tests were found' ctest.log)"
[[ $pytest_status -eq 0 && $ctest_status -eq 0 ]]
