#!/usr/bin/env bash
# stage.sh <folder>: links the Python sources of the package into <folder>, where a build for another
# torch puts its library, so that builds do not overwrite each other.
set -euo pipefail
source=$(cd "$(dirname "$0")/../torch_selfattn" && pwd)
folder=$1
[[ $(realpath -m "$folder") == "$source" ]] && exit 0

mkdir -p "$folder"
find "$folder" -maxdepth 1 -type l -delete
for path in "$source"/*; do
  case $(basename "$path") in
    lib | include | share | _C*.so | __pycache__) ;;
    *) ln -s "$path" "$folder/" ;;
  esac
done
