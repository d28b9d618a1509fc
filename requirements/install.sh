#!/usr/bin/env bash
# Set up the environment of one stack. Run by the Makefile:
#
#   requirements/install.sh STACK ENV [PYTHON]
#
# STACK is onedl or openmmlab, ENV the folder of the environment, PYTHON the
# interpreter to create it with. Running it again repairs or completes ENV.
set -euo pipefail

stack=$1
env=$2
wanted=${3:-}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
stamp=$env/.setup-done     # its date says when, its content for which folder
running=$env/.setup-running # holds a process id while pip writes into ENV
log=$env/setup.log
wait='' # how long the next step takes, where it takes long
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*"; }
step() { printf '==> %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Leaves the mark of check_running where pip was stopped.
trap 'printf "\nInterrupted: the same command starts again.\n" >&2; exit 130' INT TERM

# Version of a working interpreter that can create environments, or failure.
# It has to run: a launcher of that name may exist without an interpreter.
version_of() {
    "$1" -c 'import sys, venv, ensurepip; print("%d.%d" % sys.version_info[:2])' \
        2>/dev/null
}

supported() { [[ $1 == 3.11 || $1 == 3.12 ]]; }

find_python() {
    local name version
    for name in python3.11 python3.12 python3; do
        if version=$(version_of "$name") && supported "$version"; then
            printf '%s\n' "$name"
            return
        fi
    done
    fail "no Python 3.11 or 3.12 with its venv module was found (tried" \
        "python3.11, python3.12 and python3): install one, or name it with" \
        "'make setup PYTHON=/path/to/python3.11'."
}

check_python() {
    local version
    version=$(version_of "$1") || fail "PYTHON=$1 cannot be run, or has no" \
        "venv module: name a working Python 3.11 or 3.12."
    supported "$version" || fail "PYTHON=$1 is Python $version: name a" \
        "Python 3.11 or 3.12."
}

# Refuse to work beside another set-up, and drop what a killed one left: its
# packages may be half written, and pip would take them for complete.
check_running() {
    local process
    [[ -e $running ]] || return 0
    process=$(cat "$running")
    if [[ -n $process ]] && kill -0 "$process" 2>/dev/null; then
        fail "another set-up of $env is running (process $process): wait for" \
            "it to end, or remove $running if that process is none."
    fi
    step "Removing $env, where a set-up was interrupted (pip keeps downloads)"
    rm -rf "$env"
}

create_env() {
    local version python
    if version=$(version_of "$env/bin/python") &&
        "$env/bin/python" -m pip --version >/dev/null 2>&1; then
        supported "$version" || fail "$env holds Python $version: remove it" \
            "with 'make clean-env STACK=$stack' and run this again."
        if [[ -n $wanted && $(version_of "$wanted") != "$version" ]]; then
            fail "$env holds Python $version and PYTHON=$wanted another one:" \
                "remove it with 'make clean-env STACK=$stack', or name another" \
                "folder, as in 'make setup PYTHON=$wanted ENV=.venv-other'."
        fi
        check_other_stack
        step "Using the environment $env (Python $version)"
        return
    fi
    python=${wanted:-$(find_python)}
    step "Creating $env with $("$python" -c \
        'import platform, sys; print(f"Python {platform.python_version()} ({sys.executable})")')"
    "$python" -m venv --clear "$env"
    wait=' (about 3 GB, some minutes)'
}

# The two sets overwrite each other's modules.
check_other_stack() {
    local other=mmengine
    [[ $stack == onedl ]] || other=onedl-mmengine
    if "$env/bin/python" -c 'import sys, importlib.metadata as metadata
metadata.version(sys.argv[1])' "$other" 2>/dev/null; then
        fail "$env holds $other, which is of the other stack: name another" \
            "folder with ENV=, or remove this one with 'rm -rf $env'."
    fi
}

# Run 'pip install', keep its output in the log and show the large downloads.
install() {
    local status=0
    printf '%s\n' $$ >"$running"
    printf '\n$ pip install %s\n' "$*" >>"$log"
    "$env/bin/python" -m pip install "$@" 2>&1 | tee -a "$log" | show_downloads ||
        status=$?
    rm -f "$running"
    [[ $status -eq 0 ]] || fail_with_log "pip could not install"
}

# Line by line: some awks keep what comes through a pipe until there is more of it.
show_downloads() {
    local line file name version large='^ *(Downloading|Using cached) ([^ ]+) \(([0-9.]+ [MG]B)\)'
    local packages='^ *Installing collected packages: (.*)'
    while IFS= read -r line; do
        if [[ $line =~ $large ]]; then
            file=${BASH_REMATCH[2]##*/}
            IFS=- read -r name version _ <<<"${file%.tar.gz}"
            say "    ${BASH_REMATCH[1]} $name $version (${BASH_REMATCH[3]})"
        elif [[ $line =~ $packages && ${BASH_REMATCH[1]} == *,* ]]; then
            file=${BASH_REMATCH[1]//[^,]/}
            say "    Unpacking $((${#file} + 1)) packages (a minute or more if they are many)"
        fi
    done
}

fail_with_log() {
    printf '\nThe last lines of %s:\n' "$log" >&2
    tail -n 15 "$log" | sed 's/^/    /' >&2
    fail "$1 (above); once the cause is gone, run the same command again, it" \
        "continues where it stopped."
}

# Compile mmcv's operators, once for a Python and a torch: the wheel is kept.
# mmseg imports them, and the published packages for current torch lack them.
build_mmcv() {
    local version key folder started status=0
    version=$(sed -n 's/^mmcv==//p' "$here/openmmlab.txt")
    key=$("$env/bin/python" -c '
import platform, sys, torch
print(f"cp{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}"
      f"-{platform.system()}-{platform.machine()}".lower())')
    folder=$root/.cache/wheels/$key
    if compgen -G "$folder/mmcv-$version-*.whl" >/dev/null; then
        step "Installing mmcv $version, compiled earlier (.cache/wheels/$key)"
    else
        check_compiler
        step "Compiling mmcv $version: about 15 minutes on 2 cores, only this once"
        started=$SECONDS
        rm -rf "$folder.partial"
        mkdir -p "$folder.partial"
        printf '\n$ pip wheel mmcv==%s\n' "$version" >>"$log"
        # No GPU is visible, so that the build is the same on every machine and
        # does not need a CUDA toolkit: the models here use none of the operators.
        PATH="$(cd "$env/bin" && pwd):$PATH" MMCV_WITH_OPS=1 FORCE_CUDA=0 \
            CUDA_VISIBLE_DEVICES='' MAX_JOBS="${MAX_JOBS:-2}" \
            "$env/bin/python" -m pip wheel -v --no-deps --no-build-isolation \
            --wheel-dir "$folder.partial" "mmcv==$version" 2>&1 |
            tee -a "$log" | show_compiling || status=$?
        [[ $status -eq 0 ]] || fail_with_log "mmcv could not be compiled"
        rm -rf "$folder"
        mv "$folder.partial" "$folder"
        say "    Compiled in $(((SECONDS - started) / 60)) minutes, kept in" \
            ".cache/wheels/$key"
    fi
    # Always anew: an mmcv of this version may be one built for another torch.
    install --no-deps --force-reinstall "$folder"/mmcv-"$version"-*.whl
}

show_compiling() {
    local line compiled='^ *\[([0-9]+)/([0-9]+)\]'
    while IFS= read -r line; do
        if [[ $line =~ $compiled ]] &&
            ((BASH_REMATCH[1] % 10 == 0 || BASH_REMATCH[1] == BASH_REMATCH[2])); then
            say "    ${BASH_REMATCH[1]} of ${BASH_REMATCH[2]} files compiled"
        fi
    done
}

check_compiler() {
    local compiler=${CXX:-c++} header
    command -v "$compiler" >/dev/null || fail "compiling mmcv needs a C++" \
        "compiler, and $compiler was not found: install one (on Debian and" \
        "Ubuntu the package g++), or use the default stack, 'make setup'."
    header=$("$env/bin/python" -c \
        'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
    [[ -e $header ]] || fail "compiling mmcv needs Python's headers, and" \
        "$header was not found: install them (on Debian and Ubuntu the package" \
        "python3.11-dev), or use the default stack, 'make setup'."
}

check_env() {
    step 'Checking that everything can be imported'
    if ! "$env/bin/python" -P -W ignore -c \
        'import torch, torchvision, mmcv.transforms, mmpretrain, mmseg, mdeq_mm' \
        >>"$log" 2>&1; then
        fail_with_log "a package cannot be imported"
    fi
}

[[ $stack == onedl || $stack == openmmlab ]] ||
    fail "STACK=$stack is unknown: use onedl or openmmlab."
[[ -z $wanted ]] || check_python "$wanted"

cd "$root"
check_running
create_env
rm -f "$stamp"
extras=(-r "$here/demo.txt" -r "$here/tests.txt" -r "$here/lint.txt"
    -r "$here/docs.txt" -r "$here/deployment.txt")

if [[ $stack == onedl ]]; then
    step "Installing torch and the OneDL packages$wait"
    install -r "$here/build.txt" -r "$here/onedl.txt" "${extras[@]}"
else
    step "Installing torch$wait"
    install -r "$here/build.txt" torch torchvision -c "$here/openmmlab.txt"
    build_mmcv
    step 'Installing the OpenMMLab packages'
    install -r "$here/openmmlab.txt" "${extras[@]}"
fi

# By themselves they would bring another OpenCV over the one that is there.
step 'Installing what draws activation maps'
install --no-deps -r "$here/visualization.txt"

step 'Installing mdeq_mm itself, editable'
# Found by its path: from the folder that holds a checkout of the same name, Python
# would take that for the package otherwise.
install --no-deps --no-build-isolation --editable . --config-settings editable_mode=compat
check_env
pwd >"$stamp"
