#!/bin/sh
# Cross-build the engine and its tests for aarch64 and run them under emulation: tools/check_aarch64.sh [WORD]
#
# WORD picks the tests whose names hold it. Needs g++-aarch64-linux-gnu, qemu-user, cmake and ninja. The tests run twice:
# on a processor with the dot product, where the NEON level must be offered, and on one without, where it must not be.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=$root/build/aarch64

cmake -S "$root" -B "$build" -G Ninja -DNOMOAT_MODULE=OFF -DNOMOAT_TESTS=ON \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_EXE_LINKER_FLAGS=-static >/dev/null
cmake --build "$build"

# run PROCESSOR LEVELS [WORD]: emulated programs cannot start threads in the child of a fork, so that one test may fail
run() {
  processor=$1 levels=$2
  shift 2
  echo "aarch64, $processor:"
  output=$(qemu-aarch64 -cpu "$processor" "$build/native_tests" "$@" 2>/dev/null) || true
  echo "$output" | grep -v "^Bail out"
  if echo "$output" | grep "^FAILED" | grep -qv "the child of a fork"; then exit 1; fi
  case $output in
    "0 passed"* | *"
0 passed"*) echo "no test passed" >&2; exit 1 ;;
    *"levels: $levels") ;;
    *) echo "expected the run to end with levels: $levels" >&2; exit 1 ;;
  esac
}
run max "scalar neon" "$@"
run cortex-a57 "scalar" "$@"
