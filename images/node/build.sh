#!/usr/bin/env bash
# Builds the `node` image from Debian's packages, and prints the path of its OCI archive.
set -euo pipefail
# shellcheck source=images/common.sh
source "$(dirname "$0")/../common.sh"
# shellcheck source=images/debian.sh
source "$(dirname "$0")/../debian.sh"

reuse node
debian nodejs --config.cmd node
