//! The order against a node that is played through in time of its own.

use proptest::prelude::*;

use super::*;

const NODE: Room = Room { memory_bytes: 1000, cpu_millis: 1000, sandboxes: 1000 };

fn owner(tenant: usize, principal: usize) -> Owner {
    Owner { tenant: TenantId::proven(format!("t{tenant}")), principal: format!("p{principal}") }
}

fn room(size: u64) -> Room {
    Room { memory_bytes: size, cpu_millis: size, sandboxes: 1 }
}

/// A principal that always has the same kind of work.
#[derive(Debug, Clone)]
struct Source {
    owner: Owner,
    weight: u32,
    size: u64,
    /// `None`: for ever.
    lasts_s: Option<f64>,
    left: u32,
    /// When the one at the head began to wait.
    since: f64,
}

struct Live {
    held: Held,
    room: Room,
    began: f64,
    ends: f64,
    source: usize,
}

/// What came of it.
#[derive(Default)]
struct Played {
    /// Room times time, by source.
    used: Vec<f64>,
    starts: Vec<Vec<f64>>,
}

/// Plays until then: starts what may be started, goes on to the next end, or by a second.
fn play(mut sources: Vec<Source>, until: f64) -> Played {
    let (mut shares, mut free, mut live, mut now) = (Shares::new(NODE), NODE, Vec::<Live>::new(), 0.0_f64);
    let mut played = Played { used: vec![0.0; sources.len()], starts: vec![vec![]; sources.len()] };
    while now < until {
        loop {
            let waiting: Vec<_> = (0..sources.len()).filter(|at| sources[*at].left > 0).collect();
            let head = |at: &usize| {
                let source = &sources[*at];
                Head { owner: source.owner.clone(), weight: source.weight, room: room(source.size), waited_s: now - source.since }
            };
            let heads: Vec<_> = waiting.iter().map(head).collect();
            let Some(next) = shares.next(&heads, free) else { break };
            let (at, source) = (waiting[next], &mut sources[waiting[next]]);
            let room = room(source.size);
            assert!(room.fits_in(free), "what does not fit was chosen");
            free = free.minus(room);
            let held = shares.begin(&source.owner, source.weight, room);
            let ends = source.lasts_s.map_or(f64::INFINITY, |lasts| now + lasts);
            live.push(Live { held, room, began: now, ends, source: at });
            played.starts[at].push(now);
            source.left -= 1;
            source.since = now;
        }
        let next = live.iter().map(|live| live.ends).fold(now + 1.0, f64::min);
        now = next;
        let (ended, going): (Vec<_>, Vec<_>) = live.into_iter().partition(|live| live.ends <= now);
        live = going;
        for ended in ended {
            free = free.plus(ended.room);
            shares.end(&ended.held, now - ended.began);
            played.used[ended.source] += as_f64(ended.room.memory_bytes) * (now - ended.began);
        }
    }
    played
}

