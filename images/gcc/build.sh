#!/usr/bin/env bash
# Builds the `gcc` image from Debian's packages: compilers for C and C++, and prints the path of its OCI archive.
set -euo pipefail
# shellcheck source=images/common.sh
source "$(dirname "$0")/../common.sh"
# shellcheck source=images/debian.sh
source "$(dirname "$0")/../debian.sh"

reuse gcc
debian gcc,g++,libc6-dev --config.cmd sh
