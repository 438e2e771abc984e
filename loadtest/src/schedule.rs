//! When requests are to begin: decided before the first of them is sent, so that no slow answer puts off the next request.

use std::time::Duration;

use clap::ValueEnum;

/// How arrivals lie between each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Spacing {
    /// Equally far apart
    Even,
    /// As callers come who know nothing of each other: in clusters and with gaps
    Poisson,
}

/// Arrivals at this rate for this long, from the beginning of the measurement on. With the same seed they are the same.
pub(crate) fn steady(per_second: f64, lasting: Duration, spacing: Spacing, seed: u64) -> Vec<Duration> {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut next = 0.0;
    let mut arrivals = Vec::new();
    for number in 1_u32.. {
        if next >= lasting.as_secs_f64() {
            break;
        }
        arrivals.push(Duration::from_secs_f64(next));
        next = match spacing {
            // Not added up: what is lost by rounding would add up, too.
            Spacing::Even => f64::from(number) / per_second,
            // The gaps of a Poisson process are distributed exponentially. `f64` is below 1, so that its complement has a logarithm.
            Spacing::Poisson => next - (1.0 - random.f64()).ln() / per_second,
        };
    }
    arrivals
}

/// So many at once, so often, with a pause after each time.
pub(crate) fn bursts(size: u32, times: u32, pause: Duration) -> Vec<Duration> {
    (0..times).flat_map(|burst| std::iter::repeat_n(pause * burst, size as usize)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_schedule_has_as_many_arrivals_as_its_rate_says() {
        let lasting = Duration::from_secs(10);

        let even = steady(100.0, lasting, Spacing::Even, 1);
        let poisson = steady(100.0, lasting, Spacing::Poisson, 1);

        assert_eq!((even.len(), even.last()), (1000, Some(&Duration::from_millis(9990))));
        // Four standard deviations of a thousand arrivals.
        assert!((874..=1126).contains(&poisson.len()), "{}", poisson.len());
        assert!(poisson.is_sorted() && poisson.last() < Some(&lasting));
    }

    #[test]
    fn arrivals_at_random_are_the_same_again_with_the_same_seed() {
        let arrivals = |seed| steady(50.0, Duration::from_secs(2), Spacing::Poisson, seed);

        assert_eq!(arrivals(7), arrivals(7));
        assert_ne!(arrivals(7), arrivals(8));
    }

    #[test]
    fn a_burst_arrives_all_at_once() {
        let pause = Duration::from_secs(3);

        assert_eq!(bursts(2, 2, pause), [Duration::ZERO, Duration::ZERO, pause, pause]);
    }
}
