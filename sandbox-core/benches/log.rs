//! Records of logs: what the keeper does for each piece of output, and what each reader does.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sandbox_core::log::{self, DATA_BYTES_MAX, Kind, Record};

const LINE: usize = 80;

fn records(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("log");
    for (what, data) in [("lines", vec![b'x'; LINE]), ("full records", vec![b'x'; DATA_BYTES_MAX])] {
        let count: u64 = if data.len() == LINE { 1000 } else { 16 };
        let mut file = Vec::new();
        let write = |file: &mut Vec<u8>| {
            for seq in 0..count {
                Record { kind: Kind::Stdout, seq, at_us: 1_700_000_000_000_000 + seq, data: &data }.append_to(file);
            }
        };
        write(&mut file);
        group.throughput(Throughput::Bytes(file.len() as u64));
        group.bench_function(format!("writing {what}"), |bencher| {
            bencher.iter(|| {
                file.clear();
                write(&mut file);
                file.len()
            });
        });
        group.bench_function(format!("reading {what}"), |bencher| {
            bencher.iter(|| {
                let mut rest = file.as_slice();
                let mut bytes = 0;
                while let Some((record, behind)) = log::parse(rest).expect("these are records") {
                    bytes += record.data.len();
                    rest = behind;
                }
                bytes
            });
        });
    }
    group.finish();
}

criterion_group!(benches, records);
criterion_main!(benches);
