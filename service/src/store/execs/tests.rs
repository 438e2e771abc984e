//! The table against a real database.

use sandbox_core::protocol::{Cause, OutputPolicy};
use sqlx::PgPool;

use super::*;
use crate::{
    sandbox::{ExecPlan, Kind, Owner, Phases, Quotas},
    store::{
        EventFilter, Fingerprint, HeldKey, KeyName, KeyState, LogKept, Taking, Writer,
        sandboxes::{
            Ended,
            tests::{act, admit, sandbox, store_with_node},
        },
    },
};

const NO_QUOTAS: fn() -> DefaultQuotas = || DefaultQuotas { tenant: Quotas::default(), principal: Quotas::default() };

fn exec_of(sandbox: &Sandbox) -> Exec {
    Exec {
        id: SandboxId(Uuid::now_v7()),
        sandbox: sandbox.id,
        tenant: sandbox.tenant.clone(),
        principal: "bob".into(),
        state: ExecState::Starting,
        plan: ExecPlan {
            command: vec!["true".into()],
            env: [("A".to_owned(), "1".to_owned())].into(),
            workdir: None,
            user: None,
            has_open_stdin: false,
            terminal: None,
            wall_ms: Some(7),
            output_bytes: 9,
            output_policy: OutputPolicy::Kill,
        },
        created_at: OffsetDateTime::UNIX_EPOCH,
        started_at: None,
        finished_at: None,
        outcome: None,
    }
}

fn ended(sandbox: &Sandbox) -> Finish {
    Finish::without_usage(Cause::Exited { code: 3 }, OffsetDateTime::UNIX_EPOCH, &sandbox.limits, Phases::default())
}

async fn running(store: &Store, lease: crate::store::Lease) -> Sandbox {
    let sandbox = sandbox("acme", Kind::Sandbox, None);
    assert!(admit(store, &sandbox, lease).await);
    sandbox
}

#[sqlx::test(migrations = "../migrations")]
async fn an_exec_reads_back_as_it_was_admitted_and_is_its_tenants_alone(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = running(&store, lease).await;
    let exec = exec_of(&sandbox);

    assert_eq!(store.admit_exec(&exec, &NO_QUOTAS(), None).await.unwrap(), ExecAdmitted::Yes);

    assert_eq!(store.find_exec(&sandbox.tenant, sandbox.id, exec.id).await.unwrap(), Some(exec.clone()));
    assert_eq!(store.live_execs_of(lease.node).await.unwrap(), std::slice::from_ref(&exec));
    assert_eq!(store.find_exec(&TenantId::proven("other".into()), sandbox.id, exec.id).await.unwrap(), None);
    assert_eq!(store.list_execs(&sandbox.tenant, sandbox.id, Some(exec.id), 9).await.unwrap(), []);
}

#[sqlx::test(migrations = "../migrations")]
async fn an_end_is_stored_once_and_told_once(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = running(&store, lease).await;
    let exec = exec_of(&sandbox);
    store.admit_exec(&exec, &NO_QUOTAS(), None).await.unwrap();
    let (finish, log_tail) = (ended(&sandbox), LogTail::default());
    let end = ExecEnded { finish: &finish, log_tail: &log_tail, has_log_file: true };

    assert!(store.finish_exec(exec.id, &end).await.unwrap());
    assert!(!store.finish_exec(exec.id, &end).await.unwrap());

    let told = store.list_events(&EventFilter { kinds: vec!["exec.ended".into()], limit: 9, ..EventFilter::default() }).await.unwrap();
    assert_eq!(told.iter().map(|event| event.object.clone()).collect::<Vec<_>>(), [format!("exec/{}", exec.id)]);
    assert_eq!(store.execs_among(&[exec.id, sandbox.id], true).await.unwrap(), [exec.id]);
    assert_eq!(store.live_execs_of(lease.node).await.unwrap(), []);
}

