//! Times launches through a running keeper, one after the other, without HTTP and database.
//!
//!     launch_times SOCKET IMAGE_ID RUNS COMMAND…
#![expect(clippy::print_stdout, reason = "a tool for the terminal")]

use std::{error::Error, path::Path, time::Instant};

use sandbox_core::{
    client::Client,
    protocol::{Answer, IoLimits, Isolation, Launch, Medium, OutputPolicy, Request, SandboxId, Start, Stdin, Supervision},
};
use serde_json::json;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [socket, image, runs, command @ ..] = arguments.as_slice() else { return Err("SOCKET IMAGE_ID RUNS COMMAND…".into()) };
    let spec = json!({
        "ociVersion": "1.2.0",
        "root": { "path": image },
        "process": { "user": { "uid": 1000, "gid": 1000 }, "args": command, "env": [], "cwd": "/", "noNewPrivileges": true,
            "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 256, "hard": 256 }] },
        "linux": { "resources": {
            "memory": { "limit": 256 << 20, "swap": 256 << 20 },
            "cpu": { "quota": 100_000, "period": 100_000 },
            "pids": { "limit": 64 },
        } },
    });
    let supervision = Supervision {
        wall_ms: Some(10_000),
        cpu_ms: None,
        output_bytes: 1 << 20,
        output_policy: OutputPolicy::Truncate,
        medium: Medium::Memory,
        disk_bytes: 64 << 20,
        inodes: 4096,
        io: IoLimits::MAX,
    };
    let (mut client, _) = Client::connect(Path::new(socket))?;
    let (mut to_exec, mut to_end, mut warm) = (Vec::new(), Vec::new(), 0);
    for _ in 0..runs.parse()? {
        let id = SandboxId(uuid::Uuid::new_v4());
        let begun = Instant::now();
        let launch = Launch {
            id,
            image: image.parse()?,
            spec: serde_json::to_vec(&spec)?,
            isolation: Isolation::Container,
            supervision,
            stdin: Stdin::Null,
            has_files: false,
            terminal: None,
            layer: sandbox_core::protocol::Layering::Fresh,
            keeps_layer: false,
            volumes: Vec::new(),
        };
        let tag = client.send(&Request::Launch(Box::new(launch)), &[])?;
        let answer = client.call(&Request::Wait { id }, &[])?;
        let Answer::Ended(ending) = answer else { return Err(format!("{answer:?}").into()) };
        to_end.push(begun.elapsed().as_micros());
        let launched = ending.launched.ok_or_else(|| format!("{:?}", ending.cause))?;
        to_exec.push(u128::from(launched.launch_us));
        warm += u32::from(launched.start == Start::Warm);
        client.receive(tag)?;
        client.call(&Request::Forget { id }, &[])?;
    }
    for (what, times) in [("request to exec", &mut to_exec), ("request to answer", &mut to_end)] {
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() - 1) * percent / 100];
        println!("{what}: p50 {} µs, p90 {} µs, p99 {} µs", at(50), at(90), at(99));
    }
    println!("{warm} of {runs} warm");
    Ok(())
}
