#!/bin/sh
# Unpacks what libsd35 is built with, beside the tools, from packages of Debian into a virtual
# environment: the headers of ONNX Runtime, with a link to the library of the Python package,
# nlohmann-json, and for the example server cpp-httplib. Nothing is installed, and apt's own lists stay
# as they are.
#
#     cpp/debian.sh VENV
set -eu

venv=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    sed -nE 's/^(deb .*|URIs: *)(https?:[^ ]*).*/\2/p' | head -n 1)
key=/usr/share/keyrings/debian-archive-keyring.gpg
# Of an older Debian, ONNX Runtime's is too old.
for kind in deb deb-src; do
    echo "$kind [signed-by=$key] ${mirror:-http://deb.debian.org/debian} trixie main"
done > "$work/list"
apt() {
    apt-get -qq -o "Dir::Etc::SourceList=$work/list" -o Dir::Etc::SourceParts=/dev/null \
        -o "Dir::State::Lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User= "$@"
}
apt update
cd "$work"
apt download libonnxruntime-dev nlohmann-json3-dev
# Its source: compiled, it wants a newer Debian. All of it is one header, which Debian's changes fix.
apt source --download-only cpp-httplib
mkdir httplib
tar xf cpp-httplib_*.orig.tar.* -C httplib --strip-components 1
tar xf cpp-httplib_*.debian.tar.* -C httplib
for change in $(cat httplib/debian/patches/series); do
    (cd httplib && git apply --include=httplib.h "debian/patches/$change")
done
cd - >/dev/null
dpkg -x "$work"/libonnxruntime-dev_*.deb "$work/onnxruntime"
dpkg -x "$work"/nlohmann-json3-dev_*.deb "$work/json"
rm -rf "$venv/onnxruntime" "$venv/debian" "$venv/httplib"
mkdir -p "$venv/onnxruntime/lib" "$venv/debian" "$venv/httplib/include"
cp "$work/httplib/httplib.h" "$venv/httplib/include/"
# Without its CMake files, which want Debian's library.
cp -r "$work/onnxruntime/usr/include/onnxruntime" "$venv/onnxruntime/include"
ln -s "$(cd "$venv" && ls "$PWD"/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.*)" \
    "$venv/onnxruntime/lib/libonnxruntime.so"
cp -r "$work/json/usr" "$venv/debian/"
