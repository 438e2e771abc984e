//! What is asked of registries, by the protocol of OCI and Docker (distribution-spec 1.1): patiently, and never of a host that only we can reach.
//!
//! Everything that a registry says is a stranger's word: where it sends us on, how long it says that something is, how slowly it comes. Names are looked up,
//! and addresses looked at, as for webhooks ([`crate::outbound`]), at every step on the way: redirects are followed here, one by one.

mod login;
mod patience;
mod source;
mod upload;

use std::{error::Error as _, path::PathBuf, sync::Mutex, time::Duration};

use anyhow::Context as _;
use futures_util::TryFutureExt as _;
use ipnet::IpNet;
use oci_spec::image::Sha256Digest;
use patience::{ATTEMPTS_MAX, MIRROR_ATTEMPTS_MAX, Pace, Patience, Trouble, retry_after};
use reqwest::{
    Certificate, Client, Method, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderValue, LOCATION, RANGE},
    redirect,
};
pub(super) use source::Source;
pub use source::{HostRule, Mirror, RegistryName, Source as ImageSource};
use source::{Version, is_loopback, is_port_fit};
use tokio::time::Instant;
use tokio_util::bytes::Bytes;
pub(super) use upload::Sent;

use super::{ImportError, blob::digest_of, for_people, part::Part};
use crate::outbound::{NotPublic, Targets};

const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// From one host to the next, for one answer: the registry's own, that of its content, and one more.
const REDIRECTS_MAX: usize = 5;
/// A manifest, or an image's configuration.
pub(super) const DOCUMENT_BYTES_MAX: u64 = 4 << 20;
/// As much as this of a blob, and those that fail to bring it are forgiven.
const PROGRESS_BYTES: u64 = 1 << 20;
/// What is held of a blob until it is written.
const CHUNK_BYTES: usize = 1 << 20;

/// What every registry may answer with where a manifest is asked for.
const MANIFESTS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json";
const ANYTHING: &str = "*/*";

/// What an operator decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The only registries that are asked; empty: any.
    pub hosts: Vec<HostRule>,
    /// Who is asked first.
    pub mirrors: Vec<Mirror>,
    /// Networks that are not public and in which registries may be all the same.
    pub allowed: Vec<IpNet>,
    /// Authorities that may vouch for registries beside the system's, in PEM.
    pub ca_file: Option<PathBuf>,
    /// What the passwords that tenants keep for registries are sealed with.
    pub key_file: PathBuf,
    /// How long a registry may bring nothing.
    pub stall: Duration,
}

/// Who pulls, to the registry.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Credentials {
    pub username: String,
    pub password: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Credentials")
    }
}

/// The registries that this node may ask.
#[derive(Debug)]
pub(super) struct Registries {
    hosts: Vec<HostRule>,
    mirrors: Vec<Mirror>,
    targets: Targets,
    client: Client,
    stall: Duration,
}

/// One image's registry, and what it knows us by.
#[derive(Debug)]
pub(super) struct Session<'a> {
    registries: &'a Registries,
    source: &'a Source,
    credentials: Option<&'a Credentials>,
    /// `https`, but for a registry on this machine that speaks none.
    base: Url,
    attempts_max: u32,
    /// What it is to let us do, as its issuer of tokens calls that.
    access: &'static str,
    authorization: Mutex<Option<HeaderValue>>,
}

/// A small blob as it came.
#[derive(Debug)]
pub(super) struct Fetched {
    pub(super) digest: Sha256Digest,
    pub(super) bytes: Vec<u8>,
    /// Without parameters.
    pub(super) content_type: String,
}

impl Registries {
    pub(super) fn new(settings: &Settings) -> anyhow::Result<Self> {
        let targets = Targets::new(settings.allowed.clone(), false);
        let mut authorities = Vec::new();
        if let Some(path) = &settings.ca_file {
            let shown = || format!("registry-ca-file: the certificates in {}", path.display());
            let pem = std::fs::read(path).with_context(shown)?;
            authorities = Certificate::from_pem_bundle(&pem).with_context(shown)?;
        }
        let builder = || {
            Client::builder()
                .dns_resolver(targets.clone())
                // The environment's proxy would connect for us, to wherever it is told.
                .no_proxy()
                .redirect(redirect::Policy::none())
                .referer(false)
                .http1_only()
                .http1_max_headers(128)
                .connect_timeout(CONNECT_DEADLINE.min(settings.stall))
                .user_agent(concat!("mayfly/", env!("CARGO_PKG_VERSION")))
        };
        let client = builder().tls_certs_merge(authorities.clone()).build().or_else(|error| {
            // A machine without any is no reason not to serve.
            tracing::warn!(%error, "the system's authorities cannot be read: no image can be pulled by https that they vouch for");
            builder().tls_certs_only(authorities).build()
        });
        let client = client.context("a client for registries")?;
        Ok(Self { hosts: settings.hosts.clone(), mirrors: settings.mirrors.clone(), targets, client, stall: settings.stall })
    }

