//! What goes wrong with a registry, and how often it is asked again.

use std::time::Duration;

use reqwest::{
    StatusCode,
    header::{HeaderMap, RETRY_AFTER},
};

/// How often one thing is asked for. With the pauses, half a minute of a registry that is being restarted is borne.
pub(super) const ATTEMPTS_MAX: u32 = 6;
/// The same of who need not be waited for.
pub(super) const MIRROR_ATTEMPTS_MAX: u32 = 2;
/// Between the first two attempts; each further pause is twice as long, less up to a quarter.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// A registry may ask for a longer pause, but not for any.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// What has to come of an answer within so much waiting for it, or it has broken off: who sends little by little holds up those who wait for a place.
const PACE_BYTES: u64 = 1 << 20;
const PACE_WAIT: Duration = Duration::from_secs(60);

/// Why something did not come.
#[derive(Debug)]
pub(super) enum Trouble {
    /// Asked again, it may come; not before this time is over, the registry may say.
    Passing {
        why: String,
        after: Option<Duration>,
    },
    /// It would be so again.
    Lasting(String),
    /// With other credentials it may come.
    Denied(String),
    /// We do not go there.
    Refused(String),
    NotFound,
    /// It does not give it from the middle on; from its beginning on it may.
    OutOfRange,
    /// This machine's fault.
    Host(anyhow::Error),
}

/// How quickly an answer comes.
#[derive(Debug)]
pub(super) struct Pace {
    patience: Duration,
    waited: Duration,
    bytes: u64,
}

/// What is left of it.
#[derive(Debug)]
pub(super) struct Patience {
    attempts: u32,
    attempts_max: u32,
    pause: Duration,
}

impl Trouble {
    pub(super) const fn passing(why: String) -> Self {
        Self::Passing { why, after: None }
    }

    pub(super) const fn lasting(why: String) -> Self {
        Self::Lasting(why)
    }

    /// An answer that is none.
    pub(super) fn of_status(status: StatusCode, after: Option<Duration>) -> Self {
        let why = format!("answered {}", status.as_u16());
        let may_pass = status.is_server_error()
            || [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS].contains(&status);
        if may_pass { Self::Passing { why, after } } else { Self::Lasting(why) }
    }
}

impl Pace {
    /// Of who may bring nothing for this long.
    pub(super) fn new(stall: Duration) -> Self {
        Self { patience: PACE_WAIT.max(2 * stall), waited: Duration::ZERO, bytes: 0 }
    }

    /// Whether it comes quickly enough: so many bytes did after so much waiting.
    pub(super) fn suffices(&mut self, bytes: usize, waited: Duration) -> bool {
        self.bytes += bytes as u64;
        self.waited += waited;
        if self.waited < self.patience {
            return true;
        }
        self.waited = Duration::ZERO;
        std::mem::take(&mut self.bytes) >= PACE_BYTES
    }
}

impl From<anyhow::Error> for Trouble {
    fn from(error: anyhow::Error) -> Self {
        Self::Host(error)
    }
}

impl Patience {
    pub(super) const fn new(attempts_max: u32) -> Self {
        Self { attempts: 1, attempts_max, pause: FIRST_PAUSE }
    }

    /// How long to wait for the next attempt; `None`: there is none.
    pub(super) fn pause(&mut self, asked: Option<Duration>) -> Option<Duration> {
        if self.attempts >= self.attempts_max {
            return None;
        }
        self.attempts += 1;
        let pause = self.pause.mul_f64(1.0 - 0.25 * chance());
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        Some(asked.map_or(pause, |asked| asked.min(PAUSE_MAX).max(pause)))
    }
}

/// At least 0 and less than 1: many who were refused together are not to come again together.
fn chance() -> f64 {
    f64::from(uuid::Uuid::new_v4().as_fields().0) / (f64::from(u32::MAX) + 1.0)
}

/// In how many seconds the registry wants to be asked again. A date is none that we read: no registry sends one.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_come_to_an_end() {
        let mut patience = Patience::new(ATTEMPTS_MAX);
        let pauses: Vec<_> = std::iter::from_fn(|| patience.pause(None)).collect();
        assert_eq!(pauses.len(), ATTEMPTS_MAX as usize - 1);
        assert!(pauses.windows(2).all(|pair| pair[0] < pair[1]) && pauses[0] >= FIRST_PAUSE * 3 / 4, "{pauses:?}");
    }

    #[test]
    fn who_sends_little_by_little_is_seen_within_a_minute_of_waiting() {
        let second = Duration::from_secs(1);
        let mut pace = Pace::new(second);
        // A good beginning is none for ever.
        assert!((0..90).all(|_| pace.suffices(1 << 20, second)));
        let borne = (0..1000).take_while(|_| pace.suffices(1 << 10, second)).count();
        assert!((60..120).contains(&borne), "{borne}");
        assert!((0..600).all(|_| pace.suffices(18 << 10, second)));
        // Where an operator bears longer silence, that is none.
        assert!((0..10).all(|_| Pace::new(100 * second).suffices(1, 99 * second)));
    }

    #[test]
    fn a_registry_is_given_the_time_that_it_asks_for_within_reason() {
        let pause = |asked| Patience::new(ATTEMPTS_MAX).pause(Some(Duration::from_secs(asked))).unwrap();
        assert_eq!(pause(7), Duration::from_secs(7));
        assert_eq!(pause(86_400), PAUSE_MAX);
        assert!(pause(0) >= FIRST_PAUSE * 3 / 4);
    }

    #[test]
    fn only_what_may_pass_is_asked_again() {
        for (status, may_pass) in
            [(429, true), (500, true), (502, true), (503, true), (504, true), (400, false), (405, false), (410, false)]
        {
            let trouble = Trouble::of_status(StatusCode::from_u16(status).unwrap(), None);
            assert_eq!(matches!(trouble, Trouble::Passing { .. }), may_pass, "{status}");
        }
    }
}
