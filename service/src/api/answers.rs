//! The memory of answers that tell of output: together they take no more than is set aside for them, and each tenant's no more than a part of that.
//!
//! A program can write megabytes that are six times as many in JSON, any number of clients can ask for them, and none of them has to read what it is sent. So room is taken before output is read, and
//! is held by the answer's own bytes until those are sent, or dropped with their connection (which does not wait for ever: `serve::door`).

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

use axum::{
    body::Bytes,
    http::{StatusCode, header},
    response::{IntoResponse as _, Response},
};
use serde::Serialize;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tracing::Instrument as _;

use super::error::ApiError;
use crate::sandbox::TenantId;

/// How long an answer that can be asked for again waits for room.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// What an answer takes for each byte of output that it tells: the byte itself, and up to six in JSON, where a control character is `\u0001`.
const BYTES_FOR_BYTE: u64 = 7;
/// What it takes for all else that it says of one run, or exec.
const BYTES_FOR_ONE: u64 = 16 * 1024;
/// What takes no more than this is not counted: of such answers there are no more than connections.
const UNCOUNTED_BYTES: u64 = 64 * 1024;
/// What is counted in.
const UNIT_BYTES: u64 = 1024;
/// What is more than this is not written among everything else that goes on: some milliseconds of it.
const MANY_UNITS: usize = 1024;
/// Into how many parts the whole is divided: a tenant may have one, so that its readers who do not read keep nobody else from reading.
const PARTS: u32 = 4;

/// The room that there is.
#[derive(Debug)]
pub struct Answers {
    units: u32,
    everybodys: Arc<Semaphore>,
    /// Of those tenants that have some.
    tenants: Mutex<HashMap<TenantId, Weak<Semaphore>>>,
}

/// Room for one answer.
#[derive(Debug)]
pub(super) struct Room {
    /// Of the tenant's part and of the whole; `None`: it is not counted.
    permits: Option<[OwnedSemaphorePermit; 2]>,
}

/// The bytes of an answer, with the room that they take.
struct Held {
    bytes: Vec<u8>,
    _room: Room,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Does this to its end, whoever goes away: what takes room gives it back when it is done, not when nobody waits for it any more.
pub(super) async fn to_its_end(work: impl Future<Output = Result<Response, ApiError>> + Send + 'static) -> Result<Response, ApiError> {
    tokio::spawn(work.in_current_span()).await.unwrap_or_else(|_panic| Err(ApiError::panicked()))
}

impl Answers {
    /// So many bytes of room.
    pub fn new(bytes: u64) -> Self {
        let units = units(bytes);
        Self { units, everybodys: semaphore(units), tenants: Mutex::default() }
    }

    /// Room for an answer that tells of so many things and so many bytes of their output. One that takes more than there is has all of it to itself. Fails when there is
    /// none in time.
    pub(super) async fn room(&self, tenant: &TenantId, count: usize, output_bytes: u64, deadline: Instant) -> Result<Room, ApiError> {
        let bytes = output_bytes.saturating_mul(BYTES_FOR_BYTE).saturating_add(BYTES_FOR_ONE.saturating_mul(count as u64));
        if bytes <= UNCOUNTED_BYTES {
            return Ok(Room::uncounted());
        }
        let (wanted, part) = (units(bytes), self.part());
        let taken = async {
            // Its own part first: who waits for that holds nothing of what others need.
            let own = self.part_of(tenant).acquire_many_owned(wanted.min(part)).await;
            let everybodys = Arc::clone(&self.everybodys).acquire_many_owned(wanted.min(self.units)).await;
            [own, everybodys].map(|permit| permit.expect("these semaphores are never closed"))
        };
        let permits = tokio::time::timeout_at(deadline, taken).await.map_err(|_late| {
            ApiError::Busy("answers that were asked for and not read yet take all the memory that is set aside for them".to_owned())
        })?;
        Ok(Room { permits: Some(permits) })
    }

    fn part(&self) -> u32 {
        (self.units / PARTS).max(1)
    }

    fn part_of(&self, tenant: &TenantId) -> Arc<Semaphore> {
        let mut tenants = self.tenants.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(part) = tenants.get(tenant).and_then(Weak::upgrade) {
            return part;
        }
        tenants.retain(|_, part| part.strong_count() > 0);
        let part = semaphore(self.part());
        tenants.insert(tenant.clone(), Arc::downgrade(&part));
        part
    }
}

impl Room {
    /// None, for what takes next to nothing.
    pub(super) const fn uncounted() -> Self {
        Self { permits: None }
    }

    /// This in JSON, which holds as much of the room as it takes. What may take long to write keeps nobody else waiting.
    pub(super) async fn answer<T: Serialize + Send + 'static>(self, status: StatusCode, told: T) -> Result<Response, ApiError> {
        if self.permits.as_ref().is_none_or(|[own, _]| own.num_permits() < MANY_UNITS) {
            return self.answer_now(status, told);
        }
        let written = tokio::task::spawn_blocking(move || self.answer_now(status, told)).await;
        written.unwrap_or_else(|_panic| Err(ApiError::panicked()))
    }

