#!/usr/bin/env bash
# run_tests.sh quick|slow <build folder> <python> <PYTHONPATH> <jobs> [pytest argument...]
# Runs pytest and ctest, both even if the first one fails, and repeats their last lines at the end.
# Arguments choose tests for themselves: then slow ones are not left out, and ctest does not run.
set -uo pipefail
speed=$1
build=$(realpath "$2")
python=$3
export PYTHONPATH=$4
jobs=$5
shift 5
case $speed in
  quick) markers="not slow" labels=(-LE slow) ;;
  slow) markers=slow labels=(-L slow) ;;
esac
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
[[ $# -eq 0 ]] && arguments=(-m "$markers")
[[ ${#paths[@]} -eq 0 ]] && paths=("$root/tests/python")

# From the build folder: `python -m` puts the current folder first in the path, and the checkout's
# package may be built for another torch.
cd "$build" || exit 1
"$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -n "$jobs" --durations=10 \
  "${arguments[@]}" "${paths[@]}" 2>&1 | tee pytest.log
pytest_status=$?
[[ $# -gt 0 ]] && exit $pytest_status
ctest "${labels[@]}" -j "$jobs" --output-on-failure --no-tests=error 2>&1 | tee ctest.log
ctest_status=$?

echo
echo "pytest: $(tail -n 1 pytest.log)"
echo "ctest:  $(grep -E '^[0-9]+% tests passed|No tests were found' ctest.log)"
[[ $pytest_status -eq 0 && $ctest_status -eq 0 ]]
