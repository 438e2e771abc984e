//! The starter images as archives, built once by their recipes.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};

/// The OCI archive of a starter image; its recipe builds it if that was not done yet.
///
/// # Errors
/// The recipe failed; it has said why on stderr.
pub fn archive(name: &str) -> Result<PathBuf> {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images").join(name).join("build.sh");
    let output = Command::new(&recipe).stderr(Stdio::inherit()).output().with_context(|| recipe.display().to_string())?;
    ensure!(output.status.success(), "{} failed: {}", recipe.display(), output.status);
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

/// Unpacks an OCI archive into a layout folder.
///
/// # Errors
/// `tar` says why.
pub fn unpack_layout(archive: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    run(Command::new("tar").arg("-C").arg(to).arg("-xf").arg(archive))
}

/// A layout folder with the same layers and another config (options of `umoci config`).
///
/// # Errors
/// `tar` or `umoci` says why.
pub fn variant(archive: &Path, to: &Path, config: &[&str]) -> Result<()> {
    unpack_layout(archive, to)?;
    run(Command::new("umoci").args(["config", "--image"]).arg(format!("{}:latest", to.display())).args(config))
}

/// Unpacks an image of a layout folder into a plain folder.
///
/// # Errors
/// `umoci` says why.
pub fn unpack_root(layout: &Path, to: &Path) -> Result<()> {
    run(Command::new("umoci").args(["raw", "unpack", "--image"]).arg(format!("{}:latest", layout.display())).arg(to))
}

/// Runs a program to its end and fails with what it said.
///
/// # Errors
/// It could not be started, or it failed.
pub fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(())
}
