#!/bin/sh
# Builds libsd35 by a preset of CMakePresets.json, with what is installed, and installs it into
# build/cpp/PRESET/tree. Exit status 3: something is missing, which is named.
#
#     cpp/build.sh [release|asan|tsan]
#
# The headers of ONNX Runtime are looked for in $onnxruntime_ROOT or .venv/onnxruntime, CUDA's in
# $CUDAToolkit_ROOT or the packages in .venv, TensorRT's in $TENSORRT_ROOT, those of Debian's packages
# in .venv/debian too (see debian.sh), and all where CMake looks.
set -eu

preset=${1:-release}
cpp=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$cpp")
PATH=$PATH:$HOME/.cargo/bin
if [ -d "$root/.venv/debian" ]; then
    export CPATH="$root/.venv/debian/usr/include${CPATH:+:$CPATH}"
    export CMAKE_PREFIX_PATH="$root/.venv/debian/usr${CMAKE_PREFIX_PATH:+:$CMAKE_PREFIX_PATH}"
fi

missing=
command -v c++ >/dev/null || missing="$missing g++"
command -v cmake >/dev/null || missing="$missing cmake"
command -v ninja >/dev/null || missing="$missing ninja-build"
command -v cargo >/dev/null || missing="$missing cargo"
includes=$(c++ -E -x c++ -v /dev/null 2>&1 | sed -n 's/^ //p')
has_header() {
    for folder in $includes; do
        if [ -e "$folder/$1" ]; then return 0; fi
    done
    return 1
}
has_header nlohmann/json.hpp || missing="$missing nlohmann-json3-dev"
has_header gtest/gtest.h || missing="$missing libgtest-dev"
if [ -n "$missing" ]; then
    echo "libsd35 is not built, it needs:$missing — apt-get install them; cargo comes" \
        "from https://rustup.rs" >&2
    exit 3
fi

onnxruntime=${onnxruntime_ROOT:-$root/.venv/onnxruntime}
cuda=${CUDAToolkit_ROOT:-$(echo "$root"/.venv/lib/python3*/site-packages/nvidia/cu13)}
cd "$cpp"
cmake --preset "$preset" -DCMAKE_INSTALL_PREFIX="$root/build/cpp/$preset/tree" \
    -Donnxruntime_ROOT="$onnxruntime" -DCUDAToolkit_ROOT="$cuda" \
    ${TENSORRT_ROOT:+"-DTENSORRT_ROOT=$TENSORRT_ROOT"}
cmake --build --preset "$preset" -j "${JOBS:-2}"
cmake --install "$root/build/cpp/$preset"
