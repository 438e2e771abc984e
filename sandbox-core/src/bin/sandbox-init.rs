//! PID 1 of one sandbox. Started by the keeper alone, or by such a one under gVisor's kernel; see `sandbox_core::init`.

fn main() -> std::io::Result<()> {
    if std::env::args().nth(1).as_deref() == Some(sandbox_core::init::guest::ROLE) {
        return sandbox_core::init::guest::run();
    }
    sandbox_core::init::run()
}
