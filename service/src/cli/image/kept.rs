//! `mayfly image`: what is done with images that the service has, by way of the API.

use std::{
    fs::File,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, ensure};
use clap::Subcommand;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    super::api::{Api, Ready},
    pull::password,
};

/// Below which the API has images, how they were built, all of them as archives, and as whom tenants are known to registries.
const PLACE: &str = "v1/images";
const HISTORY: &str = "v1/image-history";
const ARCHIVES: &str = "v1/image-archives";
const REGISTRIES: &str = "v1/registries";
/// An answer that takes as long as there are bytes.
const LONG: Duration = Duration::from_secs(3600);

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Command {
    /// List images
    List {
        /// Only those whose name begins so
        #[arg(long, value_name = "PREFIX")]
        name: Option<String>,
        #[command(flatten)]
        api: Api,
    },
    /// Show one image
    Inspect {
        reference: String,
        #[command(flatten)]
        api: Api,
    },
    /// Show how an image was built
    History {
        reference: String,
        #[command(flatten)]
        api: Api,
    },
    /// Give an image another name
    Tag {
        reference: String,
        name: String,
        #[command(flatten)]
        api: Api,
    },
    /// Take a name away from an image; what runs on it goes on
    Remove {
        reference: String,
        #[command(flatten)]
        api: Api,
    },
    /// Look whether an image is what it was, and fail if it is not
    Verify {
        reference: String,
        #[command(flatten)]
        api: Api,
    },
    /// Write an image as an archive that `docker load`, `skopeo` and `mayfly image import` read
    Export {
        reference: String,
        /// The archive, which must not be there yet
        #[arg(long, short, value_name = "PATH")]
        output: PathBuf,
        #[command(flatten)]
        api: Api,
    },
    /// Keep credentials for a registry, encrypted
    Login {
        registry: String,
        #[arg(long, value_name = "NAME")]
        username: String,
        /// File with the password; - is standard input
        #[arg(long, value_name = "PATH")]
        password_file: PathBuf,
        #[command(flatten)]
        api: Api,
    },
    /// Forget the credentials for a registry
    Logout {
        registry: String,
        #[command(flatten)]
        api: Api,
    },
}

#[derive(Debug, Deserialize)]
struct Images {
    items: Vec<Listed>,
}

#[derive(Debug, Deserialize)]
struct Listed {
    reference: String,
    digest: String,
    shared: bool,
    size_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct History {
    steps: Vec<Step>,
}

#[derive(Debug, Deserialize)]
struct Step {
    created_by: Option<String>,
    layer: Option<Layer>,
}

#[derive(Debug, Deserialize)]
struct Layer {
    size_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Verified {
    reference: String,
    digest: String,
    sound: bool,
    unpacked: bool,
    damaged: Vec<Damage>,
}

#[derive(Debug, Deserialize)]
struct Damage {
    digest: String,
    part: String,
    kind: String,
}

pub(in crate::cli) fn run(command: Command) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match command {
            Command::List { name, api } => list(api, name.as_deref()).await,
            Command::Inspect { reference, api } => {
                let image: Value = api.ready()?.ask(Method::GET, PLACE, &parts(&reference), &[], None).await?;
                crate::cli::print(serde_json::to_string_pretty(&image)?)
            }
            Command::History { reference, api } => history(api, &reference).await,
            Command::Tag { reference, name, api } => {
                let asked = body([("reference", json!(reference)), ("name", json!(name))]);
                let image: Listed = api.ready()?.ask(Method::POST, PLACE, &["tag".to_owned()], &[], Some(asked)).await?;
                crate::cli::print(format!("{} {}", image.reference, image.digest))
            }
            Command::Remove { reference, api } => api.ready()?.ask::<()>(Method::DELETE, PLACE, &parts(&reference), &[], None).await,
            Command::Verify { reference, api } => verify(api, &reference).await,
            Command::Export { reference, output, api } => export(&api.ready_within(LONG)?, &reference, &output).await,
            Command::Login { registry, username, password_file, api } => {
                let asked =
                    body([("registry", json!(registry)), ("username", json!(username)), ("password", json!(password(&password_file)?))]);
                api.ready()?.ask::<Value>(Method::POST, REGISTRIES, &[], &[], Some(asked)).await.map(drop)
            }
            Command::Logout { registry, api } => api.ready()?.ask::<()>(Method::DELETE, REGISTRIES, &[registry], &[], None).await,
        }
    })
}

fn body<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The parts of a path.
fn parts(reference: &str) -> Vec<String> {
    reference.split('/').map(str::to_owned).collect()
}

async fn list(api: Api, name: Option<&str>) -> anyhow::Result<()> {
    let query: Vec<_> = name.map(|name| ("name", name)).into_iter().collect();
    let images: Images = api.ready()?.ask(Method::GET, PLACE, &[], &query, None).await?;
    let mut lines = vec![format!("{:<19} {:>12} {:<6}  NAME", "DIGEST", "BYTES", "SHARED")];
    lines.extend(images.items.iter().map(|Listed { reference, digest, shared, size_bytes }| {
        format!("{:<19.19} {size_bytes:>12} {:<6}  {reference}", digest, if *shared { "yes" } else { "no" })
    }));
    crate::cli::print(lines.join("\n"))
}

async fn history(api: Api, reference: &str) -> anyhow::Result<()> {
    let history: History = api.ready()?.ask(Method::GET, HISTORY, &parts(reference), &[], None).await?;
    let mut lines = vec![format!("{:>12}  STEP", "BYTES")];
    lines.extend(history.steps.iter().map(|Step { created_by, layer }| {
        // What a stranger wrote is not for a terminal as it is.
        let step: String = created_by.as_deref().unwrap_or("?").chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        format!("{:>12}  {step}", layer.as_ref().map_or(0, |layer| layer.size_bytes))
    }));
    crate::cli::print(lines.join("\n"))
}

async fn verify(api: Api, reference: &str) -> anyhow::Result<()> {
    let asked = body([("reference", json!(reference))]);
    let verified: Verified = api.ready_within(LONG)?.ask(Method::POST, PLACE, &["verify".to_owned()], &[], Some(asked)).await?;
    let Verified { reference, digest, sound, unpacked, damaged } = verified;
    let mut faults: Vec<_> = damaged.iter().map(|Damage { digest, part, kind }| format!("{part} {digest} is {kind}")).collect();
    faults.extend((!unpacked).then(|| "its root is missing".to_owned()));
    ensure!(sound, "{reference} {digest}: {}; import or pull it again", faults.join(", "));
    crate::cli::print(format!("{reference} {digest} is sound"))
}

/// Nobody takes half an archive for one: it has its name only when all of it is there.
async fn export(api: &Ready, reference: &str, output: &Path) -> anyhow::Result<()> {
    let shown = || output.display().to_string();
    ensure!(!output.try_exists().with_context(shown)?, "{} is there already", output.display());
    let mut response = api.open(Method::GET, ARCHIVES, &parts(reference)).await?;
    let wanted = response.content_length();
    let folder = output.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder).with_context(shown)?;
    let mut bytes = 0;
    while let Some(chunk) = response.chunk().await.context("the archive broke off")? {
        bytes += chunk.len() as u64;
        file.write_all(&chunk).with_context(shown)?;
    }
    ensure!(wanted.is_none_or(|wanted| wanted == bytes), "the archive broke off after {bytes} bytes");
    file.as_file().sync_all().with_context(shown)?;
    let kept: io::Result<File> = file.persist_noclobber(output).map_err(|error| error.error);
    kept.with_context(shown)?;
    crate::cli::print(format!("{} {bytes} bytes", output.display()))
}
