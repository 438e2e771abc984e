//! What a launch consists of, each by itself: its filter, its message, and the keeper's way from the request to the program's start and to its end.

use std::{
    cell::Cell,
    error::Error,
    io::{BufRead as _, BufReader, Write as _},
    os::fd::AsFd as _,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use sandbox_core::{
    client::Client,
    protocol::{
        Answer, IoLimits, Isolation, Launch, Launched, Layering, Medium, OutputPolicy, Request, SandboxId, Start, Stdin, Supervision,
        UnpackLimits,
    },
    seccomp,
    transport::Socket,
};
use serde_json::json;

const IMAGE: &str = "b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0";
/// So many files may be in a sandbox; with another number it is of another class, and nothing stands ready for it.
const INODES: u64 = 4096;
/// Between launches that are to find something ready. It is not measured.
const REFILL: Duration = Duration::from_millis(8);

fn parts(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("launch");
    group.bench_function("building the seccomp filter", |bencher| bencher.iter(seccomp::program));
    let (ours, theirs) = Socket::pair().expect("sockets can be made");
    let request = Request::Launch(Box::new(launch(INODES)));
    group.bench_function("sending the request and taking it", |bencher| {
        bencher.iter(|| {
            ours.send(&request, &[]).expect("there is room for one message");
            sandbox_core::transport::recv::<Request>(theirs.as_fd()).expect("it was just sent")
        });
    });
    group.finish();
}

fn by_the_keeper(criterion: &mut Criterion) {
    let node = Node::start().expect("a keeper starts, as root and with busybox-static installed");
    let mut client = node.client().expect("it listens");
    let mut group = criterion.benchmark_group("launch");
    group.sample_size(30).measurement_time(Duration::from_secs(4));
    let inodes = Cell::new(INODES);
    for start in [Start::Warm, Start::Cold] {
        let mut next = || match start {
            Start::Warm => loop {
                std::thread::sleep(REFILL);
                let done = run(&mut client, INODES).expect("it runs");
                if done.0.start == Start::Warm {
                    return done;
                }
            },
            Start::Cold => {
                inodes.set(if inodes.get() <= 64 { INODES } else { inodes.get() } - 1);
                run(&mut client, inodes.get()).expect("it runs")
            }
        };
        let mut measure = |name: &str, of: fn(&(Launched, Duration)) -> Duration| {
            group.bench_function(BenchmarkId::new(name, format!("{start:?}").to_lowercase()), |bencher| {
                bencher.iter_custom(|times| (0..times).map(|_| of(&next())).sum());
            });
        };
        measure("request to exec", |(launched, _)| Duration::from_micros(launched.launch_us));
        measure("request to the end of true", |(_, took)| *took);
    }
    group.finish();
}

/// A keeper with one image, until it is dropped.
struct Node {
    child: Child,
    folder: tempfile::TempDir,
}

impl Node {
    fn start() -> Result<Self, Box<dyn Error>> {
        // On a disk, as the store of images is.
        let folder = tempfile::Builder::new().prefix("mayfly-bench.").tempdir_in("/var/tmp")?;
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("logs"))?;
        let mut keeper = Command::new(env!("CARGO_BIN_EXE_sandbox-keeper"));
        keeper.args(["--group", "0"]);
        for (flag, name) in
            [("--socket", "keeper.sock"), ("--images", "images"), ("--logs", "logs"), ("--disks", "disks"), ("--volumes", "volumes")]
        {
            keeper.arg(flag).arg(at(name));
        }
        let mut child = keeper.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().ok_or("piped")?;
        let node = Self { child, folder };
        let mut said = String::new();
        BufReader::new(stdout).read_line(&mut said)?;
        let layer = layer(Path::new("/bin/busybox"))?;
        let limits = UnpackLimits { bytes: 64 << 20, entries: 100, wall_ms: 20_000 };
        let answer = node.client()?.call(&Request::Unpack { image: IMAGE.parse()?, layers: 1, limits }, &[layer.as_fd()])?;
        if !matches!(answer, Answer::Unpacked(_)) {
            return Err(format!("{said} {answer:?}").into());
        }
        Ok(node)
    }

    fn client(&self) -> std::io::Result<Client> {
        Ok(Client::connect(&self.folder.path().join("keeper.sock"))?.0)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // One that has ended already is what we want.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A layer with nothing but a static `true`.
fn layer(busybox: &Path) -> Result<std::fs::File, Box<dyn Error>> {
    let mut layer = tar::Builder::new(tempfile::tempfile()?);
    let program = std::fs::read(busybox)?;
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o755);
    header.set_size(program.len() as u64);
    layer.append_data(&mut header, "bin/true", &program[..])?;
    let mut file = layer.into_inner()?;
    file.flush()?;
    std::io::Seek::rewind(&mut file)?;
    Ok(file)
}

fn launch(inodes: u64) -> Launch {
    let spec = json!({
        "ociVersion": "1.2.0",
        "root": { "path": IMAGE },
        "process": { "user": { "uid": 1000, "gid": 1000 }, "args": ["/bin/true"], "env": [], "cwd": "/", "noNewPrivileges": true,
            "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 256, "hard": 256 }] },
        "linux": { "resources": {
            "memory": { "limit": 256 << 20, "swap": 256 << 20 },
            "cpu": { "quota": 100_000, "period": 100_000 },
            "pids": { "limit": 64 },
        } },
    });
    Launch {
        id: SandboxId(uuid::Uuid::new_v4()),
        image: IMAGE.parse().expect("64 digits"),
        spec: spec.to_string().into_bytes(),
        isolation: Isolation::Container,
        supervision: Supervision {
            wall_ms: Some(10_000),
            cpu_ms: None,
            output_bytes: 1 << 20,
            output_policy: OutputPolicy::Truncate,
            medium: Medium::Memory,
            disk_bytes: 64 << 20,
            inodes,
            io: IoLimits::MAX,
        },
        stdin: Stdin::Null,
        has_files: false,
        terminal: None,
        layer: Layering::Fresh,
        keeps_layer: false,
        volumes: Vec::new(),
    }
}

/// Runs `true` once: what the keeper says of its start, and how long the answer to its end took.
fn run(client: &mut Client, inodes: u64) -> Result<(Launched, Duration), Box<dyn Error>> {
    let launch = launch(inodes);
    let id = launch.id;
    let begun = Instant::now();
    let tag = client.send(&Request::Launch(Box::new(launch)), &[])?;
    let answer = client.call(&Request::Wait { id }, &[])?;
    let took = begun.elapsed();
    let Answer::Ended(ending) = answer else { return Err(format!("{answer:?}").into()) };
    client.receive(tag)?;
    client.call(&Request::Forget { id }, &[])?;
    let launched = ending.launched.ok_or_else(|| format!("{:?}", ending.cause))?;
    Ok((launched, took))
}

criterion_group!(benches, parts, by_the_keeper);
criterion_main!(benches);
