//! Pauses, changes and removals against a real database.

use std::collections::BTreeSet;

use sandbox_core::{fence::Fences, protocol::Cause};
use serde_json::json;
use sqlx::PgPool;

use super::*;
use crate::{
    sandbox::{ChangeRequest, Finish, Kind, LogTail, Phases, Quotas, RequestedLimits, State},
    store::{Ended, EventFilter, LogKept, Writer, sandboxes::tests::*},
};

const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

fn none() -> DefaultQuotas {
    DefaultQuotas { tenant: Quotas::default(), principal: Quotas::default() }
}

async fn running(store: &Store, lease: Lease, sandbox: &Sandbox) -> Hold {
    assert!(admit(store, sandbox, lease).await);
    let hold = Hold { lease, claims: 1 };
    store.mark_running(sandbox.id, hold, NOW, Fences::everywhere()).await.unwrap();
    hold
}

async fn end(store: &Store, sandbox: &Sandbox, hold: Hold) {
    let finish = Finish::without_usage(Cause::InfraError { message: "gone".into() }, NOW, &sandbox.limits, Phases::default());
    let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 0, log_file: LogKept::No };
    assert!(store.finish(sandbox.id, Writer::Holder(hold), &ended).await.unwrap());
}

async fn kinds(store: &Store, sandbox: &Sandbox) -> Vec<String> {
    let filter = EventFilter { sandbox: Some(sandbox.id), limit: 100, ..EventFilter::default() };
    store.list_events(&filter).await.unwrap().into_iter().rev().map(|told| told.kind).collect()
}

async fn state(store: &Store, sandbox: &Sandbox) -> State {
    store.whereabouts(sandbox.id).await.unwrap().unwrap().state
}

#[sqlx::test(migrations = "../migrations")]
async fn a_pause_is_noted_once_with_its_event_and_so_is_its_end(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = sandbox("acme", Kind::Sandbox, None);
    assert!(admit(&store, &sandbox, lease).await);
    let hold = Hold { lease, claims: 1 };
    let mark = async |hold, is_paused| store.mark_paused(sandbox.id, hold, is_paused, (NOW, Fences::everywhere()), &act()).await.unwrap();

    assert!(!mark(hold, false).await, "it is not paused");
    // Before anybody had time to note that it runs.
    assert!(mark(hold, true).await);
    assert!(!mark(hold, true).await);
    assert_eq!(state(&store, &sandbox).await, State::Paused);
    store.mark_running(sandbox.id, hold, NOW, Fences::everywhere()).await.unwrap();
    assert_eq!(state(&store, &sandbox).await, State::Paused, "what comes late changes nothing");
    assert_eq!(store.live_of(lease.node).await.unwrap().len(), 1);

    assert!(mark(hold, false).await);
    assert_eq!(state(&store, &sandbox).await, State::Running);
    assert_eq!(store.find(&sandbox.tenant, sandbox.id).await.unwrap().unwrap().started_at, Some(NOW));
    assert_eq!(kinds(&store, &sandbox).await, ["sandbox.created", "sandbox.paused", "sandbox.resumed"]);
}

#[sqlx::test(migrations = "../migrations")]
async fn only_who_holds_it_can_pause_it_and_it_can_end_like_that(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = sandbox("acme", Kind::Sandbox, None);
    let hold = running(&store, lease, &sandbox).await;
    let mark = async |hold| store.mark_paused(sandbox.id, hold, true, (NOW, Fences::everywhere()), &act()).await.unwrap();

    assert!(!mark(Hold { claims: 2, ..hold }).await);
    assert!(!mark(Hold { lease: Lease { epoch: lease.epoch + 1, ..lease }, ..hold }).await);
    assert_eq!(state(&store, &sandbox).await, State::Running);
    assert!(mark(hold).await);
    end(&store, &sandbox, hold).await;
    assert!(!mark(hold).await);
    assert_eq!(state(&store, &sandbox).await, State::Failed);
}

