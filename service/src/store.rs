//! Everything that must outlive a process: the only module that knows SQL.

mod admission;
mod cases;
mod deliveries;
mod ears;
mod events;
mod execs;
mod health;
mod idempotency;
mod images;
mod life;
mod nodes;
mod peers;
mod pool;
mod pools;
mod queue;
mod registries;
mod sandboxes;
mod tenants;
mod usage;
mod volumes;
mod webhooks;

use std::{sync::Arc, time::Duration};

pub use admission::{Admission, Admitted, Promise};
pub use deliveries::{Attempt, Busy, Claimed, Delivery, DeliveryFilter, DeliveryState, Redelivery};
pub use ears::Ears;
pub use events::{Act, EventFilter, Followed as FollowedEvents, News, Position, Told};
pub use execs::{ExecAdmitted, ExecEnded};
pub use idempotency::{Fingerprint, HeldKey, Kept, KeyName, KeyState, Left, Taking};
pub use images::{Image, NewImage, Origin, Recorded};
pub use life::{Changing, StartedAgain};
pub use nodes::{Abandoned, Capacity as NodeCapacity, Hold, Lease, Node, NodeId, Orders, Renewed, Renewer};
pub use peers::{Home, HomeNode, Peer, PeerDoor};
use pool::Pool;
pub use pools::{MemberAdmitted, NewMember, PoolMade, PoolWanted, TakeOver, TakenOver};
pub use queue::{Candidate, Input, Return};
pub use registries::{LOGINS_MAX, RegistryLogin};
#[cfg(test)]
pub(crate) use sandboxes::tests::sandbox as sandbox_for_tests;
pub use sandboxes::{Deleted, Ended, Everyones, Filter, Held, LogKept, Order, POOLED_FOR_MAX, StoredLog, Whereabouts, Writer};
use sqlx::{Connection as _, PgConnection, postgres::PgConnectOptions};
pub use tenants::{Account, Change, OfTenant, Standing, Suspension, Used, Who};
pub use usage::{GroupBy, RecentEnds, TimeUnit, UsageLine, UsageQuery};
pub use volumes::{Unfinished, VolumeBegun, VolumeEnd, VolumeFilter};
pub use webhooks::{Created as CreatedWebhook, NewWebhook, Rotation, Webhook, WebhookChange};

use crate::metrics::{Connections, Statements};

