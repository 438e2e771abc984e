#!/bin/bash
# Cargo calls this as `rustc-wrapper.sh rustc ARGS…` for the crates of this workspace.
# The programs that run inside a sandbox are linked statically; cargo has no such setting for one binary alone.
# (bash, because dash drops variables with a dash in their names, such as CARGO_BIN_EXE_sandbox-keeper.)
case " $* " in
*" --crate-name sandbox_init "* | *" --crate-name sandbox_unpack "*) exec "$@" -C target-feature=+crt-static -C strip=symbols ;;
*) exec "$@" ;;
esac
