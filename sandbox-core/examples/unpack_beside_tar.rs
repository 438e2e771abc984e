//! How long the unpacker takes for a layer of 500 MB beside `tar -x` of the same, each with what it takes to bring it to disk; fails if it is more than half as much again.
#![expect(clippy::print_stdout, reason = "what was measured is its answer")]

use std::{
    fs::{self, File},
    io::{Seek as _, Write as _},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, ensure};
use sandbox_core::unpack::{Bounds, Target, unpack};

const LAYER_BYTES: u64 = 500 << 20;
/// From one file to the next; as in a system with a few large files and many small ones.
const FILE_BYTES: [usize; 5] = [2 << 10, 11 << 10, 60 << 10, 500 << 10, 4 << 20];
/// The best of so many counts: what else the machine does is nobody's fault.
const ROUNDS: usize = 3;
const TIMES_MAX: f64 = 1.5;
const BOUNDS: Bounds = Bounds { bytes: 2 * LAYER_BYTES, entries: 1_000_000 };

fn main() -> anyhow::Result<()> {
    // On a disk, as the store of images is.
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let plain = folder.path().join("layer.tar");
    make_layer(&plain)?;
    let packed = folder.path().join("layer.tar.gz");
    let status = Command::new("gzip").arg("-1").stdin(File::open(&plain)?).stdout(File::create(&packed)?).status()?;
    ensure!(status.success(), "gzip failed");
    let mut is_fast = true;
    for layer in [&plain, &packed] {
        let (mut ours, mut theirs) = (Duration::MAX, Duration::MAX);
        for _ in 0..ROUNDS {
            theirs = theirs.min(timed(folder.path(), |to| by_tar(layer, to))?);
            ours = ours.min(timed(folder.path(), |to| by_us(layer, to))?);
        }
        let times = ours.as_secs_f64() / theirs.as_secs_f64();
        is_fast &= times <= TIMES_MAX;
        let name = layer.file_name().unwrap_or_default().display();
        println!("{name}: {:.2} s, tar {:.2} s: {times:.2} times as long", ours.as_secs_f64(), theirs.as_secs_f64());
    }
    ensure!(is_fast, "unpacking takes more than {TIMES_MAX} times as long as tar");
    Ok(())
}

/// A layer of files in folders, of bytes that are half as large when they are packed.
fn make_layer(path: &Path) -> anyhow::Result<()> {
    let mut tar = tar::Builder::new(std::io::BufWriter::new(File::create(path)?));
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let (mut bytes, mut number) = (0, 0);
    while bytes < LAYER_BYTES {
        let size = FILE_BYTES[number % FILE_BYTES.len()];
        let mut content = Vec::with_capacity(size + 16);
        while content.len() < size {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            content.extend_from_slice(&state.to_le_bytes());
            content.extend_from_slice(b"the same");
        }
        content.truncate(size);
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o644);
        header.set_uid(u64::from(rustix::process::getuid().as_raw()));
        header.set_gid(u64::from(rustix::process::getgid().as_raw()));
        header.set_size(size as u64);
        tar.append_data(&mut header, format!("usr/lib/{}/{number}", number / 50), &content[..])?;
        bytes += size as u64;
        number += 1;
    }
    tar.into_inner()?.flush()?;
    Ok(())
}

/// How long this takes in a new folder, which is gone again afterwards.
fn timed(folder: &Path, work: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<Duration> {
    let to = folder.join("to");
    fs::create_dir(&to)?;
    let started = Instant::now();
    work(&to)?;
    let took = started.elapsed();
    fs::remove_dir_all(&to)?;
    rustix::fs::sync();
    Ok(took)
}

fn by_tar(layer: &Path, to: &Path) -> anyhow::Result<()> {
    // The numbers of owners as they are, and the compression by its first bytes: as we do.
    let status = Command::new("tar").args(["--numeric-owner", "-xf"]).arg(layer).arg("-C").arg(to).status().context("tar")?;
    ensure!(status.success(), "tar failed");
    rustix::fs::syncfs(File::open(to)?)?;
    Ok(())
}

fn by_us(layer: &Path, to: &Path) -> anyhow::Result<()> {
    let mut layer = File::open(layer)?;
    layer.rewind()?;
    unpack([layer].into_iter(), &mut Target::new(File::open(to)?.into()), BOUNDS)?;
    Ok(())
}
