#!/usr/bin/env bash
# Builds the `debian` image: the smallest system of this Debian, and nothing else. Prints the path of its OCI archive.
set -euo pipefail
# shellcheck source=images/common.sh
source "$(dirname "$0")/../common.sh"
# shellcheck source=images/debian.sh
source "$(dirname "$0")/../debian.sh"

reuse debian
debian bash --config.cmd bash
