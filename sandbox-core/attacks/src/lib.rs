//! The program with which tests attack sandboxes from inside. It is no part of anything that is installed.

/// A static executable for the machine that compiled it. `attack NAME [ARGUMENT…]` tries one thing, prints how it went, and exits with 0 if it
/// worked, with 1 if something stopped it, with 2 if it is called in a way that it does not know.
pub static PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/attack"));
