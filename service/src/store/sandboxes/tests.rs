//! The table against a real database.

use sandbox_core::protocol::Cause;
use serde_json::json;
use sqlx::PgPool;

use super::*;
use crate::{
    sandbox::{Compile, CompileEnd, DefaultQuotas, Limits, Owner, Phases, Quotas, RequestedLimits, asked},
    store::{Admission, Admitted, Input, NewImage, NodeCapacity, Promise},
};

pub(crate) fn sandbox(tenant: &str, kind: Kind, name: Option<&str>) -> Sandbox {
    let root = "a".repeat(64);
    let now = OffsetDateTime::UNIX_EPOCH;
    Sandbox {
        id: SandboxId(Uuid::now_v7()),
        tenant: TenantId::proven(tenant.into()),
        principal: "alice".into(),
        kind,
        state: State::Starting,
        name: name.map(Into::into),
        image: ImageUsed { reference: "python".into(), digest: format!("sha256:{root}"), root: root.try_into().unwrap() },
        program: serde_json::from_value(json!({"args": ["a"], "env": [], "cwd": "/", "user": {"ids": {"uid": 0, "gid": 0}}})).unwrap(),
        compile: None,
        judging: None,
        limits: Limits::of(kind, RequestedLimits::default()).unwrap(),
        output_policy: OutputPolicy::Truncate,
        labels: BTreeMap::from([("exercise".into(), "7".into())]),
        created_at: now,
        claimed_at: Some(now),
        started_at: None,
        fences: None,
        finished_at: None,
        ttl_ms: None,
        expires_at: None,
        idle_timeout_ms: None,
        auto_remove: false,
        keep_layer: false,
        starts: 1,
        outcome: None,
        attempt: 1,
        retries_left: 0,
        claims: 1,
        keeps_input: true,
        from_pool: None,
    }
}

/// Long enough for any test.
pub(in crate::store) const HELD_FOR: std::time::Duration = std::time::Duration::from_secs(3600);

pub(in crate::store) async fn take_node(store: &Store, node: NodeId) -> Lease {
    let capacity = NodeCapacity { memory_bytes: 1, cpu_millis: 1 };
    store.take_node(node, "node", capacity, OffsetDateTime::UNIX_EPOCH, HELD_FOR).await.unwrap()
}

pub(in crate::store) async fn store_with_node(pool: PgPool) -> (Store, Lease) {
    let store = Store { pool: pool.into() };
    let now = OffsetDateTime::UNIX_EPOCH;
    let lease = take_node(&store, NodeId(Uuid::now_v7())).await;
    let root = "a".repeat(64);
    let config = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] } });
    let image = NewImage {
        tenant: None,
        reference: "python".into(),
        digest: format!("sha256:{root}"),
        root: root.try_into().unwrap(),
        config: serde_json::from_value(config).unwrap(),
        size_bytes: 1,
        created_at: now,
        origin: crate::store::Origin::Archive,
    };
    store.record_image(&image, &Quotas::default(), &act()).await.unwrap();
    (store, lease)
}

pub(in crate::store) fn act() -> Act<'static> {
    Act { actor: None, at: OffsetDateTime::UNIX_EPOCH, data: json!({}) }
}

pub(in crate::store) fn owner(sandbox: &Sandbox) -> Owner {
    Owner { tenant: sandbox.tenant.clone(), principal: sandbox.principal.clone() }
}

/// Asks for the sandbox as it is, with these quotas of every tenant and every principal.
pub(in crate::store) async fn ask(store: &Store, sandbox: &Sandbox, lease: Lease, input: &Input, defaults: &DefaultQuotas) -> Admitted {
    let ttl_ms = (sandbox.kind == Kind::Sandbox).then_some(None);
    let admission = Admission {
        sandbox,
        lease,
        input,
        cases: &[],
        asked: &asked(&sandbox.limits, ttl_ms),
        network: "none",
        isolation: "container",
        defaults,
        queue_max: 1000,
        wanted_node: None,
        key: None,
        promise: Promise::Now,
    };
    store.admit(admission).await.unwrap()
}

