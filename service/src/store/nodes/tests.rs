//! Leases against a real database.

use sandbox_core::{fence::Fences, protocol::Cause};
use sqlx::PgPool;

use super::*;
use crate::{
    sandbox::{Finish, Kind, LogTail, Phases, State},
    store::{Ended, Input, LogKept, Return, Writer, sandboxes::tests::*},
};

const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

async fn finish(store: &Store, sandbox: &Sandbox, writer: Writer) -> bool {
    let cause = Cause::Exited { code: 0 };
    let finish = Finish::without_usage(cause, NOW, &sandbox.limits, Phases::default());
    let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 0, log_file: LogKept::No };
    store.finish(sandbox.id, writer, &ended).await.unwrap()
}

/// A run that may be tried so often again, and what it is given.
async fn retried(store: &Store, lease: Lease, retries_left: u32) -> (Sandbox, Input) {
    let run = Sandbox { retries_left, ..sandbox("acme", Kind::Run, None) };
    let input = Input { files: None, stdin: Some(b"given".to_vec()) };
    assert!(admit_with(store, &run, lease, &input).await);
    (run, input)
}

/// A second node beside the one of `lease`, whose own is over.
async fn take_over(store: &Store, lease: Lease) -> Lease {
    let other = take_node(store, NodeId(Uuid::now_v7())).await;
    store.release(lease).await.unwrap();
    other
}

/// Of the first claim under this lease.
const fn first(lease: Lease) -> Hold {
    Hold { lease, claims: 1 }
}

/// Whether the one other node that has something live was deposed.
async fn depose(store: &Store, own: Lease) -> bool {
    let leases = store.leases_in_use(own.node).await.unwrap();
    assert_eq!(leases.len(), 1);
    store.depose(leases[0]).await.unwrap()
}

async fn counted(pool: &PgPool) -> (i64, i64) {
    let row = sqlx::query!("select live, queued from principals").fetch_one(pool).await.unwrap();
    let tenant = sqlx::query!("select live, queued from tenants where id = 'acme'").fetch_one(pool).await.unwrap();
    assert_eq!((row.live, row.queued), (tenant.live, tenant.queued));
    (row.live, row.queued)
}

fn failed(until: OffsetDateTime) -> Return<'static> {
    Return::Failed { message: "the machine burns", until }
}

#[sqlx::test(migrations = "../migrations")]
async fn who_lost_the_lease_changes_nothing(pool: PgPool) {
    let (store, lost) = store_with_node(pool).await;
    let (run, _) = retried(&store, lost, 1).await;
    let held = take_node(&store, lost.node).await;
    assert!(held.epoch > lost.epoch);

    assert_eq!(store.renew(lost, HELD_FOR).await.unwrap(), None);
    store.mark_running(run.id, first(lost), NOW, Fences::everywhere()).await.unwrap();
    assert_eq!(store.whereabouts(run.id).await.unwrap().unwrap().state, State::Starting);
    assert!(!finish(&store, &run, Writer::Holder(first(lost))).await);
    assert!(!store.give_back(run.id, first(lost), failed(NOW), NOW).await.unwrap());
    assert!(!admit(&store, &sandbox("acme", Kind::Run, None), lost).await);
    let waiting = Sandbox { state: State::Queued, claimed_at: None, ..sandbox("acme", Kind::Run, None) };
    assert!(admit(&store, &waiting, lost).await, "whoever waits is not bound to a node");
    assert_eq!(store.claim(waiting.id, lost, NOW).await.unwrap(), None);

    assert!(store.renew(held, HELD_FOR).await.unwrap().is_some());
    assert!(store.claim(waiting.id, held, NOW).await.unwrap().is_some());
    assert!(finish(&store, &run, Writer::Holder(first(held))).await, "what was live is the next holder's");
}