async fn change(store: &Store, sandbox: &Sandbox, body: Value, defaults: &DefaultQuotas) -> Result<Sandbox, Box<Exceeded>> {
    let change = serde_json::from_value::<ChangeRequest>(body).unwrap().parse().unwrap();
    let mut changing = store.begin_change(&sandbox.tenant, sandbox.id).await.unwrap().unwrap();
    let next = change.apply(&changing.sandbox, NOW).unwrap();
    let act = Act { data: change.told(), ..act() };
    match changing.write(&next, &change.asked(), defaults, &act).await.unwrap() {
        Ok(()) => changing.commit().await.unwrap(),
        Err(exceeded) => {
            changing.rollback().await.unwrap();
            return Err(exceeded);
        }
    }
    assert_eq!(store.find(&sandbox.tenant, sandbox.id).await.unwrap(), Some(next.clone()));
    Ok(next)
}

async fn counted(pool: &PgPool) -> Vec<(i64, i64)> {
    let rows = sqlx::query!(
        "select live_memory_bytes, live_cpu_millis from principals union all select live_memory_bytes, live_cpu_millis from tenants"
    );
    rows.fetch_all(pool).await.unwrap().into_iter().map(|row| (row.live_memory_bytes.unwrap(), row.live_cpu_millis.unwrap())).collect()
}