    fn answer_now<T: Serialize>(mut self, status: StatusCode, told: T) -> Result<Response, ApiError> {
        let bytes = json(&told).map_err(|error| ApiError::Internal(error.into()))?;
        drop(told);
        self.keep(bytes.len() as u64);
        let bytes = Bytes::from_owner(Held { bytes, _room: self });
        Ok((status, [(header::CONTENT_TYPE, "application/json")], bytes).into_response())
    }

    /// Gives back what is beyond so many bytes.
    fn keep(&mut self, bytes: u64) {
        if bytes <= UNCOUNTED_BYTES {
            self.permits = None;
        }
        for permit in self.permits.iter_mut().flatten() {
            let beyond = permit.num_permits().saturating_sub(units(bytes) as usize);
            drop(permit.split(beyond));
        }
    }
}

/// In a buffer of just its size: one that grows takes up to twice as much.
fn json<T: Serialize>(told: &T) -> serde_json::Result<Vec<u8>> {
    let mut count = Count(0);
    serde_json::to_writer(&mut count, told)?;
    let mut bytes = Vec::with_capacity(count.0);
    serde_json::to_writer(&mut bytes, told)?;
    Ok(bytes)
}

/// Counts what is written to it.
struct Count(usize);

impl io::Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn units(bytes: u64) -> u32 {
    // Half of what a number of 32 bits holds is two terabytes.
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX).clamp(1, u32::MAX / 2)
}

fn semaphore(units: u32) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(units as usize))
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;
    use serde_json::{Value, json};

    use super::*;

    const MIB: u64 = 1024 * 1024;
    /// Four answers of this much output take all that a tenant has of 112 MiB.
    const OUTPUT_BYTES: u64 = (7 * MIB - BYTES_FOR_ONE) / 7;

    fn tenant(name: &str) -> TenantId {
        TenantId::proven(name.to_owned())
    }

    async fn room(answers: &Answers, of: &str, output_bytes: u64) -> Option<Room> {
        answers.room(&tenant(of), 1, output_bytes, Instant::now() + Duration::from_millis(20)).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn there_is_no_more_room_than_there_is() {
        let answers = Answers::new(112 * MIB);
        let mut held = Vec::new();
        for of in ["a", "b", "c", "d"] {
            for _ in 0..4 {
                held.push(room(&answers, of, OUTPUT_BYTES).await.unwrap());
            }
        }
        assert!(room(&answers, "e", OUTPUT_BYTES).await.is_none());
        held.pop();
        assert!(room(&answers, "e", OUTPUT_BYTES).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_tenant_has_a_part_and_leaves_the_rest_to_others() {
        let answers = Answers::new(112 * MIB);
        let mut held = Vec::new();
        for _ in 0..4 {
            held.push(room(&answers, "a", OUTPUT_BYTES).await.unwrap());
        }
        assert!(room(&answers, "a", OUTPUT_BYTES).await.is_none());
        assert!(room(&answers, "b", OUTPUT_BYTES).await.is_some());
        assert!(room(&answers, "a", 100).await.is_some(), "a small one is not counted");
        drop(held);
        assert!(room(&answers, "a", OUTPUT_BYTES).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn what_takes_more_than_there_is_has_all_to_itself() {
        let answers = Answers::new(16 * MIB);
        let all = room(&answers, "a", 100 * MIB).await.unwrap();
        assert!(room(&answers, "a", MIB).await.is_none() && room(&answers, "b", MIB).await.is_none());
        drop(all);
        assert!(room(&answers, "b", MIB).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_holds_what_it_takes_until_its_last_byte_is_gone() {
        let answers = Answers::new(28 * MIB);
        let all = room(&answers, "a", 100 * MIB).await.unwrap();
        // 6 of 7 MiB that a tenant has, and of 28.
        let answer = all.answer(StatusCode::OK, json!({ "stdout": "\u{1}".repeat(1024 * 1024) })).await.unwrap();
        assert_eq!(answer.headers()[header::CONTENT_TYPE], "application/json");
        assert!(room(&answers, "a", MIB / 4).await.is_none(), "it was given back");
        assert!(room(&answers, "b", MIB / 2).await.is_some(), "all of it was held");

        // As a connection does, which lets go of the body when it has its bytes.
        let bytes = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(room(&answers, "a", MIB / 4).await.is_none(), "it was given back before it was sent");
        let told: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(told["stdout"].as_str().unwrap().len(), 1024 * 1024);
        drop(bytes);
        assert!(room(&answers, "a", MIB / 4).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_small_answer_holds_nothing() {
        let answers = Answers::new(MIB);
        let answer = room(&answers, "a", MIB).await.unwrap().answer(StatusCode::OK, json!({})).await.unwrap();
        assert!(room(&answers, "a", MIB).await.is_some());
        drop(answer);
    }

    #[test]
    fn json_is_as_large_as_was_counted() {
        let bytes = json(&json!({ "a": "\u{1}ü\n" })).unwrap();
        assert_eq!((bytes.len(), bytes.as_slice()), (bytes.capacity(), "{\"a\":\"\\u0001ü\\n\"}".as_bytes()));
    }
}
