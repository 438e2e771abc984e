//! The fences around a payload, by the names they have in records, in `mayfly doctor` and in `--require-fence`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// One thing that stands between a payload and what is not its own. `docs/security.md` says what each stops, and which test shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fence {
    /// Ids of its own, in a namespace that owns no other one (user_namespaces(7)).
    UserNamespace,
    /// A tree of its own, with nothing of the host's (mount_namespaces(7), pivot_root(2)).
    MountNamespace,
    PidNamespace,
    /// Loopback alone (network_namespaces(7)).
    NetworkNamespace,
    IpcNamespace,
    UtsNamespace,
    CgroupNamespace,
    /// The limits of its cgroups (cgroups(7)).
    Cgroup,
    /// None, or those of a root image (capabilities(7)).
    Capabilities,
    /// Nothing that it executes can give it more than it has (PR_SET_NO_NEW_PRIVS(2const)).
    NoNewPrivs,
    /// Set-id bits and file capabilities count for nothing, on every mount (mount(2), `MS_NOSUID`).
    Nosuid,
    /// Devices exist in our `/dev` alone (mount(2), `MS_NODEV`).
    Nodev,
    /// Parts of `/proc` that tell of the host or change it are hidden or read-only.
    MaskedProc,
    /// No descriptor but the three standard streams (CVE-2024-21626).
    Descriptors,
    /// A session keyring of its own (session-keyring(7)).
    SessionKeyring,
    /// PID 1 has an id that no payload has and cannot be traced (PR_SET_DUMPABLE(2const), CVE-2019-5736).
    InitShield,
    Seccomp,
    /// Nothing but its own tree can be opened or mounted, even through a leak (landlock(7)).
    Landlock,
    /// The profile `mayfly-sandbox`, where the host has AppArmor.
    Apparmor,
    /// The label that the node is configured with, where the host has SELinux.
    Selinux,
}

impl Fence {
    /// All that there are, in the order of their declaration.
    pub const ALL: [Self; 20] = [
        Self::UserNamespace,
        Self::MountNamespace,
        Self::PidNamespace,
        Self::NetworkNamespace,
        Self::IpcNamespace,
        Self::UtsNamespace,
        Self::CgroupNamespace,
        Self::Cgroup,
        Self::Capabilities,
        Self::NoNewPrivs,
        Self::Nosuid,
        Self::Nodev,
        Self::MaskedProc,
        Self::Descriptors,
        Self::SessionKeyring,
        Self::InitShield,
        Self::Seccomp,
        Self::Landlock,
        Self::Apparmor,
        Self::Selinux,
    ];

    /// Those that a host may lack. Every sandbox on every node has the others.
    pub const OF_SOME_HOSTS: [Self; 3] = [Self::Landlock, Self::Apparmor, Self::Selinux];

    /// Its name in JSON, configuration and documents.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UserNamespace => "user_namespace",
            Self::MountNamespace => "mount_namespace",
            Self::PidNamespace => "pid_namespace",
            Self::NetworkNamespace => "network_namespace",
            Self::IpcNamespace => "ipc_namespace",
            Self::UtsNamespace => "uts_namespace",
            Self::CgroupNamespace => "cgroup_namespace",
            Self::Cgroup => "cgroup",
            Self::Capabilities => "capabilities",
            Self::NoNewPrivs => "no_new_privs",
            Self::Nosuid => "nosuid",
            Self::Nodev => "nodev",
            Self::MaskedProc => "masked_proc",
            Self::Descriptors => "descriptors",
            Self::SessionKeyring => "session_keyring",
            Self::InitShield => "init_shield",
            Self::Seccomp => "seccomp",
            Self::Landlock => "landlock",
            Self::Apparmor => "apparmor",
            Self::Selinux => "selinux",
        }
    }

    const fn bit(self) -> u32 {
        1 << self as u32
    }
}

impl fmt::Display for Fence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The text names no fence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there is no fence {0:?}; there are {names}", names = Fence::ALL.map(Fence::name).join(", "))]
pub struct FenceUnknown(String);

impl FromStr for Fence {
    type Err = FenceUnknown;
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|fence| fence.name() == name).ok_or_else(|| FenceUnknown(name.to_owned()))
    }
}

/// A set of fences.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fences(u32);

impl Fences {
    /// What every sandbox has on every kernel that a keeper starts on.
    pub fn everywhere() -> Self {
        Fence::ALL.into_iter().filter(|fence| !Fence::OF_SOME_HOSTS.contains(fence)).collect()
    }

    /// Whether `fence` is among them.
    pub const fn has(self, fence: Fence) -> bool {
        self.0 & fence.bit() != 0
    }

    /// These and `fence`.
    #[must_use]
    pub const fn with(self, fence: Fence) -> Self {
        Self(self.0 | fence.bit())
    }

    /// These without `others`.
    #[must_use]
    pub const fn without(self, others: Self) -> Self {
        Self(self.0 & !others.0)
    }

    /// In the order of [`Fence::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Fence> {
        Fence::ALL.into_iter().filter(move |fence| self.has(*fence))
    }

    /// As a number, to be stored: bit n for the fence at place n of [`Fence::ALL`]. Later versions add places and change none.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// From [`Fences::bits`]. Places that this version does not know are left out.
    pub fn from_bits(bits: u32) -> Self {
        Fence::ALL.into_iter().filter(|fence| bits & fence.bit() != 0).collect()
    }

    /// Whether there is none in it.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl FromIterator<Fence> for Fences {
    fn from_iter<I: IntoIterator<Item = Fence>>(fences: I) -> Self {
        fences.into_iter().fold(Self::default(), Self::with)
    }
}

impl fmt::Debug for Fences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_and_bits_are_distinct() {
        for fence in Fence::ALL {
            assert_eq!(fence.name().parse(), Ok(fence));
            assert_eq!(serde_json::to_value(fence).unwrap(), fence.name());
            assert_eq!(Fences::default().with(fence).iter().collect::<Vec<_>>(), [fence]);
        }
    }

    #[test]
    fn an_unknown_name_is_told_with_those_that_exist() {
        let error = "moat".parse::<Fence>().unwrap_err().to_string();
        assert!(error.contains("moat") && error.contains("seccomp"), "{error}");
    }
}
