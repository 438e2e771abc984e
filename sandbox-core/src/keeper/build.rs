//! Building a sandbox that has no payload yet: a clone of the keeper becomes its init and is told what to build.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use rustix::{
    fs::{MemfdFlags, SealFlags},
    process::pidfd_send_signal,
};

use super::{
    Keeper, Options, Source, below,
    disk::Disk,
    layer::{Lent, Origin},
    monotonic_ns,
    parked::{Class, Parked},
    sandbox::{self, Body, Init},
    slot::Slot,
    warn,
    worker::Worker,
};
use crate::{
    disk,
    error::at,
    fail_point::reached,
    fence::{Fence, Fences},
    init::CONTROL,
    protocol::{
        CgroupMode, Isolation, Medium, VolumeMount,
        init::{Order, Place, Setup},
    },
    rootfs::map_layer,
    sys::{self, Child, Cloned},
    transport::Socket,
};

/// The programs that run inside sandboxes, sealed against everybody: what is executed is what was loaded at the start (CVE-2019-5736).
#[derive(Debug)]
pub(super) struct Programs {
    init: OwnedFd,
    pub(super) unpack: OwnedFd,
}

impl Programs {
    pub(super) fn load(options: &Options) -> io::Result<Self> {
        Ok(Self { init: seal("sandbox-init", &options.init)?, unpack: seal("sandbox-unpack", &options.unpack)? })
    }
}

fn seal(name: &str, path: &Path) -> io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut copy = File::from(memory);
    let mut program = File::open(path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
    io::copy(&mut program, &mut copy)?;
    rustix::fs::fcntl_add_seals(&copy, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    // Above the numbers that a child places its own descriptors at.
    Ok(rustix::io::fcntl_dupfd_cloexec(&copy, CONTROL + 1)?)
}

/// Gives the keeper a mount namespace of its own, with nothing shared, and stands on the folder that sandboxes build their trees on.
pub(super) fn settle(stage: &Path) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    match std::fs::create_dir(stage) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    std::env::set_current_dir(stage)
}

/// What a sandbox is built from.
#[derive(Debug)]
pub(super) struct Blueprint<'a> {
    pub(super) image: &'a OwnedFd,
    /// Mounted writable on `/image`.
    pub(super) target: Option<&'a OwnedFd>,
    pub(super) medium: Medium,
    pub(super) layer: Origin<'a>,
    /// What lies below that, above the image.
    pub(super) below: Option<&'a Lent>,
    pub(super) disk_bytes: u64,
    pub(super) inodes: u64,
    pub(super) capabilities: u64,
    pub(super) isolation: Isolation,
    pub(super) fences: Fences,
    pub(super) volumes: &'a [VolumeMount],
}

/// Why no sandbox was built.
#[derive(Debug)]
pub(super) enum BuildError {
    /// Every id range is in use.
    Full,
    Host(io::Error),
}

impl From<io::Error> for BuildError {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

/// The size of `/dev/shm`, as Docker has it. What is in it is charged to the memory limit like everything else.
const SHM_BYTES: u64 = 64 << 20;

impl Keeper {
    /// Builds one sandbox of the class that is missed most. False if there was nothing to build.
    pub(super) fn park(&mut self) -> io::Result<bool> {
        let now_ns = monotonic_ns();
        let Some(class) = self.lot.wanted(now_ns) else { return Ok(false) };
        let built = self.store.image(&class.image).map_err(BuildError::Host).and_then(|image| {
            let Class { disk_bytes, inodes, capabilities, fences, .. } = class;
            self.build(&Blueprint {
                image: &image,
                target: None,
                medium: Medium::Memory,
                layer: Origin::Own,
                below: None,
                disk_bytes,
                inodes,
                capabilities,
                isolation: Isolation::Container,
                fences,
                volumes: &[],
            })
        });
        match built {
            Ok((serial, body)) => {
                self.lot.insert(serial, Parked { class, body, is_ready: false, is_doomed: false });
                reached("keeper.park.built");
            }
            Err(error) => {
                // Who asks for one hears of it too.
                if let BuildError::Host(error) = error {
                    warn(format_args!("preparing a sandbox ahead failed: {error}"));
                }
                self.lot.give_up(|given_up| *given_up == class);
            }
        }
        Ok(true)
    }

