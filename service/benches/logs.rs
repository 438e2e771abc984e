//! A log that is read from its file to its end, as every stream of one is.

use std::{fs, io::Write as _, time::Duration};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use mayfly::logs::Logs;
use sandbox_core::{
    log::{self, DATA_BYTES_MAX, Kind, Record},
    protocol::SandboxId,
};

const LOG_BYTES: usize = 16 << 20;

fn reading(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let folder = tempfile::tempdir().expect("a folder can be made");
    let logs = runtime.block_on(async { Logs::new(folder.path()) }).expect("there are inotify instances");
    let mut group = criterion.benchmark_group("log");
    group.sample_size(20).measurement_time(Duration::from_secs(4)).throughput(Throughput::Bytes(LOG_BYTES as u64));
    for (what, data_bytes) in [("in lines", 80), ("in full records", DATA_BYTES_MAX)] {
        let id = SandboxId(uuid::Uuid::new_v4());
        write(&log::path(folder.path(), id), data_bytes).expect("the folder is ours");
        group.bench_function(format!("reading 16 MiB {what}"), |bencher| {
            bencher.to_async(&runtime).iter(async || {
                let mut reader = logs.open(id, 0).expect("it can be read").expect("it is there");
                let mut items = 0;
                while !reader.has_ended() {
                    items += reader.read().await.expect("it is a log").len();
                }
                items
            });
        });
    }
    group.finish();
}

fn write(path: &std::path::Path, data_bytes: usize) -> std::io::Result<()> {
    let data = vec![b'x'; data_bytes];
    let mut file = std::io::BufWriter::new(fs::File::create(path)?);
    let mut bytes = Vec::new();
    let count = (LOG_BYTES / data_bytes) as u64;
    for seq in 0..=count {
        bytes.clear();
        let (kind, data) = if seq < count { (Kind::Stdout, data.as_slice()) } else { (Kind::End, &[][..]) };
        Record { kind, seq, at_us: 1_700_000_000_000_000 + seq, data }.append_to(&mut bytes);
        file.write_all(&bytes)?;
    }
    file.flush()
}

criterion_group!(benches, reading);
criterion_main!(benches);
