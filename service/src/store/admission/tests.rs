//! Quotas against a real database, with many asking at once.

use std::time::Duration;

use serde_json::json;
use sqlx::PgPool;
use time::macros::datetime;

use super::*;
use crate::{
    sandbox::{Finish, Kind, LogTail, Phases, SandboxId, TenantId},
    store::{Ended, GroupBy, LogKept, Standing, Suspension, UsageQuery, Who, Writer, sandboxes::tests::*},
};

/// So often somebody races for the last place.
const RACES: u32 = 1000;

fn quotas(tenant: Value, principal: Value) -> DefaultQuotas {
    DefaultQuotas { tenant: serde_json::from_value(tenant).unwrap(), principal: serde_json::from_value(principal).unwrap() }
}

fn of(tenant: &str, principal: &str) -> Sandbox {
    Sandbox { principal: principal.into(), ..sandbox(tenant, Kind::Run, None) }
}

fn done(sandbox: &Sandbox) -> Finish {
    let cause = sandbox_core::protocol::Cause::InfraError { message: "gone".into() };
    Finish::without_usage(cause, sandbox.created_at, &sandbox.limits, Phases::default())
}

async fn finish(store: &Store, sandbox: &Sandbox, finish: &Finish) {
    let tail = LogTail::default();
    let ended = Ended { finish, log_tail: &tail, compile: None, case_bytes: 0, log_file: LogKept::No };
    let place = store.whereabouts(sandbox.id).await.unwrap().unwrap();
    assert!(store.finish(sandbox.id, place.hold.map_or(Writer::Queue, Writer::Holder), &ended).await.unwrap());
}

async fn ready(pool: PgPool, owners: &[Sandbox]) -> (Store, Lease) {
    let (store, lease) = store_with_node(pool).await;
    for sandbox in owners {
        store.introduce(&owner(sandbox), sandbox.created_at).await.unwrap();
    }
    (store, lease)
}

/// What is counted in the rows of tenants and principals is what there is.
async fn assert_counted(pool: &PgPool) {
    let wrong = sqlx::query_scalar!(
        r#"select count(*) as "count!" from principals
        where (live, live_memory_bytes, live_cpu_millis, queued, log_bytes) is distinct from (
            select (count(*) filter (where outcome is null), coalesce(sum(memory_bytes) filter (where outcome is null), 0)::bigint,
                coalesce(sum(cpu_millis) filter (where outcome is null), 0)::bigint, count(*) filter (where state = 'queued'),
                coalesce(sum(log_bytes), 0)::bigint)
            from sandboxes where tenant = principals.tenant and principal = principals.name
        )"#
    )
    .fetch_one(pool)
    .await
    .unwrap();
    let uneven = sqlx::query_scalar!(
        r#"select count(*) as "count!" from tenants
        where (live, live_memory_bytes, live_cpu_millis, queued, log_bytes) is distinct from (
            select (coalesce(sum(live), 0)::bigint, coalesce(sum(live_memory_bytes), 0)::bigint,
                coalesce(sum(live_cpu_millis), 0)::bigint, coalesce(sum(queued), 0)::bigint, coalesce(sum(log_bytes), 0)::bigint)
            from principals where tenant = tenants.id
        )"#
    )
    .fetch_one(pool)
    .await
    .unwrap();
    assert_eq!((wrong, uneven), (0, 0));
}

/// All four ask at once, again and again; never do more of one owner get in than there are places.
async fn race(
    pool: PgPool,
    owners: [(&'static str, &'static str); 4],
    quotas: DefaultQuotas,
    places: usize,
    group: fn(&Sandbox) -> String,
) {
    let all = owners.map(|(tenant, principal)| of(tenant, principal));
    let (store, lease) = ready(pool.clone(), &all).await;
    let mut got_in = 0;
    for round in 0..RACES {
        let asking = owners.map(|(tenant, principal)| {
            let (store, quotas, sandbox) = (store.clone(), quotas.clone(), of(tenant, principal));
            tokio::spawn(async move {
                let is_in = matches!(ask(&store, &sandbox, lease, &Input::default(), &quotas).await, Admitted::Yes { .. });
                is_in.then_some(sandbox)
            })
        });
        let mut inside = Vec::new();
        for asked in asking {
            inside.extend(asked.await.unwrap());
        }
        let mut groups: Vec<_> = inside.iter().map(group).collect();
        groups.sort();
        for group in groups.chunk_by(|one, other| one == other) {
            assert!(group.len() <= places, "{} of {} got in at {round}", group.len(), group[0]);
        }
        got_in += inside.len();
        for sandbox in &inside {
            finish(&store, sandbox, &done(sandbox)).await;
        }
    }
    // One always does, of each who has a place of their own.
    let groups: std::collections::HashSet<_> = all.iter().map(group).collect();
    assert_eq!(got_in, usize::try_from(RACES).unwrap() * groups.len() * places);
    assert_counted(&pool).await;
}

