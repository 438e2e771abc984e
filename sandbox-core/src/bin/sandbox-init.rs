//! PID 1 of one sandbox. Started by the keeper alone; see `sandbox_core::init`.

fn main() -> std::io::Result<()> {
    sandbox_core::init::run()
}