#[sqlx::test(migrations = "../migrations")]
async fn what_a_dead_node_had_is_given_to_another_once(pool: PgPool) {
    let (store, dead) = store_with_node(pool.clone()).await;
    let (run, input) = retried(&store, dead, 1).await;
    let alive = take_over(&store, dead).await;

    assert!(depose(&store, alive).await);
    let abandoned = store.abandoned().await.unwrap();
    assert_eq!(abandoned.iter().map(|a| (a.sandbox.id, a.hold)).collect::<Vec<_>>(), [(run.id, first(dead))]);
    assert!(store.give_back(run.id, first(dead), failed(NOW), NOW).await.unwrap());
    assert!(!store.give_back(run.id, first(dead), failed(NOW), NOW).await.unwrap());
    assert_eq!(counted(&pool).await, (1, 1));
    let (again, given) = store.claim(run.id, alive, NOW).await.unwrap().unwrap();
    assert_eq!((again.attempt, again.retries_left, given), (2, 0, input));

    assert!(!finish(&store, &run, Writer::Holder(first(dead))).await, "the dead node came back and wrote over its successor's");
    assert!(finish(&store, &again, Writer::Holder(Hold { lease: alive, claims: again.claims })).await);
    assert_eq!(counted(&pool).await, (0, 0));
    assert_eq!(store.abandoned().await.unwrap(), []);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_node_that_holds_its_lease_is_not_deposed(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    retried(&store, lease, 1).await;
    let other = take_node(&store, NodeId(Uuid::now_v7())).await;

    assert!(!depose(&store, other).await);
    assert_eq!(store.abandoned().await.unwrap(), []);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_deposed_node_that_comes_back_takes_what_nobody_took(pool: PgPool) {
    let (store, dead) = store_with_node(pool).await;
    let (run, _) = retried(&store, dead, 0).await;
    let alive = take_over(&store, dead).await;
    assert!(depose(&store, alive).await);

    let back = take_node(&store, dead.node).await;

    assert_eq!(store.abandoned().await.unwrap(), []);
    assert!(finish(&store, &run, Writer::Holder(first(back))).await);
}

#[sqlx::test(migrations = "../migrations")]
async fn what_has_no_retry_left_does_not_go_back(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let (run, _) = retried(&store, lease, 0).await;

    assert!(!store.give_back(run.id, first(lease), failed(NOW), NOW).await.unwrap());
    assert_eq!(counted(&pool).await, (1, 0));
}

#[sqlx::test(migrations = "../migrations")]
async fn what_was_not_begun_goes_back_with_its_input_and_all_its_retries(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let run = sandbox("acme", Kind::Run, None);
    let input = Input { files: Some(vec![1]), stdin: None };
    assert!(admit_with(&store, &run, lease, &input).await);

    assert!(store.give_back(run.id, first(lease), Return::NotBegun { input: &input, until: None }, NOW).await.unwrap());
    let (again, given) = store.claim(run.id, lease, NOW).await.unwrap().unwrap();

    assert_eq!((again.attempt, again.retries_left, given), (1, 0, input));
}

/// The answer to giving it back was lost; meanwhile it was claimed again, by the same process.
#[sqlx::test(migrations = "../migrations")]
async fn what_was_said_of_one_claim_is_not_said_of_the_next(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let (run, input) = retried(&store, lease, 1).await;
    let unbegun = Return::NotBegun { input: &input, until: None };
    assert!(store.give_back(run.id, first(lease), unbegun, NOW).await.unwrap());
    let (again, _) = store.claim(run.id, lease, NOW).await.unwrap().unwrap();

    assert!(!store.give_back(run.id, first(lease), unbegun, NOW).await.unwrap());
    assert!(!finish(&store, &run, Writer::Holder(first(lease))).await);
    store.mark_running(run.id, first(lease), NOW, Fences::everywhere()).await.unwrap();

    assert_eq!(store.whereabouts(run.id).await.unwrap().unwrap().state, State::Starting);
    assert!(finish(&store, &again, Writer::Holder(Hold { lease, claims: again.claims })).await);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_claim_that_was_under_way_when_its_node_was_taken_is_the_next_holders(pool: PgPool) {
    let (store, lost) = store_with_node(pool.clone()).await;
    let held = take_node(&store, lost.node).await;
    // As a statement leaves it that began before the node was taken and ended after it.
    let (run, _) = retried(&store, held, 0).await;
    sqlx::query!("update sandboxes set epoch = $1", bigint(lost.epoch)).execute(&pool).await.unwrap();
    assert!(!finish(&store, &run, Writer::Holder(first(held))).await);

    store.adopt_late_claims(lost).await.unwrap();
    assert!(!finish(&store, &run, Writer::Holder(first(held))).await);
    store.adopt_late_claims(held).await.unwrap();

    assert!(finish(&store, &run, Writer::Holder(first(held))).await);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_lease_is_renewed_by_a_connection_of_its_own(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let mut renewer = store.renewer();
    assert!(renewer.renew(lease, HELD_FOR).await.unwrap().is_some());
    store.release(lease).await.unwrap();
    assert!(renewer.renew(lease, HELD_FOR).await.unwrap().is_some(), "nobody took it meanwhile");
    take_node(&store, lease.node).await;
    assert_eq!(renewer.renew(lease, HELD_FOR).await.unwrap(), None);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_run_that_failed_here_is_left_to_others_for_a_while_if_there_are_any(pool: PgPool) {
    let (store, here) = store_with_node(pool).await;
    let (run, _) = retried(&store, here, 1).await;
    let until = NOW + Duration::from_secs(10);
    store.give_back(run.id, first(here), failed(until), NOW).await.unwrap();
    let first =
        async |node: NodeId, now: OffsetDateTime| store.next_queued(1, node, now).await.unwrap().first().map(|candidate| candidate.id);

    assert_eq!(first(here.node, NOW).await, Some(run.id), "nobody else is there");
    let other = take_node(&store, NodeId(Uuid::now_v7())).await;
    assert_eq!(first(here.node, NOW).await, None);
    assert_eq!(first(other.node, NOW).await, Some(run.id));
    assert_eq!(first(here.node, until).await, Some(run.id));
    store.drain_node(other.node, None, &act()).await.unwrap();
    assert_eq!(first(here.node, NOW).await, Some(run.id));
}

#[sqlx::test(migrations = "../migrations")]
async fn a_drained_node_takes_nothing_until_it_is_resumed(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let waiting = Sandbox { state: State::Queued, claimed_at: None, ..sandbox("acme", Kind::Run, None) };
    assert!(store.drain_node(lease.node, Some(NOW), &act()).await.unwrap());

    assert_eq!(store.renew(lease, HELD_FOR).await.unwrap(), Some(Orders { is_drained: true, evict_at: Some(NOW) }));
    assert!(!admit(&store, &sandbox("acme", Kind::Run, None), lease).await);
    assert!(admit(&store, &waiting, lease).await);
    assert_eq!(store.claim(waiting.id, lease, NOW).await.unwrap(), None);

    assert!(store.resume_node(lease.node, &act()).await.unwrap());
    assert_eq!(store.renew(lease, HELD_FOR).await.unwrap(), Some(Orders::default()));
    assert!(store.claim(waiting.id, lease, NOW).await.unwrap().is_some());
    assert!(!store.drain_node(NodeId(Uuid::now_v7()), None, &act()).await.unwrap());
}

#[sqlx::test(migrations = "../migrations")]
async fn a_node_whose_host_is_renamed_is_the_same_node(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let capacity = Capacity { memory_bytes: 2, cpu_millis: 2 };
    store.take_node(lease.node, "new:/var/lib/mayfly", capacity, NOW, HELD_FOR).await.unwrap();

    let nodes = store.list_nodes(None).await.unwrap();

    assert_eq!(
        nodes.iter().map(|node| (node.id, node.name.as_str(), node.capacity)).collect::<Vec<_>>(),
        [(lease.node, "new:/var/lib/mayfly", capacity)]
    );
}
