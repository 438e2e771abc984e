//! Table `events`: what happened and who did it, in order; written in the transaction of what it tells.

use std::time::Duration;

use serde_json::Value;
use sqlx::{Connection as _, PgConnection};
use time::OffsetDateTime;
use uuid::Uuid;

use super::{Store, StoreError, bigint, pool::Transaction, unsigned};
use crate::sandbox::{Owner, SandboxId, TenantId};

/// Who does something, when, and what else is to be known of it.
#[derive(Debug, Clone)]
pub struct Act<'a> {
    /// `None`: the service itself.
    pub actor: Option<&'a Owner>,
    pub at: OffsetDateTime,
    pub data: Value,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub struct Told {
    /// Where it stands among all.
    pub position: Position,
    /// `None`: it concerns all.
    pub tenant: Option<TenantId>,
    /// As in `sandbox.ended`.
    pub kind: String,
    /// As in `image/python:3`.
    pub object: String,
    pub actor_tenant: Option<String>,
    pub actor: Option<String>,
    pub at: OffsetDateTime,
    pub data: Value,
}

/// Which events to list.
#[derive(Debug, Clone, Default)]
pub struct EventFilter {
    /// `None`: all tenants'.
    pub tenant: Option<TenantId>,
    /// As in `sandbox.ended` or `sandbox.*`; empty: all.
    pub kinds: Vec<String>,
    pub sandbox: Option<SandboxId>,
    /// As in `image/python:3`.
    pub object: Option<String>,
    pub principal: Option<String>,
    /// Older than this one.
    pub before: Option<Position>,
    pub limit: u32,
}

/// A place in the order of all events: behind one, or behind all that a transaction wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The transaction.
    pub xact: u64,
    /// The event in it; 0: before its first.
    pub id: u64,
}

/// Events in their order, and where to go on behind them.
#[derive(Debug, Clone, PartialEq)]
pub struct Followed {
    pub events: Vec<Told>,
    pub next: Position,
    /// Whether there may be more by now.
    pub is_cut: bool,
}

/// What came since somebody looked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// Up to here everything is there that will ever be.
    pub horizon: Position,
    /// Whose events came; of very many some are left out.
    pub tenants: Vec<TenantId>,
    pub are_tenants_cut: bool,
    /// Whether somebody has written more beyond the horizon, which is behind a transaction that still runs.
    pub is_held_up: bool,
}

/// The channel that every node listens on for new events.
pub(super) const CHANNEL: &str = "mayfly_events";

/// An event as it is read; where it is read, and how far, the caller says.
macro_rules! select_events {
    ($rest:literal $(, $argument:expr)* $(,)?) => {
        sqlx::query_as!(
            Row,
            r#"select xact, id, tenant, kind, coalesce(object, 'sandbox/' || sandbox, '') as "object!", actor_tenant, actor, at, data
            from events "# + $rest
            $(, $argument)*
        )
    };
}

struct Row {
    xact: i64,
    id: i64,
    tenant: Option<String>,
    kind: String,
    object: String,
    actor_tenant: Option<String>,
    actor: Option<String>,
    at: OffsetDateTime,
    data: Value,
}

impl Row {
    fn read(self) -> Told {
        Told {
            position: Position { xact: unsigned(self.xact), id: unsigned(self.id) },
            tenant: self.tenant.map(TenantId::proven),
            kind: self.kind,
            object: self.object,
            actor_tenant: self.actor_tenant,
            actor: self.actor,
            at: self.at,
            data: self.data,
        }
    }
}

impl Store {
    /// Events, newest first.
    pub async fn list_events(&self, filter: &EventFilter) -> Result<Vec<Told>, StoreError> {
        let before = filter.before.unwrap_or(Position { xact: u64::MAX, id: u64::MAX });
        let rows = select_events!(
            "where ($1::text is null or tenant = $1)
                and (cardinality($2::text[]) = 0 or kind = any($2) or split_part(kind, '.', 1) || '.*' = any($2))
                and ($3::uuid is null or sandbox = $3)
                and ($4::text is null or actor = $4)
                and ($8::text is null or coalesce(object, 'sandbox/' || sandbox, '') = $8)
                and (xact, id) < ($5, $6)
            order by xact desc, id desc
            limit $7",
            filter.tenant.as_ref().map(TenantId::as_str) as _,
            &filter.kinds,
            filter.sandbox.map(|id| id.0) as Option<Uuid>,
            filter.principal.as_deref() as _,
            bigint(before.xact),
            bigint(before.id),
            i64::from(filter.limit),
            filter.object.as_deref() as _,
        );
        let mut reading = self.pool.begin().await?;
        let events = rows.fetch_all(&mut *reading).await?.into_iter().map(Row::read).collect();
        for_good(reading).await?;
        Ok(events)
    }

