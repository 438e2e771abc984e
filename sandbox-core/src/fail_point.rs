//! Steps at which a test can have a process die, to see that nothing is lost and nothing left behind.
//!
//! Compiled in with the feature `fail-points` alone; without it a step is nothing. Which step kills, and at which time it is reached, stands in
//! the environment variable `MAYFLY_FAIL_POINTS`, in the words of the crate `fail`: `keeper.launch.cloned=2*off->1*return` kills at the third
//! time. Several are parted by semicolons.

/// Takes the environment's word for which steps kill. At the start of a process.
#[cfg(feature = "fail-points")]
#[expect(clippy::disallowed_methods, reason = "the programs that are installed have no such variable")]
pub fn arm() {
    let asked = std::env::var("MAYFLY_FAIL_POINTS").unwrap_or_default();
    for point in asked.split(';').filter(|point| !point.is_empty()) {
        let (name, action) = point.split_once('=').expect("a step and what to do there");
        fail::cfg(name, action).expect("the crate `fail` knows what to do");
    }
}

/// Takes the environment's word for which steps kill: none, without the feature.
#[cfg(not(feature = "fail-points"))]
pub const fn arm() {}

/// Says that a step was reached: `process.area.step`, named after what has just been done.
#[cfg(feature = "fail-points")]
pub fn reached(step: &str) {
    fail::eval(step, |_| rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL));
}

/// Says that a step was reached: nothing, without the feature.
#[cfg(not(feature = "fail-points"))]
pub const fn reached(_step: &str) {}