#[sqlx::test(migrations = "../migrations")]
async fn a_change_of_limits_is_counted_for_tenant_and_principal_until_the_end(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let sandbox = sandbox("acme", Kind::Sandbox, Some("box"));
    let hold = running(&store, lease, &sandbox).await;

    change(&store, &sandbox, json!({"limits": {"memory_bytes": 64 << 20, "cpu_millis": 2000}}), &none()).await.unwrap();
    assert_eq!(counted(&pool).await, [(64 << 20, 2000), (64 << 20, 2000)]);
    change(&store, &sandbox, json!({"labels": {"a": "b"}, "name": "other", "ttl_ms": 5000}), &none()).await.unwrap();
    assert_eq!(counted(&pool).await, [(64 << 20, 2000), (64 << 20, 2000)]);
    assert_eq!(store.find_named(&sandbox.tenant, "other").await.unwrap(), Some(sandbox.id));
    assert_eq!(store.find_named(&sandbox.tenant, "box").await.unwrap(), None);

    end(&store, &sandbox, hold).await;
    change(&store, &sandbox, json!({"limits": {"memory_bytes": 128 << 20}}), &none()).await.unwrap();
    assert_eq!(counted(&pool).await, [(0, 0), (0, 0)]);
    let expected = ["sandbox.created", "sandbox.updated", "sandbox.updated", "sandbox.ended", "sandbox.updated"];
    assert_eq!(kinds(&store, &sandbox).await, expected);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_change_that_a_quota_forbids_changes_nothing(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let sandbox = sandbox("acme", Kind::Sandbox, None);
    running(&store, lease, &sandbox).await;
    let of = |tenant: Value, principal: Value| DefaultQuotas {
        tenant: serde_json::from_value(tenant).unwrap(),
        principal: serde_json::from_value(principal).unwrap(),
    };
    let grown = json!({"limits": {"memory_bytes": 512 << 20}});
    let before = counted(&pool).await;

    for (quotas, name) in [
        (of(json!({"memory_bytes": 300 << 20}), json!({})), "memory_bytes"),
        (of(json!({}), json!({"memory_bytes": 300 << 20})), "memory_bytes"),
        (of(json!({"largest_memory_bytes": 300 << 20}), json!({})), "largest_memory_bytes"),
    ] {
        let exceeded = change(&store, &sandbox, grown.clone(), &quotas).await.unwrap_err();
        assert_eq!(exceeded.quota, name);
    }
    let without_end = change(&store, &sandbox, json!({"ttl_ms": null}), &of(json!({"largest_ttl_ms": 1}), json!({}))).await;
    assert_eq!(without_end.unwrap_err().quota, "largest_ttl_ms");
    assert_eq!(counted(&pool).await, before);
    assert_eq!(kinds(&store, &sandbox).await, ["sandbox.created"]);
    // Less is always allowed, also to those who have too much already.
    let small = of(json!({"memory_bytes": 1}), json!({}));
    change(&store, &sandbox, json!({"limits": {"memory_bytes": 64 << 20}}), &small).await.unwrap();
    assert_eq!(store.find(&sandbox.tenant, sandbox.id).await.unwrap().unwrap().limits.memory_bytes(), 64 << 20);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_name_that_is_taken_is_not_given_by_a_change(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    assert!(admit(&store, &sandbox("acme", Kind::Sandbox, Some("taken")), lease).await);
    let second = sandbox("acme", Kind::Sandbox, None);
    running(&store, lease, &second).await;
    let mut changing = store.begin_change(&second.tenant, second.id).await.unwrap().unwrap();
    let next = Sandbox { name: Some("taken".into()), ..changing.sandbox.clone() };
    assert!(matches!(changing.write(&next, &json!({}), &none(), &act()).await, Err(StoreError::NameTaken)));
    changing.rollback().await.unwrap();
    assert_eq!(store.find(&second.tenant, second.id).await.unwrap().unwrap().name, None);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_change_that_is_given_up_leaves_no_trace(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let sandbox = sandbox("acme", Kind::Sandbox, None);
    running(&store, lease, &sandbox).await;
    let before = counted(&pool).await;
    {
        let mut changing = store.begin_change(&sandbox.tenant, sandbox.id).await.unwrap().unwrap();
        let asked: RequestedLimits = serde_json::from_value(json!({"memory_bytes": 64 << 20})).unwrap();
        let limits = crate::sandbox::Limits::of(Kind::Sandbox, asked).unwrap();
        let next = Sandbox { limits, ..changing.sandbox.clone() };
        changing.write(&next, &json!({}), &none(), &act()).await.unwrap().unwrap();
        // Dropped, as by a service that dies between the keeper and the commit.
    }
    // Waits until the server has noticed.
    drop(store.begin_change(&sandbox.tenant, sandbox.id).await.unwrap().unwrap());
    assert_eq!(counted(&pool).await, before);
    assert_eq!(kinds(&store, &sandbox).await, ["sandbox.created"]);
}

#[sqlx::test(migrations = "../migrations")]
async fn another_tenants_sandbox_and_a_run_are_not_changed(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let (sandbox, run) = (sandbox("acme", Kind::Sandbox, Some("box")), sandbox("acme", Kind::Run, None));
    running(&store, lease, &sandbox).await;
    running(&store, lease, &run).await;
    let other = TenantId::proven("other".into());
    assert!(store.begin_change(&other, sandbox.id).await.unwrap().is_none());
    assert!(store.begin_change(&run.tenant, run.id).await.unwrap().is_none());
    assert_eq!(store.find_named(&other, "box").await.unwrap(), None);
}

#[sqlx::test(migrations = "../migrations")]
async fn only_what_has_ended_and_was_to_be_removed_is_found_for_that(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let doomed = Sandbox { auto_remove: true, ..sandbox("acme", Kind::Sandbox, None) };
    let kept = sandbox("acme", Kind::Sandbox, None);
    let hold = running(&store, lease, &doomed).await;
    running(&store, lease, &kept).await;
    let later = NOW + std::time::Duration::from_secs(1);
    assert_eq!(store.to_be_removed(later, 10).await.unwrap(), []);
    end(&store, &doomed, hold).await;
    end(&store, &kept, hold).await;
    assert_eq!(store.to_be_removed(later, 10).await.unwrap(), [(doomed.tenant.clone(), doomed.id)]);
    assert_eq!(store.to_be_removed(NOW, 10).await.unwrap(), []);
}

#[sqlx::test(migrations = "../migrations")]
async fn another_life_is_counted_like_the_first_and_has_a_line_of_its_own(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let sandbox = Sandbox { keep_layer: true, ttl_ms: Some(5000), ..sandbox("acme", Kind::Sandbox, None) };
    let hold = running(&store, lease, &sandbox).await;
    let before = counted(&pool).await;
    end(&store, &sandbox, hold).await;
    assert_eq!(store.with_kept_layers(lease.node).await.unwrap().len(), 1);

    let mut changing = store.begin_change(&sandbox.tenant, sandbox.id).await.unwrap().unwrap();
    assert_eq!(changing.start(lease, &none(), &act()).await.unwrap(), StartedAgain::Yes { weight: 100 });
    let next = changing.reread().await.unwrap();
    changing.commit().await.unwrap();

    assert_eq!((next.state, next.starts, next.claims, next.outcome.clone()), (State::Starting, 2, 2, None));
    assert_eq!(next.expires_at, Some(NOW + std::time::Duration::from_secs(5)));
    assert_eq!(counted(&pool).await, before);
    assert_eq!(store.with_kept_layers(lease.node).await.unwrap(), []);
    end(&store, &sandbox, Hold { lease, claims: 2 }).await;
    assert_eq!(counted(&pool).await, [(0, 0), (0, 0)]);
    let lines = sqlx::query_scalar!(r#"select count(*) as "count!" from usage"#).fetch_one(&pool).await.unwrap();
    assert_eq!(lines, 2);
    assert_eq!(kinds(&store, &sandbox).await, ["sandbox.created", "sandbox.ended", "sandbox.started", "sandbox.ended"]);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_start_that_a_quota_or_the_queue_forbids_changes_nothing(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let sandbox = Sandbox { keep_layer: true, ..sandbox("acme", Kind::Sandbox, None) };
    let hold = running(&store, lease, &sandbox).await;
    end(&store, &sandbox, hold).await;
    let start = async |lease, defaults: &DefaultQuotas| {
        let mut changing = store.begin_change(&sandbox.tenant, sandbox.id).await.unwrap().unwrap();
        let answer = changing.start(lease, defaults, &act()).await.unwrap();
        changing.rollback().await.unwrap();
        answer
    };

    let none_at_all = DefaultQuotas { tenant: serde_json::from_value(json!({"sandboxes": 0})).unwrap(), principal: Quotas::default() };
    assert!(matches!(start(lease, &none_at_all).await, StartedAgain::Exceeded(exceeded) if exceeded.quota == "sandboxes"));
    assert_eq!(start(Lease { epoch: lease.epoch + 1, ..lease }, &none()).await, StartedAgain::Behind);
    let waiting = Sandbox { state: State::Queued, claimed_at: None, ..super::super::sandboxes::tests::sandbox("other", Kind::Run, None) };
    assert!(admit(&store, &waiting, lease).await);
    assert_eq!(start(lease, &none()).await, StartedAgain::Behind);
    assert_eq!(state(&store, &sandbox).await, State::Failed);
    assert_eq!(kinds(&store, &sandbox).await, ["sandbox.created", "sandbox.ended"]);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_row_with_a_layer_is_not_pruned_until_that_is_given_up(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = Sandbox { keep_layer: true, ..sandbox("acme", Kind::Sandbox, None) };
    let hold = running(&store, lease, &sandbox).await;
    end(&store, &sandbox, hold).await;
    let later = crate::clock::Clock::System.now() + std::time::Duration::from_secs(60);

    assert_eq!(store.prune_sandboxes(later, 10).await.unwrap(), 0);
    assert_eq!(store.layers_of_gone_nodes(NOW + std::time::Duration::from_secs(1)).await.unwrap(), []);
    store.give_up_layers(&[sandbox.id]).await.unwrap();
    assert_eq!(store.prune_sandboxes(later, 10).await.unwrap(), 1);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_layer_is_wanted_where_its_sandbox_lives_or_ended_and_as_long_as_it_is_kept(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = Sandbox { keep_layer: true, ..sandbox("acme", Kind::Sandbox, None) };
    let gone = SandboxId(uuid::Uuid::now_v7());
    let elsewhere = NodeId(uuid::Uuid::now_v7());
    let unwanted = async |node| BTreeSet::from_iter(store.unwanted_layers(node, &[sandbox.id, gone]).await.unwrap());

    let hold = running(&store, lease, &sandbox).await;
    assert_eq!(unwanted(lease.node).await, BTreeSet::from([gone]));
    end(&store, &sandbox, hold).await;
    assert_eq!(unwanted(lease.node).await, BTreeSet::from([gone]));
    assert_eq!(unwanted(elsewhere).await, BTreeSet::from([sandbox.id, gone]));
    store.give_up_layers(&[sandbox.id]).await.unwrap();
    assert_eq!(unwanted(lease.node).await, BTreeSet::from([sandbox.id, gone]));
}

#[sqlx::test(migrations = "../migrations")]
async fn what_keeps_its_layer_needs_its_image_until_that_is_given_up(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = Sandbox { keep_layer: true, ..sandbox("acme", Kind::Sandbox, None) };
    let hold = running(&store, lease, &sandbox).await;
    end(&store, &sandbox, hold).await;

    store.remove_image(None, "python", &act()).await.unwrap().unwrap();

    assert!(store.needs_root(&sandbox.image.root).await.unwrap());
    store.give_up_layers(&[sandbox.id]).await.unwrap();
    assert!(!store.needs_root(&sandbox.image.root).await.unwrap());
}
