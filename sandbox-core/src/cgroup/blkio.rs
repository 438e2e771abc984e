//! How fast a sandbox may use the node's disks, and how much it did.

use std::{io, path::Path};

use rustix::fs::{major, makedev, minor};
use serde::{Deserialize, Serialize};

use super::{Group, read, write};
use crate::protocol::{CgroupMode, IoLimits};

/// A block device, as the kernel counts for it: a whole disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Device {
    pub(crate) major: u32,
    pub(crate) minor: u32,
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The devices of the node that sandboxes reach. `None` for a folder that lies on no block device (tmpfs, a network, an overlay): there is
/// nothing then that a rate could be set for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Devices {
    pub(crate) images: Option<Device>,
    pub(crate) disks: Option<Device>,
    #[serde(default)]
    pub(crate) volumes: Option<Device>,
}

impl Devices {
    fn all(self) -> impl Iterator<Item = Device> {
        let disks = self.disks.filter(|disks| Some(*disks) != self.images);
        let volumes = self.volumes.filter(|volumes| Some(*volumes) != self.images && Some(*volumes) != self.disks);
        self.images.into_iter().chain(disks).chain(volumes)
    }
}

impl Device {
    /// The disk below a folder.
    pub(crate) fn of(folder: &Path) -> io::Result<Option<Self>> {
        let device = rustix::fs::stat(folder)?.st_dev;
        let (major, minor) = (major(device), minor(device));
        if major != 0 {
            return Self { major, minor }.whole().map(Some);
        }
        // btrfs numbers its volumes by itself; the table of mounts names its (first) disk.
        let table = std::fs::read_to_string("/proc/self/mountinfo")?;
        let Some(source) = source_of(&table, Self { major, minor }).filter(|source| source.starts_with('/')) else { return Ok(None) };
        let Ok(stat) = rustix::fs::stat(source) else { return Ok(None) };
        if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::BlockDevice {
            return Ok(None);
        }
        Self::from_number(stat.st_rdev).whole().map(Some)
    }

    fn from_number(number: u64) -> Self {
        Self { major: major(number), minor: minor(number) }
    }

    /// The disk of a partition; a whole disk is its own. Limits are kept for whole disks alone (`blkg_conf_open_bdev` of the kernel).
    fn whole(self) -> io::Result<Self> {
        let node = Path::new("/sys/dev/block").join(self.to_string());
        if !node.join("partition").exists() {
            return Ok(self);
        }
        let text = std::fs::read_to_string(node.canonicalize()?.join("../dev"))?;
        let numbers = text.trim().split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        let (major, minor) = numbers.ok_or_else(|| io::Error::other(format!("the disk of {self} calls itself {text:?}")))?;
        Ok(Self::from_number(makedev(major, minor)))
    }
}

/// The source of the file system `device` (proc_pid_mountinfo(5): third field, and the second behind the dash).
fn source_of(table: &str, device: Device) -> Option<&str> {
    let line = table.lines().find(|line| line.split(' ').nth(2) == Some(&device.to_string()))?;
    line.split_once(" - ")?.1.split(' ').nth(1)
}

/// What a group has read and written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Io {
    pub(crate) read_bytes: u64,
    pub(crate) written_bytes: u64,
    pub(crate) reads: u64,
    pub(crate) writes: u64,
}

impl Group {
    /// Holds the group to `io` on every disk of the node. Quick if that is what it is held to already.
    pub(crate) fn limit_io(&mut self, io: IoLimits) -> io::Result<()> {
        if self.io != Some(io) {
            self.devices.all().try_for_each(|device| self.limit_io_on(device, io))?;
            self.io = Some(io);
        }
        Ok(())
    }

    /// Holds the group to `io` on a device of its own, too.
    pub(crate) fn limit_io_on_own(&mut self, device: Device, io: IoLimits) -> io::Result<()> {
        self.limit_io_on(device, io)?;
        self.own_device = Some(device);
        Ok(())
    }

    /// Holds the group to `io` on a device that others use, too.
    pub(crate) fn limit_io_on_shared(&mut self, device: Device, io: IoLimits) -> io::Result<()> {
        self.limit_io_on(device, io)?;
        self.shared_devices.push(device);
        Ok(())
    }

    pub(super) fn limit_io_on(&self, device: Device, io: IoLimits) -> io::Result<()> {
        let IoLimits { bytes_per_s, ops_per_s } = io;
        if self.mode == CgroupMode::V2 {
            let limits = format!("rbps={bytes_per_s} wbps={bytes_per_s} riops={ops_per_s} wiops={ops_per_s}");
            return self.limit_on(device, "io.max", &limits);
        }
        for (name, value) in [
            ("blkio.throttle.read_bps_device", bytes_per_s),
            ("blkio.throttle.write_bps_device", bytes_per_s),
            ("blkio.throttle.read_iops_device", ops_per_s),
            ("blkio.throttle.write_iops_device", ops_per_s),
        ] {
            self.limit_on(device, name, &value.to_string())?;
        }
        Ok(())
    }

