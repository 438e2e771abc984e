//! Connections to Postgres: so many, with so many who wait for one, and nobody waits while the database is known to be away.

use std::{
    io,
    ops::{Deref, DerefMut},
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{
    FutureExt as _, StreamExt as _, TryFutureExt as _, TryStreamExt as _,
    future::BoxFuture,
    stream::{self, BoxStream},
};
use sqlx::{
    Connection as _, Either, Execute, Executor, PgConnection, PgPool, Postgres, SqlStr,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions, PgQueryResult, PgRow, PgStatement, PgTypeInfo},
};
use tokio::sync::{Notify, Semaphore};

use tracing::{Instrument as _, Span};

use super::{StoreError, health::Health};
use crate::{
    metrics::{self, Connections, Statements},
    telemetry::TRACE,
};

/// How long a statement waits for a free connection.
const ACQUIRE_DEADLINE: Duration = Duration::from_secs(5);
/// How many wait for each connection at the most. A statement takes a fraction of a millisecond: more than this is no queue, but a jam.
const WAITING_PER_CONNECTION: usize = 64;
/// A connection that rested for longer is asked whether it still works before it is used.
const TRUSTED_REST: Duration = Duration::from_secs(1);

/// After this time Postgres gives a statement up, and a transaction that does nothing.
const SERVER_SETTINGS: &str = "set statement_timeout = '10s'; set idle_in_transaction_session_timeout = '30s'";
/// After this time we do: it hangs, or is out of reach without anybody saying so.
const STATEMENT_DEADLINE: Duration = Duration::from_secs(15);

/// A pool that can be used as sqlx's own.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    inner: PgPool,
    gate: Arc<Gate>,
}

#[derive(Debug)]
struct Gate {
    health: Arc<Health>,
    waiting: Semaphore,
    waiting_max: usize,
    statements: Statements,
    /// Rung when events were written.
    bell: Notify,
    /// Rung when it was heard that events were written somewhere.
    came: Notify,
}

impl Gate {
    fn new(health: Arc<Health>, waiting: usize, statements: Statements) -> Self {
        Self { health, waiting: Semaphore::new(waiting), waiting_max: waiting, statements, bell: Notify::new(), came: Notify::new() }
    }
}

/// Marks errors of statements that were not sent.
#[derive(Debug, thiserror::Error)]
enum NotSent {
    #[error("it is away: {0}")]
    Away(Arc<str>),
    #[error("too many wait for a connection")]
    Crowded,
    #[error(transparent)]
    NoConnection(sqlx::Error),
}

/// Whether the statement that failed like this was never sent, so that certainly nothing was done.
pub(super) fn was_not_sent(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(error) if error.get_ref().is_some_and(|inner| inner.is::<NotSent>()))
}

impl From<NotSent> for sqlx::Error {
    fn from(error: NotSent) -> Self {
        Self::Io(io::Error::other(error))
    }
}

impl Pool {
    /// Connects, and begins to watch the database.
    pub(super) async fn connect(options: PgConnectOptions, connections: u32, statements: Statements) -> Result<Self, sqlx::Error> {
        let health = Arc::new(Health::new());
        let known = Arc::clone(&health);
        let inner = PgPoolOptions::new()
            .max_connections(connections)
            .min_connections(2.min(connections))
            .acquire_timeout(ACQUIRE_DEADLINE)
            // A question before each use would cost every request; one that has rested may have outlived its server.
            .test_before_acquire(false)
            .before_acquire(move |connection, state| {
                let is_trusted = state.idle_for < TRUSTED_REST && !known.was_away_within(state.idle_for);
                Box::pin(async move { Ok(is_trusted || connection.ping().await.is_ok()) })
            })
            .after_connect(|connection, _| Box::pin(async move { connection.execute(SERVER_SETTINGS).await.map(drop) }))
            .connect_with(options)
            .await?;
        let waiting = WAITING_PER_CONNECTION * usize::try_from(connections).unwrap_or(1);
        tokio::spawn(Arc::clone(&health).watch(inner.clone()));
        Ok(Self { inner, gate: Arc::new(Gate::new(health, waiting, statements)) })
    }

