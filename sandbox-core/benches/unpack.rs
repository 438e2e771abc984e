//! Unpacking a layer of many small files, in each compression. `make bench-unpack` has a large one, beside `tar`.

use std::{
    fs::{self, File},
    io::{Seek as _, Write as _},
    time::{Duration, Instant},
};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sandbox_core::unpack::{Bounds, Target, unpack};

const FILES: usize = 2000;
const FILE_BYTES: usize = 4096;
const BOUNDS: Bounds = Bounds { bytes: 1 << 30, entries: 100_000 };

fn layers(criterion: &mut Criterion) {
    let plain = layer().expect("a tar is made in memory");
    let gzip = {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(&plain).and_then(|()| packed.finish()).expect("memory takes it")
    };
    let zstd = zstd::encode_all(&plain[..], 1).expect("memory takes it");
    let mut group = criterion.benchmark_group("unpack");
    group.sample_size(10).measurement_time(Duration::from_secs(4)).throughput(Throughput::Bytes(plain.len() as u64));
    for (name, bytes) in [("plain", plain), ("gzip", gzip), ("zstd", zstd)] {
        // On a disk, as the store of images is.
        let folder = tempfile::tempdir_in("/var/tmp").expect("a folder can be made");
        let packed = folder.path().join(name);
        fs::write(&packed, bytes).expect("the folder is ours");
        group.bench_function(format!("{FILES} files, {name}"), |bencher| {
            bencher.iter_custom(|times| (0..times).map(|_| once(folder.path(), File::open(&packed).expect("it was written"))).sum());
        });
    }
    group.finish();
}

/// How long it takes into a new folder, which is gone again afterwards.
fn once(folder: &std::path::Path, mut layer: File) -> Duration {
    let to = folder.join("to");
    fs::create_dir(&to).expect("the folder is ours");
    layer.rewind().expect("a file has a beginning");
    let mut target = Target::new(File::open(&to).expect("it was made").into());
    let begun = Instant::now();
    unpack([layer].into_iter(), &mut target, BOUNDS).expect("it is a layer");
    let took = begun.elapsed();
    fs::remove_dir_all(&to).expect("the folder is ours");
    took
}

fn layer() -> std::io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let content: Vec<u8> = (0..FILE_BYTES).map(|at| b"0123456789abcdef"[at * 7 % 16]).collect();
    for number in 0..FILES {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_uid(u64::from(rustix::process::getuid().as_raw()));
        header.set_gid(u64::from(rustix::process::getgid().as_raw()));
        header.set_size(content.len() as u64);
        tar.append_data(&mut header, format!("usr/lib/{}/{number}", number / 50), &content[..])?;
    }
    tar.into_inner()
}

criterion_group!(benches, layers);
criterion_main!(benches);
