//! Unpacks the layers of an image, inside a throw-away sandbox. Started by the keeper alone; see `sandbox_core::unpack`.
#![expect(clippy::print_stdout, reason = "its answer goes to the keeper, over a pipe")]

use std::process::ExitCode;

fn main() -> ExitCode {
    match sandbox_core::unpack_inherited() {
        Ok(unpacked) => {
            println!("{unpacked}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
