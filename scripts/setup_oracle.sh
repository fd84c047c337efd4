#!/bin/sh
# Makes .venv-oracle: transformers and what it needs, for the tests marked `oracle`. It is an environment of its own,
# because the services never import transformers. torch (about 750 MB) is taken from the main environment through a
# .pth file, so both sides compute with the same kernels.
#
#   scripts/setup_oracle.sh [MAIN_VENV]      the main environment, .venv if not given
set -eu
cd "$(dirname "$0")/.."
main="${1:-.venv}"
oracle=.venv-oracle
requirements="transformers==5.19.0 accelerate==1.14.0 gguf==0.19.0"

main_packages="$("$main/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
if [ -f "$oracle/ready" ] && [ "$(cat "$oracle/ready")" = "$requirements $main_packages" ]; then
  exit 0
fi
rm -rf "$oracle"
"$main/bin/python" -m venv "$oracle"
packages="$("$oracle/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
echo "$main_packages" > "$packages/main_environment.pth"
# shellcheck disable=SC2086 # the requirements are words
"$oracle/bin/python" -m pip install --quiet --disable-pip-version-check $requirements
"$oracle/bin/python" -c 'import accelerate, gguf, torch, transformers'
echo "$requirements $main_packages" > "$oracle/ready"