    /// Whether this one may be asked. The error says why not.
    pub(super) fn check(&self, source: &Source) -> Result<(), String> {
        if !self.hosts.is_empty() && !self.hosts.iter().any(|rule| rule.permits(source)) {
            return Err(format!("images from {} are not for this service: its operator names other registries", source.registry()));
        }
        self.targets.check_literal(source.url()).map_err(|error| error.to_string())
    }

    /// Where the same image may be, too.
    pub(super) fn mirror_of(&self, source: &Source) -> Option<Source> {
        self.mirrors.iter().find_map(|mirror| mirror.of(source))
    }

    /// Begins to speak with a mirror, which is told nothing of who asks, and not waited for as long.
    pub(super) async fn begin_at_mirror<'a>(&'a self, mirror: &'a Source) -> Session<'a> {
        Session { attempts_max: MIRROR_ATTEMPTS_MAX, ..self.begin(mirror, None).await }
    }

    /// Begins to speak with the registry that an image is to be brought to.
    pub(super) async fn begin_to_push<'a>(&'a self, target: &'a Source, credentials: Option<&'a Credentials>) -> Session<'a> {
        Session { access: "pull,push", ..self.begin(target, credentials).await }
    }

    /// Begins to speak with the registry of an image.
    pub(super) async fn begin<'a>(&'a self, source: &'a Source, credentials: Option<&'a Credentials>) -> Session<'a> {
        let mut base = source.url().clone();
        // Nobody listens between us and this machine. Whoever speaks TLS there is spoken to so all the same.
        if is_loopback(&base) {
            let asked = self.client.get(version_url(&base)).send();
            if matches!(tokio::time::timeout(self.stall, asked).await, Ok(Err(error)) if error.is_connect()) {
                base.set_scheme("http").expect("both schemes are a URL's special ones");
            }
        }
        Session { registries: self, source, credentials, base, attempts_max: ATTEMPTS_MAX, access: "pull", authorization: Mutex::default() }
    }

    /// Whether we go there: to a host that may be public, by what nobody can listen to.
    fn check_url(&self, url: &Url) -> Result<(), String> {
        let is_safe = url.scheme() == "https" || url.scheme() == "http" && is_loopback(url);
        if !is_safe || !is_port_fit(url) {
            return Err("it leads to where images are not fetched from: by https, at port 80, 443, or 1024 and more".to_owned());
        }
        self.targets.check_literal(url).map_err(|error| error.to_string())
    }
}

fn version_url(base: &Url) -> Url {
    base.join("v2/").expect("a path without a scheme is one below")
}

