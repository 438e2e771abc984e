//! What the database does for a run: the statement that admits and claims it, and the one that stores its end. DATABASE_URL names a scratch database.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use criterion::{Criterion, criterion_group, criterion_main};
use mayfly::{
    metrics::Metrics,
    sandbox::{
        DefaultQuotas, Finish, ImageUsed, Kind, Limits, LogTail, Owner, Phases, Quotas, RequestedLimits, Sandbox, SandboxId, State,
        TenantId, asked,
    },
    store::{Act, Admission, Admitted, Ended, Hold, Input, Lease, LogKept, NewImage, NodeCapacity, NodeId, Origin, Promise, Store, Writer},
};
use sandbox_core::protocol::{Cause, OutputPolicy};
use serde_json::json;
use time::OffsetDateTime;
use uuid::Uuid;

const TENANT: &str = "bench";
const CONNECTIONS: u32 = 16;
/// Longer than any benchmark.
const HELD_FOR: Duration = Duration::from_secs(3600);
/// Runs at one time, where many are admitted at once.
const AT_ONCE: u64 = 8;

fn admission(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let (store, lease) = runtime.block_on(prepare()).expect("a scratch database is there");
    let mut group = criterion.benchmark_group("admission");
    group.sample_size(20).measurement_time(Duration::from_secs(4));
    group.bench_function("admitting a run", |bencher| {
        bencher.to_async(&runtime).iter_custom(|times| {
            let store = store.clone();
            async move {
                let mut admitting = Duration::ZERO;
                for _ in 0..times {
                    let run = run();
                    let begun = Instant::now();
                    admit(&store, &run, lease).await;
                    admitting += begun.elapsed();
                    finish(&store, &run, lease).await;
                }
                admitting
            }
        });
    });
    group.bench_function("admitting a run and storing its end", |bencher| {
        bencher.to_async(&runtime).iter(|| whole(&store, lease));
    });
    group.throughput(criterion::Throughput::Elements(AT_ONCE));
    group.bench_function(format!("the same, {AT_ONCE} of one tenant at once"), |bencher| {
        bencher.to_async(&runtime).iter(|| async {
            let all = (0..AT_ONCE).map(|_| {
                let store = store.clone();
                tokio::spawn(async move { whole(&store, lease).await })
            });
            futures_util::future::join_all(all).await
        });
    });
    group.finish();
}

async fn prepare() -> anyhow::Result<(Store, Lease)> {
    #[expect(clippy::disallowed_methods, reason = "a benchmark has no command line of its own")]
    let url = std::env::var("DATABASE_URL")?;
    let store = Store::connect(url.parse()?, CONNECTIONS, Metrics::new(0)?.statements()).await?;
    store.migrate().await?;
    let capacity = NodeCapacity { memory_bytes: 1, cpu_millis: 1 };
    let lease = store.take_node(NodeId(Uuid::now_v7()), "bench", capacity, OffsetDateTime::UNIX_EPOCH, HELD_FOR).await?;
    let config = json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": [] } });
    let image = NewImage {
        tenant: None,
        reference: "busybox".into(),
        digest: format!("sha256:{}", root()),
        root: root().try_into()?,
        config: serde_json::from_value(config)?,
        size_bytes: 1,
        created_at: OffsetDateTime::UNIX_EPOCH,
        origin: Origin::Archive,
    };
    let act = Act { actor: None, at: OffsetDateTime::UNIX_EPOCH, data: json!({}) };
    store.record_image(&image, &Quotas::default(), &act).await?;
    let owner = Owner { tenant: TenantId::proven(TENANT.into()), principal: TENANT.into() };
    store.introduce(&owner, OffsetDateTime::UNIX_EPOCH).await?;
    Ok((store, lease))
}

async fn whole(store: &Store, lease: Lease) {
    let run = run();
    admit(store, &run, lease).await;
    finish(store, &run, lease).await;
}

async fn admit(store: &Store, run: &Sandbox, lease: Lease) {
    let none = DefaultQuotas { tenant: Quotas::default(), principal: Quotas::default() };
    let admission = Admission {
        sandbox: run,
        lease,
        input: &Input::default(),
        cases: &[],
        asked: &asked(&run.limits, None),
        network: "none",
        isolation: "container",
        defaults: &none,
        queue_max: 1000,
        wanted_node: None,
        key: None,
        promise: Promise::Later,
    };
    let admitted = store.admit(admission).await.expect("the database answers");
    assert!(matches!(admitted, Admitted::Yes { .. }), "{admitted:?}");
}

async fn finish(store: &Store, run: &Sandbox, lease: Lease) {
    let cause = Cause::InfraError { message: "a benchmark runs nothing".into() };
    let finish = Finish::without_usage(cause, run.created_at, &run.limits, Phases::default());
    let ended = Ended { finish: &finish, log_tail: &LogTail::default(), compile: None, case_bytes: 0, log_file: LogKept::No };
    let hold = Hold { lease, claims: run.claims };
    assert!(store.finish(run.id, Writer::Holder(hold), &ended).await.expect("the database answers"), "it had ended before");
}

fn root() -> String {
    "b".repeat(64)
}

fn run() -> Sandbox {
    let now = OffsetDateTime::UNIX_EPOCH;
    Sandbox {
        id: SandboxId(Uuid::now_v7()),
        tenant: TenantId::proven(TENANT.into()),
        principal: TENANT.into(),
        kind: Kind::Run,
        state: State::Starting,
        name: None,
        image: ImageUsed { reference: "busybox".into(), digest: format!("sha256:{}", root()), root: root().try_into().expect("64 digits") },
        program: serde_json::from_value(json!({ "args": ["/bin/true"], "env": [], "cwd": "/", "user": { "ids": { "uid": 0, "gid": 0 } } }))
            .expect("a program"),
        compile: None,
        judging: None,
        limits: Limits::of(Kind::Run, RequestedLimits::default()).expect("the defaults are within their bounds"),
        output_policy: OutputPolicy::Truncate,
        labels: BTreeMap::new(),
        created_at: now,
        claimed_at: Some(now),
        started_at: None,
        fences: None,
        finished_at: None,
        ttl_ms: None,
        expires_at: None,
        idle_timeout_ms: None,
        auto_remove: false,
        keep_layer: false,
        starts: 1,
        outcome: None,
        attempt: 1,
        retries_left: 0,
        claims: 1,
        keeps_input: true,
        from_pool: None,
    }
}

criterion_group!(benches, admission);
criterion_main!(benches);
