//! `mayfly image`: a client of the API that sends an archive, or packs a folder into one first, or has an image pulled.

pub(super) mod kept;
mod pack;
pub(super) mod pull;
pub(super) mod push;

use std::{
    fs::File,
    io::{self, Seek, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail, ensure};
use clap::Args;
use indicatif::ProgressBar;
use reqwest::Url;
use serde::Deserialize;
use tokio::io::AsyncReadExt;

use super::{progress, remote::client_for, token::Key};
use crate::token::{Claims, Scope};

/// How much of the archive is sent at a time.
const CHUNK_BYTES: usize = 1 << 18;

#[derive(Debug, Args)]
pub(super) struct Arguments {
    /// An OCI archive, what `docker save` wrote, an OCI layout folder, or the folder of a root file system
    path: PathBuf,
    /// The name that the image is to have [default: the file's name up to its first dot]
    #[arg(long, value_name = "NAME")]
    reference: Option<String>,
    /// Where the API is
    #[arg(long, env = "MAYFLY_URL", default_value = "http://127.0.0.1:8080")]
    url: Url,
    /// Token for the API; with the scope `admin` the image is for all tenants [default: one signed with the data folder's secret]
    #[arg(long, env = "MAYFLY_TOKEN", hide_env_values = true)]
    token: Option<String>,
    #[command(flatten)]
    program: Program,
    #[command(flatten)]
    key: Key,
}

/// What a root file system has no place for.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "For the folder of a root file system")]
struct Program {
    /// Default command, one flag for each of its words
    #[arg(long, value_name = "WORD", allow_hyphen_values = true)]
    cmd: Vec<String>,
    /// A variable of the environment, NAME=VALUE; may be given several times
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<String>,
    /// Folder to start in
    #[arg(long, value_name = "PATH")]
    workdir: Option<String>,
    /// User to run as: name or number, with a group behind a colon if need be
    #[arg(long, value_name = "USER")]
    user: Option<String>,
}

impl Program {
    fn is_empty(&self) -> bool {
        self.cmd.is_empty() && self.env.is_empty() && self.workdir.is_none() && self.user.is_none()
    }
}

/// What of the API's answers is of interest here.
#[derive(Debug, Deserialize)]
struct Imported {
    reference: String,
    digest: String,
}

#[derive(Debug, Deserialize)]
struct Problem {
    code: String,
    detail: String,
}

pub(super) fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { path, reference, url, token, program, key } = arguments;
    let reference = match reference {
        Some(given) => given,
        None => reference_of(&path)?,
    };
    let archive = archive(&path, &program)?;
    let token = match token {
        Some(given) => given,
        None => key.sign(&operator(), 3600).context("signing a token; give one with --token")?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let imported = runtime.block_on(send(archive, &url, &reference, &token))?;
    super::print(format!("{} {}", imported.reference, imported.digest))
}

fn operator() -> Claims {
    Claims { tenant: "operator".into(), subject: "image-import".into(), scopes: [Scope::Admin].into_iter().collect() }
}

fn reference_of(path: &Path) -> anyhow::Result<String> {
    let name = std::path::absolute(path)?.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let reference = name.split('.').next().unwrap_or_default().to_owned();
    ensure!(!reference.is_empty(), "give the image a name with --reference");
    Ok(reference)
}

/// What is to be sent, as a file at its beginning.
fn archive(path: &Path, program: &Program) -> anyhow::Result<File> {
    let shown = || path.display().to_string();
    let meta = std::fs::metadata(path).with_context(shown)?;
    let is_layout = meta.is_dir() && path.join("oci-layout").is_file() && path.join("index.json").is_file();
    ensure!(
        (meta.is_dir() && !is_layout) || program.is_empty(),
        "{} is an image already: --cmd, --env, --workdir and --user are for the folder of a root file system",
        shown()
    );
    let mut file = if is_layout {
        pack::layout(path)?
    } else if meta.is_dir() {
        let (file, left_out) = pack::root(path, program)?;
        for path in left_out {
            // Where stderr is closed nobody hears it.
            drop(writeln!(io::stderr(), "left out, no file, folder or link: {}", path.display()));
        }
        file
    } else {
        ensure!(meta.is_file(), "{} is neither a file nor a folder", shown());
        File::open(path).with_context(shown)?
    };
    file.rewind()?;
    Ok(file)
}

async fn send(archive: File, url: &Url, reference: &str, token: &str) -> anyhow::Result<Imported> {
    let len = archive.metadata()?.len();
    let mut place = url.join("v1/images/import").context("--url")?;
    place.query_pairs_mut().append_pair("reference", reference);
    let client = client_for(url).connect_timeout(Duration::from_secs(10)).build()?;
    let bar = progress::bytes(Some(len), "sending");
    let body = reqwest::Body::wrap_stream(chunks(archive, bar.clone()));
    let request = client.post(place).bearer_auth(token).header("content-type", "application/x-tar").header("content-length", len);
    let response = request.body(body).send().await;
    bar.finish_and_clear();
    let response = response.with_context(|| format!("sending the image to {url}"))?;
    let status = response.status();
    let text = response.text().await.with_context(|| format!("hearing from {url}"))?;
    if status.is_success() {
        return serde_json::from_str(&text).with_context(|| format!("{url} answered something else than an image"));
    }
    match serde_json::from_str::<Problem>(&text) {
        Ok(problem) => bail!("{url} answered {status}, {}: {}", problem.code, problem.detail),
        Err(_) => bail!("{url} answered {status}"),
    }
}

/// The file in pieces, each counted when it goes.
fn chunks(file: File, bar: ProgressBar) -> impl futures_util::Stream<Item = io::Result<Vec<u8>>> + Send + 'static {
    futures_util::stream::try_unfold(tokio::fs::File::from_std(file), move |mut file| {
        let bar = bar.clone();
        async move {
            let mut chunk = Vec::with_capacity(CHUNK_BYTES);
            (&mut file).take(CHUNK_BYTES as u64).read_to_end(&mut chunk).await?;
            bar.inc(chunk.len() as u64);
            if chunk.is_empty() {
                // All is sent; what the service does with it takes its time.
                bar.set_message("unpacking");
            }
            Ok(if chunk.is_empty() { None } else { Some((chunk, file)) })
        }
    })
}