    /// One that was being built ahead, or stood ready, is none any more, and nobody had that done. What came in its stead would end like it, again and again: no more of
    /// its class are built until somebody asks for one.
    pub(super) fn lose_parked(&mut self, serial: u64, why: &dyn std::fmt::Display) {
        let Some(parked) = self.lot.get_mut(serial).filter(|parked| !parked.is_doomed) else { return };
        parked.is_doomed = true;
        let class = parked.class.clone();
        warn(format_args!("building a sandbox ahead failed: {why}"));
        self.lot.give_up(|given_up| *given_up == class);
    }

    /// Clones an init and has it build a sandbox. Its limits and its payload come later ([`Keeper::begin`]).
    pub(super) fn build(&mut self, blueprint: &Blueprint<'_>) -> Result<(u64, Body), BuildError> {
        let slot = match blueprint.layer.id_base().or(blueprint.below.map(|below| below.id_base)) {
            Some(id_base) => self.slots.make_on_held(&self.tree, id_base)?,
            None => match self.slots.take_ready() {
                Some(slot) => slot,
                None => self.slots.make(&self.tree)?.ok_or(BuildError::Full)?,
            },
        };
        reached("keeper.launch.slot_taken");
        let serial = self.serial();
        let init = match self.clone_and_set_up(&slot, blueprint) {
            Ok(init) => init,
            Err(error) => {
                self.slots.put_back(slot)?;
                return Err(BuildError::Host(error));
            }
        };
        reached("keeper.launch.cloned");
        let (mut disk, mut below) = (None, None);
        // Without these watches it could not be followed.
        let begun = self
            .watch(init.child.pidfd.as_fd(), Source::Init, serial)
            .and_then(|()| self.watch(init.control.as_fd(), Source::Control, serial))
            .and_then(|()| {
                below = blueprint.below.map(below::make_ready).transpose().map_err(at("starting to make the layer below ready"))?;
                below.as_ref().map_or(Ok(()), |worker| self.watch(worker.as_fd(), Source::Below, serial))
            })
            .and_then(|()| {
                disk = self.begin_disk(&slot, blueprint).map_err(at("starting to make the writable layer"))?;
                disk.as_ref().and_then(Disk::socket).map_or(Ok(()), |worker| self.watch(worker, Source::Disk, serial))
            })
            // Last: until then a layer that was lent is whole, and can be taken back, and nothing bears the name of the id range.
            .and_then(|()| let_begin(disk.as_ref(), below.as_ref()));
        if let Err(error) = begun {
            // Who was to make a layer, or to make one ready, ends with its socket, and has done nothing.
            drop((disk, below));
            pidfd_send_signal(&init.child.pidfd, rustix::process::Signal::KILL).map_err(io::Error::from)?;
            sys::reap(init.child.pid, true)?;
            self.slots.put_back(slot)?;
            return Err(BuildError::Host(error));
        }
        if disk.is_some() {
            reached("keeper.launch.disk_begun");
        }
        Ok((serial, Body { slot, init, oom_notice: None, payload: None, disk, kept: None, is_over: blueprint.below.is_some(), below }))
    }

    /// Has somebody stand ready to make the writable layer, if init does not.
    fn begin_disk(&self, slot: &Slot, blueprint: &Blueprint<'_>) -> io::Result<Option<Disk>> {
        let (bytes, inodes, id_base) = (blueprint.disk_bytes, blueprint.inodes, slot.id_base);
        let project = sandbox::project(id_base, blueprint.below.is_some());
        let order = disk::Order { bytes, inodes, id_base, project, is_synchronous: self.tree.mode() != CgroupMode::V2 };
        let lent = match blueprint.layer {
            Origin::Own => {
                return match blueprint.medium {
                    Medium::Memory => Ok(None),
                    Medium::Disk => Disk::begin(&self.disks, order).map(Some),
                };
            }
            Origin::New => None,
            Origin::Used(lent) => Some(lent),
        };
        let labels = self.labels.as_ref().filter(|_| blueprint.fences.has(Fence::Selinux));
        let label = labels.and_then(|labels| labels.mount.as_deref());
        Disk::begin_kept(&self.disks, blueprint.medium, order, label, lent).map(Some)
    }

