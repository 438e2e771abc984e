//! The keeper, driven through its public client on the real kernel: what runs, how it ends, what is left.
//!
//! Needs root, and busybox from Debian's `busybox-static`.
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod attacks;
mod control;
mod disk;
mod endings;
mod exec;
mod exhaustion;
mod fenced;
mod gvisor;
mod harness;
mod hogs;
mod images;
mod io;
mod layers;
mod leaks;
mod limits;
mod over;
mod privileges;
mod records;
mod terminal;
mod tree;
mod upgrade;
mod volumes;
mod walls;
mod warnings;
mod watch;
