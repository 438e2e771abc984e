//! The tables against a real database.

use sqlx::PgPool;

use super::{super::sandboxes::tests::*, *};
use crate::{
    sandbox::{Kind, NewSandbox, SandboxRequest, State, Wanted, asked as asked_of},
    store::{Change, Who},
};

const NOW: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

fn template() -> NewSandbox {
    match serde_json::from_value::<SandboxRequest>(json!({ "image": "python" })).unwrap().parse().unwrap() {
        Wanted::Like(asked) => *asked,
        Wanted::OfPool { .. } => panic!("it names a pool"),
    }
}

fn new(name: &str, size: u32) -> NewPool {
    NewPool { name: name.into(), size, template: template(), readiness: Readiness { output: None, within_ms: 1000 } }
}

fn alice() -> Owner {
    Owner { tenant: TenantId::proven("acme".into()), principal: "alice".into() }
}

fn bob() -> Owner {
    Owner { principal: "bob".into(), ..alice() }
}

fn member() -> Sandbox {
    Sandbox { keeps_input: false, labels: BTreeMap::new(), ..sandbox("acme", Kind::Pooled, None) }
}

async fn with_pool(pool: PgPool, size: u32) -> (Store, Lease, PoolId) {
    let (store, lease) = store_with_node(pool).await;
    for owner in [alice(), bob()] {
        store.introduce(&owner, NOW).await.unwrap();
    }
    let id = PoolId(Uuid::now_v7());
    let made = store.create_pool(id, (&new("p", size), b"{\"image\":\"python\"}"), &alice(), &Quotas::default(), &act()).await.unwrap();
    assert!(matches!(made, PoolMade::Yes(pool) if pool.id == id));
    (store, lease, id)
}

async fn join(store: &Store, lease: Lease, pool: PoolId, sandbox: &Sandbox) -> MemberAdmitted {
    let new = NewMember {
        sandbox,
        pool,
        lease,
        asked: &asked_of(&sandbox.limits, None),
        network: "none",
        isolation: "container",
        defaults: &DefaultQuotas::default(),
    };
    store.admit_member(new).await.unwrap()
}

async fn take(store: &Store, lease: Lease, pool: PoolId, id: SandboxId, owner: &Owner) -> TakenOver {
    let personal = Personal { name: Some(format!("n-{}", id.0.simple())), ..Personal::default() };
    let take = TakeOver {
        id,
        hold: Hold { lease, claims: 1 },
        pool,
        owner,
        personal: &personal,
        expires_at: None,
        started: (NOW, Fences::from_bits(1)),
        waited_ms: 7,
        at: NOW,
        asked: &asked_of(&member().limits, Some(None)),
        network: "none",
        isolation: "container",
        defaults: &DefaultQuotas::default(),
        key: None,
    };
    store.take_member(take).await.unwrap()
}

/// What is counted as live: of the tenant, of alice, of bob.
async fn live(store: &Store) -> [u64; 3] {
    let mut counts = [0; 3];
    for (count, principal) in counts.iter_mut().zip([None, Some("alice"), Some("bob")]) {
        let who = Who { tenant: &alice().tenant, principal };
        *count = store.account(who, &Quotas::default(), NOW).await.unwrap().unwrap().used.sandboxes;
    }
    counts
}

#[sqlx::test(migrations = "../migrations")]
async fn what_waits_is_counted_and_becomes_another_principals_once(pool: PgPool) {
    let (store, lease, id) = with_pool(pool, 1).await;
    let (first, second) = (member(), member());
    assert_eq!(join(&store, lease, id, &first).await, MemberAdmitted::Yes);
    assert_eq!(join(&store, lease, id, &second).await, MemberAdmitted::NotNow, "it has as many as it should");
    assert_eq!(live(&store).await, [1, 1, 0]);
    let hidden = store.find(&first.tenant, first.id).await.unwrap().unwrap();
    assert_eq!((hidden.kind, hidden.state), (Kind::Pooled, State::Starting));

    let taken = take(&store, lease, id, first.id, &bob()).await;
    let again = take(&store, lease, id, first.id, &alice()).await;

    assert_eq!((taken, again), (TakenOver::Yes { weight: 100 }, TakenOver::Gone));
    assert_eq!(live(&store).await, [1, 0, 1]);
    let row = store.find(&first.tenant, first.id).await.unwrap().unwrap();
    assert_eq!((row.kind, row.state, row.principal.as_str(), row.claims), (Kind::Sandbox, State::Running, "bob", 2));
    assert_eq!(row.from_pool, Some(crate::sandbox::FromPool { name: "p".into(), waited_ms: 7 }));
    let pool = store.find_pool(&first.tenant, "p").await.unwrap().unwrap();
    assert_eq!((pool.taken, pool.ready, pool.starting), (1, 0, 0));
    assert_eq!(join(&store, lease, id, &second).await, MemberAdmitted::Yes, "its place is free");
}

