//! A database that has seen much: finished rows, put straight into the private cluster of a service.

use std::{
    fs,
    os::unix::{fs::MetadataExt as _, process::CommandExt as _},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

/// A finished run as it really is, again and again, each with an id and times of its own over twenty days, which is less than the retention; what is told of each; and then
/// what autovacuum would do in its own time. Events stand before what webhooks have looked at: so would those of twenty days.
const ROWS: &str = "
insert into sandboxes
select made.*
from (select sandboxes as model from sandboxes where kind = 'run' and state = 'exited' limit 1) as known,
    generate_series(1, :rows) as n,
    lateral (select now() - n * (interval '20 days' / :rows) as at) as time,
    lateral jsonb_populate_record(known.model, jsonb_build_object(
        'id', lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || '7000' || '8000' || lpad(to_hex(n), 12, '0'),
        'created_at', at, 'claimed_at', at, 'started_at', at, 'finished_at', at + interval '3 ms'
    )) as made;

insert into events (tenant, sandbox, kind, at, data, xact)
select tenant, id, 'sandbox.ended', finished_at, outcome, 0 from sandboxes where state = 'exited';

vacuum analyze sandboxes;
vacuum analyze events;
checkpoint;
";

/// Adds so many finished runs to the database of the service over `data_dir`, of which one must have ended.
pub(super) fn finished(data_dir: &Path, rows: u32) -> Result<()> {
    let folder = data_dir.join("postgres");
    let owner = fs::metadata(&folder).with_context(|| format!("{} is no private Postgres", folder.display()))?;
    let name = said(Command::new("id").arg("-un").arg(owner.uid().to_string()))?;
    let mut psql = Command::new("psql");
    psql.uid(owner.uid()).gid(owner.gid()).current_dir("/").arg("-h").arg(folder.join("run"));
    psql.args(["-U", name.trim(), "-d", "mayfly", "-XAtqw", "-v", "ON_ERROR_STOP=1", "-v", &format!("rows={rows}"), "-f", "-"]);
    let mut child = psql.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::inherit()).spawn().context("psql")?;
    std::io::Write::write_all(&mut child.stdin.take().context("piped")?, ROWS.as_bytes())?;
    ensure!(child.wait()?.success(), "psql failed");
    Ok(())
}

fn said(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
