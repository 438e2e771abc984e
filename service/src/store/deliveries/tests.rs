//! The table against a real database.

use serde_json::json;
use sqlx::PgPool;

use super::*;
use crate::{
    sandbox::Quotas,
    store::{CreatedWebhook, NewWebhook, WebhookChange},
};

const KEY: &str = "key";
const HOUR: time::Duration = time::Duration::HOUR;
const MINUTE: Duration = Duration::from_secs(60);
const DAYS: Duration = Duration::from_secs(5 * 24 * 3600);
const T0: OffsetDateTime = OffsetDateTime::UNIX_EPOCH;

fn tenant(name: &str) -> TenantId {
    TenantId::proven(name.into())
}

fn act() -> Act<'static> {
    Act { actor: None, at: T0, data: json!({}) }
}

async fn webhook(store: &Store, of: &str, kinds: &[&str]) -> Uuid {
    let new = NewWebhook {
        id: Uuid::now_v7(),
        tenant: tenant(of),
        url: "https://a.example/".into(),
        kinds: kinds.iter().map(|&kind| kind.to_owned()).collect(),
        description: String::new(),
        is_active: true,
        key_id: KEY.into(),
    };
    let created = store.create_webhook(&new, &Quotas::default(), &act()).await.unwrap();
    assert!(matches!(created, CreatedWebhook::Yes(_)));
    new.id
}

async fn happen(pool: &PgPool, of: &str, kind: &str, count: i32) {
    sqlx::query("insert into events (tenant, kind, object, at, data) select $1, $2, n::text, now(), '{}' from generate_series(1, $3) as n")
        .bind(of)
        .bind(kind)
        .bind(count)
        .execute(pool)
        .await
        .unwrap();
}

