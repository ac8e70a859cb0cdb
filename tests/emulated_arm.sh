#!/usr/bin/env bash
# Tests on 64-bit Arm without such a machine: Debian's arm64 Python and the aarch64 wheels, run by qemu's user mode.
#   tests/emulated_arm.sh FOLDER [PYTEST ARGUMENT...]
# FOLDER gets some 500 MB and is used again.  Needs Debian 12 or later (apt-get, dpkg-deb), pip and qemu-user-static; root
# is not needed and nothing is installed.  Tests that start processes of their own are left out: without binfmt_misc the
# system cannot start an Arm program.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
place=$(cd "$1" && pwd)
shift
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64)

if [ ! -e "$place/root/done" ]; then
  mkdir -p "$place/apt/lists/partial" "$place/debs" "$place/root"
  touch "$place/apt/status"
  apt=(apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$place/apt"
    -o Dir::State::lists="$place/apt/lists" -o Dir::State::status="$place/apt/status" -o Dir::Cache="$place/apt"
    -o Debug::NoLocking=1 -o APT::Sandbox::User="$(id -un)")
  "${apt[@]}" update
  # Python and everything that it needs, without scripts: files are unpacked, no package is set up.
  "${apt[@]}" --no-install-recommends --print-uris install python3 python3-pip libstdc++6 \
    | sed -n "s/^'[^']*' \([^_]*\)_.*/\1/p" >"$place/packages"
  (cd "$place/debs" && xargs "${apt[@]}" download <"$place/packages")
  for deb in "$place"/debs/*.deb; do dpkg-deb -x "$deb" "$place/root"; done
  touch "$place/root/done"
fi

python=("$qemu" -L "$place/root" -cpu neoverse-n1 "$place/root/usr/bin/python3")
version=$("${python[@]}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ ! -e "$place/site/done" ]; then
  # What setup.cfg asks for, as "name>=version".
  awk '/^[^ ]/ {on = /^(install_requires|test) =/; next} on {print $1}' "$here/setup.cfg" >"$place/requirements"
  wheels=(--only-binary=:all: --implementation cp --python-version "$version")
  for tag in 2_17 2_27 2_28 2_34; do wheels+=(--platform "manylinux_${tag}_aarch64"); done
  python3 -m pip install -q --target "$place/site" "${wheels[@]}" --platform manylinux2014_aarch64 -r "$place/requirements"
  touch "$place/site/done"
fi

export PYTHONPATH="$here:$place/site" NUMBA_CACHE_DIR="$place/kernels" PYTHONDONTWRITEBYTECODE=1
export NUMBA_CPU_NAME=neoverse-n1 NUMBA_CPU_FEATURES= # what an emulator shows as its CPU, LLVM may not know
export MINIBEIT_NUM_THREADS="${MINIBEIT_NUM_THREADS:-2}" OPENBLAS_NUM_THREADS=1
mkdir -p "$NUMBA_CACHE_DIR"
chmod 700 "$NUMBA_CACHE_DIR"
cd "$here"
if [ "$#" -eq 0 ]; then
  set -- -q tests/test_numba_ops.py tests/test_golden.py tests/test_shipped_digits.py tests/test_numba_queue.py
fi
"${python[@]}" -c 'from minibeit.ops.numba_cpu.target import TILE; import platform; print(platform.machine(), TILE)'
"${python[@]}" -m pytest -p no:cacheprovider "$@"