#[sqlx::test(migrations = "../migrations")]
async fn none_is_taken_by_another_tenant_a_former_holder_or_out_of_another_pool(pool: PgPool) {
    let (store, lease, id) = with_pool(pool, 1).await;
    let waiting = member();
    join(&store, lease, id, &waiting).await;
    let stranger = Owner { tenant: TenantId::proven("other".into()), principal: "alice".into() };
    store.introduce(&stranger, NOW).await.unwrap();

    assert_eq!(take(&store, lease, id, waiting.id, &stranger).await, TakenOver::Gone);
    assert_eq!(take(&store, Lease { epoch: lease.epoch + 1, ..lease }, id, waiting.id, &bob()).await, TakenOver::Gone);
    assert_eq!(take(&store, lease, PoolId(Uuid::now_v7()), waiting.id, &bob()).await, TakenOver::Gone);
    let nobody = Owner { principal: "carol".into(), ..alice() };
    assert_eq!(take(&store, lease, id, waiting.id, &nobody).await, TakenOver::Unknown);
    assert_eq!(take(&store, lease, id, waiting.id, &bob()).await, TakenOver::Yes { weight: 100 });
}

#[sqlx::test(migrations = "../migrations")]
async fn what_a_quota_or_an_image_is_in_the_way_of_goes_on_waiting(pool: PgPool) {
    let (store, lease, id) = with_pool(pool.clone(), 1).await;
    let waiting = member();
    join(&store, lease, id, &waiting).await;
    let of_bob = Who { tenant: &alice().tenant, principal: Some("bob") };
    for quota in ["sandboxes", "runs_per_day", "largest_memory_bytes"] {
        let set = |value: Value| Change { quotas: serde_json::Map::from_iter([(quota.to_owned(), value)]), ..Change::default() };
        store.change_account(of_bob, &set(json!(0)), &act()).await.unwrap().unwrap().unwrap();
        assert_eq!(take(&store, lease, id, waiting.id, &bob()).await, TakenOver::Refused, "{quota}");
        store.change_account(of_bob, &set(json!("default")), &act()).await.unwrap().unwrap().unwrap();
    }
    sqlx::query("update images set digest = 'sha256:' || repeat('b', 64)").execute(&pool).await.unwrap();
    assert_eq!(take(&store, lease, id, waiting.id, &bob()).await, TakenOver::ImageMoved);
    assert_eq!(join(&store, lease, id, &member()).await, MemberAdmitted::NotNow);
    assert_eq!(live(&store).await, [1, 1, 0]);
}

#[sqlx::test(migrations = "../migrations")]
async fn pools_and_their_sizes_are_counted_against_quotas(pool: PgPool) {
    let (store, _, id) = with_pool(pool, 2).await;
    let quotas: Quotas = serde_json::from_value(json!({ "pools": 2, "pool_sandboxes": 3 })).unwrap();
    let make = async |id: PoolId, name: &str, size: u32| {
        store.create_pool(id, (&new(name, size), b"{}"), &alice(), &quotas, &act()).await.unwrap()
    };
    let quota = |made: PoolMade| match made {
        PoolMade::Exceeded(exceeded) => exceeded.quota,
        PoolMade::Yes(_) | PoolMade::NameTaken => panic!("no quota is in its way"),
    };
    let other = || PoolId(Uuid::now_v7());
    assert!(matches!(make(id, "p", 2).await, PoolMade::Yes(_)), "the same request");
    assert_eq!(make(other(), "p", 0).await, PoolMade::NameTaken);
    assert_eq!(quota(make(other(), "q", 2).await), "pool_sandboxes");
    assert!(matches!(make(other(), "q", 1).await, PoolMade::Yes(_)));
    assert_eq!(quota(make(other(), "r", 0).await), "pools");
    let tenant = alice().tenant;
    let resized = store.resize_pool(&tenant, "p", 3, &quotas, &act()).await.unwrap().unwrap();
    assert_eq!(resized.unwrap_err().quota, "pool_sandboxes");
    assert_eq!(store.resize_pool(&tenant, "p", 1, &quotas, &act()).await.unwrap().unwrap().unwrap().size, 1);
    assert!(store.remove_pool(&tenant, "p", &act()).await.unwrap());
    assert!(!store.remove_pool(&tenant, "p", &act()).await.unwrap());
    assert!(store.resize_pool(&tenant, "p", 1, &quotas, &act()).await.unwrap().is_none());
}

#[sqlx::test(migrations = "../migrations")]
async fn what_ends_while_it_waits_leaves_no_row_and_no_event(pool: PgPool) {
    let (store, lease, id) = with_pool(pool.clone(), 2).await;
    let (ends, stays) = (member(), member());
    join(&store, lease, id, &ends).await;
    join(&store, lease, id, &stays).await;
    let cause = sandbox_core::protocol::Cause::Exited { code: 1 };
    let finish = crate::sandbox::Finish::without_usage(cause, NOW, &ends.limits, crate::sandbox::Phases::default());
    let tail = crate::sandbox::LogTail::default();
    let ended = crate::store::Ended { finish: &finish, log_tail: &tail, compile: None, case_bytes: 0, log_file: crate::store::LogKept::No };
    assert!(store.finish(ends.id, crate::store::Writer::Holder(Hold { lease, claims: 1 }), &ended).await.unwrap());

    assert_eq!(store.remove_ended_members(10).await.unwrap(), 1);

    assert_eq!(live(&store).await, [1, 1, 0]);
    assert_eq!(store.find(&ends.tenant, ends.id).await.unwrap(), None);
    assert!(store.find(&stays.tenant, stays.id).await.unwrap().is_some());
    let told = sqlx::query_scalar::<_, i64>("select count(*) from events where kind like 'sandbox.%'").fetch_one(&pool).await.unwrap();
    assert_eq!(told, 0);
    let billed = sqlx::query_scalar::<_, i64>("select count(*) from usage where kind = 'pooled'").fetch_one(&pool).await.unwrap();
    assert_eq!(billed, 1);
}
