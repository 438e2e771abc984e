//! A registry of our own that serves one image as it should, but for what its manner says of the image's largest layer.

use std::{
    fs,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinHandle,
    time::Instant,
};

/// One request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) path: String,
    pub(crate) headers: String,
    pub(crate) at: Instant,
}

impl Asked {
    /// The value of a header, or nothing.
    pub(crate) fn header(&self, name: &str) -> &str {
        let found = self.headers.lines().find_map(|line| line.split_once(": ").filter(|(known, _)| known.eq_ignore_ascii_case(name)));
        found.map_or("", |(_, value)| value)
    }
}

/// How it answers whoever asks for the largest layer.
#[derive(Debug, Clone)]
pub(crate) enum Manner {
    Honest,
    /// The first so many times with this head.
    Answers(usize, &'static str),
    /// The first time with half of it; then nothing comes.
    Stalls,
    /// The first time with half of it; then the connection is reset.
    Resets,
    /// The first time with half of it and a reset; then, whatever is asked for, with all of it.
    StartsOver,
    /// The first time with half of it and a reset; then with all of it, but from no middle on.
    RefusesRanges,
    /// With as many other bytes.
    OtherContent,
    /// With less, and a head that says so.
    Shorter,
    /// Without a length, and without an end.
    Endless,
    /// From elsewhere.
    Redirects(String),
    /// After it was told to.
    Waits(Arc<Notify>),
    /// From this storage; that and all else only for who has fetched a token with this name and password.
    WantsToken {
        basic: &'static str,
        storage: String,
    },
    /// Like all else with 401, also to who has fetched a token from it.
    KnowsNobody,
    /// Like all else, with a page for people.
    Page,
    /// Like all else, only for who fetches a token from there.
    SendsForToken(&'static str),
}

/// A server on 127.0.0.1, by plain HTTP.
pub(crate) struct Liar {
    pub(crate) address: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    served: JoinHandle<()>,
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.served.abort();
    }
}

/// What it has.
struct Content {
    manner: Manner,
    address: String,
    manifest: Vec<u8>,
    manifest_type: String,
    blobs: std::path::PathBuf,
    largest: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Liar {
    /// Serves the one image of a layout folder as `app`, under any tag.
    pub(crate) async fn start(layout: &Path, manner: Manner) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
        let blobs = layout.join("blobs/sha256");
        let hex = |descriptor: &Value| descriptor["digest"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
        let manifest = fs::read(blobs.join(hex(&index["manifests"][0]))).unwrap();
        let parsed: Value = serde_json::from_slice(&manifest).unwrap();
        let largest = parsed["layers"].as_array().unwrap().iter().max_by_key(|layer| layer["size"].as_u64()).map(hex).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let content = Arc::new(Content {
            manner,
            address: address.clone(),
            manifest,
            manifest_type: index["manifests"][0]["mediaType"].as_str().unwrap().to_owned(),
            blobs,
            largest,
            asked: Arc::clone(&asked),
        });
        let served = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let content = Arc::clone(&content);
                tokio::spawn(async move { drop(serve(stream, &content).await) });
            }
        });
        Self { address, asked, served }
    }

    /// Everything that it was asked.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// What it was asked for of its largest layer.
    pub(crate) fn asked_for_layer(&self) -> Vec<Asked> {
        let all = self.asked();
        let is_largest = |asked: &Asked| asked.header("x-is-largest") == "yes";
        all.into_iter().filter(is_largest).collect()
    }
}

