//! Output as a reader of it has it: how fast it comes by WebSocket, and whether all of it does.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use serde::{Deserialize, de::IgnoredAny};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tokio_tungstenite::tungstenite::Message;

use super::{Load, Measured, Shape, bar};
use crate::{
    drive::{self, Until},
    report::CLOSED,
    service::{Failure, Service, Socket},
    tally::count,
    target::LOG_MB_PER_S,
    work::{Done, Work},
};

/// What is written again and again: lines that differ.
const PART_BYTES: usize = 1 << 20;
const LINE_BYTES: usize = 64;
const TTL_MS: u64 = 300_000;
/// How long the next piece may take to come.
const PIECE_DEADLINE: Duration = Duration::from_secs(30);

pub(super) async fn measure(load: &Load, service: &Service) -> Result<Measured> {
    let streams = Streams { service: service.clone(), image: load.image.clone(), mib: load.log_mib, rates: Mutex::default() };
    let streams = Arc::new(streams);
    let bar = bar(Shape::Logs.name(), load.streams.into())?;
    let tally = drive::closed(&streams, load.streams, Until::Count(load.streams.into()), &bar).await?;
    let rates = streams.rates.lock().expect("nobody panics who holds it").clone();
    let slowest = rates.iter().copied().fold(f64::INFINITY, f64::min);
    let mut facts = BTreeMap::from([("mib_of_each_stream", count(load.log_mib))]);
    if !rates.is_empty() {
        facts.insert(LOG_MB_PER_S, slowest);
    }
    Ok(Measured { kind: CLOSED, tally, facts })
}

#[derive(Debug)]
struct Streams {
    service: Service,
    image: String,
    mib: u64,
    /// MB a second of each.
    rates: Mutex<Vec<f64>>,
}

impl Work for Streams {
    async fn once(&self, _number: u64) -> Result<Done, Failure> {
        let rate = stream(&self.service, &self.image, self.mib).await?;
        self.rates.lock().expect("nobody panics who holds it").push(rate);
        Ok(Done::default())
    }
}

/// Has a program write so much while a client reads; MB a second from the first piece that comes to the last. A failure if a byte is missing, or another one.
pub(crate) async fn stream(service: &Service, image: &str, mib: u64) -> Result<f64, Failure> {
    let part = part();
    let files = std::iter::repeat_n("part", usize::try_from(mib).unwrap_or(1)).collect::<Vec<_>>().join(" ");
    // It begins when its reader is there: what is measured is output that is followed.
    let script = format!("until [ -e go ]; do sleep 0.01; done; exec cat {files}");
    let request = json!({
        "image": image, "command": ["sh", "-c", script], "workdir": "/work", "ttl_ms": TTL_MS,
        "files": [{ "path": "/work/part", "content": part }],
        "limits": { "output_bytes": mib << 20, "memory_bytes": 64 << 20 },
    });
    let sandbox = service.create(&request).await?;
    let read = async {
        let mut socket = service.follow(&sandbox.id).await.map_err(|error| Failure::new("log_refused", format!("{error:#}")))?;
        service.put(&sandbox.id, "/work/go", "").await?;
        read(&mut socket, u64::try_from(PART_BYTES).unwrap_or(0) * mib).await
    };
    let read = read.await;
    service.delete(&sandbox.id).await?;
    let Read { rate, bytes } = read?;
    let wanted = repeated(part.as_bytes(), mib);
    if Sha256::digest(&bytes) != wanted {
        return Err(Failure::new("log_differs", format!("of {mib} MiB came {} bytes, and not those that were written", bytes.len())));
    }
    Ok(rate)
}

fn part() -> String {
    (0..PART_BYTES / LINE_BYTES).map(|line| format!("{line:063}\n")).collect()
}

fn repeated(part: &[u8], times: u64) -> sha2::digest::Output<Sha256> {
    let mut digest = Sha256::new();
    for _ in 0..times {
        digest.update(part);
    }
    digest.finalize()
}

struct Read {
    rate: f64,
    bytes: Vec<u8>,
}

#[derive(Debug, Deserialize)]
struct Frame {
    seq: Option<u64>,
    data: Option<String>,
    gap: Option<IgnoredAny>,
    end: Option<IgnoredAny>,
}

/// Reads to the end. What came is compared afterwards, when nothing is measured any more.
async fn read(socket: &mut Socket, expected: u64) -> Result<Read, Failure> {
    let broken = |detail: String| Failure::new("log_broke", detail);
    let mut bytes = Vec::with_capacity(usize::try_from(expected).unwrap_or(0));
    let (mut first, mut next) = (None, 0);
    let mut last = Instant::now();
    loop {
        let message = tokio::time::timeout(PIECE_DEADLINE, socket.next()).await.context("no piece came");
        let message = message.map_err(|error| broken(format!("{error} within {} s", PIECE_DEADLINE.as_secs())))?;
        let text = match message {
            Some(Ok(Message::Text(text))) => text,
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Binary(_) | Message::Frame(_))) => continue,
            Some(Ok(Message::Close(_))) | None => return Err(broken("the log was closed before its end".to_owned())),
            Some(Err(error)) => return Err(broken(error.to_string())),
        };
        let frame: Frame = serde_json::from_str(&text).map_err(|error| broken(format!("no frame of a log: {error}")))?;
        if frame.gap.is_some() || frame.seq.is_some_and(|seq| seq != next) {
            return Err(Failure::new("log_gap", format!("pieces are missing from number {next} on")));
        }
        if frame.end.is_some() {
            break;
        }
        next += 1;
        last = Instant::now();
        bytes.extend_from_slice(frame.data.unwrap_or_default().as_bytes());
        first.get_or_insert((last, bytes.len()));
    }
    let Some((first_at, first_bytes)) = first else { return Ok(Read { rate: 0.0, bytes }) };
    let seconds = last.duration_since(first_at).as_secs_f64();
    let rate = if seconds > 0.0 { count(u64::try_from(bytes.len() - first_bytes).unwrap_or(0)) / 1e6 / seconds } else { 0.0 };
    Ok(Read { rate, bytes })
}
