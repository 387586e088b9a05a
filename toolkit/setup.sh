#!/bin/sh
# setup.sh: installs what the project needs here: Debian's packages, then Python's into .venv.
#
# `make` runs it before everything else, so it is quick when there is nothing to do. Missing Debian
# packages are installed where that is allowed; elsewhere the line that installs them is printed and
# set-up goes on without them. PYTHON names another interpreter than the python3 in PATH.
set -eu
cd "$(dirname "$0")/.."

say() {
    printf 'setup: %s\n' "$*" >&2
}

has() {
    command -v "$1" >/dev/null 2>&1
}

# --- Debian's packages ---

has_libc_headers() {
    has gcc && echo '#include <stdio.h>' | gcc -E -x c - >/dev/null 2>&1
}

# Whether a compiler has picolibc: it answers with a path when it finds the file, otherwise with the
# bare name.
has_picolibc() {
    has "$1" || return 1
    case $("$1" -print-file-name=picolibc.specs) in
    */*) ;;
    *) return 1 ;;
    esac
}

has_fuzzer() {
    echo 'int LLVMFuzzerTestOneInput(void); int LLVMFuzzerTestOneInput(void) { return 0; }' |
        clang -fsanitize=fuzzer,address,undefined -x c - -o /dev/null >/dev/null 2>&1
}

# One line for each thing that is missing: Debian's package, and what it is for.
missing_packages() {
    has gcc || echo 'gcc: compiles devices that run on this machine (make demo, make test)'
    has_libc_headers || echo 'libc6-dev: the C library for them (make demo, make test)'
    can_make_venv || echo "$venv_package: makes .venv, where the Python packages go"
    has arm-none-eabi-gcc || echo 'gcc-arm-none-eabi: compiles firmware for Arm boards'
    has_picolibc arm-none-eabi-gcc ||
        echo 'picolibc-arm-none-eabi: the C library for them'
    has qemu-system-arm || echo 'qemu-system-arm: emulates them'
    has riscv64-unknown-elf-gcc ||
        echo 'gcc-riscv64-unknown-elf: compiles firmware for RISC-V boards'
    has_picolibc riscv64-unknown-elf-gcc ||
        echo 'picolibc-riscv64-unknown-elf: the C library for them'
    has qemu-system-riscv32 || echo 'qemu-system-misc: emulates them'
    has gdb-multiarch || echo 'gdb-multiarch: loads firmware into emulated boards'
    has clang || echo 'clang: looks for bytes that break the firmware (make fuzz, make test)'
    ! has clang || has_fuzzer || echo 'libclang-rt-dev: libFuzzer and sanitizers for that'
    has clang-format || echo 'clang-format: the form of the C (make check, make format)'
}

# Sets sudo to what makes this user root: nothing for root itself. Fails where there is no way.
find_sudo() {
    sudo=
    [ "$(id -u)" -ne 0 ] || return 0
    sudo=sudo
    has sudo || return 1
    sudo -n true 2>/dev/null || [ -t 0 ] # only on a terminal can it ask for a password
}

install_packages() {
    missing=$(missing_packages)
    [ -n "$missing" ] || return 0
    say 'not installed:'
    echo "$missing" | sed 's/^/  /' >&2
    if ! has apt-get; then
        say 'this is no Debian or Ubuntu: install their like with its own package manager'
        return 0
    fi

    # What could not be installed is not tried, and no password asked for, at every `make`.
    tried=build/cache/packages-tried
    names=$(names_of "$missing")
    if find_sudo && [ "$names" != "$(cat $tried 2>/dev/null)" ]; then
        say 'installing them (3 GB if it is all of them)'
        # A list that cannot be renewed may still do. $names is several words.
        $sudo apt-get update -q >&2 || true
        $sudo env DEBIAN_FRONTEND=noninteractive \
            apt-get install -q -y --no-install-recommends $names >&2 || true
        missing=$(missing_packages)
        [ -n "$missing" ] || return 0
        # Whether clang came with its libraries is known only now: it depends on the release.
        if [ "$(names_of "$missing")" != "$names" ]; then
            install_packages
            return
        fi
        mkdir -p build/cache
        echo "$names" >$tried
    fi
    say 'going on without them; this line installs them:'
    as_root=${sudo:+sudo }
    printf '  %s\n' "${as_root}apt-get update && ${as_root}apt-get install -y \
--no-install-recommends $names" >&2
}

names_of() {
    echo "$1" | sed 's/:.*//' | paste -s -d ' ' -
}

# --- Python's packages ---

# Sets python to the interpreter to use, and venv_package to what Debian calls its venv module.
find_python() {
    venv_package=python3-venv
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            case $python in python3.*) venv_package=$python-venv ;; esac
            return 0
        fi
    done
    return 1
}

# Whether .venv is complete and was made here: one that was moved or copied starts the programs of
# the place it comes from.
has_own_venv() {
    [ -x .venv/bin/python ] && [ -x .venv/bin/pip ] &&
        [ "$(head -n 1 .venv/installed 2>/dev/null || pwd)" = "$(pwd)" ]
}

can_make_venv() {
    has_own_venv || { find_python && "$python" -c 'import ensurepip, venv' >/dev/null 2>&1; }
}

make_venv() {
    if ! find_python; then
        say "no Python 3.11 or newer among: ${PYTHON:-python3, python3.11 to python3.14}"
        say 'install one, then name it: make setup PYTHON=/path/to/python3'
        return 1
    fi
    say "making .venv with $("$python" --version)"
    if ! "$python" -m venv --clear .venv; then
        rm -rf .venv
        say "$python cannot make a virtual environment: Debian and Ubuntu need $venv_package for it"
        return 1
    fi
}

install_python() {
    # The stamp holds what the installation depends on, first of all where it is.
    stamp=$(pwd && cksum pyproject.toml constraints.txt)
    if has_own_venv; then
        [ "$stamp" != "$(cat .venv/installed 2>/dev/null)" ] || return 0
    else
        make_venv
    fi

    say 'installing the Python packages into .venv (some minutes)'
    quiet=--quiet
    [ ! -t 1 ] || quiet= # on a terminal pip shows how far it is
    .venv/bin/python -m pip install $quiet --disable-pip-version-check \
        --constraint constraints.txt --editable '.[dev]'
    echo "$stamp" >.venv/installed
    say 'done'
}

install_packages
install_python
