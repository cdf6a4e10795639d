#!/usr/bin/env bash
# test_wheel.sh <python> <folder> <torch version> <jobs> [pytest argument...]
# Makes an sdist, a wheel of what is in it, and an environment where that wheel is installed. There
# the tests of the sdist run, all of them unless arguments choose some.
set -euo pipefail
python=$1
folder=$2
torch=$3
jobs=$4
shift 4
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$folder"
folder=$(realpath "$folder")

rm -rf "$folder"/dist "$folder"/source
"$python" -m build --no-isolation --outdir "$folder/dist" "$root"
mkdir "$folder/source"
tar -xzf "$folder"/dist/*.tar.gz -C "$folder/source" --strip-components 1

"$root/tools/make_environment.sh" "$folder/environment" "$torch"
installed=$folder/environment/bin/python
pip=("$installed" -m pip --disable-pip-version-check)
"${pip[@]}" uninstall -q -y torch_selfattn
"${pip[@]}" install -q "$folder"/dist/*.whl

# Not from the sources' folder: the package there has no library.
cd "$folder"
"$installed" -c 'import torch_selfattn as t; assert "site-packages" in t.__file__, t.__file__'
exec source/tools/run_tests.sh quick . "$installed" "" "$jobs" "${@:-tests/python}"