impl Session<'_> {
    /// What the image's reference names: a manifest, or an index of such.
    pub(super) async fn manifest(&self) -> Result<Fetched, ImportError> {
        match self.source.version() {
            Version::Tag(tag) => self.document(&format!("manifests/{tag}"), MANIFESTS, None).await,
            Version::Digest(digest) => self.manifest_of(digest).await,
        }
    }

    /// One that an index names.
    pub(super) async fn manifest_of(&self, digest: &Sha256Digest) -> Result<Fetched, ImportError> {
        self.document(&format!("manifests/sha256:{digest}"), MANIFESTS, Some(digest)).await
    }

    /// A small blob.
    pub(super) async fn small_blob(&self, digest: &Sha256Digest) -> Result<Fetched, ImportError> {
        self.document(&format!("blobs/sha256:{digest}"), ANYTHING, Some(digest)).await
    }

    async fn document(&self, path: &str, accept: &str, digest: Option<&Sha256Digest>) -> Result<Fetched, ImportError> {
        let mut patience = Patience::new(self.attempts_max);
        loop {
            let fetched = self.get(path, accept, 0).and_then(|response| self.whole(response)).await;
            let fetched = match fetched {
                Ok(fetched) => fetched,
                Err(trouble) => {
                    self.bear(&mut patience, trouble).await?;
                    continue;
                }
            };
            return match digest {
                Some(digest) if fetched.digest != *digest => Err(self.failed(&wrong_digest(digest, &fetched.digest))),
                Some(_) | None => Ok(fetched),
            };
        }
    }

    async fn whole(&self, mut response: Response) -> Result<Fetched, Trouble> {
        let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
        let content_type = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
        let (mut bytes, mut pace) = (Vec::new(), Pace::new(self.registries.stall));
        while let Some(chunk) = self.chunk(&mut response, &mut pace).await? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
                return Err(Trouble::lasting(format!("sent a document of more than {DOCUMENT_BYTES_MAX} bytes")));
            }
        }
        Ok(Fetched { digest: digest_of(&bytes), bytes, content_type })
    }

    /// Fills the part with the blob of this digest, checked, and tells how far it came. What was broken off is gone on with.
    pub(super) async fn blob(&self, digest: &Sha256Digest, part: &mut Part, mut tell: impl FnMut(u64)) -> Result<(), ImportError> {
        let mut patience = Patience::new(self.attempts_max);
        let path = format!("blobs/sha256:{digest}");
        tell(part.done());
        // What is here of an attempt before may have suffered on the disk: that is no fault of the registry's.
        let mut is_of_before = part.done() > 0;
        loop {
            if part.left() == 0 {
                if part.digest() == *digest {
                    return Ok(());
                }
                if !is_of_before {
                    break;
                }
                is_of_before = false;
                part.begin_again().map_err(ImportError::Internal)?;
            }
            let before = part.done();
            if let Err(trouble) = self.rest_of_blob(&path, part, &mut tell).await {
                if part.done() >= before + PROGRESS_BYTES {
                    patience = Patience::new(self.attempts_max);
                }
                self.bear(&mut patience, trouble).await?;
            }
        }
        let found = part.digest();
        part.begin_again().map_err(ImportError::Internal)?;
        Err(self.failed(&wrong_digest(digest, &found)))
    }

    async fn rest_of_blob(&self, path: &str, part: &mut Part, tell: &mut impl FnMut(u64)) -> Result<(), Trouble> {
        let mut answer = self.get(path, ANYTHING, part.done()).await;
        // What is here may be of another answer than what is there now.
        if matches!(answer, Err(Trouble::OutOfRange)) {
            part.begin_again()?;
            tell(0);
            answer = self.get(path, ANYTHING, 0).await;
        }
        let mut response = answer?;
        if !goes_on(&response, part.done()) {
            part.begin_again()?;
            tell(0);
        }
        if response.content_length().is_some_and(|bytes| bytes != part.left()) {
            return Err(Trouble::lasting(wrong_size(part)));
        }
        let (mut held, mut pace) = (Vec::new(), Pace::new(self.registries.stall));
        let ended = loop {
            match self.chunk(&mut response, &mut pace).await {
                Ok(Some(chunk)) => held.extend_from_slice(&chunk),
                Ok(None) => break Ok(()),
                Err(trouble) => break Err(trouble),
            }
            if held.len() as u64 > part.left() {
                return Err(Trouble::lasting(wrong_size(part)));
            }
            if held.len() >= CHUNK_BYTES {
                part.write(std::mem::take(&mut held)).await?;
                tell(part.done());
            }
        };
        // What came before it broke off need not come again.
        part.write(held).await?;
        tell(part.done());
        ended?;
        if part.left() > 0 { Err(Trouble::passing(format!("broke off {} bytes before the end", part.left()))) } else { Ok(()) }
    }

    async fn chunk(&self, response: &mut Response, pace: &mut Pace) -> Result<Option<Bytes>, Trouble> {
        let asked_at = Instant::now();
        let Ok(chunk) = tokio::time::timeout(self.registries.stall, response.chunk()).await else { return Err(self.stalled()) };
        let chunk = chunk.map_err(|error| reason(&error))?;
        match &chunk {
            Some(bytes) if !pace.suffices(bytes.len(), asked_at.elapsed()) => {
                Err(Trouble::passing("brings too little by little".to_owned()))
            }
            Some(_) | None => Ok(chunk),
        }
    }

    /// Where something of this repository is.
    fn url(&self, path: &str) -> Result<Url, Trouble> {
        let path = format!("v2/{}/{path}", self.source.repository());
        self.base.join(&path).map_err(|error| Trouble::lasting(format!("cannot be asked for {path}: {error}")))
    }

    /// The head of a good answer about something of this repository, from this byte on.
    async fn get(&self, path: &str, accept: &str, from: u64) -> Result<Response, Trouble> {
        self.ask(Method::GET, path, accept, from).await
    }

    /// The same by any method that sends nothing.
    async fn ask(&self, method: Method, path: &str, accept: &str, from: u64) -> Result<Response, Trouble> {
        let mut url = self.url(path)?;
        let mut has_logged_in = false;
        for _ in 0..REDIRECTS_MAX {
            self.registries.check_url(&url).map_err(Trouble::Refused)?;
            let is_own = url.origin() == self.base.origin();
            let mut request = self.registries.client.request(method.clone(), url.clone()).header(ACCEPT, accept);
            if method == Method::POST {
                request = request.header(CONTENT_LENGTH, 0);
            }
            if from > 0 {
                request = request.header(RANGE, format!("bytes={from}-"));
            }
            // Nobody else is told (CVE-2020-15157).
            if is_own && let Some(authorization) = self.authorization() {
                request = request.header(AUTHORIZATION, authorization);
            }
            let response = self.send(request).await?;
            match response.status() {
                StatusCode::OK | StatusCode::PARTIAL_CONTENT | StatusCode::ACCEPTED => return Ok(response),
                // Where it is, it is; who may ask there how large it is, is another question.
                status if method == Method::HEAD && status.is_redirection() => return Ok(response),
                StatusCode::UNAUTHORIZED if is_own && !has_logged_in => {
                    has_logged_in = true;
                    self.log_in(response.headers()).await?;
                }
                status if status.is_redirection() => url = target(&url, &response)?,
                // The key in an address of somebody's storage may have expired: the registry gives another.
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if !is_own => {
                    return Err(Trouble::passing("sent us to where we were refused".to_owned()));
                }
                // Some answer so where there is no such repository, too, Docker's own for one.
                status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                    let repository = self.source.repository();
                    return Err(Trouble::Denied(format!(
                        "has no {repository}, or not for these credentials: it answered {}",
                        status.as_u16()
                    )));
                }
                StatusCode::NOT_FOUND => return Err(Trouble::NotFound),
                StatusCode::RANGE_NOT_SATISFIABLE if from > 0 => return Err(Trouble::OutOfRange),
                status => return Err(Trouble::of_status(status, retry_after(response.headers()))),
            }
        }
        Err(Trouble::lasting("sent us on and on".to_owned()))
    }

    /// The head of whatever answer.
    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Response, Trouble> {
        match tokio::time::timeout(self.registries.stall, request.send()).await {
            Ok(answered) => answered.map_err(|error| reason(&error)),
            Err(_stalled) => Err(self.stalled()),
        }
    }

    fn stalled(&self) -> Trouble {
        Trouble::passing(format!("brought nothing for {} s", self.registries.stall.as_secs()))
    }

    /// Waits for the next attempt, or gives up.
    async fn bear(&self, patience: &mut Patience, trouble: Trouble) -> Result<(), ImportError> {
        let why = match trouble {
            Trouble::Passing { why, after } => match patience.pause(after) {
                Some(pause) => {
                    tracing::debug!(registry = self.source.registry(), why, "a registry is asked again");
                    tokio::time::sleep(pause).await;
                    return Ok(());
                }
                None => why,
            },
            Trouble::Lasting(why) => why,
            Trouble::OutOfRange => "does not go on in the middle".to_owned(),
            Trouble::Denied(why) => return Err(ImportError::RegistryDenied(self.said(&why))),
            Trouble::Refused(why) => return Err(ImportError::invalid(&format!("{}: {why}", self.source.registry()))),
            Trouble::NotFound => {
                return Err(ImportError::NotAtRegistry(format!("{} at {}", self.source.repository(), self.source.registry())));
            }
            Trouble::Host(error) => return Err(ImportError::of_host(error)),
        };
        Err(self.failed(&why))
    }

    fn failed(&self, why: &str) -> ImportError {
        ImportError::RegistryFailed(self.said(why))
    }

    fn said(&self, why: &str) -> String {
        // A certificate, for one, may have said it.
        format!("the registry {} {}", self.source.registry(), for_people(why))
    }
}

