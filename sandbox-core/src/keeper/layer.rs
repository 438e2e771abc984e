//! Writable layers that outlive their sandbox: kept as descriptors of mounts that are attached nowhere, so that they go with the keeper whatever
//! becomes of it, and pass with everything else to the program that it goes on as.
//!
//! A kept layer keeps its id range, too: the next sandbox on it gets the same one, and every file has its owner without being mapped anew. So it counts as a sandbox where
//! the keeper counts those. What a layer in memory holds stays charged to the cgroup that wrote it — a removed group lives on, unseen, for as long as something is
//! charged to it, and its parent, the keeper's own, counts it — and can become no more than the layer's size. The groups themselves are not free either: a layer to which too many have written is
//! taken by nobody any more.

use std::{
    collections::{HashMap, HashSet},
    io,
    os::fd::OwnedFd,
};

use serde::{Deserialize, Serialize};

use super::{Keeper, Source, connection::failed, disk::Disk, warn};
use crate::{
    cgroup::{Device, Limits},
    protocol::{Answer, FailureKind, ImageId, Isolation, Launch, Layering, Medium, SandboxId, Supervision},
};

/// Groups that a layer in memory may leave behind before no sandbox is started on it any more. The kernel keeps some hundred KiB for each.
const GROUPS_MAX: u32 = 64;
/// The same before nobody is let to its files either, who may write to them, too.
const GROUPS_MAX_OF_VISITS: u32 = 4 * GROUPS_MAX;

/// All that are kept, and what is left of those that are given up.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Layers {
    kept: HashMap<SandboxId, Kept>,
    dropped: HashMap<u64, Dropped>,
}

/// The layer of one sandbox.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// What the sandbox was, and so what the next one on this layer is.
    shape: Shape,
    /// The block device that is the layer's own.
    device: Option<Device>,
    /// Who has it now: its sandbox, until nothing is left of that, or one without a payload, for its files alone.
    user: Option<u64>,
    /// No payload has run on it yet.
    #[serde(default)]
    is_new: bool,
    /// Groups that something of it may be charged to, of those who had it before.
    #[serde(default)]
    groups: u32,
    /// What it held when it was taken last, if it is in memory: blocks, as statfs(2) counts them.
    #[serde(default)]
    blocks: Option<u64>,
    /// `None` while somebody has it.
    #[serde(with = "crate::handover")]
    mount: Option<OwnedFd>,
}

/// What stays the same from one sandbox on a layer to the next.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) image: ImageId,
    pub(super) supervision: Supervision,
    pub(super) limits: Limits,
    pub(super) id_base: u32,
}

/// One that is being removed.
#[derive(Debug, Serialize, Deserialize)]
struct Dropped {
    disk: Disk,
    id_base: u32,
}

/// What a new sandbox has of a kept layer.
#[derive(Debug)]
pub(super) struct Lent {
    pub(super) mount: OwnedFd,
    pub(super) device: Option<Device>,
    pub(super) id_base: u32,
}

/// What a launch wants of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wish {
    /// One to go on with.
    pub(super) of: Option<SandboxId>,
    /// One to be below.
    pub(super) over: Option<SandboxId>,
    pub(super) is_kept: bool,
}

impl Wish {
    pub(super) const NONE: Self = Self { of: None, over: None, is_kept: false };

    pub(super) const fn is_none(self) -> bool {
        self.lent().is_none() && !self.is_kept
    }

    /// The kept one that it takes.
    pub(super) const fn lent(self) -> Option<SandboxId> {
        match self.of {
            Some(of) => Some(of),
            None => self.over,
        }
    }
}

/// How a layer of some id stands to somebody who wants it.
#[derive(Debug)]
pub(super) enum Standing {
    None,
    Free(Shape),
    /// The serial number of who has it.
    Taken(u64),
}

impl Layers {
    /// Those that nobody has.
    pub(super) fn idle(&self) -> usize {
        self.kept.values().filter(|kept| kept.user.is_none()).count()
    }

