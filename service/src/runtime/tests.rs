//! The keeper's calls against a keeper of the test's own.

use std::sync::mpsc;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use sandbox_core::{fence::Fences, protocol::CgroupMode};

use super::*;

/// A keeper that answers as `answer` says, one connection after another, until `answer` breaks the connection by `None`.
fn fake(mut answer: impl FnMut(&Request) -> Option<Answer> + Send + 'static) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keeper.sock");
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&listener, 8).unwrap();
    std::thread::spawn(move || {
        while let Ok(socket) = rustix::net::accept(&listener) {
            while let Ok(Some(datagram)) = sandbox_core::transport::recv::<Call>(socket.as_fd()) {
                let Some(answer) = answer(&datagram.message.request) else { break };
                let reply = Reply { tag: datagram.message.tag, answer };
                sandbox_core::transport::send(socket.as_fd(), &reply, &[]).unwrap();
            }
        }
    });
    (folder, path)
}

fn greeting(request: &Request, started_at_us: u64) -> Option<Answer> {
    let hello = Hello {
        version: VERSION,
        pid: 1,
        upgrades: 0,
        started_at_us,
        cgroup: CgroupMode::V2,
        sandboxes_max: 1,
        fences: Fences::everywhere(),
        isolation: vec![sandbox_core::protocol::Isolation::Container],
    };
    matches!(request, Request::Hello { .. }).then_some(Answer::Hello(hello))
}

fn list(request: &Request) -> Option<Answer> {
    matches!(request, Request::List { .. }).then(|| Answer::Records { records: vec![], is_more: false })
}

#[tokio::test]
async fn answers_reach_their_callers() {
    let (_folder, path) = fake(|request| {
        let refusal = || Answer::Failed(Failure { kind: FailureKind::Gone, message: "no such image".into() });
        Some(greeting(request, 1).or_else(|| list(request)).unwrap_or_else(refusal))
    });
    let keeper = Keeper::connect(&path, Fences::default()).await.unwrap();
    assert_eq!(keeper.list().await.unwrap(), []);
    let error = keeper.remove_image("a".repeat(64).try_into().unwrap()).await.unwrap_err();
    assert!(matches!(error, CallError::Failed(Failure { kind: FailureKind::Gone, .. })));
}

#[tokio::test]
async fn a_broken_connection_fails_the_call_and_is_made_again() {
    let mut started_at_us = 0;
    let (_folder, path) = fake(move |request| {
        started_at_us += u64::from(matches!(request, Request::Hello { .. }));
        greeting(request, started_at_us).or_else(|| list(request))
    });
    let keeper = Keeper::connect(&path, Fences::default()).await.unwrap();
    assert!(matches!(keeper.shutdown().await, Err(CallError::Lost)));

    let again = async {
        while keeper.reconnects() == 0 {
            tokio::time::sleep(RETRY_MIN).await
        }
    };
    tokio::time::timeout(Duration::from_secs(5), again).await.unwrap();
    assert_eq!(keeper.connected().await.started_at_us, 2);
    assert_eq!(keeper.list().await.unwrap(), []);
}

#[tokio::test]
async fn a_list_of_many_pages_is_whole_and_has_each_record_as_it_was_last() {
    let record = |id: u128, seq| Record { id: SandboxId(uuid::Uuid::from_u128(id)), seq, launched: None, is_ended: seq == 4 };
    let (_folder, path) = fake(move |request| {
        let Request::List { after } = request else { return greeting(request, 1) };
        match after {
            0 => Some(Answer::Records { records: vec![record(1, 1), record(2, 2)], is_more: true }),
            // The first one has ended while this was asked.
            2 => Some(Answer::Records { records: vec![record(3, 3), record(1, 4)], is_more: false }),
            _ => None,
        }
    });
    let keeper = Keeper::connect(&path, Fences::default()).await.unwrap();
    assert_eq!(keeper.list().await.unwrap(), [record(2, 2), record(3, 3), record(1, 4)]);
}

#[tokio::test]
async fn no_keeper_is_an_error_that_names_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    let error = Keeper::connect(&folder.path().join("keeper.sock"), Fences::default()).await.unwrap_err();
    assert!(error.to_string().contains("keeper.sock"));
}

#[tokio::test]
async fn descriptors_arrive_with_the_launch_before_the_wait() {
    let (seen, order) = mpsc::channel();
    let (_folder, path) = fake(move |request| {
        if let Some(hello) = greeting(request, 1) {
            return Some(hello);
        }
        seen.send(if matches!(request, Request::Launch(_)) { "launch" } else { "wait" }).unwrap();
        Some(Answer::Failed(Failure { kind: FailureKind::Gone, message: String::new() }))
    });
    let keeper = Keeper::connect(&path, Fences::default()).await.unwrap();
    let id = SandboxId(uuid::Uuid::nil());
    let launch = Launch {
        id,
        image: "a".repeat(64).try_into().unwrap(),
        spec: vec![],
        isolation: sandbox_core::protocol::Isolation::Container,
        supervision: sandbox_core::protocol::Supervision {
            wall_ms: None,
            cpu_ms: None,
            output_bytes: 0,
            output_policy: sandbox_core::protocol::OutputPolicy::Discard,
            medium: sandbox_core::protocol::Medium::Memory,
            disk_bytes: 0,
            inodes: 0,
            io: sandbox_core::protocol::IoLimits::MAX,
        },
        stdin: sandbox_core::protocol::Stdin::Null,
        has_files: false,
        terminal: None,
        layer: sandbox_core::protocol::Layering::Fresh,
        keeps_layer: false,
        volumes: Vec::new(),
    };
    let launched = keeper.launch(launch, &[]).await.unwrap();
    let ended = keeper.wait(id).await.unwrap();
    assert!(launched.await.is_err() && ended.await.is_err());
    assert_eq!([order.recv().unwrap(), order.recv().unwrap()], ["launch", "wait"]);
}

#[tokio::test]
async fn a_keeper_without_a_fence_that_is_required_is_refused() {
    let (_folder, path) = fake(|request| greeting(request, 1));
    let required = [Fence::Seccomp, Fence::Selinux].into_iter().collect();
    let error = format!("{:#}", Keeper::connect(&path, required).await.unwrap_err());
    assert!(error.contains("lack a fence") && error.contains("selinux") && !error.contains("seccomp"), "{error}");
}