/// The same without quotas, by somebody who may have to be introduced.
pub(in crate::store) async fn admit(store: &Store, sandbox: &Sandbox, lease: Lease) -> bool {
    admit_with(store, sandbox, lease, &Input::default()).await
}

pub(in crate::store) async fn admit_with(store: &Store, sandbox: &Sandbox, lease: Lease, input: &Input) -> bool {
    store.introduce(&owner(sandbox), sandbox.created_at).await.unwrap();
    let none = DefaultQuotas { tenant: Quotas::default(), principal: Quotas::default() };
    matches!(ask(store, sandbox, lease, input, &none).await, Admitted::Yes { .. })
}

fn lost(sandbox: &Sandbox) -> Finish {
    let cause = Cause::InfraError { message: "gone".into() };
    Finish::without_usage(cause, OffsetDateTime::UNIX_EPOCH, &sandbox.limits, Phases::default())
}

#[sqlx::test(migrations = "../migrations")]
async fn a_sandbox_reads_back_as_it_was_admitted(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = sandbox("acme", Kind::Sandbox, Some("box"));
    assert!(admit(&store, &sandbox, lease).await);
    assert_eq!(store.find(&sandbox.tenant, sandbox.id).await.unwrap(), Some(sandbox.clone()));
    assert_eq!(store.live_of(lease.node).await.unwrap(), [sandbox]);
}

/// How far Postgres's log is on disk.
async fn flushed(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select (pg_current_wal_flush_lsn() - '0/0')::bigint").fetch_one(pool).await.unwrap()
}

/// How far it is written.
async fn written(pool: &PgPool) -> i64 {
    sqlx::query_scalar("select (pg_current_wal_insert_lsn() - '0/0')::bigint").fetch_one(pool).await.unwrap()
}

#[sqlx::test(migrations = "../migrations")]
async fn what_is_promised_later_is_on_disk_once_it_is_kept(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let run = sandbox("acme", Kind::Run, None);
    store.introduce(&owner(&run), run.created_at).await.unwrap();
    let admission = Admission {
        sandbox: &run,
        lease,
        input: &Input::default(),
        cases: &[],
        asked: &asked(&run.limits, None),
        network: "none",
        isolation: "container",
        defaults: &DefaultQuotas { tenant: Quotas::default(), principal: Quotas::default() },
        queue_max: 1000,
        wanted_node: None,
        key: None,
        promise: Promise::Later,
    };
    assert!(matches!(store.admit(admission).await.unwrap(), Admitted::Yes { .. }));
    let made = written(&pool).await;
    assert!(store.keep(run.id).await.unwrap());
    assert!(flushed(&pool).await >= made);

    // As a crash does that comes before.
    sqlx::query("delete from sandboxes where id = $1").bind(run.id.0).execute(&pool).await.unwrap();
    assert!(!store.keep(run.id).await.unwrap());
}

/// A run that is compiled first, with more memory than it has itself.
fn compiled() -> Sandbox {
    let run = sandbox("acme", Kind::Run, None);
    let (limits, step) = Limits::of_steps(RequestedLimits::default(), Some(RequestedLimits::default())).unwrap();
    let compile = Compile { program: run.program.clone(), limits: step.unwrap(), end: None };
    Sandbox { limits, compile: Some(Box::new(compile)), ..run }
}

#[sqlx::test(migrations = "../migrations")]
async fn a_run_with_a_compile_step_counts_as_what_is_larger_and_keeps_what_it_is_given(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let run = compiled();
    let input = Input { files: Some(vec![1]), stdin: Some(vec![2]) };
    assert!(admit_with(&store, &run, lease, &input).await);
    assert_eq!(store.find(&run.tenant, run.id).await.unwrap(), Some(run.clone()));
    let live = async || sqlx::query_scalar!("select live_memory_bytes from tenants where id = 'acme'").fetch_one(&pool).await.unwrap();
    assert_eq!(live().await, 512 << 20);

    // As a service does that finds it claimed, and not begun.
    let hold = Hold { lease, claims: 1 };
    let none = Input::default();
    let again = crate::store::Return::NotBegun { input: &none, until: None };
    assert!(store.give_back(run.id, hold, again, OffsetDateTime::UNIX_EPOCH).await.unwrap());
    let (claimed, given) = store.claim(run.id, lease, OffsetDateTime::UNIX_EPOCH).await.unwrap().unwrap();
    assert_eq!((claimed.compile, given), (run.compile.clone(), input));

    let finish = lost(&run);
    let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 0, log_file: LogKept::No };
    assert!(store.finish(run.id, Writer::Holder(Hold { lease, claims: 2 }), &ended).await.unwrap());
    assert_eq!(live().await, 0);
}