    /// Whether that is one of them.
    pub(super) fn is_idle(&self, id: SandboxId) -> bool {
        self.kept.get(&id).is_some_and(|kept| kept.user.is_none())
    }

    /// Whose they are.
    pub(super) fn ids(&self) -> Vec<SandboxId> {
        self.kept.keys().copied().collect()
    }

    /// Whether one is on this image: what the image lacks is in none of its layers.
    pub(super) fn is_on(&self, image: &ImageId) -> bool {
        self.kept.values().any(|kept| kept.shape.image == *image)
    }

    /// Whether there is nothing left of any of them.
    pub(super) fn is_empty(&self) -> bool {
        self.kept.is_empty() && self.dropped.is_empty()
    }

    pub(super) fn standing(&self, id: SandboxId) -> Standing {
        match self.kept.get(&id) {
            None => Standing::None,
            Some(Kept { user: Some(serial), .. }) => Standing::Taken(*serial),
            Some(Kept { shape, .. }) => Standing::Free(shape.clone()),
        }
    }

    /// Takes the mount of a free one, for a sandbox that is being built on it.
    pub(super) fn lend(&mut self, id: SandboxId) -> Option<Lent> {
        let kept = self.kept.get_mut(&id).filter(|kept| kept.user.is_none())?;
        let mount = kept.mount.take()?;
        kept.blocks = kept.blocks_of(&mount);
        Some(Lent { mount, device: kept.device, id_base: kept.shape.id_base })
    }

    /// That came to nothing.
    pub(super) fn take_back(&mut self, id: SandboxId, lent: Lent) {
        if let Some(kept) = self.kept.get_mut(&id) {
            kept.mount = Some(lent.mount);
        }
    }

    /// A sandbox was built with a layer that is to be kept under this name: a new one, or one that somebody had `before`.
    fn begin(&mut self, id: SandboxId, serial: u64, shape: Shape, before: Option<&Kept>) {
        let (is_new, groups) = before.map_or((true, 0), |before| (before.is_new, before.groups));
        self.kept.insert(id, Kept { shape, device: None, user: Some(serial), is_new, groups, blocks: None, mount: None });
    }

    /// Whether somebody has one.
    pub(super) fn has_user(&self, serial: u64) -> bool {
        self.kept.values().any(|kept| kept.user == Some(serial))
    }

    /// Whether one in memory, which somebody had below his own and which is back, holds more than before. Nothing is written to it then, but a page of a hole that is read
    /// through a mapping is made and charged like one that is written.
    pub(super) fn has_grown(&self, serial: u64) -> bool {
        let Some(kept) = self.kept.values().find(|kept| kept.user == Some(serial)) else { return false };
        kept.mount.as_ref().is_some_and(|mount| {
            kept.shape.supervision.medium == Medium::Memory && (kept.blocks.is_none() || kept.blocks_of(mount) != kept.blocks)
        })
    }

    /// The block device of the one that this sandbox has.
    pub(super) fn device_of(&self, serial: u64) -> Option<Device> {
        self.kept.values().find(|kept| kept.user == Some(serial))?.device
    }

    /// Whether one that is in memory has left so many groups behind.
    fn is_worn(&self, id: SandboxId, groups_max: u32) -> bool {
        self.kept.get(&id).is_some_and(|kept| kept.shape.supervision.medium == Medium::Memory && kept.groups >= groups_max)
    }

    fn of_user(&mut self, serial: u64) -> Option<(SandboxId, &mut Kept)> {
        self.kept.iter_mut().find(|(_, kept)| kept.user == Some(serial)).map(|(id, kept)| (*id, kept))
    }

    /// Its layer is made, or made ready again.
    pub(super) fn made(&mut self, serial: u64, device: Option<Device>) {
        if let Some((_, kept)) = self.of_user(serial) {
            kept.device = device;
        }
    }