    /// Rung when events were written, heard by who tells the other nodes.
    pub(super) fn bell(&self) -> &Notify {
        &self.gate.bell
    }

    /// Rung when it was heard that events were written, on whichever node.
    pub(super) fn came(&self) -> &Notify {
        &self.gate.came
    }

    pub(super) fn health(&self) -> &Health {
        &self.gate.health
    }

    /// A connection. An error says that nothing was sent.
    pub(super) async fn acquire(&self) -> Result<PoolConnection<Postgres>, sqlx::Error> {
        let Gate { health, waiting, statements, .. } = &*self.gate;
        let _place = waiting.try_acquire().map_err(|_| self.refused(NotSent::Crowded))?;
        let asked_at = Instant::now();
        let connection = tokio::select! {
            biased;
            reason = health.away() => Err(NotSent::Away(reason)),
            connection = self.inner.acquire() => connection.map_err(|error| {
                health.doubt();
                NotSent::NoConnection(error)
            }),
        };
        let connection = connection.map_err(|reason| self.refused(reason))?;
        statements.acquire_seconds.observe(asked_at.elapsed().as_secs_f64());
        Ok(connection)
    }

    fn refused(&self, reason: NotSent) -> sqlx::Error {
        self.gate.statements.refused(match &reason {
            NotSent::Away(_) => metrics::NotSent::Away,
            NotSent::Crowded => metrics::NotSent::Crowded,
            NotSent::NoConnection(_) => metrics::NotSent::NoConnection,
        });
        reason.into()
    }

    /// The connections as they are now.
    pub(super) fn connections(&self) -> Connections {
        let Gate { health, waiting, waiting_max, .. } = &*self.gate;
        let (open, idle) = (u64::from(self.inner.size()), self.inner.num_idle() as u64);
        Connections {
            idle,
            // Asked one after the other: meanwhile one may have come to rest.
            busy: open.saturating_sub(idle),
            max: u64::from(self.inner.options().get_max_connections()),
            waiting: waiting_max.saturating_sub(waiting.available_permits()) as u64,
            is_up: !health.is_away(),
        }
    }

    pub(super) async fn begin(&self) -> Result<Transaction, sqlx::Error> {
        let span = tracing::debug_span!(target: TRACE, "postgres transaction");
        let mut connection = InUse(Some(self.acquire().instrument(span.clone()).await?));
        let began_at = Instant::now();
        let begun = tokio::time::timeout(STATEMENT_DEADLINE, connection.get().execute("begin")).await;
        self.heard(begun.unwrap_or_else(|_late| Err(late())))?;
        Ok(Transaction { connection, gate: Arc::clone(&self.gate), began_at, _span: span })
    }

    /// Waits for a whole transaction no longer than for a statement: then it is given up, and may have been done or not.
    pub(super) async fn in_time<T>(&self, work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        tokio::time::timeout(STATEMENT_DEADLINE, work).await.unwrap_or_else(|_late| {
            self.gate.health.doubt();
            Err(late().into())
        })
    }

    /// Uses a connection for one statement, for as long as that may take.
    async fn use_one<T>(self, work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>) -> Result<T, sqlx::Error> {
        let span = tracing::debug_span!(target: TRACE, "postgres statement");
        let mut connection = InUse(Some(self.acquire().instrument(span.clone()).await?));
        let sent_at = Instant::now();
        let done = match tokio::time::timeout(STATEMENT_DEADLINE, work(connection.get())).instrument(span).await {
            Ok(done) => {
                connection.rest();
                done
            }
            Err(_late) => Err(late()),
        };
        self.gate.statements.statement_seconds.observe(sent_at.elapsed().as_secs_f64());
        self.heard(done)
    }