#[sqlx::test(migrations = "../migrations")]
async fn the_last_place_of_each_of_two_tenants_is_given_once(pool: PgPool) {
    let owners = [("acme", "alice"), ("acme", "bob"), ("other", "alice"), ("other", "bob")];
    race(pool, owners, quotas(json!({"sandboxes": 1}), json!({})), 1, |sandbox| sandbox.tenant.to_string()).await;
}

#[sqlx::test(migrations = "../migrations")]
async fn the_last_place_of_each_of_two_principals_is_given_once(pool: PgPool) {
    let owners = [("acme", "alice"), ("acme", "alice"), ("acme", "bob"), ("acme", "bob")];
    race(pool, owners, quotas(json!({}), json!({"sandboxes": 1})), 1, |sandbox| sandbox.principal.clone()).await;
}

#[sqlx::test(migrations = "../migrations")]
async fn a_bucket_gives_out_what_it_holds_and_what_flowed_in(pool: PgPool) {
    let alice = of("acme", "alice");
    let (store, lease) = ready(pool, std::slice::from_ref(&alice)).await;
    let limited = quotas(json!({"runs_per_minute": 30}), json!({}));
    let start = datetime!(2030-01-01 12:00 UTC);
    let at = async |ms: u64, many: u32| {
        let asking = (0..many).map(|_| {
            let (store, limited) = (store.clone(), limited.clone());
            let sandbox = Sandbox { created_at: start + Duration::from_millis(ms), ..of("acme", "alice") };
            tokio::spawn(async move { matches!(ask(&store, &sandbox, lease, &Input::default(), &limited).await, Admitted::Yes { .. }) })
        });
        let mut got_in = 0;
        for asked in asking.collect::<Vec<_>>() {
            got_in += u32::from(asked.await.unwrap());
        }
        got_in
    };
    assert_eq!(at(0, 100).await, 30);
    assert_eq!(at(1_999, 20).await, 0);
    assert_eq!(at(2_000, 20).await, 1);
    assert_eq!(at(10_000, 20).await, 4);
    // Full again, and no fuller.
    assert_eq!(at(600_000, 100).await, 30);
}

async fn refused(store: &Store, sandbox: &Sandbox, lease: Lease, quotas: &DefaultQuotas) -> Exceeded {
    let answer = ask(store, sandbox, lease, &Input::default(), quotas).await;
    let Admitted::Exceeded(exceeded, _) = answer else { panic!("{answer:?}") };
    exceeded
}