/// Makes deliveries until every event was looked at. Others' transactions in the same cluster hold everybody up, for as long as they run.
async fn make(store: &Store, pool: &PgPool) {
    for _ in 0..3000 {
        store.make_deliveries(T0, T0 + HOUR, |told| told.kind).await.unwrap();
        let is_done: bool = sqlx::query_scalar(
            "select not exists (select 1 from events, webhook_position as done where (events.xact, events.id) > (done.xact, done.id))",
        )
        .fetch_one(pool)
        .await
        .unwrap();
        if is_done {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("events are held up for half a minute");
}

async fn claim(store: &Store, now: OffsetDateTime) -> Vec<Claimed> {
    store.claim_attempts(&Busy { of_tenant_max: 16, ..Busy::default() }, KEY, now, MINUTE, 100).await.unwrap()
}

fn attempt(claimed: &Claimed, at: OffsetDateTime, error: Option<&str>) -> Attempt {
    Attempt { number: claimed.number, at, ms: 5, status: error.is_none().then_some(200), error: error.map(ToOwned::to_owned) }
}

async fn record(store: &Store, claimed: &Claimed, at: OffsetDateTime, error: Option<&str>, next_at: Option<OffsetDateTime>) -> bool {
    store.record_attempt(claimed, &attempt(claimed, at, error), Some("body"), next_at, DAYS).await.unwrap()
}

async fn delivery(store: &Store, of: &Claimed) -> Delivery {
    store.find_delivery(&tenant(&of.tenant), of.webhook, of.delivery).await.unwrap().unwrap()
}

#[sqlx::test(migrations = "../migrations")]
async fn every_wanted_event_gets_one_delivery_however_many_make_them(pool: PgPool) {
    let store = Store { pool: pool.clone().into() };
    happen(&pool, "acme", "sandbox.ended", 3).await;
    let (ended, all) = (webhook(&store, "acme", &["sandbox.ended", "image.*"]).await, webhook(&store, "acme", &[]).await);
    happen(&pool, "acme", "sandbox.ended", 600).await;
    happen(&pool, "acme", "sandbox.created", 5).await;
    happen(&pool, "acme", "image.removed", 2).await;
    happen(&pool, "other", "sandbox.ended", 5).await;

    tokio::join!(make(&store, &pool), make(&store, &pool), make(&store, &pool));

    let count = async |webhook: Uuid| -> i64 {
        let counted = sqlx::query_scalar("select count(*) from webhook_deliveries where webhook = $1 and kind not like 'webhook.%'");
        counted.bind(webhook).fetch_one(&pool).await.unwrap()
    };
    assert_eq!((count(ended).await, count(all).await), (602, 607));
}

#[sqlx::test(migrations = "../migrations")]
async fn an_attempt_is_its_takers_alone_for_a_time_and_anybodys_then(pool: PgPool) {
    let store = Store { pool: pool.clone().into() };
    webhook(&store, "acme", &["sandbox.ended"]).await;
    happen(&pool, "acme", "sandbox.ended", 1).await;
    make(&store, &pool).await;

    let first = claim(&store, T0).await.remove(0);
    assert_eq!(claim(&store, T0 + MINUTE / 2).await, []);
    let second = claim(&store, T0 + MINUTE).await.remove(0);
    assert_eq!((first.number, second.number, first.delivery), (1, 2, second.delivery));
    // The first one failed, and it is not his to say any more.
    record(&store, &first, T0 + MINUTE, Some("failed"), None).await;
    assert_eq!(delivery(&store, &second).await.state, DeliveryState::Pending);
    // It came through after all, whoever says so.
    record(&store, &first, T0 + MINUTE, None, None).await;
    record(&store, &second, T0 + 2 * MINUTE, Some("failed"), Some(T0 + HOUR)).await;
    let known = delivery(&store, &second).await;
    assert_eq!((known.state, known.attempt_count, known.attempts.len()), (DeliveryState::Delivered, 2, 1));
}

#[sqlx::test(migrations = "../migrations")]
async fn nobody_takes_more_than_a_share(pool: PgPool) {
    let store = Store { pool: pool.clone().into() };
    let (busy, free) = (webhook(&store, "acme", &["sandbox.ended"]).await, webhook(&store, "acme", &["sandbox.ended"]).await);
    let other = webhook(&store, "other", &["sandbox.ended"]).await;
    for name in ["acme", "other"] {
        happen(&pool, name, "sandbox.ended", 50).await;
    }
    make(&store, &pool).await;
    let take = async |busy: &Busy, key: &str| {
        let taken = store.claim_attempts(busy, key, T0, MINUTE, 100).await.unwrap();
        let mut webhooks: Vec<_> = taken.into_iter().map(|claimed| claimed.webhook).collect();
        webhooks.sort_unstable();
        webhooks
    };

    // One of each at a time.
    let none = Busy { of_tenant_max: 16, ..Busy::default() };
    assert_eq!(take(&none, KEY).await, [busy, free, other]);
    assert_eq!(take(&Busy { webhooks: vec![busy], ..none.clone() }, KEY).await, [free, other]);
    assert_eq!(take(&Busy { tenants: vec![("acme".into(), 16)], ..none.clone() }, KEY).await, [other]);
    assert_eq!(take(&Busy { tenants: vec![("acme".into(), 15)], ..none.clone() }, KEY).await.len(), 2);
    assert!(take(&none, "another").await.is_empty());
}

#[sqlx::test(migrations = "../migrations")]
async fn a_webhook_that_fails_for_days_is_made_inactive_and_told_of(pool: PgPool) {
    let store = Store { pool: pool.clone().into() };
    let id = webhook(&store, "acme", &["sandbox.ended"]).await;
    happen(&pool, "acme", "sandbox.ended", 1).await;
    make(&store, &pool).await;
    let mut at = T0;
    let mut fail = async |after: Duration| {
        at += after;
        let claimed = claim(&store, at).await.remove(0);
        record(&store, &claimed, at, Some("failed"), Some(at)).await
    };

    assert!(!fail(Duration::ZERO).await);
    assert!(!fail(DAYS / 2).await);
    // Forgiven, it begins anew.
    sqlx::query("update webhooks set failing_since = null").execute(&pool).await.unwrap();
    assert!(!fail(DAYS).await);
    assert!(!fail(DAYS / 2).await);
    assert!(fail(DAYS / 2).await);

    let inactive = store.find_webhook(&tenant("acme"), id).await.unwrap().unwrap();
    assert_eq!((inactive.is_active, inactive.disabled_at), (false, Some(at)));
    assert_eq!(claim(&store, at + DAYS).await, []);
    let told: Vec<String> =
        sqlx::query_scalar("select kind from events where kind like 'webhook.%' order by id").fetch_all(&pool).await.unwrap();
    assert_eq!(told, ["webhook.created", "webhook.disabled"]);
    // What waited is given up in time, and it can be made active again.
    assert_eq!(store.give_up_deliveries(at + DAYS, 100).await.unwrap(), 1);
    let change = WebhookChange { is_active: Some(true), ..WebhookChange::default() };
    let active = store.change_webhook(&tenant("acme"), id, &change, &act()).await.unwrap().unwrap();
    assert_eq!((active.is_active, active.failing_since, active.disabled_at), (true, None, None));
}

#[sqlx::test(migrations = "../migrations")]
async fn a_success_forgives_what_failed_before_and_a_test_says_nothing(pool: PgPool) {
    let store = Store { pool: pool.clone().into() };
    let id = webhook(&store, "acme", &["sandbox.ended"]).await;
    let failing = async || store.find_webhook(&tenant("acme"), id).await.unwrap().unwrap().failing_since;
    store.make_test_delivery(&tenant("acme"), id, "{}", T0).await.unwrap().unwrap();
    let test = claim(&store, T0).await.remove(0);
    record(&store, &test, T0, Some("failed"), None).await;
    assert_eq!(failing().await, None);

    happen(&pool, "acme", "sandbox.ended", 1).await;
    make(&store, &pool).await;
    let first = claim(&store, T0).await.remove(0);
    record(&store, &first, T0, Some("failed"), Some(T0)).await;
    assert_eq!(failing().await, Some(T0));
    let second = claim(&store, T0).await.remove(0);
    record(&store, &second, T0, None, None).await;
    assert_eq!(failing().await, None);
    // Sent again it begins anew, with its attempts counted on.
    let again = store.redeliver(&tenant("acme"), id, second.delivery, T0, T0 + HOUR).await.unwrap();
    assert_eq!(again, Some(Redelivery::Begun));
    assert_eq!(store.redeliver(&tenant("acme"), id, second.delivery, T0, T0 + HOUR).await.unwrap(), Some(Redelivery::Pending));
    assert_eq!(store.redeliver(&tenant("other"), id, second.delivery, T0, T0 + HOUR).await.unwrap(), None);
    let third = claim(&store, T0).await.remove(0);
    assert_eq!((third.number, third.numbers_before), (3, 2));
    assert_eq!(store.prune_deliveries(T0 + HOUR, 100).await.unwrap(), 1);
}

#[sqlx::test(migrations = "../migrations")]
async fn what_comes_while_too_many_wait_is_counted_and_not_kept(pool: PgPool) {
    let store = Store { pool: pool.clone().into() };
    let id = webhook(&store, "acme", &["sandbox.ended"]).await;
    happen(&pool, "acme", "sandbox.ended", 10_003).await;
    make(&store, &pool).await;
    let waiting: i64 = sqlx::query_scalar("select count(*) from webhook_deliveries").fetch_one(&pool).await.unwrap();
    let dropped = store.find_webhook(&tenant("acme"), id).await.unwrap().unwrap().dropped;
    assert_eq!((waiting, dropped), (WAITING_MAX, 3));
}

#[sqlx::test(migrations = "../migrations")]
async fn what_is_given_back_is_taken_at_once(pool: PgPool) {
    let store = Store { pool: pool.clone().into() };
    webhook(&store, "acme", &["sandbox.ended"]).await;
    happen(&pool, "acme", "sandbox.ended", 1).await;
    make(&store, &pool).await;
    let first = claim(&store, T0).await.remove(0);
    store.give_attempts_back(&[(first.delivery, first.number)], T0).await.unwrap();
    assert_eq!(claim(&store, T0).await.len(), 1);
    // Not any more the first one's to give.
    store.give_attempts_back(&[(first.delivery, first.number)], T0).await.unwrap();
    assert_eq!(claim(&store, T0).await, []);
}

#[sqlx::test(migrations = "../migrations")]
async fn what_nobody_wanted_is_passed_over_and_what_comes_then_is_not(pool: PgPool) {
    let store = Store { pool: pool.clone().into() };
    happen(&pool, "acme", "sandbox.ended", 10).await;
    sqlx::query("update webhook_position set xact = xact - 100000").execute(&pool).await.unwrap();
    make(&store, &pool).await;
    webhook(&store, "acme", &["sandbox.ended"]).await;
    happen(&pool, "acme", "sandbox.ended", 1).await;
    make(&store, &pool).await;
    assert_eq!(claim(&store, T0).await.len(), 1);
    let made: i64 = sqlx::query_scalar("select count(*) from webhook_deliveries").fetch_one(&pool).await.unwrap();
    assert_eq!(made, 1);
}