    /// A failure that is the connection's makes the database doubtful.
    fn heard<T>(&self, done: Result<T, sqlx::Error>) -> Result<T, sqlx::Error> {
        if let Err(error) = &done
            && super::is_unavailable(error)
        {
            self.gate.health.doubt();
        }
        done
    }
}

/// A transaction; sqlx's own gives its connection back to the pool when it is given up, see [`InUse`].
pub(super) struct Transaction {
    connection: InUse,
    gate: Arc<Gate>,
    began_at: Instant,
    /// Ends with it.
    _span: Span,
}

impl Transaction {
    pub(super) async fn commit(self) -> Result<(), sqlx::Error> {
        let gate = Arc::clone(&self.gate);
        self.commit_untold().await?;
        // Most tell of something, and a look too many costs little.
        gate.bell.notify_one();
        Ok(())
    }

    /// Of one that has nothing to tell.
    pub(super) async fn commit_untold(mut self) -> Result<(), sqlx::Error> {
        self.end("commit").await
    }

    /// As by being dropped, but the connection is used again.
    pub(super) async fn rollback(mut self) -> Result<(), sqlx::Error> {
        self.end("rollback").await
    }

    async fn end(&mut self, how: &'static str) -> Result<(), sqlx::Error> {
        let ended = tokio::time::timeout(STATEMENT_DEADLINE, self.connection.get().execute(how)).await;
        self.gate.statements.transaction_seconds.observe(self.began_at.elapsed().as_secs_f64());
        ended.unwrap_or_else(|_late| Err(late()))?;
        self.connection.rest();
        Ok(())
    }
}

impl Deref for Transaction {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.connection.0.as_ref().expect("it is given back at the end")
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.connection.get()
    }
}

/// A connection with a statement under way. One that is given up — its answer is late, or who asked for it went away — is closed: given back to the
/// pool it would be asked whether it works, and might never answer.
struct InUse(Option<PoolConnection<Postgres>>);

impl InUse {
    fn get(&mut self) -> &mut PgConnection {
        self.0.as_mut().expect("it is given back at the end")
    }

    /// The answer is there.
    fn rest(&mut self) {
        self.0 = None;
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            drop(connection.detach());
        }
    }
}

/// A statement was sent, and whether it was done nobody knows.
fn late() -> sqlx::Error {
    sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, "a statement got no answer"))
}

impl Deref for Pool {
    type Target = PgPool;

    fn deref(&self) -> &PgPool {
        &self.inner
    }
}

#[cfg(test)]
impl From<PgPool> for Pool {
    /// One that nobody watches.
    fn from(inner: PgPool) -> Self {
        Self { inner, gate: Arc::new(Gate::new(Arc::new(Health::new()), 1000, Statements::unread())) }
    }
}