/// Postgres, with a bounded number of connections, and of those who wait for one.
#[derive(Debug, Clone)]
pub struct Store {
    pool: Pool,
}

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Postgres was not asked: it is away, or too many wait for it. Nothing was done. Later it may work.
    #[error("the database is out of reach: {0}")]
    Unreached(#[source] sqlx::Error),
    /// Postgres broke off or is shutting down, or has no room: the statement may have been done, or not. Later it may work.
    #[error("the database is not available: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// The tenant has a sandbox of this name.
    #[error("the name is taken")]
    NameTaken,
    /// There is a sandbox of this id.
    #[error("it is made already")]
    MadeAlready,
    /// What was given has a zero byte, which no text of Postgres can hold, nor its `jsonb`. Nothing was done.
    #[error("no text can hold a zero byte")]
    ZeroByte,
    /// A row that no version of ours wrote. It stays so.
    #[error("a row is damaged: {0}")]
    Damaged(String),
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

impl StoreError {
    /// Whether it may work later.
    pub const fn is_unavailable(&self) -> bool {
        matches!(self, Self::Unreached(_) | Self::Unavailable(_))
    }

    /// Whether it may have been done all the same: no answer came, or none of Postgres's own.
    pub fn is_unclear(&self) -> bool {
        matches!(self, Self::Unavailable(error) if error.as_database_error().is_none())
    }
}

impl Store {
    /// Connects. Fails when Postgres cannot be reached with these options.
    pub async fn connect(options: PgConnectOptions, connections: u32, statements: Statements) -> anyhow::Result<Self> {
        let pool = Pool::connect(options, connections, statements).await?;
        Ok(Self { pool })
    }

    /// Brings the schema up to this program's version, under a lock that lets one process do it at a time.
    pub async fn migrate(&self) -> anyhow::Result<()> {
        // By a connection of its own, which has no deadline: a migration takes as long as its tables are large.
        let mut connection = PgConnection::connect_with(&self.pool.connect_options()).await?;
        sqlx::migrate!("../migrations").run(&mut connection).await?;
        events::renumber_restored(&mut connection).await?;
        // Its end is all the same to us.
        drop(connection.close().await);
        Ok(())
    }

    /// Returns as soon as Postgres is known to be away, with the reason.
    pub async fn away(&self) -> Arc<str> {
        self.pool.health().away().await
    }

    /// Returns as soon as Postgres is not known to be away.
    pub async fn there(&self) {
        self.pool.health().there().await;
    }

    /// The connections as they are now.
    pub fn connections(&self) -> Connections {
        self.pool.connections()
    }

    /// Whether Postgres answers.
    pub async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query!("select 1 as one").fetch_one(&self.pool).await?;
        Ok(())
    }

    /// Closes every connection, after what they are doing; one that is busy for longer than a moment is left to the end of the process.
    pub async fn close(&self) {
        /// Longer than any statement of ours takes.
        const PATIENCE: Duration = Duration::from_secs(2);
        drop(tokio::time::timeout(PATIENCE, self.pool.close()).await);
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        if pool::was_not_sent(&error) {
            return Self::Unreached(error);
        }
        if is_unavailable(&error) {
            return Self::Unavailable(error);
        }
        if let sqlx::Error::Database(database) = &error
            && database.constraint() == Some("sandboxes_name")
        {
            return Self::NameTaken;
        }
        if let sqlx::Error::Database(database) = &error
            && database.constraint() == Some("sandboxes_pkey")
        {
            return Self::MadeAlready;
        }
        // 22021: a character that is none of its encoding's; 22P05: one that `jsonb` cannot hold.
        if error.as_database_error().and_then(sqlx::error::DatabaseError::code).is_some_and(|code| code == "22021" || code == "22P05") {
            return Self::ZeroByte;
        }
        Self::Other(error.into())
    }
}

/// Whether the fault lies with the connection or the server's state, not with the statement.
fn is_unavailable(error: &sqlx::Error) -> bool {
    // Of the table of error codes in Postgres's manual the classes 08 (connection), 53 (resources: disk, memory, connections), 57 (operator)
    // and 58 (system), a transaction that rested for too long, and a server that only reads, as one that is about to be replaced.
    const CODES: [&str; 6] = ["08", "53", "57", "58", "25P03", "25006"];
    let code = error.as_database_error().and_then(sqlx::error::DatabaseError::code);
    code.is_some_and(|code| CODES.iter().any(|beginning| code.starts_with(beginning)))
        || matches!(
            error,
            sqlx::Error::Io(_)
                | sqlx::Error::Protocol(_)
                | sqlx::Error::PoolTimedOut
                | sqlx::Error::PoolClosed
                | sqlx::Error::Tls(_)
                | sqlx::Error::WorkerCrashed
        )
}

/// Whether this transaction may do what changes rows of many tenants: one at a time, so that no two wait for each other.
async fn keeps_house(connection: &mut PgConnection) -> Result<bool, StoreError> {
    /// Any number that nobody else takes for an advisory lock.
    const HOUSEKEEPING: i64 = 0x6d61_7966_6c79;
    let may = sqlx::query_scalar!(r#"select pg_try_advisory_xact_lock($1) as "may!""#, HOUSEKEEPING).fetch_one(connection).await?;
    Ok(may)
}

/// A number of ours as Postgres holds it. Limits, sizes and counters stay far below 2^63.
fn bigint(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// A bound of bytes, which is none where it is more than any value of Postgres's has.
fn bytes_at_most(bytes: usize) -> i64 {
    const MOST: i64 = 1 << 30;
    i64::try_from(bytes).map_or(MOST, |bytes| bytes.min(MOST))
}

/// A number from a column that cannot be negative.
fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

/// A row that no version of ours wrote.
fn damaged(what: impl std::fmt::Display) -> StoreError {
    StoreError::Damaged(format!("it holds {what}"))
}