    /// The sockets of those that are being removed.
    pub(super) fn removing(&self) -> impl Iterator<Item = (u64, &Disk)> {
        self.dropped.iter().map(|(serial, dropped)| (*serial, &dropped.disk))
    }
}

impl Kept {
    fn blocks_of(&self, mount: &OwnedFd) -> Option<u64> {
        let is_in_memory = self.shape.supervision.medium == Medium::Memory;
        let space = rustix::fs::fstatfs(mount).ok().filter(|_| is_in_memory)?;
        space.f_blocks.checked_sub(space.f_bfree)
    }
}

/// The id ranges of kept layers: they are given to nobody else.
pub(super) type Held = HashSet<u32>;

impl Keeper {
    /// What this launch wants of layers, if it can have it.
    pub(super) fn check_layer(&self, launch: &Launch) -> Result<Wish, Box<Answer>> {
        let (of, over) = match launch.layer {
            Layering::Fresh => (None, None),
            Layering::Of(id) => (Some(id), None),
            Layering::Over(id) => (None, Some(id)),
        };
        let wish = Wish { of, over, is_kept: launch.keeps_layer };
        if !wish.is_none() && launch.isolation != Isolation::Container {
            return Err(Box::new(failed(FailureKind::Refused, "layers of sandboxes under gVisor are not kept")));
        }
        if wish.is_kept && over.is_some() {
            return Err(Box::new(failed(FailureKind::Refused, "a layer over a kept one is not kept")));
        }
        // By one name two layers would be meant.
        if over == Some(launch.id) {
            return Err(Box::new(failed(FailureKind::Refused, "a sandbox over a kept layer needs a name of its own")));
        }
        // Its record may be forgotten, and its layer still be kept.
        if wish.is_kept && wish.of != Some(launch.id) && !matches!(self.layers.standing(launch.id), Standing::None) {
            return Err(Box::new(failed(FailureKind::Refused, format!("a layer of sandbox {} is kept already", launch.id))));
        }
        let Some(of) = wish.lent() else { return Ok(wish) };
        // Who has it below his own leaves nothing behind, but for what [`Layers::has_grown`] tells of.
        let groups_max = if over.is_some() { GROUPS_MAX_OF_VISITS } else { GROUPS_MAX };
        match self.layers.standing(of) {
            Standing::None => Err(Box::new(failed(FailureKind::Gone, format!("no layer of sandbox {of} is kept")))),
            Standing::Taken(_) => Err(Box::new(failed(FailureKind::Busy, format!("somebody still has the layer of sandbox {of}")))),
            Standing::Free(_) if self.layers.is_worn(of, groups_max) => Err(Box::new(worn(of))),
            Standing::Free(shape) if over.is_some() => {
                if shape.image == launch.image {
                    Ok(wish)
                } else {
                    Err(Box::new(failed(FailureKind::Refused, "a layer stays on its image, whatever lies over it")))
                }
            }
            Standing::Free(shape) => {
                let is_same =
                    |(a, b): (&Supervision, &Supervision)| (a.medium, a.disk_bytes, a.inodes) == (b.medium, b.disk_bytes, b.inodes);
                if shape.image == launch.image && is_same((&shape.supervision, &launch.supervision)) {
                    Ok(wish)
                } else {
                    Err(Box::new(failed(FailureKind::Refused, "a layer stays on its image, in its place and of its size")))
                }
            }
        }
    }

    /// A sandbox is being built as it was wished: the layer that it has is its own from here on.
    pub(super) fn layer_taken(&mut self, serial: u64, id: SandboxId, wish: Wish, shape: Shape) {
        let id_base = shape.id_base;
        let before = wish.of.and_then(|of| self.layers.kept.remove(&of));
        if wish.is_kept {
            self.slots.hold(id_base);
            self.layers.begin(id, serial, shape, before.as_ref());
        } else if wish.of.is_some() {
            // Its range goes with it.
            self.slots.let_go(id_base);
        }
    }

