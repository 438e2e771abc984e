//! Where an image is: a reference as people write it, taken apart.

use std::net::IpAddr;

use oci_spec::image::Sha256Digest;
use reqwest::Url;

/// The registry that is meant where none is named, and the host that serves it.
const USUAL_REGISTRY: &str = "docker.io";
const USUAL_HOST: &str = "registry-1.docker.io";
/// What the specification of distribution has: 255 with the host, and 128.
const REPOSITORY_BYTES_MAX: usize = 255;
const TAG_BYTES_MAX: usize = 128;

/// An image at a registry.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    /// As an operator allows it: [`USUAL_REGISTRY`], or host and port.
    registry: String,
    /// Of the host that is asked, without a path.
    url: Url,
    repository: String,
    version: Version,
}

/// Which of a repository's images.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Version {
    Tag(String),
    Digest(Sha256Digest),
}

/// A registry that may be asked, as in `registry.example`, `*.example` or `registry.example:5000`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRule {
    /// Without a `*.` before it.
    name: String,
    is_suffix: bool,
    /// `None`: any.
    port: Option<u16>,
}

/// Who is asked before a registry, as in `registry.example=mirror.example:5000`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    of: HostRule,
    registry: String,
    url: Url,
}

impl Mirror {
    /// The same image at this mirror, if it is one of its registry.
    pub(super) fn of(&self, source: &Source) -> Option<Source> {
        self.of.permits(source).then(|| Source { registry: self.registry.clone(), url: self.url.clone(), ..source.clone() })
    }
}

impl std::str::FromStr for Mirror {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (of, host) = text.split_once('=').ok_or_else(|| format!("{text:?} is not REGISTRY=MIRROR"))?;
        let url = url_of(host)?;
        Ok(Self { of: of.parse()?, registry: name_of(&url), url })
    }
}

impl Source {
    /// Takes `[REGISTRY/]REPOSITORY[:TAG][@sha256:DIGEST]` apart; a digest goes before a tag. The error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest)),
            None => (text, None),
        };
        let (registry, path) = match name.split_once('/') {
            Some((first, rest)) if is_registry(first) => (first, rest),
            Some(_) | None => (USUAL_REGISTRY, name),
        };
        let (repository, tag) = match path.rsplit_once(':') {
            Some((repository, tag)) => (repository, tag),
            None => (path, "latest"),
        };
        if !is_tag(tag) {
            return Err(format!("a tag is 1 to {TAG_BYTES_MAX} letters, digits and ._-, beginning with none of the last two"));
        }
        let version = match digest {
            Some(digest) => {
                let digest = digest.strip_prefix("sha256:").and_then(|hex| hex.parse().ok());
                Version::Digest(digest.ok_or("a digest is sha256: and 64 hexadecimal digits")?)
            }
            None => Version::Tag(tag.to_owned()),
        };
        let (registry, url) = registry_of(registry)?;
        let repository =
            if registry == USUAL_REGISTRY && !repository.contains('/') { format!("library/{repository}") } else { repository.to_owned() };
        if repository.len() > REPOSITORY_BYTES_MAX || !repository.split('/').all(is_component) {
            return Err(format!(
                "a repository is at most {REPOSITORY_BYTES_MAX} lower-case letters and digits, with ._- between them and / between its parts"
            ));
        }
        Ok(Self { registry, url, repository, version })
    }

    /// The whole of it in one form, whatever was left out.
    pub(in crate::images) fn name(&self) -> String {
        let Self { registry, repository, .. } = self;
        match &self.version {
            Version::Tag(tag) => format!("{registry}/{repository}:{tag}"),
            Version::Digest(digest) => format!("{registry}/{repository}@sha256:{digest}"),
        }
    }

    /// The registry's host and port.
    pub(super) const fn url(&self) -> &Url {
        &self.url
    }

    /// What people know the registry by.
    pub(in crate::images) fn registry(&self) -> &str {
        &self.registry
    }

    pub(in crate::images) fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, unless it is named by its digest.
    pub fn tag(&self) -> Option<&str> {
        match &self.version {
            Version::Tag(tag) => Some(tag),
            Version::Digest(_) => None,
        }
    }

    pub(super) const fn version(&self) -> &Version {
        &self.version
    }
}

/// A registry by itself, as people know it: all names of one are the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryName(String);

