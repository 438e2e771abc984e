//! The id of this node, which its data folder keeps: the host's name may change, and live sandboxes must be found again.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{OpenOptionsExt, fchown},
    path::Path,
};

use anyhow::Context;
use uuid::Uuid;

use crate::{config::Account, store::NodeId};

/// The id that the folder keeps, made at the first start; `owner` gets its file. The folder must be held against a second service.
pub(super) fn id(data_dir: &Path, owner: Option<&Account>) -> anyhow::Result<NodeId> {
    let path = data_dir.join("node-id");
    let id = match fs::read_to_string(&path) {
        Ok(text) => text.trim_ascii().parse().with_context(|| format!("{} holds no id of a node", path.display()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            make(&path, owner).with_context(|| format!("making an id of this node in {}", path.display()))?
        }
        Err(error) => return Err(error).with_context(|| format!("reading the id of this node from {}", path.display())),
    };
    Ok(NodeId(id))
}

/// Under another name first: an id that is cut short by a crash would be none.
fn make(path: &Path, owner: Option<&Account>) -> io::Result<Uuid> {
    let id = Uuid::new_v4();
    let unfinished = path.with_extension("new");
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    writeln!(file, "{id}")?;
    if let Some(account) = owner {
        fchown(&file, Some(account.uid), Some(account.gid))?;
    }
    file.sync_all()?;
    fs::rename(&unfinished, path)?;
    File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_folder_keeps_its_id() {
        let folder = tempfile::tempdir().unwrap();
        let first = id(folder.path(), None).unwrap();
        assert_eq!(id(folder.path(), None).unwrap(), first);
        assert_eq!(fs::metadata(folder.path().join("node-id")).unwrap().permissions().mode() & 0o777, 0o600);
        let other = tempfile::tempdir().unwrap();
        assert_ne!(id(other.path(), None).unwrap(), first);
    }

    #[test]
    fn a_damaged_id_is_told_and_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("node-id"), "mine").unwrap();
        assert!(id(folder.path(), None).unwrap_err().to_string().contains("node-id"));
    }
}
