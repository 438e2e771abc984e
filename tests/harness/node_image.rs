//! The image of a node, with the programs of this build in it.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{
    image::{self, run},
    service::program,
};

/// The archive of the image with the programs of this build, built again.
///
/// # Errors
/// `tools/image.sh` says why.
pub fn build(archive: &Path) -> Result<()> {
    let programs = program("mayfly");
    let mut build = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/image.sh"));
    build.env("PROGRAMS", programs.parent().context("a folder of programs")?).env("OUT", archive).env("SOURCE_DATE_EPOCH", "1700000000");
    run(&mut build)
}

/// The files of that image, built once for these programs.
///
/// # Errors
/// As [`build`].
pub fn root() -> Result<PathBuf> {
    let programs = program("mayfly").parent().context("a folder of programs")?.to_owned();
    let mut key = Vec::new();
    for name in ["mayfly", "sandbox-keeper", "sandbox-init", "sandbox-unpack"] {
        let meta = fs::metadata(programs.join(name))?;
        key.push(format!("{name} {} {:?}", meta.len(), meta.modified()?));
    }
    let recipes =
        ["Dockerfile", "tools/image.sh"].map(|name| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)));
    for recipe in recipes {
        key.push(recipe?);
    }
    let folder = programs.join("node-image");
    fs::create_dir_all(&folder)?;
    let lock = File::options().create(true).append(true).open(folder.join("lock"))?;
    lock.lock()?;
    let root = folder.join("root");
    let (known, key) = (folder.join("of"), key.join("\n"));
    if fs::read_to_string(&known).is_ok_and(|known| known == key) {
        return Ok(root);
    }
    let archive = folder.join("image.oci.tar");
    build(&archive)?;
    for old in [&root, &folder.join("layout")] {
        run(Command::new("rm").arg("-rf").arg(old))?;
    }
    unpack(&archive, &folder.join("layout"), &root)?;
    fs::write(known, key)?;
    Ok(root)
}

/// Unpacks an archive into a layout, and its image into a folder.
///
/// # Errors
/// `skopeo` or `umoci` says why.
pub fn unpack(archive: &Path, layout: &Path, root: &Path) -> Result<()> {
    let from = format!("oci-archive:{}", archive.display());
    run(Command::new("skopeo").args(["copy", "--quiet", &from, &format!("oci:{}:latest", layout.display())]))?;
    image::unpack_root(layout, root)
}
