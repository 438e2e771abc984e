//! Keys against a real database.

use std::time::Duration;

use serde_json::json;
use sqlx::PgPool;

use super::*;
use crate::{
    sandbox::{DefaultQuotas, Finish, Kind, LogTail, Phases, Sandbox, TenantId},
    store::{Admission, Admitted, Ended, Hold, Input, Lease, LogKept, Promise, Who, Writer, sandboxes::tests::*},
};

const TARGET: [u8; 32] = [1; 32];
const BODY: [u8; 32] = [2; 32];
const ASKED: Fingerprint = Fingerprint { target: TARGET, body: Some(BODY) };

fn attempt(tenant: &str, key: &str) -> HeldKey {
    let owner = Owner { tenant: TenantId::proven(tenant.into()), principal: "alice".into() };
    HeldKey { name: KeyName { owner, key: key.into() }, holder: Uuid::new_v4() }
}

fn taking(after_s: u64) -> Taking {
    let now = OffsetDateTime::UNIX_EPOCH + Duration::from_secs(after_s);
    let (node, process) = (NodeId(Uuid::from_u128(1)), Uuid::from_u128(1));
    Taking { node, process, now, expires_at: now + Duration::from_secs(1000), orphaned_before: Some(now - Duration::from_secs(100)) }
}

async fn take(store: &Store, attempt: &HeldKey, taking: &Taking) -> KeyState {
    store.take_key(attempt, &ASKED, taking).await.unwrap().expect("nobody else is there").0
}

fn kept(status: u16) -> Kept {
    let body = Some(b"{}".to_vec());
    Kept { status, content_type: Some("application/json".into()), location: Some("/v1/runs/x".into()), body, made: None }
}

const OURS: KeyState = KeyState::Ours { made: None, is_begun: false };
const BEGUN: KeyState = KeyState::Ours { made: None, is_begun: true };

/// Asks for admission as `POST /v1/runs` does.
async fn admit(store: &Store, sandbox: &Sandbox, lease: Lease, attempt: &HeldKey) -> Admitted {
    let admission = Admission {
        sandbox,
        lease,
        input: &Input::default(),
        cases: &[],
        asked: &json!({}),
        network: "none",
        isolation: "default",
        defaults: &DefaultQuotas::default(),
        queue_max: 10,
        wanted_node: None,
        key: Some(attempt),
        promise: Promise::Now,
    };
    store.admit(admission).await.unwrap()
}

async fn with_sandbox(pool: PgPool) -> (Store, Lease, Sandbox) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = sandbox("acme", Kind::Run, None);
    store.introduce(&owner(&sandbox), sandbox.created_at).await.unwrap();
    (store, lease, sandbox)
}

#[sqlx::test(migrations = "../migrations")]
async fn a_key_is_taken_once_and_answered_for_good(pool: PgPool) {
    let (store, _) = store_with_node(pool).await;
    let (first, second) = (attempt("acme", "k"), attempt("acme", "k"));

    assert_eq!(take(&store, &first, &taking(0)).await, OURS);
    assert_eq!(take(&store, &second, &taking(1)).await, KeyState::Theirs);
    // Not its holder's word.
    store.keep_answer(&second, None, &kept(404)).await.unwrap();
    assert_eq!(take(&store, &second, &taking(1)).await, KeyState::Theirs);
    store.keep_answer(&first, None, &kept(200)).await.unwrap();
    assert_eq!(take(&store, &second, &taking(500)).await, KeyState::Answered(kept(200)));
}

