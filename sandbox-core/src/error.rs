//! Why a step of a launch failed, and what a caller can do about it.

use std::{fmt, io};

use serde::{Deserialize, Serialize};

/// Whether another try can work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// The request can never work: it names something that the image does not have, or more than its limits hold.
    Spec,
    /// This machine could not do it. It may work elsewhere, or later.
    Host,
}

/// A step of a launch that failed: `mounting the overlay failed on /work: No space left on device`.
#[derive(Debug, thiserror::Error)]
pub struct LaunchError {
    pub kind: Kind,
    /// Empty when `source` says all.
    pub step: &'static str,
    pub target: String,
    #[source]
    pub source: io::Error,
}

impl fmt::Display for LaunchError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { step, target, source, .. } = self;
        match (step.is_empty(), target.is_empty()) {
            (true, _) => write!(f, "{source}"),
            (false, true) => write!(f, "{step} failed: {source}"),
            (false, false) => write!(f, "{step} failed on {target}: {source}"),
        }
    }
}

/// A step that failed, with its cause: unlike in a new error of the same kind, [`shortage`] still finds it.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {source}")]
struct Failed {
    step: String,
    source: io::Error,
}

/// Names the step that failed.
pub(crate) fn at(step: impl fmt::Display) -> impl FnOnce(io::Error) -> io::Error {
    move |source| io::Error::new(source.kind(), Failed { step: step.to_string(), source })
}

/// What this machine is out of for the moment, if that is what an error says: later there may be some again.
pub(crate) fn shortage(error: &io::Error) -> Option<&'static str> {
    if let Some(failed) = error.get_ref().and_then(|inner| inner.downcast_ref::<Failed>()) {
        return shortage(&failed.source);
    }
    Some(match error.raw_os_error()? {
        libc::EMFILE => "descriptors of the keeper",
        libc::ENFILE => "descriptors of this machine",
        libc::ETOOMANYREFS => "descriptors under way",
        libc::EAGAIN => "processes",
        libc::ENOMEM => "kernel memory",
        libc::ENOBUFS => "socket buffers",
        libc::EUSERS => "user namespaces",
        libc::ENOSPC | libc::EDQUOT => "space, or namespaces",
        _ => return None,
    })
}

/// Names the step at which an [`io::Result`] failed.
pub trait Step<T> {
    /// The machine failed at `step`.
    fn step(self, step: &'static str) -> Result<T, LaunchError>;
    /// The machine failed at `step`, with what it was doing it to.
    fn step_on(self, step: &'static str, target: impl fmt::Display) -> Result<T, LaunchError>;
    /// What the request asks for cannot be had.
    fn spec(self, step: &'static str, target: impl fmt::Display) -> Result<T, LaunchError>;
}

impl<T, E: Into<io::Error>> Step<T> for Result<T, E> {
    fn step(self, step: &'static str) -> Result<T, LaunchError> {
        self.step_on(step, "")
    }
    fn step_on(self, step: &'static str, target: impl fmt::Display) -> Result<T, LaunchError> {
        self.map_err(|e| LaunchError { kind: Kind::Host, step, target: target.to_string(), source: e.into() })
    }
    fn spec(self, step: &'static str, target: impl fmt::Display) -> Result<T, LaunchError> {
        self.map_err(|e| LaunchError { kind: Kind::Spec, step, target: target.to_string(), source: e.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_is_found_below_the_steps_that_met_it() {
        let bottom = io::Error::from_raw_os_error(libc::EMFILE);
        let error = at("cloning init")(at("opening the cgroups")(bottom));
        assert_eq!(shortage(&error), Some("descriptors of the keeper"));
        assert!(error.to_string().starts_with("cloning init: opening the cgroups: "), "{error}");
        assert_eq!(shortage(&at("mounting")(io::Error::from_raw_os_error(libc::EPERM))), None);
        assert_eq!(shortage(&io::Error::other("something else")), None);
    }
}
