//! Volumes: what may be asked for, and where they stand in sandboxes.

use std::collections::BTreeMap;

use sandbox_core::{
    files::PATH_BYTES_MAX,
    protocol::{VOLUMES_MAX, VolumeId, VolumeMount},
};
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use super::{
    Bound, Invalid, SandboxId, TenantId,
    request::{check_labels, check_name},
    words,
};

/// The size of a volume.
pub const SIZE_BYTES: Bound = Bound { field: "size_bytes", unit: "bytes", min: 4 << 20, default: None, max: 1 << 40 };

/// For the contract: folders between single slashes, none of them `.` or `..`.
const MOUNT_PATTERN: &str = "^(/([^/.\\u0000][^/\\u0000]{0,254}|\\.[^/.\\u0000][^/\\u0000]{0,253}|\\.\\.[^/\\u0000]{1,253}))+$";
/// What is the sandbox's own: nothing of anybody's is mounted there.
const RESERVED: [&str; 3] = ["proc", "sys", "dev"];
const FOLDER_BYTES_MAX: usize = 255;
const _: () = assert!(VOLUMES_MAX == 16, "the contract of `volumes` says so too, and takes nothing but a literal");

/// Body of `POST /v1/volumes`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VolumeRequest {
    /// Given once to a tenant.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    name: String,
    /// How much fits into it. Set aside on the node's disk.
    #[schema(extensions(("x-bound" = json!(SIZE_BYTES))))]
    size_bytes: u64,
    #[serde(default)]
    #[schema(value_type = words::Labels)]
    labels: BTreeMap<String, String>,
}

/// A volume as asked for, every field checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVolume {
    pub name: String,
    pub size_bytes: u64,
    pub labels: BTreeMap<String, String>,
}

/// A volume that there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    pub id: VolumeId,
    pub tenant: TenantId,
    pub name: String,
    /// Whose disk it is on.
    pub node: Uuid,
    pub size_bytes: u64,
    pub labels: BTreeMap<String, String>,
    pub created_at: OffsetDateTime,
    /// Sandboxes and runs that hold it, the first hundred.
    pub used_by: Vec<SandboxId>,
}

/// A volume in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(as = Mount)]
pub struct MountRequest {
    /// Of the tenant's volume.
    #[schema(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    pub name: String,
    /// Absolute; not in `/proc`, `/sys` or `/dev`, nor in the place of another volume. Made if it is missing; no link may be on the way.
    #[schema(extensions(("x-schema" = json!({ "maxLength": PATH_BYTES_MAX, "pattern": MOUNT_PATTERN }))))]
    pub path: String,
    /// Whether nobody in the sandbox may write to it.
    #[serde(default)]
    pub read_only: bool,
}

/// The same, once it is known which volume that is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    pub volume: VolumeId,
    pub name: String,
    pub path: String,
    pub read_only: bool,
}

impl Mount {
    /// For the keeper.
    pub fn order(&self) -> VolumeMount {
        VolumeMount { volume: self.volume, path: self.path.clone(), is_read_only: self.read_only }
    }

    /// As a request would say it.
    pub fn request(&self) -> MountRequest {
        let Self { volume: _, name, path, read_only } = self.clone();
        MountRequest { name, path, read_only }
    }
}

impl VolumeRequest {
    /// The volume, or the first field that is wrong.
    pub fn parse(self) -> Result<NewVolume, Invalid> {
        check_labels(&self.labels)?;
        Ok(NewVolume { name: check_name(self.name)?, size_bytes: SIZE_BYTES.check(self.size_bytes)?, labels: self.labels })
    }
}

impl NewVolume {
    /// How many files, folders and links fit into a volume of this size, beside its bytes: one for each 16 KiB, as ext4 has them, and some for small ones.
    pub const fn inodes(&self) -> u64 {
        1024 + self.size_bytes / 16_384
    }
}

/// What is asked for, if all of it can stand in one sandbox.
pub(super) fn mounts(mounts: Vec<MountRequest>) -> Result<Vec<MountRequest>, Invalid> {
    if mounts.len() > VOLUMES_MAX {
        return Err(Invalid::new("volumes", format!("{} volumes; at most {VOLUMES_MAX}", mounts.len())));
    }
    let mut places: Vec<Vec<&str>> = Vec::new();
    for (at, mount) in mounts.iter().enumerate() {
        let in_field = |field: &str, detail: String| Invalid::new(format!("volumes[{at}].{field}"), detail);
        check_name(mount.name.clone()).map_err(|invalid| in_field("name", invalid.detail))?;
        let parts: Vec<&str> = mount.path.strip_prefix('/').unwrap_or_default().split('/').collect();
        let is_folder = |part: &&str| (1..=FOLDER_BYTES_MAX).contains(&part.len()) && ![".", ".."].contains(part) && !part.contains('\0');
        if mount.path.len() > PATH_BYTES_MAX || !parts.iter().all(is_folder) {
            let detail = "the place of a volume is an absolute path of at most 4095 bytes, with one slash before each folder, none of them `.` or `..`";
            return Err(in_field("path", detail.to_owned()));
        }
        if parts.first().is_some_and(|first| RESERVED.contains(first)) {
            return Err(in_field("path", "/proc, /sys and /dev are the sandbox's own".to_owned()));
        }
        if let Some(other) = places.iter().find(|other| other.starts_with(&parts) || parts.starts_with(other)) {
            return Err(in_field("path", format!("/{} is the place of another volume", other.join("/"))));
        }
        places.push(parts);
    }
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(paths: &[&str]) -> Result<Vec<MountRequest>, Invalid> {
        mounts(paths.iter().map(|path| MountRequest { name: "data".into(), path: (*path).to_owned(), read_only: false }).collect())
    }

    #[test]
    fn volumes_stand_beside_each_other() {
        assert_eq!(at(&["/a/b", "/a/c", "/ab", "/a.b", "/..a"]).unwrap().len(), 5);
        for (paths, field) in [
            (&["/a", "/a"][..], "volumes[1].path"),
            (&["/a/b", "/a"], "volumes[1].path"),
            (&["/a", "/b", "/a/b"], "volumes[2].path"),
            (&["/"], "volumes[0].path"),
            (&["a"], "volumes[0].path"),
            (&["/a/"], "volumes[0].path"),
            (&["/a//b"], "volumes[0].path"),
            (&["/a/../b"], "volumes[0].path"),
            (&["/a\0"], "volumes[0].path"),
            (&["/proc/self"], "volumes[0].path"),
            (&["/dev"], "volumes[0].path"),
            (&["/a"; 17], "volumes"),
        ] {
            assert_eq!(at(paths).unwrap_err().field, field, "{paths:?}");
        }
    }

    #[test]
    fn the_keeper_takes_every_size() {
        for size_bytes in [SIZE_BYTES.min, SIZE_BYTES.max] {
            let volume = NewVolume { name: "data".into(), size_bytes, labels: BTreeMap::new() };
            assert!(volume.inodes() <= 16_384 + size_bytes / 8192);
        }
    }
}
