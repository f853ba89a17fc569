# Sourced by demo, test, check and docs: goes to the project's root and puts a working .venv first on PATH.
#
# .venv/stamp records the folder and the requirements of the environment, and is written last. Without a stamp (an
# interrupted install) or in another folder (scripts in .venv have absolute paths), .venv is created again; if only the
# requirements changed, pip updates it.
set -eu
cd "$(dirname "$0")/.."
here=$(pwd -P)
wanted="$here $(cat constraints.txt pyproject.toml | cksum)"
found=$(cat .venv/stamp 2>/dev/null || true)

if [ "$found" != "$wanted" ] || [ ! -x .venv/bin/python ]; then
    case $found in
    "$here "*) echo "Requirements changed: updating .venv (a minute or so)" >&2 ;;
    *)
        for python in "${PYTHON:-python3}" python3.13 python3.12 python3.11 ""; do
            "${python:-false}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && break
        done
        [ -n "$python" ] || { echo "Python 3.11, 3.12 or 3.13 is needed; name it with PYTHON=..." >&2 && exit 2; }
        echo "Making .venv: 2 minutes and 1.8 GB with a CPU build of torch, several GB more with CUDA" >&2
        "$python" -m venv --clear .venv
        ;;
    esac
    rm -f .venv/stamp
    .venv/bin/python -m pip install -qq --disable-pip-version-check --no-input \
        -c constraints.txt -e '.[dev,sentencepiece]'
    echo "$wanted" >.venv/stamp
fi
outside=$PATH
PATH="$here/.venv/bin:$PATH"
# With other processes on the machine, spinning OpenMP threads are 20 times slower; sleeping ones cost at most 10 %.
export PATH OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
