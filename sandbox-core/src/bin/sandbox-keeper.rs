//! The keeper: the one privileged process of a node. See `sandbox_core::keeper`.

use anyhow::Context;
use sandbox_core::keeper::{Weakening, command};

fn main() -> anyhow::Result<()> {
    let program = std::env::current_exe()?;
    command::run(program.parent().context("this program is in no folder")?, Weakening::Refused)
}