fn wrong_digest(wanted: &Sha256Digest, found: &Sha256Digest) -> String {
    format!("sent other content for sha256:{wanted}: its digest is sha256:{found}")
}

fn wrong_size(part: &Part) -> String {
    format!("sent a blob that has not the {} bytes that its manifest says", part.bytes())
}

/// Whether the answer begins where we were, rather than at the beginning.
fn goes_on(response: &Response, from: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    response.status() == StatusCode::PARTIAL_CONTENT
        && range.strip_prefix("bytes ").is_some_and(|range| range.starts_with(&format!("{from}-")))
}

fn target(from: &Url, response: &Response) -> Result<Url, Trouble> {
    let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    let location = location.ok_or_else(|| Trouble::lasting(format!("answered {} without a target", response.status().as_u16())))?;
    from.join(location).map_err(|_| Trouble::lasting("sent us to what is no URL".to_owned()))
}

/// The innermost cause, which names neither our resolver nor an address.
fn reason(error: &reqwest::Error) -> Trouble {
    let mut cause = error.source();
    let mut innermost = None;
    while let Some(inner) = cause {
        if inner.is::<NotPublic>() {
            return Trouble::Refused(NotPublic.to_string());
        }
        innermost = Some(inner.to_string());
        cause = inner.source();
    }
    let what = if error.is_connect() { "cannot be reached" } else { "broke off" };
    Trouble::passing(innermost.map_or_else(|| what.to_owned(), |inner| format!("{what}: {inner}")))
}