/// Each quota refuses one more than it allows, by its name, with its value, what is used, and when to come again.
#[sqlx::test(migrations = "../migrations")]
async fn every_quota_names_itself_its_value_and_the_use(pool: PgPool) {
    let alice = Sandbox { created_at: datetime!(2030-01-01 23:59 UTC), ..of("acme", "alice") };
    let (store, lease) = ready(pool.clone(), std::slice::from_ref(&alice)).await;
    assert_eq!(ask(&store, &alice, lease, &Input::default(), &quotas(json!({}), json!({}))).await, Admitted::Yes { weight: 100 });
    let used = sandbox_core::protocol::Usage { cpu_us: 2_500_000, ..Default::default() };
    finish(&store, &alice, &Finish { used, ..done(&alice) }).await;
    let live = Sandbox { created_at: alice.created_at, ..of("acme", "alice") };
    assert_eq!(ask(&store, &live, lease, &Input::default(), &quotas(json!({}), json!({}))).await, Admitted::Yes { weight: 100 });
    sqlx::query!("update tenants set log_bytes = 7").execute(&pool).await.unwrap();
    sqlx::query!("update principals set log_bytes = 7").execute(&pool).await.unwrap();
    let (memory, cpu) = (alice.limits.memory_bytes(), alice.limits.cpu_millis());
    let midnight = Some(61);
    let cases = [
        ("sandboxes", json!(1), json!(1), Some(1)),
        ("memory_bytes", json!(2 * memory - 1), json!(memory), Some(1)),
        ("cpu_millis", json!(2 * cpu - 1), json!(cpu), Some(1)),
        ("log_bytes", json!(7), json!(7), Some(60)),
        ("runs_per_day", json!(2), json!(2), midnight),
        ("cpu_seconds_per_day", json!(2), json!(2), midnight),
        ("runs_per_minute", json!(0), json!(0), None),
        ("largest_memory_bytes", json!(memory - 1), json!(memory), None),
        ("largest_cpu_millis", json!(cpu - 1), json!(cpu), None),
        ("largest_pids", json!(63), json!(64), None),
        ("largest_wall_ms", json!(9_999), json!(10_000), None),
        ("largest_cpu_ms", json!(5), json!(null), None),
        ("largest_output_bytes", json!(1), json!(1 << 20), None),
        ("largest_disk_bytes", json!(1), json!(64 << 20), None),
        ("largest_inodes", json!(1), json!(4096), None),
        ("largest_open_files", json!(1), json!(256), None),
        ("largest_file_size_bytes", json!(1), json!(64 << 20), None),
        ("largest_io_bytes_per_s", json!(1), json!(256 << 20), None),
        ("largest_io_ops_per_s", json!(1), json!(20_000), None),
        ("networks", json!(["proxy"]), json!("none"), None),
        ("isolations", json!(["gvisor"]), json!("container"), None),
    ];
    for (quota, limit, used, retry_after_s) in cases {
        for scope in [QuotaScope::Tenant, QuotaScope::Principal] {
            let own = json!({ quota: limit });
            let defaults = if scope == QuotaScope::Tenant { quotas(own, json!({})) } else { quotas(json!({}), own) };
            let again = Sandbox { id: SandboxId(Uuid::now_v7()), ..alice.clone() };
            let expected = Exceeded { scope, quota: quota.to_owned(), limit: limit.clone(), used: used.clone(), retry_after_s };
            assert_eq!(refused(&store, &again, lease, &defaults).await, expected);
        }
    }
    let waiting = Sandbox { state: State::Queued, claimed_at: None, ..of("acme", "alice") };
    let exceeded = refused(&store, &waiting, lease, &quotas(json!({"queued": 0}), json!({}))).await;
    assert_eq!((exceeded.quota.as_str(), exceeded.limit, exceeded.used), ("queued", json!(0), json!(0)));
    let endless = sandbox("acme", Kind::Sandbox, None);
    let exceeded = refused(&store, &endless, lease, &quotas(json!({"largest_ttl_ms": 1000}), json!({}))).await;
    assert_eq!((exceeded.quota.as_str(), exceeded.used), ("largest_ttl_ms", json!(null)));
}

#[sqlx::test(migrations = "../migrations")]
async fn a_quota_of_ones_own_goes_before_the_tenants_and_that_before_the_default(pool: PgPool) {
    let alice = of("acme", "alice");
    let (store, lease) = ready(pool, std::slice::from_ref(&alice)).await;
    let defaults = quotas(json!({}), json!({"largest_pids": 1}));
    let tenant = Who { tenant: &alice.tenant, principal: None };
    let change = |value: Value| serde_json::from_value(value).unwrap();
    assert_eq!(refused(&store, &alice, lease, &defaults).await.limit, json!(1));
    store.change_account(tenant, &change(json!({"principal_quotas": {"largest_pids": 2}})), &act()).await.unwrap().unwrap().unwrap();
    assert_eq!(refused(&store, &alice, lease, &defaults).await.limit, json!(2));
    let own = Who { principal: Some("alice"), ..tenant };
    store.change_account(own, &change(json!({"quotas": {"largest_pids": null}})), &act()).await.unwrap().unwrap().unwrap();
    assert!(matches!(ask(&store, &alice, lease, &Input::default(), &defaults).await, Admitted::Yes { .. }));
}

