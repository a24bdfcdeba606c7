# Shared by the scripts of launch/: finds a Python, makes .venv, installs torch and dist-llm. Sourced by bash from the repository root.
# shellcheck shell=bash

VENV=.venv
CPU_INDEX=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
trap 'exit 130' INT # pip answers Ctrl-C with an exit code like any other

# say TEXT: a line of progress with the seconds since the start.
say() { printf '[%3d s] %s\n' "$SECONDS" "$1"; }

# die WHAT NEXT: a user's problem; exit 2 as everywhere in dist-llm.
die() {
  printf 'error: %s\n  next:     %s\n' "$1" "$2" >&2
  exit 2
}

has_nvidia() { [ -e /dev/nvidia0 ] || command -v nvidia-smi >/dev/null 2>&1; }

# find_python: sets PYTHON to the first interpreter that is new enough.
find_python() {
  local candidate
  [ "$(uname -s)" = Linux ] || die "dist-llm runs on Linux; this is $(uname -s)" "use a Linux machine, WSL 2 or docker/Dockerfile"
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      PYTHON=$candidate
      return
    fi
  done
  die "no Python 3.11 or newer was found" "install one, or name it: PYTHON=/path/to/python $0"
}

# make_venv: .venv, made once. Where the chosen Python has a torch that will do (GPU images bring their own), that one is used.
make_venv() {
  if "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
    return
  fi
  find_python
  [ ! -e "$VENV" ] || die "$VENV is there, but has no working Python 3.11 with pip" "remove it: rm -r $VENV"
  say "making $VENV with $("$PYTHON" --version 2>&1)"
  local flags=()
  if has_torch "$PYTHON" && "$PYTHON" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)'; then
    say "this Python has torch already: $VENV will see its packages"
    flags=(--system-site-packages)
  fi
  "$PYTHON" -m venv ${flags[@]+"${flags[@]}"} "$VENV" >/dev/null || {
    rm -rf "$VENV"
    die "this Python cannot make a virtual environment" "install its venv module (Debian, Ubuntu: apt install python3-venv)"
  }
}

# pip_install ARGS: pip's own progress on a terminal, silence elsewhere.
pip_install() {
  if [ -t 1 ]; then "$VENV/bin/python" -m pip install "$@"; else "$VENV/bin/python" -m pip install -qq "$@"; fi
}

# install_torch: a CPU build where there is no NVIDIA device; the size is said before gigabytes are downloaded.
# pip's list of versions costs nothing; a dry run downloads 0.5 GB where the index has no metadata files.
install_torch() {
  if has_torch "$VENV/bin/python"; then return; fi
  local torch
  torch=$(grep '^torch==' constraints.txt)
  if "$VENV/bin/python" -m pip index versions torch --timeout 5 --retries 0 2>/dev/null | grep -w "${torch#torch==}+cpu" >/dev/null; then
    say "installing $torch+cpu, which pip is configured to find"
    pip_install "$torch+cpu"
    return
  fi
  if has_nvidia; then
    say "installing $torch with CUDA: 2 to 3 GB to download. Ctrl-C stops it"
  else
    say "no NVIDIA device here: installing a CPU build of torch (0.2 GB to download)"
    if pip_install --index-url "$CPU_INDEX" --timeout 5 --retries 0 "$torch" 2>"$VENV/torch.log"; then return; fi
    say "nothing within reach at $CPU_INDEX: installing $torch with CUDA, 2 to 3 GB to download. Ctrl-C stops it"
  fi
  pip_install "$torch" || die "pip found no $torch" "see pip's message above; an index or a folder of wheels is needed once"
}

# has_torch PYTHON: whether it has torch 2.11 or newer (asked without importing it, which takes seconds).
has_torch() {
  "$1" - <<'PY' 2>/dev/null
import re, sys
from importlib import metadata
numbers = re.findall(r"\d+", metadata.version("torch"))
sys.exit(tuple(map(int, numbers[:2])) < (2, 11))
PY
}

# install_project EXTRAS ("" or "[test]"): dist-llm itself and what it needs, once for each state of pyproject.toml and constraints.txt.
install_project() {
  local stamp="$VENV/.installed$1" state
  state="$PWD $(cat pyproject.toml constraints.txt | cksum)"
  [ "$(cat "$stamp" 2>/dev/null)" != "$state" ] || return 0
  say "installing dist-llm$1"
  grep -v '^torch==' constraints.txt >"$VENV/constraints.txt" # torch is there, perhaps the machine's own
  pip_install 'setuptools>=77' || die "pip cannot install setuptools" "see pip's message above; an index is needed once"
  if ! pip_install --no-build-isolation -c "$VENV/constraints.txt" -e ".$1"; then
    say "not every version of constraints.txt is within reach: taking what pyproject.toml allows"
    : >"$VENV/constraints.txt"
    pip_install --no-build-isolation -e ".$1" || die "dist-llm could not be installed" "see pip's message above"
  fi
  printf '%s\n' "$state" >"$stamp"
}

# install_deepspeed: the rival in `compare` and in the tests, without building its kernels. It may fail: nothing else needs it.
install_deepspeed() {
  "$VENV/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("deepspeed") is None)' && return
  say "installing deepspeed, to compare with"
  if ! DS_BUILD_OPS=0 pip_install --no-build-isolation -c "$VENV/constraints.txt" deepspeed >"$VENV/deepspeed.log" 2>&1; then
    say "deepspeed could not be installed (see $VENV/deepspeed.log): going on without it"
  fi
}

# prepare EXTRAS: everything up to a working environment.
prepare() {
  make_venv
  install_torch
  install_project "$1"
  install_deepspeed
}