/// Answers one request and closes.
async fn serve(mut stream: TcpStream, content: &Content) -> std::io::Result<()> {
    let Some(mut asked) = read(&mut stream).await else { return Ok(()) };
    let path = asked.path.clone();
    let is_largest = path.ends_with(&content.largest);
    if is_largest {
        asked.headers += "\nx-is-largest: yes";
    }
    let number = {
        let mut all = content.asked.lock().unwrap();
        all.push(asked.clone());
        all.iter().filter(|other| other.path == path).count()
    };
    let has_token = asked.header("authorization") == "Bearer right";
    if let Manner::WantsToken { basic, .. } = &content.manner {
        if path.starts_with("/token") {
            let is_right = asked.header("authorization") == format!("Basic {basic}");
            return if is_right {
                whole(stream, "application/json", br#"{"token":"right"}"#).await
            } else {
                head(stream, "401 Unauthorized").await
            };
        }
        if !has_token {
            let challenge =
                format!("401 Unauthorized\r\nwww-authenticate: Bearer realm=\"http://{}/token\",service=\"liar\"", content.address);
            return head(stream, &challenge).await;
        }
    }
    if let Manner::SendsForToken(realm) = &content.manner {
        return head(stream, &format!("401 Unauthorized\r\nwww-authenticate: Bearer realm=\"{realm}\"")).await;
    }
    if matches!(content.manner, Manner::KnowsNobody) {
        if path.starts_with("/token") {
            return whole(stream, "application/json", br#"{"token":"right"}"#).await;
        }
        let challenge = format!("401 Unauthorized\r\nwww-authenticate: Bearer realm=\"http://{}/token\"", content.address);
        return head(stream, &challenge).await;
    }
    if matches!(content.manner, Manner::Page) {
        return whole(stream, "text/html", b"<html>nothing of yours is here</html>").await;
    }
    if path.contains("/manifests/") {
        return whole(stream, &content.manifest_type, &content.manifest).await;
    }
    let blob = path.rsplit_once("sha256:").and_then(|(_, hex)| fs::read(content.blobs.join(hex)).ok());
    let Some(blob) = blob else { return head(stream, "404 Not Found").await };
    if !is_largest {
        return whole(stream, "application/octet-stream", &blob).await;
    }
    match &content.manner {
        Manner::Answers(times, answer) if number <= *times => head(stream, answer).await,
        Manner::Stalls if number == 1 => {
            half(&mut stream, &blob).await?;
            tokio::time::sleep(Duration::from_secs(600)).await;
            Ok(())
        }
        Manner::Resets | Manner::StartsOver | Manner::RefusesRanges if number == 1 => {
            half(&mut stream, &blob).await?;
            // What is on its way is to arrive: a reset overtakes it.
            tokio::time::sleep(Duration::from_millis(300)).await;
            stream.set_zero_linger()
        }
        Manner::RefusesRanges if !asked.header("range").is_empty() => head(stream, "416 Range Not Satisfiable").await,
        Manner::OtherContent => whole(stream, "application/octet-stream", &vec![7; blob.len()]).await,
        Manner::Shorter => whole(stream, "application/octet-stream", &blob[..blob.len() - 1]).await,
        Manner::Endless => {
            stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n").await?;
            while stream.write_all(&blob).await.is_ok() {}
            Ok(())
        }
        Manner::Redirects(target) | Manner::WantsToken { storage: target, .. } => {
            head(stream, &format!("307 Temporary Redirect\r\nlocation: {target}")).await
        }
        Manner::Waits(told) => {
            told.notified().await;
            whole(stream, "application/octet-stream", &blob).await
        }
        Manner::StartsOver | Manner::RefusesRanges => whole(stream, "application/octet-stream", &blob).await,
        Manner::Honest
        | Manner::Answers(..)
        | Manner::Stalls
        | Manner::Resets
        | Manner::SendsForToken(_)
        | Manner::KnowsNobody
        | Manner::Page => rest(stream, &asked, &blob).await,
    }
}

/// As a registry that knows ranges.
async fn rest(mut stream: TcpStream, asked: &Asked, blob: &[u8]) -> std::io::Result<()> {
    let from = asked.header("range").strip_prefix("bytes=").and_then(|range| range.strip_suffix('-')).and_then(|from| from.parse().ok());
    let Some(from) = from else { return whole(stream, "application/octet-stream", blob).await };
    let (part, last, len) = (&blob[from..], blob.len() - 1, blob.len());
    let bytes = part.len();
    let head = format!(
        "HTTP/1.1 206 Partial Content\r\ncontent-length: {bytes}\r\ncontent-range: bytes {from}-{last}/{len}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(part).await?;
    stream.shutdown().await
}

async fn half(stream: &mut TcpStream, blob: &[u8]) -> std::io::Result<()> {
    stream.write_all(format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", blob.len()).as_bytes()).await?;
    stream.write_all(&blob[..blob.len() / 2]).await?;
    stream.flush().await
}

async fn head(mut stream: TcpStream, status: &str) -> std::io::Result<()> {
    stream.write_all(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").as_bytes()).await?;
    stream.shutdown().await
}

async fn whole(mut stream: TcpStream, media_type: &str, body: &[u8]) -> std::io::Result<()> {
    let len = body.len();
    let head = format!("HTTP/1.1 200 OK\r\ncontent-type: {media_type}\r\ncontent-length: {len}\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body).await?;
    stream.shutdown().await
}

/// One head; `None` for what is no HTTP, as the hello of TLS.
async fn read(stream: &mut TcpStream) -> Option<Asked> {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        let byte = stream.read_u8().await.ok()?;
        if bytes.is_empty() && !byte.is_ascii_uppercase() {
            return None;
        }
        bytes.push(byte);
    }
    let text = String::from_utf8(bytes).ok()?;
    let (first, headers) = text.split_once("\r\n")?;
    Some(Asked { path: first.split(' ').nth(1)?.to_owned(), headers: headers.trim_end().to_owned(), at: Instant::now() })
}