#[sqlx::test(migrations = "../migrations")]
async fn a_new_day_begins_with_nothing_used(pool: PgPool) {
    let alice = Sandbox { created_at: datetime!(2030-01-01 23:59:59 UTC), ..of("acme", "alice") };
    let (store, lease) = ready(pool, std::slice::from_ref(&alice)).await;
    let daily = quotas(json!({"runs_per_day": 1}), json!({}));
    assert!(matches!(ask(&store, &alice, lease, &Input::default(), &daily).await, Admitted::Yes { .. }));
    let next = |at| Sandbox { created_at: at, ..of("acme", "alice") };
    assert_eq!(refused(&store, &next(alice.created_at), lease, &daily).await.retry_after_s, Some(2));
    let tomorrow = next(datetime!(2030-01-02 00:00 UTC));
    assert!(matches!(ask(&store, &tomorrow, lease, &Input::default(), &daily).await, Admitted::Yes { .. }));
}

#[sqlx::test(migrations = "../migrations")]
async fn who_is_suspended_gets_nothing_and_who_is_unknown_neither(pool: PgPool) {
    let alice = of("acme", "alice");
    let (store, lease) = store_with_node(pool).await;
    let none = quotas(json!({}), json!({}));
    let ask_again = async || ask(&store, &of("acme", "alice"), lease, &Input::default(), &none).await;
    assert_eq!(ask_again().await, Admitted::Unknown);
    assert_eq!(store.standing(&owner(&alice)).await.unwrap(), Standing::Unknown);
    store.introduce(&owner(&alice), alice.created_at).await.unwrap();
    let tenant = Who { tenant: &alice.tenant, principal: None };
    for who in [tenant, Who { principal: Some("alice"), ..tenant }] {
        assert!(store.suspend(who, Suspension::Imposed { stops: false }, &act()).await.unwrap());
        assert_eq!((ask_again().await, store.standing(&owner(&alice)).await.unwrap()), (Admitted::Suspended, Standing::Suspended));
        assert!(store.suspend(who, Suspension::Lifted, &act()).await.unwrap());
        assert!(matches!(ask_again().await, Admitted::Yes { .. }));
    }
    let nobody = TenantId::proven("nobody".into());
    assert!(!store.suspend(Who { tenant: &nobody, principal: None }, Suspension::Lifted, &act()).await.unwrap());
}

#[sqlx::test(migrations = "../migrations")]
async fn the_queue_is_bounded(pool: PgPool) {
    let waiting = || Sandbox { state: State::Queued, claimed_at: None, ..of("acme", "alice") };
    let (store, lease) = ready(pool.clone(), &[waiting()]).await;
    let one_waits = async || {
        let (sandbox, none) = (waiting(), quotas(json!({}), json!({})));
        let admission = Admission {
            sandbox: &sandbox,
            lease,
            input: &Input::default(),
            cases: &[],
            asked: &json!({}),
            network: "none",
            isolation: "container",
            defaults: &none,
            queue_max: 1,
            wanted_node: None,
            key: None,
            promise: Promise::Now,
        };
        store.admit(admission).await.unwrap()
    };
    assert!(matches!(one_waits().await, Admitted::Yes { .. }));
    assert_eq!(one_waits().await, Admitted::QueueFull);
    assert_counted(&pool).await;
}

/// The transactions that wrote the rows that there are, of every table.
async fn writers(pool: &PgPool) -> BTreeSet<String> {
    let tables: Vec<String> =
        sqlx::query_scalar("select format('%I', tablename) from pg_tables where schemaname = 'public'").fetch_all(pool).await.unwrap();
    assert!(tables.iter().any(|table| table == "sandboxes"), "{tables:?}");
    let of_each = tables.iter().map(|table| format!("select xmin::text from {table}"));
    let all = of_each.collect::<Vec<_>>().join(" union ");
    sqlx::query_scalar(sqlx::AssertSqlSafe(all)).fetch_all(pool).await.unwrap().into_iter().collect()
}