impl<'p> Executor<'p> for &'_ Pool {
    type Database = Postgres;

    /// All rows are held before the first is given: none of our statements has many.
    fn fetch_many<'e, 'q: 'e, E>(self, query: E) -> BoxStream<'e, Result<Either<PgQueryResult, PgRow>, sqlx::Error>>
    where
        E: 'q + Execute<'q, Postgres>,
    {
        let pool = self.clone();
        let steps = pool.use_one(async move |connection| connection.fetch_many(query).try_collect::<Vec<_>>().await);
        steps.map_ok(|steps| stream::iter(steps).map(Ok)).try_flatten_stream().boxed()
    }

    fn fetch_optional<'e, 'q: 'e, E>(self, query: E) -> BoxFuture<'e, Result<Option<PgRow>, sqlx::Error>>
    where
        E: 'q + Execute<'q, Postgres>,
    {
        let pool = self.clone();
        pool.use_one(async move |connection| connection.fetch_optional(query).await).boxed()
    }

    fn prepare_with<'e>(self, sql: SqlStr, parameters: &'e [PgTypeInfo]) -> BoxFuture<'e, Result<PgStatement, sqlx::Error>>
    where
        'p: 'e,
    {
        let pool = self.clone();
        pool.use_one(async move |connection| connection.prepare_with(sql, parameters).await).boxed()
    }

    fn describe<'e>(self, sql: SqlStr) -> BoxFuture<'e, Result<sqlx::Describe<Postgres>, sqlx::Error>> {
        let pool = self.clone();
        pool.use_one(async move |connection| connection.describe(sql).await).boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreError;

    /// Far less than anybody waits for a connection.
    const AT_ONCE: Duration = Duration::from_millis(500);

    async fn of_one(pool: &PgPool, waiting: usize) -> Pool {
        let inner = PgPoolOptions::new().max_connections(1).connect_with((*pool.connect_options()).clone()).await.unwrap();
        Pool { inner, gate: Arc::new(Gate::new(Arc::new(Health::new()), waiting, Statements::unread())) }
    }

    #[sqlx::test(migrations = false)]
    async fn nobody_waits_for_a_database_that_is_away(pool: PgPool) {
        let pool = of_one(&pool, 10).await;
        let held = pool.acquire().await.unwrap();
        let waiting = tokio::spawn({
            let pool = pool.clone();
            async move { pool.acquire().await.map(drop) }
        });
        while pool.gate.waiting.available_permits() == 10 {
            tokio::task::yield_now().await;
        }

        let gone_at = Instant::now();
        pool.gate.health.note(Some("gone".into()));
        let (waited, came) = (waiting.await.unwrap().unwrap_err(), pool.acquire().await.unwrap_err());

        assert!(gone_at.elapsed() < AT_ONCE, "{:?}", gone_at.elapsed());
        for error in [waited, came] {
            assert!(matches!(StoreError::from(error), StoreError::Unreached(_)));
        }
        pool.gate.health.note(None);
        drop(held);
        pool.acquire().await.unwrap();
    }

    #[sqlx::test(migrations = false)]
    async fn no_more_wait_for_a_connection_than_may(pool: PgPool) {
        let pool = of_one(&pool, 2).await;
        let held = pool.acquire().await.unwrap();
        let waiting: Vec<_> = (0..2)
            .map(|_| {
                let pool = pool.clone();
                tokio::spawn(async move { pool.acquire().await.map(drop) })
            })
            .collect();
        while pool.gate.waiting.available_permits() > 0 {
            tokio::task::yield_now().await;
        }

        let asked_at = Instant::now();
        let refused = pool.acquire().await.unwrap_err();

        assert!(asked_at.elapsed() < AT_ONCE, "{:?}", asked_at.elapsed());
        assert!(matches!(StoreError::from(refused), StoreError::Unreached(_)));
        drop(held);
        for waited in waiting {
            waited.await.unwrap().unwrap();
        }
    }

    #[sqlx::test(migrations = false)]
    async fn every_connection_gives_up_what_takes_too_long(pool: PgPool) {
        let pool = Pool::connect((*pool.connect_options()).clone(), 2, Statements::unread()).await.unwrap();
        let settings = sqlx::query_scalar!(
            r#"select current_setting('statement_timeout') || ' ' || current_setting('idle_in_transaction_session_timeout') as "settings!""#
        );
        assert_eq!(settings.fetch_one(&pool).await.unwrap(), "10s 30s");
        pool.close().await;
    }

    #[sqlx::test(migrations = false)]
    async fn a_full_disk_is_the_databases_fault_and_not_the_statements(pool: PgPool) {
        let fail = async |code: &str| {
            let statement = format!("do $$ begin raise exception 'no' using errcode = '{code}'; end $$");
            StoreError::from(sqlx::query(sqlx::AssertSqlSafe(statement)).execute(&pool).await.unwrap_err())
        };
        for code in ["53100", "53200", "57014", "58030", "25006"] {
            assert!(matches!(fail(code).await, StoreError::Unavailable(_)), "{code}");
        }
        assert!(matches!(fail("22012").await, StoreError::Other(_)));
    }
}