#[sqlx::test(migrations = "../migrations")]
async fn a_key_whose_node_is_not_heard_of_any_more_is_taken_with_what_it_made(pool: PgPool) {
    let (store, lease, sandbox) = with_sandbox(pool).await;
    let other = take_node(&store, NodeId(Uuid::now_v7())).await;
    let (first, second) = (attempt("acme", "k"), attempt("acme", "k"));
    let by = |lease: Lease| Taking { node: lease.node, ..taking(0) };
    assert_eq!(take(&store, &first, &by(lease)).await, OURS);
    assert!(matches!(admit(&store, &sandbox, lease, &first).await, Admitted::Yes { .. }));

    assert_eq!(take(&store, &second, &by(other)).await, KeyState::Theirs, "its lease holds");
    store.release(lease).await.unwrap();
    let own = Taking { orphaned_before: None, ..by(other) };
    assert_eq!(take(&store, &second, &own).await, KeyState::Theirs, "this process is at it");
    assert_eq!(take(&store, &second, &by(other)).await, KeyState::Ours { made: Some(sandbox.id), is_begun: false });
}

#[sqlx::test(migrations = "../migrations")]
async fn a_key_of_another_tenant_or_principal_is_another_key(pool: PgPool) {
    let (store, _) = store_with_node(pool).await;
    let (acme, other) = (attempt("acme", "k"), attempt("other", "k"));
    let mut bob = attempt("acme", "k");
    bob.name.owner.principal = "bob".into();

    for attempt in [&acme, &other, &bob] {
        assert_eq!(take(&store, attempt, &taking(0)).await, OURS);
    }
}

#[sqlx::test(migrations = "../migrations")]
async fn another_request_with_the_key_is_refused_before_and_after_the_answer(pool: PgPool) {
    let (store, _) = store_with_node(pool).await;
    let first = attempt("acme", "k");
    let others = [
        Fingerprint { target: TARGET, body: Some([3; 32]) },
        Fingerprint { target: [3; 32], body: Some(BODY) },
        Fingerprint { target: [3; 32], body: None },
    ];
    take(&store, &first, &taking(0)).await;
    for is_answered in [false, true] {
        if is_answered {
            store.keep_answer(&first, None, &kept(200)).await.unwrap();
        }
        for other in &others {
            let state = store.take_key(&attempt("acme", "k"), other, &taking(1)).await.unwrap().unwrap().0;
            assert_eq!(state, KeyState::Reused, "{other:?}, {is_answered}");
            let state = store.look_at_key(&first.name, other, taking(1).now).await.unwrap().unwrap();
            assert_eq!(state, KeyState::Reused, "{other:?}, {is_answered}");
        }
    }
}