    /// The end of all events that are there for good: whatever is read up to here, nothing will come before it.
    pub async fn event_horizon(&self) -> Result<Position, StoreError> {
        let mut reading = self.pool.begin().await?;
        let (horizon, _) = horizons(&mut reading).await?;
        for_good(reading).await?;
        Ok(horizon)
    }

    /// The tenant's events behind this position, in order, so many at the most. None is skipped, however late its transaction commits: those behind
    /// one that still runs are left for later.
    pub async fn follow_events(&self, tenant: &TenantId, after: Position, limit: u32) -> Result<Followed, StoreError> {
        let mut reading = self.pool.begin().await?;
        let (horizon, ahead) = horizons(&mut reading).await?;
        // Given before this database was restored from another cluster's; see below.
        let after = if after < ahead { after } else { Position { xact: 0, id: after.id } };
        let rows = select_events!(
            "where tenant = $1 and (xact, id) > ($2, $3) and xact < $4 order by xact, id limit $5",
            tenant.as_str(),
            bigint(after.xact),
            bigint(after.id),
            bigint(horizon.xact),
            i64::from(limit),
        );
        let events: Vec<_> = rows.fetch_all(&mut *reading).await?.into_iter().map(Row::read).collect();
        for_good(reading).await?;
        let is_cut = events.len() >= usize::try_from(limit).unwrap_or(usize::MAX);
        let next = events.last().filter(|_| is_cut).map_or(horizon.max(after), |last| last.position);
        Ok(Followed { events, next, is_cut })
    }

    /// What came behind this position, in brief.
    pub async fn event_news(&self, after: Position) -> Result<News, StoreError> {
        const TENANTS_MAX: i64 = 1000;
        let row = sqlx::query!(
            r#"with seen as (select pg_snapshot_xmin(pg_current_snapshot())::text::bigint as horizon)
            select horizon as "horizon!", exists (select 1 from events where xact >= horizon) as "is_held_up!",
                array(
                    select distinct tenant from events where tenant is not null and (xact, id) > ($1, $2) and xact < horizon limit $3
                ) as "tenants!"
            from seen"#,
            bigint(after.xact),
            bigint(after.id),
            TENANTS_MAX,
        )
        .fetch_one(&self.pool)
        .await?;
        Ok(News {
            horizon: Position { xact: unsigned(row.horizon), id: 0 },
            are_tenants_cut: i64::try_from(row.tenants.len()).is_ok_and(|count| count >= TENANTS_MAX),
            tenants: row.tenants.into_iter().map(TenantId::proven).collect(),
            is_held_up: row.is_held_up,
        })
    }

    /// Says to all nodes that events came: in a moment, and once for all that were told of until then.
    pub(super) fn told(&self) {
        self.pool.bell().notify_one();
    }