fn parse_variable(text: &str) -> anyhow::Result<String> {
    let is_sound = text.split_once('=').is_some_and(|(name, _)| !name.is_empty());
    ensure!(is_sound, "NAME=VALUE is needed");
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_called_as_its_file_up_to_the_first_dot() {
        assert_eq!(reference_of(Path::new("/tmp/python.oci.tar")).unwrap(), "python");
        assert_eq!(reference_of(Path::new("/tmp/root/")).unwrap(), "root");
        assert!(reference_of(Path::new("/tmp/.tar")).is_err());
    }

    #[test]
    fn a_finished_image_takes_no_program() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("image.tar");
        std::fs::write(&file, "").unwrap();
        let program = Program { cmd: vec!["sh".into()], ..Program::default() };
        assert!(archive(&file, &program).unwrap_err().to_string().contains("--cmd"));
        assert!(archive(&file, &Program::default()).is_ok());
    }

    #[test]
    fn a_variable_has_a_name() {
        assert!(parse_variable("A=").is_ok());
        assert!(parse_variable("A=B=C").is_ok());
        assert!(parse_variable("A").is_err());
        assert!(parse_variable("=A").is_err());
    }

    #[tokio::test]
    async fn the_whole_file_is_sent() {
        use futures_util::TryStreamExt;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; CHUNK_BYTES * 2 + 5]).unwrap();
        file.rewind().unwrap();
        let parts: Vec<_> = chunks(file, ProgressBar::hidden()).try_collect().await.unwrap();
        assert_eq!(parts.concat().len(), CHUNK_BYTES * 2 + 5);
    }
}