#[sqlx::test(migrations = "../migrations")]
async fn a_key_given_back_is_free_for_any_request(pool: PgPool) {
    let (store, _) = store_with_node(pool).await;
    let first = attempt("acme", "k");
    take(&store, &first, &taking(0)).await;
    store.give_key_back(&first, Left::Undone, taking(100).now).await.unwrap();

    assert_eq!(store.look_at_key(&first.name, &ASKED, taking(1).now).await.unwrap(), None);
    let other = Fingerprint { target: [3; 32], body: None };
    assert_eq!(store.take_key(&attempt("acme", "k"), &other, &taking(1)).await.unwrap().unwrap().0, OURS);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_key_of_a_process_that_is_gone_is_taken_over(pool: PgPool) {
    let (store, _) = store_with_node(pool).await;
    let first = attempt("acme", "k");
    take(&store, &first, &taking(0)).await;
    let next_process = Taking { process: Uuid::from_u128(2), ..taking(1) };
    let other_node = Taking { node: NodeId(Uuid::from_u128(2)), process: Uuid::from_u128(3), ..taking(1) };
    let much_later = |taken: Taking| Taking { orphaned_before: Some(taking(200).now), ..taken };

    assert_eq!(take(&store, &attempt("acme", "k"), &other_node).await, KeyState::Theirs);
    assert_eq!(take(&store, &attempt("acme", "k"), &next_process).await, OURS);
    // The one that was thought dead has no say any more.
    store.keep_answer(&first, None, &kept(200)).await.unwrap();
    assert_eq!(take(&store, &attempt("acme", "k"), &other_node).await, KeyState::Theirs);
    assert_eq!(take(&store, &attempt("acme", "k"), &much_later(other_node)).await, OURS);
    // Nor is what is at work here ever an orphan's.
    let here = Taking { orphaned_before: None, ..other_node };
    assert_eq!(take(&store, &attempt("acme", "k"), &here).await, KeyState::Theirs);
}

#[sqlx::test(migrations = "../migrations")]
async fn what_was_begun_is_known_to_every_later_attempt_until_its_own_takes_it_back(pool: PgPool) {
    let (store, _) = store_with_node(pool).await;
    let (first, second, third) = (attempt("acme", "k"), attempt("acme", "k"), attempt("acme", "k"));
    let next_process = |after_s, number| Taking { process: Uuid::from_u128(number), ..taking(after_s) };
    take(&store, &first, &taking(0)).await;
    assert!(store.begin_keyed(&first).await.unwrap());
    assert!(!store.begin_keyed(&first).await.unwrap(), "it was begun twice");

    assert_eq!(take(&store, &second, &next_process(1, 2)).await, BEGUN);
    assert!(!store.begin_keyed(&second).await.unwrap() && !store.begin_keyed(&first).await.unwrap());
    // What it did not begin it cannot say anything of.
    store.give_key_back(&second, Left::Undone, taking(100).now).await.unwrap();
    let other = Fingerprint { target: [3; 32], body: Some(BODY) };
    assert_eq!(store.take_key(&third, &other, &taking(2)).await.unwrap().unwrap().0, KeyState::Reused);
    assert_eq!(take(&store, &third, &taking(500)).await, BEGUN);
}

#[sqlx::test(migrations = "../migrations")]
async fn what_was_begun_and_given_back_is_undone_or_unknown(pool: PgPool) {
    let (store, _) = store_with_node(pool).await;
    for (key, left, then) in [("a", Left::Undone, OURS), ("b", Left::Unknown, BEGUN)] {
        let first = attempt("acme", key);
        take(&store, &first, &taking(0)).await;
        store.begin_keyed(&first).await.unwrap();
        store.give_key_back(&first, left, taking(100).now).await.unwrap();
        assert_eq!(take(&store, &attempt("acme", key), &taking(1)).await, then);
    }
}

#[sqlx::test(migrations = "../migrations")]
async fn a_sandbox_is_tied_to_its_key_when_it_is_admitted(pool: PgPool) {
    let (store, lease, run) = with_sandbox(pool).await;
    let first = attempt("acme", "k");
    take(&store, &first, &taking(0)).await;

    assert!(matches!(admit(&store, &run, lease, &first).await, Admitted::Yes { .. }));
    store.give_key_back(&first, Left::Undone, taking(100).now).await.unwrap();
    let second = attempt("acme", "k");
    assert_eq!(take(&store, &second, &taking(1)).await, KeyState::Ours { made: Some(run.id), is_begun: false });
    // Whatever it does, it makes no other.
    assert_eq!(admit(&store, &sandbox("acme", Kind::Run, None), lease, &second).await, Admitted::KeyLost);
    let other = Fingerprint { target: [3; 32], body: Some(BODY) };
    assert_eq!(store.take_key(&attempt("acme", "k"), &other, &taking(1)).await.unwrap().unwrap().0, KeyState::Reused);
}

#[sqlx::test(migrations = "../migrations")]
async fn nobody_makes_a_sandbox_for_a_key_that_was_taken_over(pool: PgPool) {
    let (store, lease, run) = with_sandbox(pool.clone()).await;
    let (first, second) = (attempt("acme", "k"), attempt("acme", "k"));
    take(&store, &first, &taking(0)).await;
    take(&store, &second, &Taking { process: Uuid::from_u128(2), ..taking(1) }).await;

    assert_eq!(admit(&store, &run, lease, &first).await, Admitted::KeyLost);
    let rows = sqlx::query_scalar!(r#"select count(*) as "count!" from sandboxes"#).fetch_one(&pool).await.unwrap();
    let live = sqlx::query_scalar!(r#"select sum(live)::bigint as "live!" from tenants"#).fetch_one(&pool).await.unwrap();
    assert_eq!((rows, live), (0, 0));
    assert!(matches!(admit(&store, &run, lease, &second).await, Admitted::Yes { .. }));
}

#[sqlx::test(migrations = "../migrations")]
async fn the_key_of_a_sandbox_that_was_never_made_is_free(pool: PgPool) {
    let (store, lease, run) = with_sandbox(pool).await;
    let first = attempt("acme", "k");
    take(&store, &first, &taking(0)).await;
    admit(&store, &run, lease, &first).await;
    store.give_key_back(&first, Left::Undone, taking(100).now).await.unwrap();

    store.free_key_of(&first, run.id, run.claims).await.unwrap();
    let held = take(&store, &attempt("acme", "k"), &taking(1)).await;
    assert_eq!(held, KeyState::Ours { made: Some(run.id), is_begun: false }, "it lives, and its key was freed");
    let cause = sandbox_core::protocol::Cause::InfraError { message: "never made".into() };
    let finish = Finish::without_usage(cause, run.created_at, &run.limits, Phases::default());
    let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 0, log_file: LogKept::No };
    assert!(store.finish(run.id, Writer::Holder(Hold { lease, claims: run.claims }), &ended).await.unwrap());
    store.free_key_of(&first, run.id, run.claims).await.unwrap();
    assert_eq!(take(&store, &attempt("acme", "k"), &taking(1)).await, KeyState::Theirs, "another attempt answers for it");
    let second = Taking { process: Uuid::from_u128(9), ..taking(2) };
    let KeyState::Ours { made: Some(_), .. } = take(&store, &first, &second).await else { panic!("it was not taken over") };
    store.free_key_of(&first, run.id, run.claims).await.unwrap();

    assert_eq!(take(&store, &attempt("acme", "k"), &taking(3)).await, OURS);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_key_whose_time_is_over_is_as_one_that_never_was(pool: PgPool) {
    let (store, lease, run) = with_sandbox(pool).await;
    let first = attempt("acme", "k");
    take(&store, &first, &taking(0)).await;
    admit(&store, &run, lease, &first).await;
    store.keep_answer(&first, None, &kept(200)).await.unwrap();

    assert_eq!(store.prune_keys(taking(999).now, 10).await.unwrap(), 0);
    assert!(matches!(take(&store, &attempt("acme", "k"), &taking(999)).await, KeyState::Answered(_)));
    let other = Fingerprint { target: [3; 32], body: None };
    assert_eq!(store.take_key(&attempt("acme", "k"), &other, &taking(1000)).await.unwrap().unwrap().0, OURS);
    assert_eq!(store.prune_keys(taking(1999).now, 10).await.unwrap(), 0);
    assert_eq!(store.prune_keys(taking(2000).now, 10).await.unwrap(), 1);
}

#[sqlx::test(migrations = "../migrations")]
async fn of_many_at_once_one_takes_the_key(pool: PgPool) {
    let (store, _) = store_with_node(pool).await;
    let asking: Vec<_> = (0..50)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move { store.take_key(&attempt("acme", "k"), &ASKED, &taking(0)).await.unwrap() })
        })
        .collect();
    let mut ours = 0;
    for asked in asking {
        ours += u32::from(matches!(asked.await.unwrap(), Some((KeyState::Ours { .. }, _))));
    }
    assert_eq!(ours, 1);
}

#[sqlx::test(migrations = "../migrations")]
async fn whose_key_it_is_is_known_to_be_suspended(pool: PgPool) {
    let (store, _, run) = with_sandbox(pool).await;
    let who = Who { tenant: &run.tenant, principal: None };
    store.suspend(who, crate::store::Suspension::Imposed { stops: false }, &act()).await.unwrap();

    let (_, is_suspended) = store.take_key(&attempt("acme", "k"), &ASKED, &taking(0)).await.unwrap().unwrap();

    assert!(is_suspended);
}
