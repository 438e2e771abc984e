//! What a keeper has to say is for whoever listens, and waits for nobody.

use std::{
    os::fd::OwnedFd,
    process::Command,
    time::{Duration, Instant},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sandbox_core::{
    protocol::{Cause, Reply},
    transport::Socket,
};

use crate::harness::{KEEPER, Node, shell};

const SOON: Timespec = Timespec { tv_sec: 15, tv_nsec: 0 };

/// Whether there is something to be read soon.
fn is_readable(descriptor: &impl std::os::fd::AsFd) -> bool {
    poll(&mut [PollFd::new(descriptor, PollFlags::IN)], Some(&SOON)).unwrap() > 0
}

/// Says something that is no request, of which the keeper warns before it closes the connection.
fn talk_nonsense(node: &Node) {
    let socket = Socket::connect(&node.socket()).unwrap();
    socket.send(&"nonsense", &[]).unwrap();
    assert!(is_readable(&socket), "the keeper does nothing any more");
    let answer = socket.recv::<Reply>();
    assert!(!matches!(answer, Ok(Some(_))), "{answer:?}");
}

/// Writes to a pipe until it takes nothing more. It blocks its writers again behind this.
fn fill(pipe: &OwnedFd) {
    rustix::io::ioctl_fionbio(pipe, true).unwrap();
    for len in [4096, 1] {
        while rustix::io::write(pipe, &vec![b'x'; len]).is_ok() {}
    }
    rustix::io::ioctl_fionbio(pipe, false).unwrap();
}

/// All that is said until it holds `text`.
fn heard(pipe: &OwnedFd, text: &str) -> String {
    let (deadline, mut said, mut part) = (Instant::now() + Duration::from_secs(15), String::new(), vec![0; 1 << 16]);
    while !said.contains(text) {
        assert!(Instant::now() < deadline && is_readable(pipe), "{text:?} does not come: {said:?}");
        let len = rustix::io::read(pipe, &mut part).unwrap();
        said.push_str(&String::from_utf8_lossy(&part[..len]));
    }
    said
}

#[test]
fn a_keeper_whose_log_nobody_reads_goes_on_and_says_later_that_something_is_missing() {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let mut keeper = Command::new(KEEPER);
    keeper.stderr(write.try_clone().unwrap());
    let node = Node::start_as(keeper);
    talk_nonsense(&node);
    heard(&read, "disconnecting a client");
    fill(&write);

    talk_nonsense(&node);

    assert_eq!(shell("exit 3").run_on(&node).ending.cause, Cause::Exited { code: 3 });
    let said = heard(&read, "x");
    assert!(!said.contains("sandbox-keeper"), "there was room");
    // All of it, so that there is some.
    while poll(&mut [PollFd::new(&read, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() > 0 {
        rustix::io::read(&read, &mut vec![0; 1 << 16]).unwrap();
    }
    talk_nonsense(&node);
    let said = heard(&read, "disconnecting a client");
    assert!(said.contains("missing here"), "{said}");
}