#[sqlx::test(migrations = "../migrations")]
async fn the_last_place_in_a_sandbox_is_given_once(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = running(&store, lease).await;
    let quotas = DefaultQuotas { tenant: serde_json::from_str(r#"{"execs":1}"#).unwrap(), principal: Quotas::default() };
    let (one, other) = (exec_of(&sandbox), exec_of(&sandbox));

    let (one, other) = tokio::join!(store.admit_exec(&one, &quotas, None), store.admit_exec(&other, &quotas, None));

    let answers = [one.unwrap(), other.unwrap()];
    assert_eq!(answers.iter().filter(|answer| **answer == ExecAdmitted::Yes).count(), 1, "{answers:?}");
    assert!(answers.iter().any(|answer| matches!(answer, ExecAdmitted::Exceeded(exceeded) if exceeded.quota == "execs")), "{answers:?}");
}

#[sqlx::test(migrations = "../migrations")]
async fn nothing_is_started_in_what_has_ended_and_what_was_goes_with_it(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = running(&store, lease).await;
    let exec = exec_of(&sandbox);
    store.admit_exec(&exec, &NO_QUOTAS(), None).await.unwrap();
    let hold = store.whereabouts(sandbox.id).await.unwrap().unwrap().hold.unwrap();
    let (finish, log_tail) = (ended(&sandbox), LogTail::default());
    let end = Ended { finish: &finish, log_tail: &log_tail, compile: None, case_bytes: 0, log_file: LogKept::No };
    assert!(store.finish(sandbox.id, Writer::Holder(hold), &end).await.unwrap());

    let late = store.admit_exec(&exec_of(&sandbox), &NO_QUOTAS(), None).await.unwrap();
    assert!(matches!(late, ExecAdmitted::NotRunning(Some(State::Exited | State::Failed))), "{late:?}");
    let later = OffsetDateTime::UNIX_EPOCH + std::time::Duration::from_secs(1);
    assert_eq!(store.orphaned_execs(later, 9).await.unwrap().len(), 1);

    store.delete(&sandbox.tenant, sandbox.id, &act()).await.unwrap().unwrap();
    assert_eq!(store.find_exec_anywhere(&sandbox.tenant, exec.id).await.unwrap(), None);
    assert_eq!(store.admit_exec(&exec, &NO_QUOTAS(), None).await.unwrap(), ExecAdmitted::NotRunning(None));
}

#[sqlx::test(migrations = "../migrations")]
async fn a_key_has_one_exec(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = running(&store, lease).await;
    let owner = Owner { tenant: sandbox.tenant.clone(), principal: "bob".into() };
    let key = HeldKey { name: KeyName { owner, key: "k".into() }, holder: Uuid::new_v4() };
    let now = OffsetDateTime::UNIX_EPOCH;
    let later = now + std::time::Duration::from_secs(60);
    let taking = Taking { node: lease.node, process: Uuid::new_v4(), now, expires_at: later, orphaned_before: None };
    let print = Fingerprint { target: [1; 32], body: Some([2; 32]) };
    store.take_key(&key, &print, &taking).await.unwrap();
    let exec = exec_of(&sandbox);

    assert_eq!(store.admit_exec(&exec, &NO_QUOTAS(), Some(&key)).await.unwrap(), ExecAdmitted::Yes);
    assert_eq!(store.admit_exec(&exec_of(&sandbox), &NO_QUOTAS(), Some(&key)).await.unwrap(), ExecAdmitted::KeyLost);

    store.give_key_back(&key, crate::store::Left::Undone, later).await.unwrap();
    let (state, _) = store.take_key(&key, &print, &taking).await.unwrap().unwrap();
    assert_eq!(state, KeyState::Ours { made: Some(exec.id), is_begun: false });
}

#[sqlx::test(migrations = "../migrations")]
async fn what_ended_long_ago_is_dropped_when_no_node_keeps_its_log(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = running(&store, lease).await;
    let (finish, log_tail) = (ended(&sandbox), LogTail::default());
    let exec = exec_of(&sandbox);
    store.admit_exec(&exec, &NO_QUOTAS(), None).await.unwrap();
    store.finish_exec(exec.id, &ExecEnded { finish: &finish, log_tail: &log_tail, has_log_file: true }).await.unwrap();
    let later = OffsetDateTime::UNIX_EPOCH + std::time::Duration::from_secs(1);

    assert_eq!(store.prune_execs(later, 9).await.unwrap(), 0);
    assert_eq!(store.overdue_exec_logs(lease.node, later).await.unwrap(), [exec.id]);
    store.drop_exec_logs(&[exec.id]).await.unwrap();
    assert_eq!(store.prune_execs(later, 9).await.unwrap(), 1);
}
