//! Signals by the names that people know them by (signal(7)).

use serde::{Deserialize, Serialize};

use super::Invalid;

const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM", "STKFLT", "CHLD",
    "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
/// The first of the real-time signals that the C library leaves to programs, and the last of all.
const RTMIN: i32 = 34;
const MAX: i32 = 64;

/// A signal that can be sent. In rows and answers it stands by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Signal(i32);

/// How a request names one: `"SIGTERM"`, `"TERM"`, `15`.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged, expecting = "a signal is a name, as in SIGTERM, or a number")]
pub enum SignalRequest {
    Number(i64),
    Name(String),
}

impl Signal {
    pub const KILL: Self = Self(9);
    pub const TERM: Self = Self(15);

    /// As the kernel counts it.
    pub const fn number(self) -> i32 {
        self.0
    }

    fn numbered(number: i64) -> Option<Self> {
        i32::try_from(number).ok().filter(|number| (1..=MAX).contains(number)).map(Self)
    }

    fn named(text: &str) -> Option<Self> {
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        if let Some(at) = NAMES.iter().position(|known| *known == name) {
            return Self::numbered(i64::try_from(at).ok()? + 1);
        }
        if let Some(rest) = name.strip_prefix("RTMIN") {
            let above = if rest.is_empty() { 0 } else { digits(rest.strip_prefix('+')?)? };
            return Self::numbered(i64::from(RTMIN) + above).filter(|signal| signal.0 >= RTMIN);
        }
        Self::numbered(digits(name)?)
    }
}

fn digits(text: &str) -> Option<i64> {
    (text.len() <= 2 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok()).flatten()
}

/// What names a signal in a request, for the contract.
pub(super) fn pattern() -> String {
    format!("^((SIG)?({}|RTMIN(\\+([0-9]|[12][0-9]|30))?)|[1-9]|[1-5][0-9]|6[0-4])$", NAMES.join("|"))
}

impl SignalRequest {
    /// The signal; the error names `field`.
    pub fn parse(self, field: &str) -> Result<Signal, Invalid> {
        let signal = match self {
            Self::Number(number) => Signal::numbered(number),
            Self::Name(name) => Signal::named(&name),
        };
        signal.ok_or_else(|| Invalid::new(field, "a signal is a name, as in SIGTERM, or a number from 1 to 64"))
    }
}

impl TryFrom<String> for Signal {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::named(&text).ok_or("there is no such signal")
    }
}

impl From<Signal> for String {
    fn from(signal: Signal) -> Self {
        name_of(signal.0)
    }
}

/// The name of a signal, as in `SIGSEGV`.
pub(super) fn name_of(signal: i32) -> String {
    let known = usize::try_from(signal).ok().and_then(|number| NAMES.get(number.checked_sub(1)?));
    match known {
        Some(name) => format!("SIG{name}"),
        None if signal == RTMIN => "SIGRTMIN".to_owned(),
        None if signal > RTMIN => format!("SIGRTMIN+{}", signal - RTMIN),
        None => format!("SIG{signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(request: SignalRequest) -> Option<i32> {
        request.parse("signal").ok().map(Signal::number)
    }

    #[test]
    fn a_signal_has_a_number_and_names() {
        for name in ["SIGTERM", "TERM", "sigterm", "15"] {
            assert_eq!(parsed(SignalRequest::Name(name.into())), Some(15), "{name}");
        }
        assert_eq!(parsed(SignalRequest::Number(64)), Some(64));
        assert_eq!(parsed(SignalRequest::Name("SIGRTMIN+2".into())), Some(36));
        assert_eq!(parsed(SignalRequest::Name("RTMIN".into())), Some(34));
    }

    #[test]
    fn what_is_no_signal_is_refused() {
        for number in [0, -1, 65, i64::MAX] {
            assert_eq!(parsed(SignalRequest::Number(number)), None, "{number}");
        }
        for name in ["", "SIG", "SIGNOPE", "0", "65", "SIGRTMIN+31", "SIGRTMIN-1", "RTMIN+", "TERM\0", "+9", "009"] {
            assert_eq!(parsed(SignalRequest::Name(name.into())), None, "{name:?}");
        }
    }

    #[test]
    fn every_signal_is_read_by_the_name_that_it_is_shown_by() {
        for number in 1..=MAX {
            let shown = name_of(number);
            // Two belong to the C library and have no names.
            assert_eq!(Signal::named(&shown).map(Signal::number), Some(number), "{shown}");
        }
    }

    #[test]
    fn signals_beyond_the_classic_ones_have_names_too() {
        assert_eq!(name_of(9), "SIGKILL");
        assert_eq!(name_of(34), "SIGRTMIN");
        assert_eq!(name_of(36), "SIGRTMIN+2");
        assert_eq!(name_of(0), "SIG0");
    }
}
