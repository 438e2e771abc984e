//! Launching, limiting and supervising sandboxes on one Linux machine.
//!
//! The library behind `sandbox-keeper` and `sandbox-init`, and the side of their protocol that a service uses.
//! It knows Linux; it knows no HTTP, SQL, tenants or async.

mod apparmor;
mod cgroup;
pub mod client;
mod disk;
pub mod error;
pub mod fail_point;
pub mod fence;
pub mod files;
mod handover;
mod ids;
pub mod init;
pub mod keeper;
mod landlock;
pub mod log;
mod network;
mod policy;
pub mod privileges;
pub mod probe;
pub mod protocol;
mod rootfs;
pub mod seccomp;
pub mod selinux;
mod sys;
pub mod transport;
pub mod tree;
pub mod unpack;

pub use unpack::unpack_inherited;
