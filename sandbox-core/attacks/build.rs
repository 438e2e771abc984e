//! Compiles the attacks with the linker that Rust needs anyway. Static: they run in an image that holds no library.
use std::{path::PathBuf, process::Command};

fn main() {
    println!("cargo::rerun-if-changed=src/attack.c");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join("attack");
    let mut compiler = Command::new(std::env::var_os("CC").unwrap_or_else(|| "cc".into()));
    let done =
        compiler.args(["-std=gnu11", "-static", "-s", "-O1", "-Wall", "-Wextra", "-Werror", "src/attack.c", "-o"]).arg(&out).status();
    assert!(done.is_ok_and(|status| status.success()), "cc could not compile src/attack.c (packages gcc and libc6-dev)");
}
