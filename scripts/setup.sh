#!/usr/bin/env bash
# Set-up steps of the Makefile: setup.sh venv | torch | packages | vulkan. Each does nothing that is already done.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

# A Python that the dependencies support: $PYTHON if given, else the first that is found.
find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "Python 3.11, 3.12 or 3.13 is needed (wgpu 0.32 has no release for 3.10); install one and run make PYTHON=<its path>."
}

adapter_found() {
    .venv/bin/python -c 'import sys; from executorch_webgpu.runtime.gpu.device import adapters; sys.exit(not adapters())' >/dev/null 2>&1
}

setup_venv() {
    [ -x .venv/bin/pip ] && return
    local python
    python=$(find_python)
    "$python" -m venv .venv || fail "'$python -m venv' failed: install the venv module (Debian, Ubuntu: apt-get install python3-venv)."
}

# torch alone and spelled exactly so: together with the others, or by a range, pip may choose a build of several gigabytes.
setup_torch() { .venv/bin/python -m pip install torch==2.13.0; }

setup_packages() {
    .venv/bin/python -m pip install --constraint constraints.txt setuptools
    .venv/bin/python -m pip install --constraint constraints.txt --no-build-isolation --editable '.[export,cli,dev]'
}

# A software Vulkan driver where there is no GPU.
setup_vulkan() {
    adapter_found && return
    local root=()
    [ "$(id -u)" -eq 0 ] || root=(sudo -n)
    if command -v apt-get >/dev/null && { [ "$(id -u)" -eq 0 ] || sudo -n true 2>/dev/null; }; then
        say "No GPU adapter found: installing the software Vulkan driver of Mesa."
        "${root[@]}" apt-get update -qq || true
        "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends mesa-vulkan-drivers libvulkan1 >&2 ||
            fail "apt-get could not install mesa-vulkan-drivers and libvulkan1: install a Vulkan driver for your GPU, or these two packages."
        adapter_found && return
    fi
    fail "no WebGPU adapter found: install your GPU's Vulkan driver, or a software one (Debian, Ubuntu: apt-get install mesa-vulkan-drivers libvulkan1)."
}

case "${1:-}" in
    venv | torch | packages | vulkan) "setup_$1" ;;
    *) fail "usage: setup.sh venv | torch | packages | vulkan" ;;
esac
