# Sourced after env.sh by scripts with libraries that neither solotune nor its suite needs, with $name and $packages
# (and $unpinned, a package that they want in another version than constraints.txt):
# installs them once in an environment of their own, ~/.cache/solotune/$name, which sees the packages of .venv.
# $own_python is its Python.
own="${XDG_CACHE_HOME:-$HOME/.cache}/solotune/$name"
own_python="$own/bin/python"
[ -x "$own_python" ] || python -m venv "$own"
of_venv=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$of_venv" >"$("$own_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of_solotune.pth"
grep -v "^${unpinned:-none}==" constraints.txt >"$own/constraints.txt"
# shellcheck disable=SC2086  # several packages
"$own_python" -m pip install -q --disable-pip-version-check --no-input -c "$own/constraints.txt" $packages
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
