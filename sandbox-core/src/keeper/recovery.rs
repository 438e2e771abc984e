//! The records of the keeper before, as its logs tell them.
//!
//! A log that ends in its end record holds the ending. One without belonged to a sandbox that died with its keeper, and is given an end. A log whose record was
//! forgotten is sealed: nobody may write it, which a look at its mode tells.

use std::{
    fs::{self, File, Permissions},
    io::{self, Read},
    os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    path::Path,
};

use super::{output::Sink, records::Records, unix_us, warn};
use crate::{
    log::{self, Kind},
    protocol::{Cause, Ending, SandboxId, Usage},
};

/// The owner may write it: there is a record.
const UNSEALED: u32 = 0o200;
/// What is read of a log at once.
const CHUNK_BYTES: u64 = 256 * 1024;

/// Notes the ending of every log in `folder` that has a record, the oldest first. What is wrong with one log is no other's concern.
pub(super) fn recover(folder: &Path, records: &mut Records) -> io::Result<()> {
    let mut endings = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Some(id) = entry.file_name().to_str().and_then(|name| name.strip_suffix(".log")?.parse::<SandboxId>().ok()) else { continue };
        // The one name that a log has; a UUID can be written in others.
        if log::path(folder, id) != entry.path() {
            continue;
        }
        match ending_of(&entry.path()) {
            Ok(Some(ending)) => endings.push((id, ending)),
            Ok(None) => {}
            Err(error) => warn(format_args!("what became of sandbox {id} cannot be read from its log: {error}")),
        }
    }
    endings.sort_by_key(|(_, ending)| ending.ended_at_us);
    endings.into_iter().for_each(|(id, ending)| records.ended(id, ending));
    Ok(())
}

/// Marks the log of a sandbox as one without a record. No error if there is none.
pub(super) fn seal(path: &Path) -> io::Result<()> {
    match fs::set_permissions(path, Permissions::from_mode(0o440)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// How the sandbox of this log ended, which is noted in the log if it was not; `None` if there is no record of it, or it is no log of ours.
fn ending_of(path: &Path) -> io::Result<Option<Ending>> {
    let metadata = fs::symlink_metadata(path)?;
    let is_ours = metadata.is_file() && metadata.uid() == nix::unistd::geteuid().as_raw() && metadata.nlink() == 1;
    if !is_ours || metadata.mode() & UNSEALED == 0 {
        return Ok(None);
    }
    let file = File::options().read(true).append(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    let scan = Scan::of(&file)?;
    if let Some((data, at_us)) = scan.end {
        let unknown = || lost("the record of its end cannot be read", at_us, scan.usage);
        return Ok(Some(log::decode_ending(&data).unwrap_or_else(unknown)));
    }
    let ending = lost("its keeper was killed, and the sandbox with it", unix_us(), scan.usage);
    // The beginning of a record, or what a machine that lost its power left.
    let noted = file.set_len(scan.len).and_then(|()| {
        let mut sink = Sink::Log { file, next_seq: scan.next_seq, len: scan.len, is_torn: false };
        sink.append(Kind::End, &log::encode_ending(&ending), ending.ended_at_us)
    });
    if let Err(error) = noted {
        // The next start finds it as this one did.
        warn(format_args!("{}: noting that its sandbox died with its keeper failed: {error}", path.display()));
    }
    Ok(Some(ending))
}

fn lost(message: &str, ended_at_us: u64, usage: Usage) -> Ending {
    Ending {
        cause: Cause::InfraError { message: message.to_owned() },
        launched: None,
        ended_at_us,
        usage,
        limits_hit: Vec::new(),
        oom_kills: 0,
        stdout_truncated: false,
        stderr_truncated: false,
    }
}

/// What stands in a log.
#[derive(Debug, Default)]
struct Scan {
    /// The bytes of its whole records.
    len: u64,
    next_seq: u64,
    /// As far as a log tells it.
    usage: Usage,
    /// The end record's data, and its time.
    end: Option<(Vec<u8>, u64)>,
}

impl Scan {
    /// Reads from the beginning: where the last record begins cannot be told from the end, since a payload writes what it likes.
    fn of(mut file: &File) -> io::Result<Self> {
        let mut scan = Self::default();
        let mut bytes = Vec::new();
        loop {
            let read = file.by_ref().take(CHUNK_BYTES).read_to_end(&mut bytes)?;
            let mut rest = bytes.as_slice();
            // A record that is damaged ends the log like one that is cut.
            while let Ok(Some((record, behind))) = log::parse(rest) {
                scan.len += (log::HEADER_BYTES + record.data.len()) as u64;
                scan.next_seq = record.seq + 1;
                match record.kind {
                    Kind::Stdout => scan.usage.stdout_bytes += record.data.len() as u64,
                    Kind::Stderr => scan.usage.stderr_bytes += record.data.len() as u64,
                    Kind::End => {
                        scan.end = Some((record.data.to_vec(), record.at_us));
                        return Ok(scan);
                    }
                }
                rest = behind;
            }
            let is_over = read == 0 || log::parse(rest).is_err();
            let parsed = bytes.len() - rest.len();
            bytes.drain(..parsed);
            if is_over {
                return Ok(scan);
            }
        }
    }
}