#[sqlx::test(migrations = "../migrations")]
async fn the_end_of_a_compile_step_is_stored_with_that_of_its_run(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let run = compiled();
    assert!(admit(&store, &run, lease).await);
    let finish = lost(&run);
    let log_tail = LogTail { bytes: vec![1, 2], stdout_omitted_bytes: 3, stderr_omitted_bytes: 4 };
    let step = CompileEnd { outcome: finish.outcome.clone(), log_tail };
    let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: Some(&step), case_bytes: 0, log_file: LogKept::No };
    assert!(store.finish(run.id, Writer::Holder(Hold { lease, claims: 1 }), &ended).await.unwrap());

    let stored = store.find(&run.tenant, run.id).await.unwrap().unwrap();
    assert_eq!(stored.compile.and_then(|compile| compile.end), Some(step));
}

#[sqlx::test(migrations = "../migrations")]
async fn another_tenants_sandbox_is_not_found(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = sandbox("acme", Kind::Sandbox, None);
    assert!(admit(&store, &sandbox, lease).await);
    let other = TenantId::proven("other".into());
    assert_eq!(store.find(&other, sandbox.id).await.unwrap(), None);
    assert_eq!(store.delete(&other, sandbox.id, &act()).await.unwrap(), None);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_name_is_given_once_to_a_tenant_and_again_to_another(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    assert!(admit(&store, &sandbox("acme", Kind::Sandbox, Some("box")), lease).await);
    let second = sandbox("acme", Kind::Sandbox, Some("box"));
    let admission = Admission {
        sandbox: &second,
        lease,
        input: &Input::default(),
        cases: &[],
        asked: &json!({}),
        network: "none",
        isolation: "container",
        defaults: &DefaultQuotas::default(),
        queue_max: 1,
        wanted_node: None,
        key: None,
        promise: Promise::Now,
    };
    assert!(matches!(store.admit(admission).await, Err(StoreError::NameTaken)));
    assert!(admit(&store, &sandbox("other", Kind::Sandbox, Some("box")), lease).await);
}

#[sqlx::test(migrations = "../migrations")]
async fn an_end_is_stored_and_counted_once(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let sandbox = sandbox("acme", Kind::Run, None);
    assert!(admit(&store, &sandbox, lease).await);
    let finish = lost(&sandbox);
    let tail = LogTail { bytes: vec![1, 2], stdout_omitted_bytes: 3, stderr_omitted_bytes: 0 };
    let ended = Ended { finish: &finish, log_tail: &tail, compile: None, case_bytes: 0, log_file: LogKept::UntilDeleted };
    let bytes = async |output_bytes| store.told_bytes(&sandbox.tenant, &[sandbox.id], output_bytes, 0).await.unwrap();
    assert_eq!(bytes(10).await, 20, "it may end with as much");

    assert!(store.finish(sandbox.id, Writer::Holder(Hold { lease, claims: 1 }), &ended).await.unwrap());
    assert!(!store.finish(sandbox.id, Writer::Holder(Hold { lease, claims: 1 }), &ended).await.unwrap());

    let stored = store.find(&sandbox.tenant, sandbox.id).await.unwrap().unwrap();
    assert_eq!((stored.state, stored.outcome.as_ref()), (State::Failed, Some(&finish.outcome)));
    assert_eq!(store.find_log(sandbox.id).await.unwrap(), Some(StoredLog { tail, has_file: true }));
    assert_eq!([bytes(10).await, bytes(2).await], [5, 4]);
    assert_eq!(store.kept_logs(lease.node, None).await.unwrap(), [sandbox.id]);
    assert_eq!(store.kept_logs(lease.node, Some((OffsetDateTime::UNIX_EPOCH, OffsetDateTime::UNIX_EPOCH))).await.unwrap(), []);
    let lines = sqlx::query_scalar!(r#"select count(*) as "count!" from usage"#).fetch_one(&pool).await.unwrap();
    let events = sqlx::query_scalar!(r#"select count(*) as "count!" from events"#).fetch_one(&pool).await.unwrap();
    // The image's import, its tenant, the sandbox's making and its end.
    assert_eq!((lines, events), (1, 4));
}

#[sqlx::test(migrations = "../migrations")]
async fn an_end_that_cannot_be_read_holds_up_no_other(pool: PgPool) {
    let (store, lease) = store_with_node(pool.clone()).await;
    let (sound, damaged) = (sandbox("acme", Kind::Run, None), sandbox("acme", Kind::Run, None));
    for run in [&sound, &damaged] {
        assert!(admit(&store, run, lease).await);
        let ended = Ended { finish: &lost(run), log_tail: &LogTail::default(), compile: None, case_bytes: 0, log_file: LogKept::No };
        assert!(store.finish(run.id, Writer::Holder(Hold { lease, claims: 1 }), &ended).await.unwrap());
    }
    sqlx::query("update sandboxes set program = '{}' where id = $1").bind(damaged.id.0).execute(&pool).await.unwrap();

    let ended = store.ended_of(&[damaged.id, sound.id]).await.unwrap();

    assert_eq!(ended.iter().map(|(sandbox, _)| sandbox.id).collect::<Vec<_>>(), [sound.id]);
}

#[sqlx::test(migrations = "../migrations")]
async fn an_end_that_knows_no_start_leaves_the_one_that_was_noted(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = sandbox("acme", Kind::Sandbox, None);
    assert!(admit(&store, &sandbox, lease).await);
    let started_at = OffsetDateTime::UNIX_EPOCH + std::time::Duration::from_secs(1);
    store.mark_running(sandbox.id, Hold { lease, claims: 1 }, started_at, Fences::everywhere()).await.unwrap();
    let finish = lost(&sandbox);
    let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 0, log_file: LogKept::No };
    store.finish(sandbox.id, Writer::Holder(Hold { lease, claims: 1 }), &ended).await.unwrap();
    assert_eq!(store.find(&sandbox.tenant, sandbox.id).await.unwrap().unwrap().started_at, Some(started_at));
}

#[sqlx::test(migrations = "../migrations")]
async fn a_running_sandbox_is_not_deleted_and_an_ended_one_is(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let sandbox = sandbox("acme", Kind::Sandbox, None);
    assert!(admit(&store, &sandbox, lease).await);
    store.mark_running(sandbox.id, Hold { lease, claims: 1 }, OffsetDateTime::UNIX_EPOCH, Fences::everywhere()).await.unwrap();
    assert_eq!(store.delete(&sandbox.tenant, sandbox.id, &act()).await.unwrap(), None);

    let finish = lost(&sandbox);
    let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 0, log_file: LogKept::No };
    store.finish(sandbox.id, Writer::Holder(Hold { lease, claims: 1 }), &ended).await.unwrap();
    let deleted = store.delete(&sandbox.tenant, sandbox.id, &act()).await.unwrap();
    assert_eq!(deleted, Some(Deleted { state: State::Failed, has_log_file: false }));
    assert_eq!(store.find(&sandbox.tenant, sandbox.id).await.unwrap(), None);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_list_is_newest_first_filtered_and_paged(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let first = sandbox("acme", Kind::Sandbox, None);
    let second = sandbox("acme", Kind::Sandbox, None);
    let run = sandbox("acme", Kind::Run, None);
    for sandbox in [&first, &second, &run] {
        assert!(admit(&store, sandbox, lease).await);
    }
    let list = async |filter: Filter| -> Vec<SandboxId> {
        store.list(&first.tenant, &filter).await.unwrap().into_iter().map(|sandbox| sandbox.id).collect()
    };
    let (id1, id2) = (first.id.max(second.id), first.id.min(second.id));
    assert_eq!(list(Filter { limit: 10, ..Filter::default() }).await, [id1, id2]);
    assert_eq!(list(Filter { limit: 1, ..Filter::default() }).await, [id1]);
    assert_eq!(list(Filter { limit: 10, behind: Some(id1), ..Filter::default() }).await, [id2]);
    assert_eq!(list(Filter { limit: 10, states: vec![State::Exited], ..Filter::default() }).await, []);
    let labels = BTreeMap::from([("exercise".to_owned(), "8".to_owned())]);
    assert_eq!(list(Filter { limit: 10, labels, ..Filter::default() }).await, []);
}

#[sqlx::test(migrations = "../migrations")]
async fn filters_of_a_list_are_combined_and_go_in_both_orders(pool: PgPool) {
    let (store, lease) = store_with_node(pool).await;
    let at = |seconds| crate::clock::Clock::System.now() + std::time::Duration::from_secs(seconds);
    let labels = |pairs: &[(&str, &str)]| pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let web =
        Sandbox { created_at: at(0), labels: labels(&[("tier", "web"), ("n", "1")]), ..sandbox("acme", Kind::Sandbox, Some("web_1")) };
    let other = Sandbox { created_at: at(100), labels: labels(&[("tier", "web")]), ..sandbox("acme", Kind::Sandbox, Some("webx1")) };
    let data = Sandbox { created_at: at(200), labels: labels(&[("tier", "data"), ("n", "")]), ..sandbox("acme", Kind::Sandbox, None) };
    for sandbox in [&web, &other, &data] {
        assert!(admit(&store, sandbox, lease).await);
    }
    let finish = lost(&web);
    let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 0, log_file: LogKept::No };
    assert!(store.finish(web.id, Writer::Holder(Hold { lease, claims: 1 }), &ended).await.unwrap());
    let list = async |filter: Filter| -> Vec<SandboxId> {
        let filter = Filter { limit: 10, order: Order::OldestFirst, ..filter };
        store.list(&web.tenant, &filter).await.unwrap().into_iter().map(|sandbox| sandbox.id).collect()
    };

    assert_eq!(list(Filter::default()).await, [web.id, other.id, data.id]);
    assert_eq!(list(Filter { behind: Some(web.id), ..Filter::default() }).await, [other.id, data.id]);
    assert_eq!(list(Filter { labels: labels(&[("tier", "web")]), ..Filter::default() }).await, [web.id, other.id]);
    assert_eq!(list(Filter { label_keys: vec!["n".into()], ..Filter::default() }).await, [web.id, data.id]);
    let both = Filter { label_keys: vec!["n".into()], labels: labels(&[("tier", "data")]), ..Filter::default() };
    assert_eq!(list(both).await, [data.id]);
    // An underscore is one, and stands for no other character.
    assert_eq!(list(Filter { name_prefix: Some("web_".into()), ..Filter::default() }).await, [web.id]);
    assert_eq!(list(Filter { name_prefix: Some("web".into()), ..Filter::default() }).await, [web.id, other.id]);
    assert_eq!(list(Filter { image: Some("python".into()), ..Filter::default() }).await.len(), 3);
    assert_eq!(list(Filter { image: Some("pytho".into()), ..Filter::default() }).await, []);
    assert_eq!(list(Filter { created: (Some(other.created_at), Some(data.created_at)), ..Filter::default() }).await, [other.id]);
    assert_eq!(list(Filter { finished: (Some(finish.finished_at), None), ..Filter::default() }).await, [web.id]);
    assert_eq!(list(Filter { finished: (None, Some(finish.finished_at)), ..Filter::default() }).await, []);
    assert_eq!(list(Filter { states: vec![State::Starting], labels: labels(&[("tier", "web")]), ..Filter::default() }).await, [other.id]);
}