    /// Why nobody may look at the files of this layer, if so.
    pub(super) fn check_visit(&self, id: SandboxId) -> Result<(), Answer> {
        if self.layers.is_worn(id, GROUPS_MAX_OF_VISITS) { Err(worn(id)) } else { Ok(()) }
    }

    /// The same for one that looks at the files of a layer, or has it below his own, and leaves it as whose it is.
    pub(super) fn layer_visited(&mut self, id: SandboxId, serial: u64) {
        if let Some(kept) = self.layers.kept.get_mut(&id) {
            kept.user = Some(serial);
        }
    }

    /// Init is dead: what is to stay of its layer is taken out of what is removed.
    pub(super) fn keep_layer(&mut self, serial: u64) {
        let Some(sandbox) = self.sandboxes.get_mut(&serial) else { return };
        let has_run = sandbox.launched.is_some();
        let Some(body) = &mut sandbox.body else { return };
        // One that is not made yet may still be.
        if !body.is_over && body.disk.as_ref().is_some_and(Disk::is_under_way) {
            return;
        }
        let mount = body.kept.take();
        let (id_base, is_over) = (body.slot.id_base, body.is_over);
        let Some((id, kept)) = self.layers.of_user(serial).filter(|(_, kept)| kept.mount.is_none()) else { return };
        kept.is_new &= !has_run;
        match mount {
            Some(mount) => {
                kept.mount = Some(mount);
                // The one that init had died with its namespace; there is nothing to remove, unless his own lay over it.
                if !is_over {
                    body.disk = None;
                }
            }
            // What is left of it goes when nothing is left of who was to lie over it ([`Keeper::layer_freed`]): until then he has their range.
            None if is_over => {}
            None => {
                warn(format_args!("the layer of sandbox {id} is lost: it could not be made"));
                self.layers.kept.remove(&id);
                self.slots.let_go(id_base);
            }
        }
    }

    /// Nothing is left of whoever had a layer: somebody else can have it. `has_files`: something of it was still charged to his group.
    pub(super) fn layer_freed(&mut self, serial: u64, has_files: bool) {
        let Some((id, kept)) = self.layers.of_user(serial) else { return };
        if kept.mount.is_none() {
            return self.layer_lost(id);
        }
        kept.user = None;
        kept.groups = kept.groups.saturating_add(u32::from(has_files));
        // Nobody wrote to a new one whose sandbox was ended before its payload ran, and nobody asks for it.
        if self.shutdown.is_some() || kept.is_new {
            self.drop_layer(id);
        }
    }

    /// One that was to lie below another did not come back from who was to make it ready: its mount is gone, and its name may be left on disk.
    fn layer_lost(&mut self, id: SandboxId) {
        warn(format_args!("the layer of sandbox {id} is lost: it could not be made ready"));
        let Some(Kept { shape, .. }) = self.layers.kept.remove(&id) else { return };
        if shape.supervision.medium == Medium::Memory || !self.disks.leaves_names() {
            return self.slots.release(shape.id_base);
        }
        match Disk::discard(&self.disks, shape.id_base) {
            Ok(disk) => self.follow_removal(disk, shape.id_base),
            Err(error) => {
                // The next layer on disk that gets this range removes it first.
                warn(format_args!("starting to remove what is left of the layer failed: {error}"));
                self.slots.release(shape.id_base);
            }
        }
    }

