//! What is promised, held against what clients were told and what the service answers now.

use std::{collections::HashMap, time::Duration};

use anyhow::{Context, Result, ensure};
use mayfly_tests::{Client, database::Database, service::Place, stream::Frames};

use super::{
    books::{self, Row},
    load::{Asked, Known},
};

/// How long ends may take to be stored: longer than the service takes to look for sandboxes that nobody follows.
const SETTLE_DEADLINE: Duration = Duration::from_secs(120);
const LINES_DEADLINE: Duration = Duration::from_secs(30);
const LOOK: Duration = Duration::from_millis(50);

/// What was found to be wrong, and how many bytes of output were compared.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) wrong: Vec<String>,
    pub(crate) log_bytes: u64,
}

/// Waits until nothing of this label lives but sandboxes that write lines, deleting those that nobody deletes any more.
pub(crate) async fn settle(place: &Place, database: &Database, label: &str, spare_lines: bool) -> Result<Vec<Row>> {
    let deadline = tokio::time::Instant::now() + SETTLE_DEADLINE;
    loop {
        let rows = books::rows(database, label)?;
        let live: Vec<&Row> = rows.iter().filter(|row| row.reason.is_none() && !(spare_lines && is_lines(&row.label))).collect();
        if live.is_empty() {
            return Ok(rows);
        }
        ensure!(
            tokio::time::Instant::now() < deadline,
            "{} s after the last request these have no end: {live:#?}",
            SETTLE_DEADLINE.as_secs()
        );
        for row in live.iter().filter(|row| row.kind == "sandbox") {
            // Whatever it answers: the next look tells.
            let _unread = Client::of(place, &row.tenant).try_delete(&format!("/v1/sandboxes/{}", row.id)).await;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Deletes what has ended and keeps what it wrote: that is there until somebody does, and so no leak.
pub(crate) async fn drop_layers(place: &Place, database: &Database, label: &str) -> Result<()> {
    let deadline = tokio::time::Instant::now() + SETTLE_DEADLINE;
    loop {
        let mut rows = books::rows(database, label)?;
        rows.retain(|row| row.keeps_layer);
        if rows.is_empty() {
            return Ok(());
        }
        ensure!(tokio::time::Instant::now() < deadline, "what these wrote is not given up: {rows:#?}");
        for row in &rows {
            // Whatever it answers: the next look tells.
            let _unread = Client::of(place, &row.tenant).try_delete(&format!("/v1/sandboxes/{}", row.id)).await;
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn is_lines(label: &str) -> bool {
    label.contains("-lines-")
}

/// Holds each request against what became of it.
pub(crate) async fn requests(place: &Place, known: &[Known], rows: &[Row], ends_keeper: bool, is_calm: bool) -> Findings {
    let mut by_label: HashMap<&str, Vec<&Row>> = HashMap::new();
    rows.iter().for_each(|row| by_label.entry(row.label.as_str()).or_default().push(row));
    let mut findings = Findings::default();
    for known in known {
        findings.wrong.extend(known.wrong.iter().cloned());
        // Beside the one that was accepted there may be one of which its client was told that it was not made.
        let same = by_label.get(known.label.as_str()).map_or(&[][..], |same| same.as_slice());
        let accepted = same.iter().find(|row| known.id.as_ref().is_some_and(|id| *id == row.id));
        let Some(row) = accepted.or_else(|| same.last()) else {
            if known.id.is_some() && known.deletion.is_none() {
                findings.wrong.push(format!("{} was accepted and is gone: {known:?}", known.label));
            }
            continue;
        };
        if known.deletion == Some(true) {
            findings.wrong.push(format!("{} is still there, though its deletion was promised", known.label));
        }
        if known.id.as_ref().is_some_and(|id| *id != row.id) {
            findings.wrong.push(format!("{} was accepted as {:?} and is {}", known.label, known.id, row.id));
        }
        // One that writes lines is looked at by itself.
        if row.reason.is_some()
            && known.asked != Asked::Lines
            && let Err(wrong) = end(place, known, row, (ends_keeper, is_calm), &mut findings.log_bytes).await
        {
            findings.wrong.push(wrong);
        }
    }
    findings
}

async fn end(place: &Place, known: &Known, row: &Row, (ends_keeper, is_calm): (bool, bool), log_bytes: &mut u64) -> Result<(), String> {
    let reason = row.reason.as_deref().unwrap_or_default();
    let path = if row.kind == "run" { format!("/v1/runs/{}", row.id) } else { format!("/v1/sandboxes/{}", row.id) };
    let deadline = tokio::time::Instant::now() + LINES_DEADLINE;
    let now = loop {
        let answer = Client::of(place, &row.tenant).get(&path).await;
        if answer.status == 404 && known.deletion.is_some() {
            // It went by itself in the meantime.
            return Ok(());
        }
        let now = answer.expect(200);
        // A service that was not told that its commit went through tells of the end when it has tried again.
        if !now["outcome"].is_null() || tokio::time::Instant::now() > deadline {
            break now;
        }
        tokio::time::sleep(LOOK).await;
    };
    let outcome = &now["outcome"];
    if let Some(told) = known.outcomes.iter().find(|told| *told != outcome) {
        return Err(format!("{} was told {told} and is {outcome}", known.label));
    }
    if reason == "infra_error" {
        if outcome["message"].as_str().is_none_or(str::is_empty) {
            return Err(format!("{} does not say why: {outcome}", known.label));
        }
        return match known {
            _ if is_calm => Err(format!("{} ended with {outcome} though nothing was killed", known.label)),
            _ if known.retry > 0 => Err(format!("{} may be tried {} times more, and ended with {outcome}", known.label, known.retry)),
            _ if known.has_run && !ends_keeper => Err(format!("{} ran, its keeper lived, and yet: {outcome}", known.label)),
            _ => Ok(()),
        };
    }
    if let Some(refused) = &known.refused {
        return Err(format!("{} was refused and ended with {outcome}; the refusal: {refused}", known.label));
    }
    match known.asked {
        Asked::Run(payload) => {
            payload.check(&known.label, &now)?;
            *log_bytes += payload.output_bytes(&known.label);
            Ok(())
        }
        Asked::Cancelled if reason == "stopped_by_user" => Ok(()),
        // Deleted before its end, or after it.
        Asked::Ended if reason == "exited" || reason == "stopped_by_user" => Ok(()),
        Asked::Cancelled | Asked::Ended | Asked::Lines => Err(format!("{} ended with {outcome}", known.label)),
    }
}

/// Reads what sandboxes that write lines have written: nothing may be missing, doubled, or out of order, and whose keeper lives goes on.
pub(crate) async fn lines(place: &Place, known: &[Known], rows: &[Row], ends_keeper: bool) -> Result<Findings> {
    let mut findings = Findings::default();
    for known in known.iter().filter(|known| known.asked == Asked::Lines) {
        let Some(row) = rows.iter().find(|row| row.label == known.label) else {
            if known.id.is_some() {
                findings.wrong.push(format!("{} was accepted and is gone", known.label));
            }
            continue;
        };
        let must_live = known.has_run && !ends_keeper;
        if must_live && row.reason.is_some() {
            findings.wrong.push(format!("{} ran, its keeper lives, and it ended with {:?}", known.label, row.reason));
        }
        let written = written(place, row).await?;
        match count(&written, &row.label) {
            Ok(lines) if row.reason.is_none() => {
                let deadline = tokio::time::Instant::now() + LINES_DEADLINE;
                let mut now = lines;
                while now <= lines {
                    ensure!(tokio::time::Instant::now() < deadline, "{} writes no more after line {lines}", row.label);
                    tokio::time::sleep(LOOK).await;
                    let written = self::written(place, row).await?;
                    findings.log_bytes += written.len() as u64;
                    now = count(&written, &row.label).map_err(anyhow::Error::msg)?;
                }
            }
            Ok(_) => findings.log_bytes += written.len() as u64,
            Err(wrong) => findings.wrong.push(wrong),
        }
    }
    Ok(findings)
}

/// All that a sandbox has written until now.
async fn written(place: &Place, row: &Row) -> Result<String> {
    let client = Client::of(place, &row.tenant);
    let path = format!("/v1/sandboxes/{}/logs?from=0&follow=false", row.id);
    let request = client.request(reqwest::Method::GET, &path).header("accept", "application/x-ndjson");
    let answer = client.send(request, "GET", &path).await;
    ensure!(answer.status == 200, "reading the log of {}: {}", row.label, answer.text);
    let mut frames = Frames::default();
    for line in answer.text.lines() {
        frames.add(&serde_json::from_str(line).context("a line of JSON")?);
    }
    ensure!(frames.gaps.is_empty(), "the log of {} has gaps: {:?}", row.label, frames.gaps);
    Ok(frames.stdout_text())
}

/// How many whole lines there are, numbered from 0 on.
fn count(written: &str, label: &str) -> Result<usize, String> {
    let whole = written.rsplit_once('\n').map_or("", |(whole, _cut)| whole);
    let mut lines = 0;
    for line in whole.lines() {
        if line != format!("{label} {lines}") {
            return Err(format!("{label}: {line:?} stands where line {lines} must"));
        }
        lines += 1;
    }
    Ok(lines)
}
