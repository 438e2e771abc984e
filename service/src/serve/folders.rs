//! The data folder: what lies in it, and whose it is.

use std::{
    fs::{self, DirBuilder, File, Permissions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown},
    path::Path,
};

use anyhow::{Context, bail, ensure};

use crate::config::{Account, finish};

/// Owner of a folder.
#[derive(Clone, Copy)]
enum Owner {
    /// Root, with the service's group.
    Root,
    Service,
}

/// The folders below the data folder: the keeper's, and the service's.
const FOLDERS: [(&str, Owner, u32); 6] = [
    ("images", Owner::Root, 0o700),
    ("logs", Owner::Root, 0o750),
    ("blobs", Owner::Service, 0o700),
    ("pulls", Owner::Service, 0o700),
    ("uploads", Owner::Service, 0o700),
    ("postgres", Owner::Service, 0o700),
];

/// The files in it.
const FILES: [&str; 4] = ["jwt-secret", "node-id", "registry-key", "webhook-key"];

/// Others may pass through, to nothing that is open to them; the service may look around but make nothing.
const DATA_MODE: u32 = 0o751;

/// Makes what is missing. As root, everything gets its owner and mode; below the service's own folders root touches nothing.
pub(super) fn prepare(data_dir: &Path, account: &Account, is_root: bool) -> anyhow::Result<()> {
    ensure!(is_ours(data_dir)?, "{} is no data folder of mayfly, and not empty", data_dir.display());
    DirBuilder::new().recursive(true).create(data_dir).with_context(|| data_dir.display().to_string())?;
    if !is_root {
        let mut folders = FOLDERS.iter().filter(|(_, owner, _)| matches!(owner, Owner::Service));
        return folders.try_for_each(|(name, _, mode)| make(&data_dir.join(name), *mode));
    }
    own(data_dir, 0, account.gid, DATA_MODE)?;
    for (name, owner, mode) in FOLDERS {
        let path = data_dir.join(name);
        make(&path, mode)?;
        match owner {
            Owner::Root if name == "images" => own(&path, 0, 0, mode)?,
            Owner::Root => own(&path, 0, account.gid, mode)?,
            Owner::Service => own(&path, account.uid, account.gid, mode)?,
        }
    }
    let is_reached = finish(account.command("test").arg("-x").arg(data_dir.join("blobs"))).is_ok();
    ensure!(is_reached, "the user {} cannot reach {}: a folder above it is closed to others", account.name, data_dir.display());
    Ok(())
}

/// Holds the data folder against a second service until it is dropped, or its process dies.
pub(super) fn lock(data_dir: &Path) -> anyhow::Result<File> {
    let folder = File::open(data_dir).with_context(|| data_dir.display().to_string())?;
    match folder.try_lock() {
        Ok(()) => Ok(folder),
        Err(TryLockError::WouldBlock) => bail!("another mayfly serves from {}", data_dir.display()),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("locking {}", data_dir.display())),
    }
}

/// Whether the folder is missing, empty, or one that we made: owner and mode of any other one are not ours to change.
fn is_ours(data_dir: &Path) -> anyhow::Result<bool> {
    let entries = match fs::read_dir(data_dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error).with_context(|| data_dir.display().to_string()),
    };
    let names: Vec<_> = entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<_>>()?;
    let is_known = |name: &std::ffi::OsString| FOLDERS.iter().any(|(folder, _, _)| name == folder) || FILES.iter().any(|file| name == file);
    Ok(names.iter().all(|name| name == "lost+found") || names.iter().any(is_known))
}

fn make(path: &Path, mode: u32) -> anyhow::Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.with_context(|| path.display().to_string()),
    }
}

fn own(path: &Path, uid: u32, gid: u32, mode: u32) -> anyhow::Result<()> {
    let now = fs::metadata(path).with_context(|| path.display().to_string())?;
    if (now.uid(), now.gid()) != (uid, gid) {
        chown(path, Some(uid), Some(gid)).with_context(|| format!("changing the owner of {}", path.display()))?;
    }
    if now.permissions().mode() & 0o7777 != mode {
        fs::set_permissions(path, Permissions::from_mode(mode)).with_context(|| format!("changing the mode of {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_somebody_elses_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("thesis.txt"), "").unwrap();
        let error = prepare(folder.path(), &Account::current().unwrap(), false).unwrap_err().to_string();
        assert!(error.contains("not empty"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_new_folder_and_one_of_ours_are_taken() {
        let folder = tempfile::tempdir().unwrap();
        let data_dir = folder.path().join("a/b");
        prepare(&data_dir, &Account::current().unwrap(), false).unwrap();
        prepare(&data_dir, &Account::current().unwrap(), false).unwrap();
        assert_eq!(fs::metadata(data_dir.join("blobs")).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn one_data_folder_serves_one_service() {
        let folder = tempfile::tempdir().unwrap();
        let first = lock(folder.path()).unwrap();
        assert!(lock(folder.path()).unwrap_err().to_string().contains("another mayfly"));
        drop(first);
        lock(folder.path()).unwrap();
    }
}
