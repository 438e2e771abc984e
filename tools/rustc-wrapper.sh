#!/bin/sh
# Cargo calls this as `rustc-wrapper.sh rustc ARGS…` for the crates of this workspace.
# The programs that run inside a sandbox are linked statically; cargo has no such setting for one binary alone.
case " $* " in
*" --crate-name sandbox_init "* | *" --crate-name sandbox_unpack "*) exec "$@" -C target-feature=+crt-static ;;
*) exec "$@" ;;
esac