    fn clone_and_set_up(&self, slot: &Slot, blueprint: &Blueprint<'_>) -> io::Result<Init> {
        let tasks = slot.group.tasks().map_err(at("opening the cgroups"))?;
        let namespace = slot.user_namespace.as_fd();
        let image = map_layer(blueprint.image.as_fd(), namespace, true).map_err(at("mapping the image"))?;
        let base = map_layer(self.store.base().as_fd(), namespace, true).map_err(at("mapping the base layer"))?;
        let target =
            blueprint.target.map(|target| map_layer(target.as_fd(), namespace, false)).transpose().map_err(at("mapping the target"))?;
        let (control, init_end) = Socket::pair()?;
        let setup = Order::Setup(Setup {
            isolation: blueprint.isolation,
            id_base: slot.id_base,
            medium: blueprint.medium,
            layer: blueprint.layer.in_setup(blueprint.medium),
            has_below: blueprint.below.is_some(),
            disk_bytes: blueprint.disk_bytes,
            inodes: blueprint.inodes,
            shm_bytes: SHM_BYTES,
            cgroup_hierarchies: u32::try_from(tasks.len()).map_err(io::Error::other)?,
            has_target: target.is_some(),
            volumes: blueprint.volumes.iter().map(|mount| Place { path: mount.path.clone(), is_read_only: mount.is_read_only }).collect(),
            payload_capabilities: blueprint.capabilities,
            fences: blueprint.fences,
            labels: self.labels.clone().filter(|_| blueprint.fences.has(Fence::Selinux)),
            seccomp: self.seccomp.clone(),
        });
        let mut descriptors: Vec<BorrowedFd<'_>> = vec![namespace, image.as_fd(), base.as_fd()];
        descriptors.extend(tasks.iter().map(AsFd::as_fd));
        descriptors.extend(target.iter().map(AsFd::as_fd));
        if blueprint.isolation == Isolation::Gvisor {
            descriptors.extend(self.gvisor.iter().map(|gvisor| gvisor.program.as_fd()));
        }
        // It waits in the socket when init looks for it.
        control.send(&setup, &descriptors)?;
        let child = {
            let clone = || self.clone_init(slot, &init_end, blueprint.fences);
            let is_inside = blueprint.fences.has(Fence::NetworkNamespace);
            if is_inside { self.slots.networks.inside(&slot.network, clone) } else { clone() }.map_err(at("cloning init"))?
        };
        Ok(Init { child, control, is_dead: false })
    }

    /// The child has nothing of the keeper's but its end of the control socket after execve: everything else is close-on-exec.
    fn clone_init(&self, slot: &Slot, init_end: &OwnedFd, fences: Fences) -> io::Result<Child> {
        let mut namespaces = CloneFlags::CLONE_NEWPID | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS;
        namespaces.set(CloneFlags::CLONE_NEWIPC, fences.has(Fence::IpcNamespace));
        match sys::clone3(namespaces, true, slot.group.birthplace())? {
            Cloned::Parent(child) => Ok(child),
            Cloned::Child => {
                let failed = become_init(&self.programs.init, init_end);
                warn(format_args!("starting init failed: {failed}"));
                std::process::exit(1)
            }
        }
    }
}

/// Has those begin who make the layers of one sandbox. A failure means that nobody has.
fn let_begin(disk: Option<&Disk>, below: Option<&Worker>) -> io::Result<()> {
    let own = |disk: Option<&Disk>| disk.map_or(Ok(()), Disk::let_begin);
    let Some(below) = below else { return own(disk) };
    below.begin()?;
    // From here on the layer below is with that process, and comes back at the end of the sandbox: which is near if nobody makes its own, as the socket of that one tells.
    own(disk).or_else(|_untold| disk.map_or(Ok(()), Disk::stop))
}

/// Turns the clone into sandbox-init. Comes back only with a failure.
fn become_init(program: &OwnedFd, control: &OwnedFd) -> io::Error {
    let steps = || -> io::Result<std::convert::Infallible> {
        sys::place_at(control.as_fd(), CONTROL)?;
        let no_environment: [&std::ffi::CStr; 0] = [];
        Ok(nix::unistd::fexecve(program, &[c"sandbox-init"], &no_environment)?)
    };
    match steps() {
        Ok(never) => match never {},
        Err(error) => error,
    }
}