#[sqlx::test(migrations = "../migrations")]
async fn an_admission_is_one_transaction(pool: PgPool) {
    let alice = of("acme", "alice");
    let (store, lease) = ready(pool.clone(), std::slice::from_ref(&alice)).await;
    let before = writers(&pool).await;
    assert!(matches!(ask(&store, &alice, lease, &Input::default(), &DefaultQuotas::default()).await, Admitted::Yes { .. }));
    let admitted = writers(&pool).await;
    assert_eq!(admitted.difference(&before).count(), 1);
    finish(&store, &alice, &done(&alice)).await;
    assert_eq!(writers(&pool).await.difference(&admitted).count(), 1);
}

/// Folding at any boundary changes no sum, and what ended is counted to the microsecond.
#[sqlx::test(migrations = "../migrations")]
async fn usage_is_the_sum_of_outcomes_wherever_it_was_folded(pool: PgPool) {
    let (store, lease) = ready(pool, &[of("acme", "alice"), of("acme", "bob"), of("other", "alice")]).await;
    let start = datetime!(2030-01-01 22:30 UTC);
    let (mut cpu, mut wall, mut memory) = (0, 0, 0_u128);
    for turn in 0..20_u64 {
        let (tenant, principal) = [("acme", "alice"), ("acme", "bob"), ("other", "alice")][usize::try_from(turn % 3).unwrap()];
        let sandbox = Sandbox { created_at: start + Duration::from_secs(turn * 600), ..of(tenant, principal) };
        assert!(admit(&store, &sandbox, lease).await);
        let used = sandbox_core::protocol::Usage { cpu_us: 1000 + turn, wall_us: 7 * turn + 1, stdout_bytes: turn, ..Default::default() };
        if tenant == "acme" {
            (cpu, wall) = (cpu + used.cpu_us, wall + used.wall_us);
            memory += u128::from(sandbox.limits.memory_bytes()) * u128::from(used.wall_us);
        }
        finish(&store, &sandbox, &Finish { used, ..done(&sandbox) }).await;
    }
    let query = UsageQuery {
        tenant: Some(TenantId::proven("acme".into())),
        from: datetime!(2030-01-01 22:00 UTC),
        to: datetime!(2030-01-02 03:00 UTC),
        by: GroupBy::default(),
        limit: 100,
    };
    for folded_up_to in [datetime!(2030-01-01 22:00 UTC), datetime!(2030-01-01 23:00 UTC), datetime!(2030-01-02 00:10 UTC), query.to] {
        // In batches that end in the middle of an hour.
        while store.roll_up_usage(folded_up_to, 3).await.unwrap() > 0 {}
        let total = store.usage(&query).await.unwrap();
        assert_eq!(total.len(), 1);
        assert_eq!((total[0].runs, total[0].cpu_us, total[0].wall_us, total[0].memory_byte_us), (14, cpu, wall, memory));
        let by = GroupBy { principal: true, time: Some(crate::store::TimeUnit::Day), ..GroupBy::default() };
        let days = store.usage(&UsageQuery { by, ..query.clone() }).await.unwrap();
        assert_eq!(days.len(), 4);
        assert_eq!(days.iter().map(|day| day.cpu_us).sum::<u64>(), cpu);
    }
}

