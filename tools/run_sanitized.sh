#!/usr/bin/env bash
# run_sanitized.sh <sanitizers> <build folder> <python> <jobs> [pytest argument...]
#
# address,undefined: the C++ tests, and pytest in an ordinary Python with the library instrumented.
# thread: the tests of the CPU kernels only. They use std::thread; torch and libgomp are not
# instrumented, so everything above the kernels would report races that are none.
set -euo pipefail
sanitizers=$1
build=$2
python=$3
jobs=$4
shift 4
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"

with_python=ON
[[ $sanitizers == thread ]] && with_python=OFF
cmake -GNinja -S . -B "$build" -DPython_EXECUTABLE="$python" -DTORCH_SELFATTN_CUDA=OFF \
  -DCMAKE_INSTALL_PREFIX="$root/$build/python/torch_selfattn" -DCMAKE_INSTALL_MESSAGE=NEVER \
  -DTORCH_SELFATTN_PYTHON=$with_python -DTORCH_SELFATTN_TESTS=ON \
  -DTORCH_SELFATTN_SANITIZE="$sanitizers" -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON \
  -DCMAKE_BUILD_TYPE=RelWithDebInfo \
  -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1" --log-level=WARNING

export UBSAN_OPTIONS=print_stacktrace=1
if [[ $sanitizers == thread ]]; then
  cmake --build "$build" --target torch_selfattn_kernel_tests -j "$jobs"
  exec ctest --test-dir "$build" -R '^torch_selfattn_kernel_tests' -j "$jobs" \
    --output-on-failure --no-tests=error
fi

tools/stage.sh "$build/python"
cmake --build "$build" --target install -j "$jobs"
# Python and torch keep what they allocate to the end, so leaks are looked for in the kernel tests.
ctest --test-dir "$build" -R '^torch_selfattn_kernel_tests' -j "$jobs" --output-on-failure
export ASAN_OPTIONS=detect_leaks=0
ctest --test-dir "$build" -E '^torch_selfattn_kernel_tests' -j "$jobs" --output-on-failure
# The runtime must be the first library of the process, and libstdc++ must be there when it starts:
# else it does not find __cxa_throw and dies at the first exception.
preload=$(c++ -print-file-name=libasan.so):$(c++ -print-file-name=libstdc++.so)
cd "$build"
LD_PRELOAD=$preload PYTHONPATH=$root/$build/python "$python" -m pytest -c "$root/pyproject.toml" \
  --rootdir "$root" -n "$jobs" -m "not slow" "${@:-$root/tests/python}"