impl RegistryName {
    /// Takes a host, with its port if that is not the usual one. The error says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        // As long as a name of a host may be, with a port (RFC 1035, 2.3.4).
        if text.len() > REPOSITORY_BYTES_MAX || !is_registry(text) {
            return Err(format!("{text:?} is not the name of a registry: its host, as in registry.example:5000"));
        }
        Ok(Self(registry_of(text)?.0))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Whether the first part of an image's name is the registry that it is at.
fn is_registry(text: &str) -> bool {
    text.contains(['.', ':']) || text == "localhost"
}

/// What people know it by, and the host that is asked.
fn registry_of(name: &str) -> Result<(String, Url), String> {
    let url = url_of(name)?;
    let name = name_of(&url);
    if [USUAL_REGISTRY, "index.docker.io", USUAL_HOST].contains(&name.as_str()) {
        return Ok((USUAL_REGISTRY.to_owned(), url_of(USUAL_HOST)?));
    }
    Ok((name, url))
}

/// The one name of it, however it was spelled: the host, and the port unless that is the usual one.
fn name_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// Whether this host is this machine itself, by its very name: nobody can listen on the way.
pub(super) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    host == "localhost" || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

/// Whether connections to this port are a registry's: what listens below 1024 otherwise speaks no HTTP.
pub(super) fn is_port_fit(url: &Url) -> bool {
    matches!(url.port_or_known_default(), Some(80 | 443 | 1024..))
}

fn url_of(host: &str) -> Result<Url, String> {
    let refused = || format!("{host:?} is not the name of a registry");
    // What a URL would take for a path, a query or a name of a user.
    if !host.bytes().all(|b| b.is_ascii_alphanumeric() || b"._:-[]".contains(&b)) {
        return Err(refused());
    }
    let mut url: Url = format!("https://{host}/").parse().map_err(|_| refused())?;
    // With the dot of the root of all names behind it, it is the same host (RFC 1034, 3.1).
    if let Some(bare) = url.host_str().and_then(|host| host.strip_suffix('.')).map(str::to_owned) {
        if bare.ends_with('.') {
            return Err(refused());
        }
        url.set_host(Some(&bare)).map_err(|_| refused())?;
    }
    if !is_port_fit(&url) {
        return Err("a registry's port is 80, 443, or 1024 and more".to_owned());
    }
    Ok(url)
}

fn is_tag(text: &str) -> bool {
    let is_fit = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    (1..=TAG_BYTES_MAX).contains(&text.len()) && !text.starts_with(['.', '-']) && text.bytes().all(is_fit)
}

/// One part of a repository's name: words with `.`, `_`, `__` or dashes between.
fn is_component(text: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ends_in_words = text.bytes().next().is_some_and(is_word) && text.bytes().next_back().is_some_and(is_word);
    let mut between = text.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    ends_in_words && between.all(|part| ["", ".", "_", "__"].contains(&part) || part.bytes().all(|b| b == b'-'))
}

impl HostRule {
    /// Whether it is this one's registry, by what people call it or by the host that is asked.
    pub(super) fn permits(&self, source: &Source) -> bool {
        let (host, port) = (source.url.host_str().unwrap_or_default(), source.url.port_or_known_default());
        let is_named = |host: &str| {
            if self.is_suffix { host.strip_suffix(&self.name).is_some_and(|rest| rest.ends_with('.')) } else { host == self.name }
        };
        let is_usual = source.registry == USUAL_REGISTRY && is_named(USUAL_REGISTRY);
        (is_named(host) || is_usual) && (self.port.is_none() || self.port == port)
    }
}

impl std::str::FromStr for HostRule {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (is_suffix, host) = text.strip_prefix("*.").map_or((false, text), |rest| (true, rest));
        let url = url_of(host).map_err(|error| format!("{text:?}: {error}"))?;
        // The URL forgets a port that is the scheme's own.
        let port = if url.port().is_none() && host.ends_with(":443") { Some(443) } else { url.port() };
        Ok(Self { name: url.host_str().unwrap_or_default().to_owned(), is_suffix, port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken_apart(text: &str) -> (String, String, String) {
        let source = Source::parse(text).unwrap();
        let version = match &source.version {
            Version::Tag(tag) => tag.clone(),
            Version::Digest(digest) => format!("@{digest}"),
        };
        (source.url.to_string(), source.repository, version)
    }

    #[test]
    fn what_names_no_registry_is_at_the_usual_one() {
        let hub = |repository: &str, version: &str| (format!("https://{USUAL_HOST}/"), repository.to_owned(), version.to_owned());
        assert_eq!(taken_apart("python"), hub("library/python", "latest"));
        assert_eq!(taken_apart("python:3.12"), hub("library/python", "3.12"));
        assert_eq!(taken_apart("team/app"), hub("team/app", "latest"));
        assert_eq!(taken_apart("docker.io/python"), hub("library/python", "latest"));
    }

    #[test]
    fn a_registry_is_what_looks_like_a_host() {
        let digest = "a".repeat(64);
        assert_eq!(
            taken_apart(&format!("registry.example:5000/team/app:1@sha256:{digest}")),
            ("https://registry.example:5000/".to_owned(), "team/app".to_owned(), format!("@{digest}"))
        );
        assert_eq!(Source::parse("Registry.Example/app").unwrap().name(), "registry.example/app:latest");
        assert_eq!(Source::parse(&format!("a.example/b:1@sha256:{digest}")).unwrap().name(), format!("a.example/b@sha256:{digest}"));
        assert_eq!(taken_apart("localhost/app").0, "https://localhost/");
        assert_eq!(taken_apart("Registry.Example/app").0, "https://registry.example/");
        // However it is spelled, an address is seen for what it is.
        assert!(is_loopback(Source::parse("0x7f.1/app").unwrap().url()));
        assert!(!is_loopback(Source::parse("localhost.example/app").unwrap().url()));
    }

    #[test]
    fn a_registry_is_named_as_images_at_it_name_it() {
        let name = |text: &str| RegistryName::parse(text).map(|name| name.as_str().to_owned());
        assert_eq!(name("Registry.Example:5000").as_deref(), Ok("registry.example:5000"));
        for same in [USUAL_HOST, "Docker.io", "docker.io:443", "index.docker.io.", "REGISTRY-1.docker.io"] {
            assert_eq!(name(same).as_deref(), Ok(Source::parse("python").unwrap().registry()), "{same}");
            assert_eq!(Source::parse(&format!("{same}/python")).unwrap(), Source::parse("python").unwrap(), "{same}");
        }
        for same in ["Registry.example", "registry.example:443", "registry.example.", "registry.example:", "registry.example.:443"] {
            assert_eq!(name(same).as_deref(), Ok("registry.example"), "{same}");
            assert_eq!(taken_apart(&format!("{same}/a")).0, "https://registry.example/", "{same}");
        }
        assert_eq!(name("0x7f.1:5000").as_deref(), Ok("127.0.0.1:5000"));
        for bad in ["", "python", "a.example/b", "a.example:22", "me@a.example", "https://a.example", "a b.example", ".", "a.example.."] {
            assert!(name(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_could_lead_a_request_elsewhere_is_refused() {
        for bad in [
            "",
            ":1",
            "a/",
            "/a",
            "Python",
            "a//b",
            "a/../b",
            "a/.b",
            "a_.b",
            "a:",
            "a:-1",
            "a.example/b:c/d",
            "a.example:22/b",
            "a.example:x/b",
            "a.example:99999/b",
            "me@a.example/b",
            "a@sha256:abc",
            "a@sha512:abc",
            "a@b@c",
        ] {
            assert!(Source::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_mirror_has_the_same_image_elsewhere() {
        let mirror: Mirror = "docker.io=Mirror.Example:5000".parse().unwrap();
        let there = mirror.of(&Source::parse("python:3").unwrap()).unwrap();
        assert_eq!((there.url.as_str(), there.registry.as_str()), ("https://mirror.example:5000/", "mirror.example:5000"));
        assert_eq!((there.repository.as_str(), &there.version), ("library/python", &Version::Tag("3".to_owned())));
        assert_eq!(mirror.of(&Source::parse("other.example/a").unwrap()), None);
        assert!("mirror.example".parse::<Mirror>().is_err() && "a=b/c".parse::<Mirror>().is_err());
    }

    #[test]
    fn a_rule_permits_its_hosts_and_no_others() {
        let permits = |rule: &str, reference: &str| rule.parse::<HostRule>().unwrap().permits(&Source::parse(reference).unwrap());
        assert!(permits("registry.example", "registry.example/a") && permits("registry.example", "registry.example:5000/a"));
        assert!(permits("registry.example:5000", "registry.example:5000/a") && !permits("registry.example:5000", "registry.example/a"));
        assert!(permits("registry.example:443", "registry.example/a") && !permits("registry.example:443", "registry.example:8443/a"));
        assert!(
            permits("*.example", "a.b.example/a") && !permits("*.example", "badexample.com/a") && !permits("*.example", "notexample/a")
        );
        assert!(permits("docker.io", "python") && !permits("docker.io", "other.example/a"));
        for bad in ["", "*", "https://registry.example", "registry.example/a", "a.example:22"] {
            assert!(bad.parse::<HostRule>().is_err(), "{bad}");
        }
    }
}
