//! Service, keeper and Postgres are killed at random moments and at every named step, under a mixed load: what was promised is kept, no
//! output of what lives is lost, and nothing is left behind.
//!
//! A failure says its seed; `MAYFLY_CRASH_SEED` gives it again, `MAYFLY_CRASH_KILLS` says how many random kills there are of each victim,
//! `MAYFLY_CRASH_TURNS` how often each step is gone through, `MAYFLY_CRASH_STEPS` what the steps must hold in their names to be gone
//! through, `MAYFLY_CRASH_RUNS` how many short runs there are, and `MAYFLY_CRASH_TABLE` where counts are gathered.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

#[path = "crash/books.rs"]
mod books;
#[path = "crash/checks.rs"]
mod checks;
#[path = "crash/counts.rs"]
mod counts;
#[path = "crash/load.rs"]
mod load;
#[path = "crash/many.rs"]
mod many;
#[path = "crash/node.rs"]
mod node;
#[path = "crash/payload.rs"]
mod payload;
#[path = "crash/steps.rs"]
mod steps;
#[path = "crash/trial.rs"]
mod trial;

use mayfly_tests::{random::Random, token};
use node::{KeeperOf, Victim};
use trial::{Death, Trial};

/// A number that the environment gives under this name, or this one.
pub(crate) fn setting(name: &str, default: u64) -> u64 {
    #[expect(clippy::disallowed_methods, reason = "this is how somebody asks for another seed, or for more")]
    let given = std::env::var(name);
    given.map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

fn seed() -> u64 {
    setting("MAYFLY_CRASH_SEED", token::now_unix_s())
}

/// The steps of one process that this run goes through.
fn chosen_steps(of: &str) -> Vec<String> {
    #[expect(clippy::disallowed_methods, reason = "this is how somebody asks for some")]
    let wanted = std::env::var("MAYFLY_CRASH_STEPS").unwrap_or_default();
    let mut steps = steps::steps(of);
    steps.retain(|step| step.contains(&wanted));
    steps
}

/// A node that has a keeper of its own kind dies by each of these steps, in turn.
async fn die_at(name: &str, keeper_of: KeeperOf, victim: Victim, steps: Vec<String>, at_start: &str) {
    let mut trial = Trial::start(name, keeper_of, seed()).await;
    for _turn in 0..setting("MAYFLY_CRASH_TURNS", 1) {
        for step in &steps {
            let death = if step.starts_with(at_start) { Death::AtStart(victim, step) } else { Death::AtStep(victim, step) };
            trial.round(death).await;
        }
    }
    trial.end();
}

/// Kills at random moments, each of these victims so often, in an order that the seed gives.
async fn die_at_random(name: &str, keeper_of: KeeperOf, victims: &[Victim], default: u64) {
    let mut trial = Trial::start(name, keeper_of, seed()).await;
    let mut all: Vec<Victim> = victims.iter().flat_map(|victim| (0..setting("MAYFLY_CRASH_KILLS", default)).map(|_| *victim)).collect();
    let mut random = Random::new(seed() ^ 1);
    while !all.is_empty() {
        let at = usize::try_from(random.below(all.len() as u64)).unwrap();
        let victim = all.swap_remove(at);
        trial.round(Death::AtRandom(victim)).await;
    }
    trial.end();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_dies_at_any_step_of_a_launch_or_an_end_loses_nothing_and_leaves_nothing() {
    let steps: Vec<_> = chosen_steps("service.").into_iter().filter(|step| !is_of_images(step) && !is_of_others(step)).collect();
    die_at("service-steps", KeeperOf::Supervisor, Victim::Service, steps, "service.recover.").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_dies_at_any_step_of_an_import_or_a_removal_leaves_nothing_of_the_image() {
    let steps: Vec<_> = chosen_steps("service.").into_iter().filter(|step| is_of_images(step)).collect();
    die_at("image-steps", KeeperOf::Supervisor, Victim::Service, steps, "service.recover.").await;
}

fn is_of_images(step: &str) -> bool {
    step.starts_with("service.import.") || step.starts_with("service.image.")
}

/// What the load does not do: `tests/webhooks.rs`, `tests/volumes.rs`, `tests/pools.rs`, `tests/batch.rs`, `tests/pull.rs`, `tests/recovery.rs` and `tests/idempotency.rs` die there.
fn is_of_others(step: &str) -> bool {
    [
        "service.commit.",
        "service.webhook.",
        "service.volume.",
        "service.pool.",
        "service.batch.",
        "service.pull.",
        "service.idempotency.begun",
    ]
    .iter()
    .any(|of| step.starts_with(of))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_dies_at_any_step_of_a_launch_or_an_upgrade_leaves_nothing() {
    let steps: Vec<_> = chosen_steps("keeper.").into_iter().filter(|step| is_of_beginnings(step)).collect();
    die_at("keeper-launch-steps", KeeperOf::Supervisor, Victim::Keeper, steps, "keeper.start.").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_dies_at_any_step_of_an_end_or_of_cleaning_up_leaves_nothing() {
    let steps: Vec<_> = chosen_steps("keeper.").into_iter().filter(|step| !is_of_beginnings(step) && !is_of_what_runs(step)).collect();
    die_at("keeper-end-steps", KeeperOf::Supervisor, Victim::Keeper, steps, "keeper.start.").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keeper_that_dies_at_any_step_of_an_exec_or_of_what_a_sandbox_is_told_leaves_nothing() {
    let steps: Vec<_> = chosen_steps("keeper.").into_iter().filter(|step| is_of_what_runs(step)).collect();
    die_at("keeper-exec-steps", KeeperOf::Supervisor, Victim::Keeper, steps, "keeper.start.").await;
}

fn is_of_what_runs(step: &str) -> bool {
    step.starts_with("keeper.exec.") || step.starts_with("keeper.control.")
}

fn is_of_beginnings(step: &str) -> bool {
    ["keeper.launch.", "keeper.park.", "keeper.upgrade."].iter().any(|of| step.starts_with(of))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_dies_at_whatever_moment_nothing_is_lost_and_nothing_left_behind() {
    let victims = [Victim::Service, Victim::Keeper, Victim::Postmaster, Victim::Backend];
    die_at_random("random", KeeperOf::Service, &victims, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn beside_a_supervised_keeper_nothing_is_lost_either() {
    let victims = [Victim::Service, Victim::Keeper, Victim::Postmaster];
    die_at_random("random-supervised", KeeperOf::Supervisor, &victims, 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_short_runs_leave_nothing_and_take_no_more_memory() {
    many::runs(setting("MAYFLY_CRASH_RUNS", 2000)).await;
}