    /// Gives up the layer that this sandbox kept.
    pub(super) fn drop_layer(&mut self, id: SandboxId) -> Answer {
        match self.layers.standing(id) {
            Standing::None => return Answer::Done,
            Standing::Taken(_) => return failed(FailureKind::Busy, "somebody still has this layer"),
            Standing::Free(_) => {}
        }
        let Some(mut kept) = self.layers.kept.remove(&id) else { return Answer::Done };
        let Some(mount) = kept.mount.take() else { return Answer::Done };
        let mut disk = Disk::Ready(mount);
        let removed = disk.remove(&self.disks, kept.shape.id_base, kept.shape.supervision.medium);
        let disk = match (removed, disk) {
            // There is nobody to remove it: as if nobody had asked, unless nobody will ask again.
            (Err(error), Disk::Ready(mount)) if self.shutdown.is_none() => {
                let answer = failed(FailureKind::Busy, format!("starting to remove the layer failed: {error}"));
                kept.mount = Some(mount);
                self.layers.kept.insert(id, kept);
                return answer;
            }
            (Err(error), disk) => {
                warn(format_args!("removing a kept layer failed: {error}"));
                disk
            }
            (Ok(()), disk) => disk,
        };
        self.follow_removal(disk, kept.shape.id_base);
        Answer::Done
    }

    /// Gives the id range of a layer back when that is removed.
    fn follow_removal(&mut self, disk: Disk, id_base: u32) {
        let serial = self.serial();
        let watched = disk.socket().map_or(Ok(()), |socket| self.watch(socket, Source::Layer, serial));
        if let Err(error) = watched {
            // Its range stays with it: it may still be on its way.
            return warn(format_args!("the removal of a kept layer is not followed: {error}"));
        }
        match disk.socket() {
            Some(_) => drop(self.layers.dropped.insert(serial, Dropped { disk, id_base })),
            None => self.slots.release(id_base),
        }
    }

    /// All of them: the keeper stops.
    pub(super) fn drop_layers(&mut self) {
        let free: Vec<SandboxId> = self.layers.kept.iter().filter(|(_, kept)| kept.user.is_none()).map(|(id, _)| *id).collect();
        free.into_iter().for_each(|id| drop(self.drop_layer(id)));
    }

    /// Who removes a layer says something, or has ended.
    pub(super) fn on_layer(&mut self, serial: u64) -> io::Result<()> {
        let Some(dropped) = self.layers.dropped.get(&serial) else { return Ok(()) };
        match dropped.disk.said()? {
            Some(why) => {
                if let Some(why) = why {
                    warn(format_args!("removing a kept layer failed: {why}"));
                }
                Ok(())
            }
            None => {
                let Some(Dropped { disk, id_base }) = self.layers.dropped.remove(&serial) else { return Ok(()) };
                self.slots.release(id_base);
                match disk.socket() {
                    Some(socket) => Ok(rustix::event::epoll::delete(&self.epoll, socket)?),
                    None => Ok(()),
                }
            }
        }
    }
}

/// The answer to whoever wants one that too many have written to.
fn worn(id: SandboxId) -> Answer {
    failed(
        FailureKind::Refused,
        format!("the layer of sandbox {id} is in memory and was written to by too many sandboxes: nothing is started on it again"),
    )
}

/// What a sandbox without a payload is held to, beside the limits of the one whose layer it has.
pub(super) fn supervision_of_visit(of: &Supervision) -> Supervision {
    Supervision { wall_ms: None, cpu_ms: None, output_bytes: 4096, output_policy: crate::protocol::OutputPolicy::Discard, ..*of }
}

/// Where a new sandbox's writable layer comes from.
#[derive(Debug)]
pub(super) enum Origin<'a> {
    /// It is made for this one and goes with it.
    Own,
    /// It is made to be kept.
    New,
    /// It was kept.
    Used(&'a Lent),
}

impl Origin<'_> {
    /// The id range that comes with it.
    pub(super) const fn id_base(&self) -> Option<u32> {
        match self {
            Self::Used(lent) => Some(lent.id_base),
            Self::Own | Self::New => None,
        }
    }

    pub(super) const fn in_setup(&self, medium: Medium) -> crate::protocol::init::Layer {
        use crate::protocol::init::Layer;
        match (self, medium) {
            (Self::Own, Medium::Memory) => Layer::Own,
            (Self::Own, Medium::Disk) => Layer::New,
            (Self::New | Self::Used(_), _) => Layer::Kept,
        }
    }
}
