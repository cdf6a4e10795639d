#!/usr/bin/env bash
# stage.sh <folder>: links the Python sources into <folder>, so that a build for another torch puts
# its library there, into <folder>/torch_selfattn, and builds do not overwrite each other. Nothing to
# do for the checkout itself.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(realpath -m "$1")
[[ $folder == "$root" ]] && exit 0

mkdir -p "$folder/torch_selfattn"
find "$folder" -maxdepth 2 -type l -delete
for path in "$root"/torch_selfattn/*; do
  case $(basename "$path") in
    lib | include | share | _C*.so | __pycache__) ;;
    *) ln -s "$path" "$folder/torch_selfattn/" ;;
  esac
done
ln -s "$root/benchmarks" "$root/examples" "$folder/"
