#!/usr/bin/env bash
# Runs pytest as an ordinary user: tests/as_user.sh USER PYTEST-ARGUMENTS...
# Without arguments for pytest it only sees to it that there is such a user.
# The checkout may lie where that user cannot look (a private clone), so what is needed is copied to a place where it can.
set -euo pipefail
user=$1
shift
cd "$(dirname "$0")/.."
id "$user" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash --key SUB_UID_COUNT=0 --key SUB_GID_COUNT=0 "$user"
home=$(getent passwd "$user" | cut -d: -f6)
[ -d "$home" ] || install -d -o "$user" -m 0755 "$home"
[ $# -gt 0 ] || exit 0
place=$(mktemp -d /tmp/corral-as-user.XXXXXX)
internet_pid=
trap '[ -z "$internet_pid" ] || kill "$internet_pid" 2>/dev/null || true; rm -rf "$place"' EXIT
# A little internet, which only root can make; it ends with this script, however that ends (tests/internet/world.py).
internet=
if [ "$(id -u)" = 0 ]; then
  exec {said}< <(exec .venv/bin/python -B -m tests.internet.world $$ </dev/null)
  internet_pid=$!
  read -r -t 240 -u "$said" internet || [ -z "${CI:-}" ] || { echo 'no little internet' >&2; exit 1; }
fi
cp -a .venv tests pyproject.toml README.md docs src "$place"
[ ! -d examples ] || cp -a examples "$place"
[ ! -d benchmarks ] || cp -a benchmarks "$place"
# The agents that tests run: one is small, the other stays where it is, if this user can look there.
mkdir -p "$place/build"
[ ! -d build/agents ] || cp -a build/agents "$place/build"
[ ! -d build/demo-venv ] || ln -s "$PWD/build/demo-venv" "$place/build/demo-venv"
# Its first line names the interpreter of the checkout.
sed -i "1s|^#!.*|#!$place/.venv/bin/python|" "$place/.venv/bin/corral"
chown -R "$user:" "$place"
chmod 755 "$place"
cd "$place"
# Not `exec`: the trap must run. A session of its own, so that nothing here shares the caller's terminal.
setsid --wait runuser -u "$user" -- env -i HOME="$home" PATH="/usr/local/bin:/usr/bin:/bin" LANG=C.UTF-8 \
  CI="${CI:-}" CORRAL_ASAN_LAUNCHER="${CORRAL_ASAN_LAUNCHER:-}" CORRAL_INTERNET="$internet" CORRAL_ROUNDS="${CORRAL_ROUNDS:-2500}" \
  "$place/.venv/bin/python" -m pytest "$@"
