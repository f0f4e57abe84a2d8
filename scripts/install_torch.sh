#!/usr/bin/env bash
# Installs the torch that constraints.txt pins into a virtual environment: scripts/install_torch.sh VENV/bin/python
#
# PyPI's torch for Linux is a CUDA build of several GB. On Linux without an NVIDIA GPU this asks for the CPU build by its
# full name (`+cpu`), which a CUDA build can never satisfy: first from the indexes pip is configured with, then from
# PyTorch's own CPU index. TORCH_INDEX names another index in its place.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${1:?usage: scripts/install_torch.sh PATH/TO/python}
index=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
version=$(sed -n 's/^torch==//p' constraints.txt)
install=("$python" -m pip install -qq --disable-pip-version-check)

if "$python" -c 'import sys, torch; sys.exit(torch.__version__.partition("+")[0] != sys.argv[1])' "$version" 2>/dev/null; then
    exit 0
fi

if nvidia-smi >/dev/null 2>&1; then
    echo "torch $version: NVIDIA GPU found, installing the index's default build"
    "${install[@]}" -c constraints.txt "torch==$version"
    exit 0
fi

if [[ $(uname -s) == Linux ]]; then
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    echo "torch $version: no NVIDIA GPU, installing the CPU build"
    if ! "${install[@]}" --no-deps "torch==$version+cpu" >"$log" 2>&1; then
        echo "torch $version+cpu is not on pip's configured indexes, taking it from $index"
        "${install[@]}" --no-deps --index-url "$index" "torch==$version+cpu" || { cat "$log" >&2; exit 1; }
    fi
fi
# On Linux torch is there by now and only its dependencies are missing. macOS wheels are CPU builds.
"${install[@]}" -c constraints.txt "torch==$version"
"$python" -W ignore -c 'import torch; assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build"'
