//! A keeper for tests: a request may leave out fences, by their names in the annotation `without`. So a test can show that an attack works
//! where a fence is not. The keeper that is installed has no such way in.

use anyhow::Context;
use sandbox_core::keeper::{Weakening, command};

fn main() -> anyhow::Result<()> {
    let program = std::env::current_exe()?;
    let programs = program.parent().and_then(std::path::Path::parent).context("this program is in no folder")?;
    command::run(programs, Weakening::Allowed)
}
