//! The certificate of the API: loaded, and loaded again when its files change.

use std::{
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use anyhow::{Context, ensure};
use tokio::signal::unix::{SignalKind, signal};
use tokio_rustls::{
    TlsAcceptor,
    rustls::{
        ServerConfig,
        crypto::aws_lc_rs,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
        server::{ClientHello, ResolvesServerCert},
        sign::CertifiedKey,
        version::{TLS12, TLS13},
    },
};

use crate::config::TlsFiles;

/// How often the files are looked at. A look is two stats; a notification would miss folders that are swapped by a symlink, as Kubernetes does.
const LOOK_PERIOD: Duration = Duration::from_secs(2);

/// The certificate in force.
#[derive(Debug)]
pub(super) struct Certificate {
    files: TlsFiles,
    current: RwLock<Arc<CertifiedKey>>,
}

/// What tells that a file was written or replaced.
type Mark = [Option<(u64, u64, i64, i64)>; 2];

impl Certificate {
    /// Loads it, and follows its files from then on. What cannot be loaded later leaves the old one in force.
    pub(super) fn follow(files: &TlsFiles) -> anyhow::Result<Arc<Self>> {
        let mark = mark(files);
        let certificate = Arc::new(Self { files: files.clone(), current: RwLock::new(Arc::new(load(files)?)) });
        let mut hangup = signal(SignalKind::hangup()).context("catching SIGHUP")?;
        let followed = Arc::downgrade(&certificate);
        tokio::spawn(async move {
            let mut seen = mark;
            loop {
                let is_told = tokio::select! {
                    _ = hangup.recv() => true,
                    () = tokio::time::sleep(LOOK_PERIOD) => false,
                };
                let Some(certificate) = followed.upgrade() else { return };
                let now = self::mark(&certificate.files);
                if is_told || now != seen {
                    seen = now;
                    certificate.renew();
                }
            }
        });
        Ok(certificate)
    }

    /// What accepts connections with it: TLS 1.2 and 1.3, HTTP/1.1.
    pub(super) fn acceptor(self: &Arc<Self>) -> anyhow::Result<TlsAcceptor> {
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&TLS13, &TLS12])?
            .with_no_client_auth()
            .with_cert_resolver(Arc::clone(self) as Arc<dyn ResolvesServerCert>);
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }

    fn renew(&self) {
        match load(&self.files) {
            Ok(loaded) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(loaded);
                tracing::info!("the certificate was read again");
            }
            // Between the writing of one file and of the other they do not fit; the next look comes after that.
            Err(error) => tracing::warn!("the certificate stays as it was: {error:#}"),
        }
    }
}

impl ResolvesServerCert for Certificate {
    fn resolve(&self, _client: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn load(files: &TlsFiles) -> anyhow::Result<CertifiedKey> {
    let shown = |path: &Path| format!("{}, which the service's user must be able to read", path.display());
    let chain = CertificateDer::pem_file_iter(&files.cert).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let chain = chain.with_context(|| format!("reading the certificate from {}", shown(&files.cert)))?;
    ensure!(!chain.is_empty(), "{} holds no certificate in PEM", files.cert.display());
    let key = PrivateKeyDer::from_pem_file(&files.key).with_context(|| format!("reading the private key from {}", shown(&files.key)))?;
    CertifiedKey::from_der(chain, key, &aws_lc_rs::default_provider())
        .with_context(|| format!("{} and {}", files.cert.display(), files.key.display()))
}

fn mark(files: &TlsFiles) -> Mark {
    let of = |path: &Path| {
        let meta = std::fs::metadata(path).ok()?;
        Some((meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec()))
    };
    [of(&files.cert), of(&files.key)]
}