    /// Passes on for good what [`Store::told`] says.
    pub async fn ring(&self) {
        /// A message takes a lock that all who commit one share: few of them say as much as many.
        const PAUSE: Duration = Duration::from_millis(25);
        loop {
            self.pool.bell().notified().await;
            if let Err(error) = sqlx::query!("select pg_notify($1, '')", CHANNEL).execute(&self.pool).await {
                // Who follows looks by itself now and then.
                tracing::debug!(%error, "telling other nodes of events failed");
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Returns when events may have come, for the one who waits. A hint only, and only while somebody listens: look by yourself as well.
    pub async fn events_came(&self) {
        self.pool.came().notified().await;
    }

    /// Tells of something that is not done in a transaction.
    pub async fn tell_of_sandbox(&self, tenant: &TenantId, id: SandboxId, kind: &str, act: &Act<'_>) -> Result<(), StoreError> {
        let (actor_tenant, actor) = act.names();
        sqlx::query!(
            "insert into events (tenant, sandbox, kind, at, data, actor_tenant, actor) values ($1, $2, $3, $4, $5, $6, $7)",
            tenant.as_str(),
            id.0,
            kind,
            act.at,
            act.data,
            actor_tenant as _,
            actor as _,
        )
        .execute(&self.pool)
        .await?;
        self.told();
        Ok(())
    }

    /// Removes the oldest events from before this time. Answers how many.
    pub async fn prune_events(&self, before: OffsetDateTime, limit: u32) -> Result<u64, StoreError> {
        let gone = sqlx::query_scalar!(
            r#"with gone as (
                delete from events using (
                    select id from events where at < $1 and id <= (select min(id) + 2 * $2::bigint from events)
                    order by id limit $2
                    for update skip locked
                ) as old
                where events.id = old.id
                returning events.xact, events.id
            ), last as (
                select xact, id from gone order by xact desc, id desc limit 1
            ), noted as (
                update events_pruned set xact = last.xact, id = last.id from last
                where (events_pruned.xact, events_pruned.id) < (last.xact, last.id)
            )
            select count(*) as "count!" from gone"#,
            before,
            i64::from(limit),
        );
        Ok(unsigned(gone.fetch_one(&self.pool).await?))
    }

    /// Behind which position all events are kept still.
    pub async fn kept_events(&self) -> Result<Position, StoreError> {
        let row = sqlx::query!("select xact, id from events_pruned").fetch_one(&self.pool).await?;
        Ok(Position { xact: unsigned(row.xact), id: unsigned(row.id) })
    }
}

impl Position {
    /// In front of everything that is kept.
    pub const OLDEST: Self = Self { xact: 0, id: 0 };
}

impl EventFilter {
    /// Whether the event is one of those, wherever it stands.
    pub fn takes(&self, told: &Told) -> bool {
        let Self { tenant, kinds, sandbox, object, principal, before: _, limit: _ } = self;
        tenant.as_ref().is_none_or(|tenant| told.tenant.as_ref() == Some(tenant))
            && takes_kind(kinds, &told.kind)
            && sandbox.is_none_or(|id| told.object.strip_prefix("sandbox/").is_some_and(|text| text.parse() == Ok(id)))
            && object.as_ref().is_none_or(|object| told.object == *object)
            && principal.as_ref().is_none_or(|principal| told.actor.as_ref() == Some(principal))
    }
}

/// Whether the kind is among these, of which one may be as `sandbox.*`; none is all.
fn takes_kind(kinds: &[String], kind: &str) -> bool {
    let area = kind.split('.').next().unwrap_or(kind);
    kinds.is_empty() || kinds.iter().any(|wanted| wanted == kind || wanted.strip_suffix(".*") == Some(area))
}

impl Act<'_> {
    pub(super) fn names(&self) -> (Option<&str>, Option<&str>) {
        (self.actor.map(|actor| actor.tenant.as_str()), self.actor.map(|actor| actor.principal.as_str()))
    }
}

/// Makes what was written in another cluster, which this database was restored from, older than all that is written here: numbers of
/// transactions begin anew there, those of events do not.
pub(super) async fn renumber_restored(connection: &mut PgConnection) -> Result<(), StoreError> {
    let mut transaction = connection.begin().await?;
    let found = sqlx::query!(
        "update events set xact = 0
        where xact > 0 and exists (select 1 from events where xact >= pg_snapshot_xmax(pg_current_snapshot())::text::bigint)"
    );
    let count = found.execute(&mut *transaction).await?.rows_affected();
    sqlx::query!("update events_pruned set xact = 0 where xact > pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
        .execute(&mut *transaction)
        .await?;
    sqlx::query!("update webhook_position set xact = 0, id = id_max where xact > pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
        .execute(&mut *transaction)
        .await?;
    sqlx::query!("update webhooks set xact = 0 where xact > pg_snapshot_xmax(pg_current_snapshot())::text::bigint")
        .execute(&mut *transaction)
        .await?;
    transaction.commit().await?;
    if count > 0 {
        tracing::info!(count, "the database was restored from another cluster: its events are older than all new ones now");
    }
    Ok(())
}

pub(super) async fn tell(
    connection: &mut PgConnection,
    tenant: Option<&TenantId>,
    kind: &str,
    object: Option<&str>,
    act: &Act<'_>,
) -> Result<(), StoreError> {
    let (actor_tenant, actor) = act.names();
    sqlx::query!(
        "insert into events (tenant, kind, object, at, data, actor_tenant, actor) values ($1, $2, $3, $4, $5, $6, $7)",
        tenant.map(TenantId::as_str) as _,
        kind,
        object as _,
        act.at,
        act.data,
        actor_tenant as _,
        actor as _,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// The end of all events that are there for good, and what is ahead of everything that was written in this cluster.
async fn horizons(connection: &mut PgConnection) -> Result<(Position, Position), StoreError> {
    let row = sqlx::query!(
        r#"select pg_snapshot_xmin(now)::text::bigint as "oldest!", pg_snapshot_xmax(now)::text::bigint as "next!"
        from pg_current_snapshot() as now"#
    )
    .fetch_one(connection)
    .await?;
    Ok((Position { xact: unsigned(row.oldest), id: 0 }, Position { xact: unsigned(row.next), id: 0 }))
}

/// Ends a reading when all that it saw is on disk. Whoever is told of an event, or of a position, counts on it: a crash of Postgres must not take it back, or give its number again. By the
/// same connection: a crash in between breaks it.
async fn for_good(mut reading: Transaction) -> Result<(), StoreError> {
    sqlx::query!("select pg_logical_emit_message(true, 'mayfly', '')::text as flushed").fetch_one(&mut *reading).await?;
    Ok(reading.commit_untold().await?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use sqlx::PgPool;

    use super::*;

    const ADD: &str = "insert into events (tenant, kind, object, at, data) values ('acme', 'test.made', $1, now(), '{}')";

    fn acme() -> TenantId {
        TenantId::proven("acme".into())
    }

    async fn add(pool: &PgPool, object: &str) {
        sqlx::query(ADD).bind(object).execute(pool).await.unwrap();
    }

    /// Follows until so many came. Others' transactions in the same cluster hold everybody up, for as long as they run.
    async fn follow(store: &Store, mut after: Position, count: usize) -> (Vec<String>, Position) {
        let mut objects = Vec::new();
        for _ in 0..3000 {
            let followed = store.follow_events(&acme(), after, 2).await.unwrap();
            objects.extend(followed.events.into_iter().map(|told| told.object));
            after = followed.next;
            if objects.len() >= count && !followed.is_cut {
                return (objects, after);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{objects:?} are not {count}")
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn an_event_whose_transaction_commits_late_is_not_skipped(pool: PgPool) {
        let store = Store { pool: pool.clone().into() };
        let mut slow = pool.begin().await.unwrap();
        sqlx::query(ADD).bind("slow").execute(&mut *slow).await.unwrap();
        add(&pool, "fast").await;
        // Who goes by ids has seen the larger one, and looks for none below it.
        let by_id: Vec<String> = sqlx::query_scalar("select object from events where id > 0 order by id").fetch_all(&pool).await.unwrap();
        assert_eq!(by_id, ["fast"]);

        let before = store.follow_events(&acme(), Position::OLDEST, 10).await.unwrap();
        slow.commit().await.unwrap();
        let (objects, _) = follow(&store, before.next, 2).await;

        assert_eq!(before.events, []);
        assert_eq!(objects, ["slow", "fast"]);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn nothing_comes_twice_and_nothing_is_left_out(pool: PgPool) {
        let store = Store { pool: pool.clone().into() };
        for number in 0..5 {
            add(&pool, &number.to_string()).await;
        }
        let (first, after) = follow(&store, Position::OLDEST, 5).await;
        add(&pool, "5").await;
        let (second, _) = follow(&store, after, 1).await;
        assert_eq!((first, second), (["0", "1", "2", "3", "4"].map(String::from).to_vec(), vec!["5".to_owned()]));
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn news_name_whose_events_came_and_that_some_are_held_up(pool: PgPool) {
        let store = Store { pool: pool.clone().into() };
        let mut slow = pool.begin().await.unwrap();
        sqlx::query(ADD).bind("slow").execute(&mut *slow).await.unwrap();
        add(&pool, "fast").await;
        let held_up = store.event_news(Position::OLDEST).await.unwrap();
        slow.commit().await.unwrap();
        follow(&store, Position::OLDEST, 2).await;
        let news = store.event_news(Position::OLDEST).await.unwrap();
        assert_eq!((held_up.is_held_up, held_up.tenants), (true, vec![]));
        assert_eq!((news.tenants, news.are_tenants_cut), (vec![acme()], false));
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn in_a_restored_database_new_events_come_behind_the_old_ones(pool: PgPool) {
        let store = Store { pool: pool.clone().into() };
        add(&pool, "old").await;
        // As the numbers of another cluster are, which was further.
        let far = i64::MAX / 2;
        sqlx::query("update events set xact = $1").bind(far).execute(&pool).await.unwrap();
        let last = store.list_events(&EventFilter { limit: 1, ..EventFilter::default() }).await.unwrap()[0].position;
        sqlx::query("update webhook_position set xact = $1, id_max = 7").bind(far).execute(&pool).await.unwrap();

        renumber_restored(&mut pool.acquire().await.unwrap()).await.unwrap();
        add(&pool, "new").await;

        let (all, _) = follow(&store, Position::OLDEST, 2).await;
        let (later, _) = follow(&store, last, 1).await;
        assert_eq!((all, later), (vec!["old".to_owned(), "new".to_owned()], vec!["new".to_owned()]));
        let position: (i64, i64) = sqlx::query_as("select xact, id from webhook_position").fetch_one(&pool).await.unwrap();
        assert_eq!(position, (0, 7));
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn how_far_events_were_dropped_is_known(pool: PgPool) {
        let store = Store { pool: pool.clone().into() };
        for number in 0..4 {
            add(&pool, &number.to_string()).await;
        }
        assert_eq!(store.kept_events().await.unwrap(), Position::OLDEST);
        let listed = store.list_events(&EventFilter { limit: 4, ..EventFilter::default() }).await.unwrap();
        sqlx::query("update events set at = 'epoch' where object in ('0', '1')").execute(&pool).await.unwrap();
        assert_eq!(store.prune_events(OffsetDateTime::UNIX_EPOCH + Duration::from_secs(1), 100).await.unwrap(), 2);
        assert_eq!(store.kept_events().await.unwrap(), listed[2].position);
    }

    #[sqlx::test(migrations = "../migrations")]
    async fn lists_and_streams_take_the_same_events(pool: PgPool) {
        let store = Store { pool: pool.clone().into() };
        let sandbox = SandboxId(Uuid::now_v7());
        let act = Act { actor: None, at: OffsetDateTime::UNIX_EPOCH, data: json!({}) };
        store.tell_of_sandbox(&acme(), sandbox, "sandbox.killed", &act).await.unwrap();
        add(&pool, "image/python").await;
        let (_, _) = follow(&store, Position::OLDEST, 2).await;
        let all = store.follow_events(&acme(), Position::OLDEST, 10).await.unwrap().events;
        let base = EventFilter { limit: 10, ..EventFilter::default() };
        for (filter, expected) in [
            (base.clone(), 2),
            (EventFilter { kinds: vec!["sandbox.*".into()], ..base.clone() }, 1),
            (EventFilter { kinds: vec!["test.made".into(), "sandbox.killed".into()], ..base.clone() }, 2),
            (EventFilter { kinds: vec!["sandbox".into()], ..base.clone() }, 0),
            (EventFilter { sandbox: Some(sandbox), ..base.clone() }, 1),
            (EventFilter { object: Some("image/python".into()), ..base.clone() }, 1),
            (EventFilter { principal: Some("alice".into()), ..base.clone() }, 0),
            (EventFilter { tenant: Some(TenantId::proven("other".into())), ..base.clone() }, 0),
        ] {
            let listed = store.list_events(&filter).await.unwrap().len();
            let taken = all.iter().filter(|told| filter.takes(told)).count();
            assert_eq!((listed, taken), (expected, expected), "{filter:?}");
        }
    }
}
