//! The one place where the time of day is read, so that everything else can be told what time it is.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use time::OffsetDateTime;

/// Tells the time: the machine's, or one that a test sets.
#[derive(Debug, Clone, Default)]
pub enum Clock {
    #[default]
    System,
    /// Unix time in microseconds.
    Fixed(Arc<AtomicI64>),
}

impl Clock {
    /// Now, in whole microseconds: what Postgres keeps and what the keeper reports.
    pub fn now(&self) -> OffsetDateTime {
        match self {
            Self::System => {
                #[expect(clippy::disallowed_methods, reason = "this is the Clock that the others ask")]
                let now = OffsetDateTime::now_utc();
                now.replace_nanosecond(now.nanosecond() / 1000 * 1000).expect("a smaller number of nanoseconds is one too")
            }
            Self::Fixed(micros) => at_us(u64::try_from(micros.load(Ordering::Relaxed)).unwrap_or(0)),
        }
    }

    /// Now, in whole seconds of Unix time.
    pub fn now_unix_s(&self) -> i64 {
        self.now().unix_timestamp()
    }
}

/// The instant that the keeper writes as Unix microseconds. A number beyond the calendar becomes its last day.
pub fn at_us(micros: u64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(micros) * 1000).unwrap_or_else(|_| time::Date::MAX.midnight().assume_utc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fixed_clock_tells_the_time_it_was_given() {
        let clock = Clock::Fixed(Arc::new(AtomicI64::new(1_700_000_000_000_001)));
        assert_eq!(clock.now_unix_s(), 1_700_000_000);
        assert_eq!(clock.now().microsecond(), 1);
    }

    #[test]
    fn the_systems_time_has_no_fraction_of_a_microsecond() {
        assert_eq!(Clock::System.now().nanosecond() % 1000, 0);
    }
}