    fn limit_on(&self, device: Device, name: &str, value: &str) -> io::Result<()> {
        let line = format!("{device} {value}");
        write(self.blkio(), name, &line)?;
        let found = read(self.blkio(), name)?;
        if found.lines().any(|found| found == line) {
            Ok(())
        } else {
            Err(io::Error::other(format!("{name} is {:?} instead of {line:?}", found.trim_end())))
        }
    }

    /// What reached the node's disks. What went through a loop device arrives at a disk and is counted there; it counts by itself only
    /// where there is no disk below.
    pub(super) fn io(&self) -> io::Result<Io> {
        let devices = self.devices;
        let own = self.own_device.filter(|_| devices.disks.is_none());
        let counted: Vec<String> = devices.all().chain(own).map(|device| device.to_string()).collect();
        if counted.is_empty() {
            return Ok(Io::default());
        }
        if self.mode == CgroupMode::V2 {
            return Ok(sum_v2(&read(self.blkio(), "io.stat")?, &counted));
        }
        let bytes = sum_v1(&read(self.blkio(), "blkio.throttle.io_service_bytes")?, &counted);
        let operations = sum_v1(&read(self.blkio(), "blkio.throttle.io_serviced")?, &counted);
        Ok(Io { read_bytes: bytes.0, written_bytes: bytes.1, reads: operations.0, writes: operations.1 })
    }
}

/// Lines like `254:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0`.
fn sum_v2(text: &str, counted: &[String]) -> Io {
    let mut sum = Io::default();
    for (_, fields) in text.lines().filter_map(|line| line.split_once(' ')).filter(|(device, _)| counted.iter().any(|c| c == device)) {
        for (name, value) in fields.split(' ').filter_map(|field| field.split_once('=')) {
            let value = value.parse().unwrap_or(0);
            match name {
                "rbytes" => sum.read_bytes += value,
                "wbytes" => sum.written_bytes += value,
                "rios" => sum.reads += value,
                "wios" => sum.writes += value,
                _ => {}
            }
        }
    }
    sum
}

/// What was read and written, from lines like `254:0 Read 4096`.
fn sum_v1(text: &str, counted: &[String]) -> (u64, u64) {
    let of = |kind: &str| {
        let values = text.lines().filter_map(|line| {
            let mut words = line.split(' ');
            let is_it = counted.iter().any(|device| Some(device.as_str()) == words.clone().next()) && words.clone().nth(1) == Some(kind);
            if is_it { words.nth(2)?.parse::<u64>().ok() } else { None }
        });
        values.sum()
    };
    (of("Read"), of("Write"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn use_is_summed_over_the_nodes_disks_and_no_other_device() {
        let counted = ["254:0".to_owned(), "8:16".to_owned()];
        let v2 = "7:3 rbytes=5 wbytes=5 rios=5 wios=5 dbytes=0 dios=0\n254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=9 dios=9\n8:16 rbytes=1 wbytes=2 rios=3 wios=4\n";
        assert_eq!(sum_v2(v2, &counted), Io { read_bytes: 4097, written_bytes: 8194, reads: 4, writes: 6 });
        let v1 = "7:3 Read 5\n7:3 Write 5\n254:0 Read 4096\n254:0 Write 8192\n254:0 Sync 1\n254:0 Total 12288\n8:16 Write 3\nTotal 12301\n";
        assert_eq!(sum_v1(v1, &counted), (4096, 8195));
    }

    #[test]
    fn the_disk_of_an_anonymous_device_is_in_the_table_of_mounts() {
        let table = "31 23 0:28 / /sys rw shared:1 - sysfs sysfs rw\n40 23 0:35 /data /srv rw,noatime - btrfs /dev/sda2 rw\n";
        assert_eq!(source_of(table, Device { major: 0, minor: 35 }), Some("/dev/sda2"));
        assert_eq!(source_of(table, Device { major: 0, minor: 36 }), None);
    }

    #[test]
    fn a_folder_in_memory_lies_on_no_device() {
        assert_eq!(Device::of(Path::new("/proc")).unwrap(), None);
        let root = Device::of(Path::new("/")).unwrap();
        assert!(root.is_none_or(|device| !Path::new("/sys/dev/block").join(device.to_string()).join("partition").exists()), "{root:?}");
    }
}
