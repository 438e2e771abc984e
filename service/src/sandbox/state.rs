//! The life of a sandbox as a table of permitted steps.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where a sandbox stands.
///
/// ```text
///                       StartedAgain
///    ┌──────────────────────────────────────────────────────┐
///    │     Claimed            Launched           Ended      │
/// queued ──────────▶ starting ──────────▶ running ─────▶ exited
///  │  ▲                │  │                 │  │ ▲         ▲
///  │  └────────────────┴──│─────────────────┘  │ │ Paused, │
///  │           Returned   │                    │ ▼ Resumed │ Ended
///  │                      │                   paused ──────┘
///  │ Lost                 │ Lost               │ Lost
///  └──────────────────────┴────────────────────┴───────▶ failed
/// ```
///
/// `failed`: the payload never started, or nobody knows what became of it; it can be started again, too. What is paused goes the same ways as what runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(description = "`failed`: the program never started, or its fate is unknown. Every other end is `exited`.")]
pub enum State {
    Queued,
    Starting,
    Running,
    /// Its processes are frozen, its limits in real time go on.
    Paused,
    Exited,
    Failed,
}

/// What happens to a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A node took it from the queue.
    Claimed,
    /// The payload's program runs.
    Launched,
    /// Its processes stand still.
    Paused,
    /// They go on.
    Resumed,
    /// The payload ended, and how is known.
    Ended,
    /// This attempt came to nothing by no fault of its own; it waits for another.
    Returned,
    /// The payload never ran, or its end is unknown.
    Lost,
    /// Somebody wants it to live once more.
    StartedAgain,
}

impl State {
    pub const ALL: [Self; 6] = [Self::Queued, Self::Starting, Self::Running, Self::Paused, Self::Exited, Self::Failed];

    /// The state after `event`, or `None` if that cannot happen here.
    pub const fn after(self, event: Event) -> Option<Self> {
        match (self, event) {
            (Self::Queued, Event::Claimed) => Some(Self::Starting),
            (Self::Starting, Event::Launched) | (Self::Paused, Event::Resumed) => Some(Self::Running),
            (Self::Running, Event::Paused) => Some(Self::Paused),
            (Self::Running | Self::Paused, Event::Ended) => Some(Self::Exited),
            (Self::Starting | Self::Running | Self::Paused, Event::Returned) | (Self::Exited | Self::Failed, Event::StartedAgain) => {
                Some(Self::Queued)
            }
            (Self::Queued | Self::Starting | Self::Running | Self::Paused, Event::Lost) => Some(Self::Failed),
            (Self::Queued, Event::Launched | Event::Paused | Event::Resumed | Event::Ended | Event::Returned)
            | (Self::Starting, Event::Claimed | Event::Paused | Event::Resumed | Event::Ended)
            | (Self::Running, Event::Claimed | Event::Launched | Event::Resumed)
            | (Self::Paused, Event::Claimed | Event::Launched | Event::Paused)
            | (Self::Queued | Self::Starting | Self::Running | Self::Paused, Event::StartedAgain)
            | (
                Self::Exited | Self::Failed,
                Event::Claimed | Event::Launched | Event::Paused | Event::Resumed | Event::Ended | Event::Returned | Event::Lost,
            ) => None,
        }
    }

    /// Whether nothing happens to it any more, unless somebody starts it again.
    pub const fn is_final(self) -> bool {
        matches!(self, Self::Exited | Self::Failed)
    }

    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Exited => "exited",
            Self::Failed => "failed",
        }
    }

    /// The state of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_that_ran_to_its_end_is_exited() {
        let states = [Event::Claimed, Event::Launched, Event::Ended].iter().try_fold(State::Queued, |state, event| state.after(*event));
        assert_eq!(states, Some(State::Exited));
    }

    #[test]
    fn nothing_but_a_new_start_leaves_a_final_state() {
        for event in [Event::Claimed, Event::Launched, Event::Paused, Event::Resumed, Event::Ended, Event::Returned, Event::Lost] {
            assert_eq!(State::Exited.after(event), None);
            assert_eq!(State::Failed.after(event), None);
        }
        assert_eq!(State::Exited.after(Event::StartedAgain), Some(State::Queued));
        assert_eq!(State::Running.after(Event::StartedAgain), None);
    }

    #[test]
    fn only_what_runs_can_be_paused_and_it_can_end_like_that() {
        for state in State::ALL {
            assert_eq!(state.after(Event::Paused).is_some(), state == State::Running, "{state:?}");
            assert_eq!(state.after(Event::Resumed).is_some(), state == State::Paused, "{state:?}");
        }
        assert_eq!(State::Paused.after(Event::Ended), Some(State::Exited));
        assert_eq!(State::Paused.after(Event::Lost), Some(State::Failed));
    }

    #[test]
    fn a_payload_that_never_ran_cannot_exit() {
        assert_eq!(State::Starting.after(Event::Ended), None);
        assert_eq!(State::Starting.after(Event::Lost), Some(State::Failed));
    }

    #[test]
    fn every_name_names_its_state() {
        for state in State::ALL {
            assert_eq!(State::named(state.as_str()), Some(state));
        }
        assert_eq!(State::named("gone"), None);
    }
}