fn source(tenant: usize, weight: u32, size: u64, lasts_s: f64, left: u32) -> Source {
    Source { owner: owner(tenant, 0), weight, size, lasts_s: Some(lasts_s), left, since: 0.0 }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_tenants_get_is_proportional_to_their_weights(
        tenants in prop::collection::vec((1_u32..=8, 50_u64..=250, 0.05_f64..2.0), 2..5),
    ) {
        let sources: Vec<_> = tenants.iter().enumerate().map(|(at, (weight, size, lasts))| source(at, *weight, *size, *lasts, u32::MAX)).collect();
        let played = play(sources, 300.0);
        let total: f64 = played.used.iter().sum();
        let weights: u32 = tenants.iter().map(|(weight, ..)| weight).sum();
        for (used, (weight, ..)) in played.used.iter().zip(&tenants) {
            let (got, due) = (used / total, f64::from(*weight) / f64::from(weights));
            prop_assert!((got - due).abs() < 0.08, "got {got:.3}, due {due:.3}: {tenants:?}");
        }
    }

    #[test]
    fn what_principals_of_a_tenant_get_is_even(lasts in prop::collection::vec(0.05_f64..2.0, 2..5)) {
        let of = |at: usize, lasts: f64| Source { owner: owner(0, at), ..source(0, 5, 100, lasts, u32::MAX) };
        let sources: Vec<_> = lasts.iter().enumerate().map(|(at, lasts)| of(at, *lasts)).collect();
        let played = play(sources, 300.0);
        let total: f64 = played.used.iter().sum();
        for used in &played.used {
            prop_assert!((used / total - 1.0 / f64::from(u32::try_from(lasts.len()).unwrap())).abs() < 0.05);
        }
    }

    #[test]
    fn nobody_starves(
        tenants in prop::collection::vec((1_u32..=100, 1_u64..=1000, 0.01_f64..3.0), 2..8),
        newcomer in (1_u32..=100, 1_u64..=1000),
    ) {
        let mut sources: Vec<_> = tenants.iter().enumerate().map(|(at, (weight, size, lasts))| source(at, *weight, *size, *lasts, u32::MAX)).collect();
        let (weight, size) = newcomer;
        sources.push(source(100, weight, size, 0.1, 3));
        let until = 400.0;
        let played = play(sources, until);
        prop_assert_eq!(played.starts.last().unwrap().len(), 3);
        let weights: u32 = weight + tenants.iter().map(|(weight, ..)| weight).sum::<u32>();
        for (starts, (weight, size, lasts)) in played.starts.iter().zip(&tenants) {
            // Half of what is due, in whole runs, less the one that may still wait for its turn.
            let due = until * f64::from(*weight) / f64::from(weights) / (as_f64(*size) / 1000.0 * lasts);
            let (got, least) = (f64::from(u32::try_from(starts.len()).unwrap()), due.min(until / lasts) / 2.0 - 1.0);
            prop_assert!(got >= least, "started {got} times, due {due}");
        }
    }

    #[test]
    fn a_large_one_comes_to_its_turn_and_small_ones_go_on_meanwhile(
        small in prop::collection::vec((10_u64..=100, 0.05_f64..4.0), 1..5),
        large in 600_u64..=1000,
    ) {
        let mut sources: Vec<_> = small.iter().enumerate().map(|(at, (size, lasts))| source(at, 1, *size, *lasts, u32::MAX)).collect();
        sources.push(source(100, 1, large, 1.0, 1));
        let played = play(sources, 60.0);
        prop_assert_eq!(played.starts.last().unwrap().len(), 1);
        prop_assert!(played.starts.last().unwrap()[0] < 20.0);
    }

    #[test]
    fn one_that_never_gets_its_room_does_not_stop_the_others(size in 10_u64..=100) {
        let forever = Source { lasts_s: None, ..source(0, 1, 500, 0.0, 1) };
        let sources = vec![forever, source(1, 1, 900, 1.0, 1), source(2, 1, size, 0.5, u32::MAX)];
        // Up to the end of a time for the others.
        let until = 1271.0;
        let played = play(sources, until);
        prop_assert_eq!(played.starts[1].len(), 0);
        let busy = played.used[2] / as_f64(500 / size * size) / until;
        prop_assert!(busy > 0.45, "{busy}");
    }
}

#[test]
fn a_newcomer_goes_before_ten_thousand_who_were_there_first() {
    let mut shares = Shares::new(NODE);
    let flood = Head { owner: owner(0, 0), weight: 100, room: room(1000), waited_s: 100.0 };
    let mut held = shares.begin(&flood.owner, 100, flood.room);
    for _ in 0..50 {
        assert_eq!(shares.next(std::slice::from_ref(&flood), Room::default()), None);
        shares.end(&held, 0.01);
        assert_eq!(shares.next(std::slice::from_ref(&flood), NODE), Some(0));
        held = shares.begin(&flood.owner, 100, flood.room);
    }
    let single = Head { owner: owner(1, 0), weight: 100, room: room(1000), waited_s: 0.0 };
    shares.end(&held, 0.01);
    assert_eq!(shares.next(&[flood, single], NODE), Some(1));
}

#[test]
fn who_is_gone_is_forgotten() {
    let mut shares = Shares::new(NODE);
    for at in 0..100 {
        let held = shares.begin(&owner(at, 0), 1, room(10));
        shares.end(&held, 1.0);
    }
    shares.next(&[], NODE);
    let late = shares.begin(&owner(1000, 0), 1, room(10));
    shares.end(&late, 0.001);
    shares.next(&[], NODE);
    assert!(shares.tenants.len() < 100, "{}", shares.tenants.len());
}

#[test]
fn room_is_held_for_half_of_the_time_at_the_most() {
    assert!(!is_held_for(-0.5));
    assert!(is_held_for(0.0) && is_held_for(4.9) && !is_held_for(5.1) && !is_held_for(9.9));
    assert!(is_held_for(10.1) && is_held_for(19.9) && !is_held_for(20.1));
    let held = (0..10_000_000).filter(|second| is_held_for(f64::from(*second))).count();
    assert!((4_990_000..=5_010_000).contains(&held), "{held}");
}
