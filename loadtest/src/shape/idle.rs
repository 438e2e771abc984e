//! Sandboxes that do nothing: what they cost, and what they cost those that do something.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::Result;
use serde_json::json;

use super::{Load, Measured, Shape, bar};
use crate::{
    drive::{self, Until, milliseconds},
    host::Memory,
    report::CLOSED,
    service::{Failure, Service},
    tally::{Tally, count},
    target::IDLE_MIB,
    work::{Done, Runs, Work},
};

/// They go by themselves if this program cannot take them away.
const TTL_MS: u64 = 1_800_000;
const MEMORY_BYTES: u64 = 8 << 20;
/// Less than that, so that it lies in memory: on disk the space of a thousand would be set aside.
const DISK_BYTES: u64 = 4 << 20;
const CPU_MILLIS: u64 = 100;
const AT_ONCE: u32 = 8;
/// From the end of what was asked to when the machine's memory is looked at: what is cleaned up off the reply path is gone by then.
const SETTLE: Duration = Duration::from_secs(2);

pub(super) async fn measure(load: &Load, service: &Service, runs: &Arc<Runs>) -> Result<Measured> {
    let before = memory(load.data_dir.as_deref()).await?;
    let idle = Idle::create(service, &load.image, load.sandboxes).await?;
    let after = memory(load.data_dir.as_deref()).await?;
    let lasting = Duration::from_secs_f64(load.duration_s);
    let (until, length) = load.requests.map_or((Until::Over(lasting), milliseconds(lasting)), |count| (Until::Count(count), count));
    let mut tally = drive::closed(runs, 1, until, &bar("runs beside idle sandboxes", length)?).await?;
    let live = count(idle.made());
    let Idle { created, .. } = idle.delete(service).await?;
    let mut facts =
        BTreeMap::from([("sandboxes", live), ("create_p50_ms", created.latency_ms(0.5)), ("create_p99_ms", created.latency_ms(0.99))]);
    facts.insert("created_per_s", created.rate());
    if let (Some(before), Some(after)) = (before, after)
        && live > 0.0
    {
        let mib = |bytes: u64| count(bytes) / f64::from(1 << 20);
        facts.insert(IDLE_MIB, mib(before.available.saturating_sub(after.available)) / live);
        facts.insert("service_mib", mib(after.service));
        facts.insert("keeper_mib", mib(after.keeper));
    }
    // Of sandboxes that could not be made the errors are told; their times are no runs'.
    for (code, errors) in created.errors {
        tally.sent += errors.count;
        tally.errors.entry(code).or_default().add(errors);
    }
    Ok(Measured { kind: CLOSED, tally, facts })
}

async fn memory(data_dir: Option<&Path>) -> Result<Option<Memory>> {
    match data_dir {
        Some(data_dir) => settled(data_dir).await.map(Some),
        None => Ok(None),
    }
}

/// What is in use once nothing is being done any more.
pub(crate) async fn settled(data_dir: &Path) -> Result<Memory> {
    tokio::time::sleep(SETTLE).await;
    Memory::of(data_dir)
}

/// Sandboxes that sleep.
#[derive(Debug)]
pub(crate) struct Idle {
    ids: Vec<String>,
    /// How they were made.
    pub(crate) created: Tally,
}

impl Idle {
    /// Makes so many. Those that could not be made are counted.
    pub(crate) async fn create(service: &Service, image: &str, sandboxes: u32) -> Result<Self> {
        let limits = json!({ "memory_bytes": MEMORY_BYTES, "disk_bytes": DISK_BYTES, "cpu_millis": CPU_MILLIS, "pids": 4 });
        let request = json!({ "image": image, "command": ["sleep", "1000000"], "ttl_ms": TTL_MS, "limits": limits });
        let work = Arc::new(Creates { service: service.clone(), request, ids: Mutex::default() });
        let bar = bar(Shape::Idle.name(), sandboxes.into())?;
        let created = drive::closed(&work, AT_ONCE, Until::Count(sandboxes.into()), &bar).await?;
        let ids = std::mem::take(&mut *work.ids.lock().expect("nobody panics who holds it"));
        Ok(Self { ids, created })
    }

    pub(crate) fn made(&self) -> u64 {
        self.created.succeeded()
    }

    /// Takes them away; fails if one cannot be.
    pub(crate) async fn delete(mut self, service: &Service) -> Result<Self> {
        let work = Arc::new(Deletes { service: service.clone(), ids: std::mem::take(&mut self.ids) });
        let number = u64::try_from(work.ids.len())?;
        let deleted = drive::closed(&work, AT_ONCE, Until::Count(number), &bar("taking them away", number)?).await?;
        if let Some((code, errors)) = deleted.errors.into_iter().next() {
            return Err(Failure::new(code, format!("{} idle sandboxes could not be deleted: {}", errors.count, errors.example)).into());
        }
        Ok(self)
    }
}

#[derive(Debug)]
struct Creates {
    service: Service,
    request: serde_json::Value,
    ids: Mutex<Vec<String>>,
}

impl Work for Creates {
    async fn once(&self, _number: u64) -> Result<Done, Failure> {
        let told = self.service.create(&self.request).await?;
        self.ids.lock().expect("nobody panics who holds it").push(told.id);
        Ok(Done::default())
    }
}

#[derive(Debug)]
struct Deletes {
    service: Service,
    ids: Vec<String>,
}

impl Work for Deletes {
    async fn once(&self, number: u64) -> Result<Done, Failure> {
        let Some(id) = usize::try_from(number).ok().and_then(|number| self.ids.get(number)) else { return Ok(Done::default()) };
        self.service.delete(id).await.map(|()| Done::default())
    }
}
