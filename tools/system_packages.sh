#!/usr/bin/env bash
# Installs what the build takes from the system where that is possible: as root on Debian or Ubuntu.
# Never fails: without ccache the build is only slower, and CMake fetches Catch2 where it is missing.
set -u

missing=()
command -v ccache > /dev/null || missing+=(ccache)
[[ -e /usr/include/catch2 || -e /usr/local/include/catch2 ]] || missing+=(catch2)
python3 -c 'import ensurepip, venv' 2> /dev/null || missing+=(python3-venv)
command -v c++ > /dev/null || missing+=(g++)
[[ ${#missing[@]} -eq 0 ]] && exit 0

if [[ $(id -u) -eq 0 ]] && command -v apt-get > /dev/null; then
  echo "Installing ${missing[*]}"
  install=(timeout 300 apt-get install -y -qq --no-install-recommends "${missing[@]}")
  export DEBIAN_FRONTEND=noninteractive
  "${install[@]}" < /dev/null > /dev/null 2>&1 && exit 0
  timeout 300 apt-get update -qq < /dev/null > /dev/null 2>&1
  "${install[@]}" < /dev/null > /dev/null 2>&1 && exit 0
fi
echo "Not installed: ${missing[*]} (by the system's package manager)"
exit 0