#[sqlx::test(migrations = "../migrations")]
async fn what_is_old_is_removed_and_what_is_not_stays(pool: PgPool) {
    let alice = of("acme", "alice");
    let (store, lease) = ready(pool.clone(), std::slice::from_ref(&alice)).await;
    let at = |hours: i64| {
        let at = datetime!(2030-01-01 00:00 UTC) + time::Duration::hours(hours);
        let ms = u64::try_from(at.unix_timestamp_nanos() / 1_000_000).unwrap();
        let id = SandboxId(Uuid::from_u64_pair((ms << 16) | 0x7000, 0x8000_0000_0000_0000 | u64::try_from(hours).unwrap()));
        Sandbox { id, created_at: at, ..of("acme", "alice") }
    };
    let (old, young, live) = (at(1), at(100), at(2));
    for sandbox in [&old, &young, &live] {
        assert!(admit(&store, sandbox, lease).await);
    }
    for sandbox in [&old, &young] {
        finish(&store, sandbox, &done(sandbox)).await;
    }
    let cutoff = datetime!(2030-01-02 00:00 UTC);
    assert_eq!(store.prune_sandboxes(cutoff, 10).await.unwrap(), 1);
    assert_eq!(store.find(&old.tenant, old.id).await.unwrap(), None);
    assert!(store.find(&old.tenant, young.id).await.unwrap().is_some() && store.find(&old.tenant, live.id).await.unwrap().is_some());
    let events = async || sqlx::query_scalar!(r#"select count(*) as "count!" from events"#).fetch_one(&pool).await.unwrap();
    let before = events().await;
    while store.prune_events(cutoff, 2).await.unwrap() > 0 {}
    // Left are the making and the end of the young one.
    assert!(before > 2 && events().await == 2, "{before}");
    assert_counted(&pool).await;
    // Whoever has something stays; whoever has nothing any more is forgotten.
    assert_eq!(store.forget_principals(cutoff + time::Duration::days(365), 10).await.unwrap(), 0);
    finish(&store, &live, &done(&live)).await;
    assert_eq!(store.forget_principals(cutoff + time::Duration::days(365), 10).await.unwrap(), 1);
}

#[sqlx::test(migrations = "../migrations")]
async fn a_node_finds_what_a_suspension_is_to_end(pool: PgPool) {
    let (alice, bob) = (of("acme", "alice"), of("acme", "bob"));
    let waiting = Sandbox { state: State::Queued, claimed_at: None, ..of("acme", "alice") };
    let (store, lease) = ready(pool, &[alice.clone(), bob.clone()]).await;
    for sandbox in [&alice, &bob, &waiting] {
        assert!(admit(&store, sandbox, lease).await);
    }
    let who = Who { tenant: &alice.tenant, principal: Some("alice") };
    let found = async || {
        let mut ids: Vec<_> = store.to_be_stopped(lease.node).await.unwrap().into_iter().map(|(id, _)| id.0).collect();
        ids.sort();
        ids
    };
    store.suspend(who, Suspension::Imposed { stops: false }, &act()).await.unwrap();
    assert!(found().await.is_empty());
    store.suspend(who, Suspension::Imposed { stops: true }, &act()).await.unwrap();
    let mut expected = [alice.id.0, waiting.id.0];
    expected.sort();
    assert_eq!(found().await, expected);
}

#[sqlx::test(migrations = "../migrations")]
async fn of_a_pulled_image_nothing_is_made_that_is_being_given_up(pool: PgPool) {
    let sandbox = of("acme", "alice");
    let (store, lease) = ready(pool.clone(), std::slice::from_ref(&sandbox)).await;
    sqlx::query("update images set pulled_from = 'registry.example/python'").execute(&pool).await.unwrap();
    let mut taking = pool.begin().await.unwrap();
    sqlx::query("select 1 from images for update").execute(&mut *taking).await.unwrap();

    let asked = sandbox.clone();
    let asking = tokio::spawn(async move { ask(&store, &asked, lease, &Input::default(), &quotas(json!({}), json!({}))).await });
    let waits = async {
        let waiting = "select exists (select 1 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock')";
        while !sqlx::query_scalar::<_, bool>(waiting).fetch_one(&pool).await.unwrap() {
            assert!(!asking.is_finished(), "it does not wait for it");
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waits).await.unwrap();
    sqlx::query("delete from images").execute(&mut *taking).await.unwrap();
    taking.commit().await.unwrap();

    assert!(matches!(asking.await.unwrap(), Admitted::ImageMoved));
}

#[sqlx::test(migrations = "../migrations")]
async fn an_image_of_which_something_was_just_made_is_not_given_up(pool: PgPool) {
    let sandbox = of("acme", "alice");
    let (store, lease) = ready(pool.clone(), std::slice::from_ref(&sandbox)).await;
    sqlx::query("update images set pulled_from = 'registry.example/python'").execute(&pool).await.unwrap();
    let give_up = async || {
        let later = sandbox.created_at + Duration::from_secs(1);
        store.give_up_root(&sandbox.image.root, later, &act()).await.unwrap()
    };

    assert!(matches!(ask(&store, &sandbox, lease, &Input::default(), &quotas(json!({}), json!({}))).await, Admitted::Yes { .. }));
    let needed = give_up().await;
    finish(&store, &sandbox, &done(&sandbox)).await;
    let idle = give_up().await;

    assert!(needed.is_empty());
    assert_eq!(idle, ["python"]);
}
