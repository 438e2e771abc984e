//! Attacks on a sandbox, and what it means that a fence stops one.

use sandbox_core::{fence::Fence, protocol::Cause};

use crate::harness::{Done, Node, Run, command, fences};

/// What stops an attack, and what a control has to leave out besides because it cannot be set up without the others.
pub(crate) struct Fenced<'a> {
    pub(crate) by: &'a [Fence],
    pub(crate) also_without: &'a [Fence],
}

pub(crate) const fn by(fences: &[Fence]) -> Fenced<'_> {
    Fenced { by: fences, also_without: &[] }
}

/// How the attack went: whether it worked, and what it said.
pub(crate) fn went(done: &Done) -> (bool, String) {
    let said = format!("{:?} {} {}", done.ending.cause, done.stdout.trim_end(), done.stderr.trim_end());
    let Cause::Exited { code: code @ (0 | 1) } = done.ending.cause else { panic!("the attack neither worked nor was stopped: {said}") };
    (code == 0, said)
}

pub(crate) fn attack(arguments: &[&str]) -> Run {
    command(&[&["/bin/attack"], arguments].concat())
}

/// Tries the attack behind all fences, behind none of those that stop it, and behind each of them alone.
pub(crate) fn assert_stopped(node: &Node, run: impl Fn() -> Run, fenced: &Fenced<'_>) {
    let here = fences(node);
    let all: Vec<Fence> = [fenced.by, fenced.also_without].concat();
    let (worked, said) = went(&run().run_on(node));
    assert!(!worked, "it works behind all fences: {said}");
    let (worked, said) = went(&run().without(&all).run_on(node));
    assert!(worked, "the control: without {all:?} it is still stopped: {said}");
    for alone in fenced.by.iter().filter(|fence| here.has(**fence)) {
        let others: Vec<Fence> = all.iter().copied().filter(|fence| fence != alone).collect();
        let (worked, said) = went(&run().without(&others).run_on(node));
        assert!(!worked, "{alone} alone does not stop it: {said}");
    }
}
