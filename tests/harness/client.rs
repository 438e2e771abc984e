//! A client of the API that trusts nothing: each answer is held against the contract before a test sees it.

use std::time::Duration;

use reqwest::{Method, header::HeaderMap};
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};

use crate::{
    contract,
    service::Place,
    stream::{self, Frames, Socket},
    token,
};

/// One tenant's view of a service.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    place: Place,
    token: Option<String>,
}

/// What came back.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub text: String,
    /// `null` if the body is not JSON.
    pub body: Value,
}

impl Answer {
    /// The body, if the status is the expected one; panics with all that came otherwise.
    #[track_caller]
    pub fn expect(self, status: u16) -> Value {
        assert_eq!(self.status, status, "unexpected answer: {}", self.text);
        self.body
    }

    /// Checks that this is the problem with that status and code, and returns it.
    #[track_caller]
    pub fn problem(self, status: u16, code: &str) -> Value {
        assert_eq!((self.status, self.body["code"].as_str()), (status, Some(code)), "unexpected answer: {}", self.text);
        self.body
    }

    /// A header as text, or nothing.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|v| v.to_str().ok()).unwrap_or("")
    }
}

impl Client {
    /// As a tenant that may do all that tenants may.
    #[must_use]
    pub fn of(place: &Place, tenant: &str) -> Self {
        Self::with_scope(place, tenant, token::TENANT_SCOPES)
    }

    /// As a tenant that may do what `scope` says.
    #[must_use]
    pub fn with_scope(place: &Place, tenant: &str, scope: &str) -> Self {
        let token = token::sign(&token::claims(tenant, scope), &place.secret_file());
        Self::with_token(place, Some(token))
    }

    /// As this principal of a tenant, who may do all that tenants may.
    #[must_use]
    pub fn of_principal(place: &Place, tenant: &str, principal: &str) -> Self {
        let mut claims = token::claims(tenant, token::TENANT_SCOPES);
        claims["sub"] = principal.into();
        Self::with_token(place, Some(token::sign(&claims, &place.secret_file())))
    }

    /// As somebody who looks after all tenants.
    #[must_use]
    pub fn admin(place: &Place) -> Self {
        Self::with_scope(place, "operator", "admin")
    }

    /// With exactly this token, or none.
    #[must_use]
    pub fn with_token(place: &Place, token: Option<String>) -> Self {
        let http = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(120)).build().expect("a client without TLS files");
        Self { http, place: place.clone(), token }
    }

    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path), "GET", path).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path), "DELETE", path).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request(Method::POST, path).json(body), "POST", path).await
    }

    pub async fn patch(&self, path: &str, body: &Value) -> Answer {
        self.send(self.request(Method::PATCH, path).json(body), "PATCH", path).await
    }

    /// With a body that need not be JSON.
    pub async fn post_raw(&self, path: &str, content_type: &str, body: impl Into<reqwest::Body>) -> Answer {
        self.send(self.request(Method::POST, path).header("content-type", content_type).body(body), "POST", path).await
    }

    /// A request of the caller's own making, with our token.
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.place.url));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// Sends it and holds the answer against the contract.
    pub async fn send(&self, request: reqwest::RequestBuilder, method: &str, path: &str) -> Answer {
        self.try_send(request, method, path).await.unwrap_or_else(|e| panic!("{method} {path}: {e:?}"))
    }

    /// [`Self::send`] to a service that may die on the way: an answer that came whole is held against the contract all the same.
    ///
    /// # Errors
    /// No whole answer came.
    pub async fn try_send(&self, request: reqwest::RequestBuilder, method: &str, path: &str) -> reqwest::Result<Answer> {
        let response = request.send().await?;
        let status = response.status().as_u16();
        let headers = response.headers().clone();
        let text = response.text().await?;
        if let Err(breach) = contract::check(method, path, status, &headers, &text) {
            panic!("the answer breaks the contract: {breach:#}");
        }
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        Ok(Answer { status, headers, text, body })
    }

    /// [`Self::get`] from a service that may die on the way.
    ///
    /// # Errors
    /// As [`Self::try_send`].
    pub async fn try_get(&self, path: &str) -> reqwest::Result<Answer> {
        self.try_send(self.request(Method::GET, path), "GET", path).await
    }

    /// [`Self::delete`] at a service that may die on the way.
    ///
    /// # Errors
    /// As [`Self::try_send`].
    pub async fn try_delete(&self, path: &str) -> reqwest::Result<Answer> {
        self.try_send(self.request(Method::DELETE, path), "DELETE", path).await
    }

    /// [`Self::post`] to a service that may die on the way.
    ///
    /// # Errors
    /// As [`Self::try_send`].
    pub async fn try_post(&self, path: &str, body: &Value) -> reqwest::Result<Answer> {
        self.try_send(self.request(Method::POST, path).json(body), "POST", path).await
    }

    /// Runs to the end; panics if that is not what happens.
    pub async fn run(&self, request: &Value) -> Value {
        self.post("/v1/runs", request).await.expect(200)
    }

    /// Runs a shell script in the `busybox` image.
    pub async fn shell(&self, script: &str) -> Value {
        self.run(&json!({ "image": "busybox", "command": ["sh", "-c", script] })).await
    }

    /// Asks for a run or sandbox at `path` until `is_it` says yes.
    pub async fn until(&self, path: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
        loop {
            let body = self.get(path).await.expect(200);
            if is_it(&body) {
                return body;
            }
            assert!(tokio::time::Instant::now() < deadline, "waited a minute in vain at {path}: {body:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Opens the log of a sandbox or run as a WebSocket. `query` is what follows the question mark.
    pub async fn follow(&self, id: &str, query: &str) -> Socket {
        let url = format!("{}/v1/sandboxes/{id}/logs?{query}", self.place.url);
        stream::open(&url, self.token.as_deref()).await.unwrap_or_else(|e| panic!("{url}: {e:#}"))
    }

    /// Attaches to `path`, as in `/v1/sandboxes/{id}/attach`.
    pub async fn attach(&self, path: &str) -> Socket {
        let url = format!("{}{path}", self.place.url);
        stream::open(&url, self.token.as_deref()).await.unwrap_or_else(|e| panic!("{url}: {e:#}"))
    }

    /// A connection of one's own over which the head of a GET was sent, with our token and these further lines: for what no client library does.
    pub async fn get_by_hand(&self, path: &str, lines: &str) -> TcpStream {
        let host = self.place.url.trim_start_matches("http://");
        let token = self.token.as_deref().expect("a client with a token");
        let head = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {token}\r\n{lines}\r\n");
        let mut stream = TcpStream::connect(host).await.unwrap_or_else(|e| panic!("{host}: {e}"));
        stream.write_all(head.as_bytes()).await.unwrap_or_else(|e| panic!("{path}: {e}"));
        stream
    }

    /// A long-lived sandbox of the `busybox` image that runs this script.
    pub async fn sandbox(&self, script: &str) -> String {
        let made = self.post("/v1/sandboxes", &json!({ "image": "busybox", "command": ["sh", "-c", script] })).await.expect(201);
        made["id"].as_str().expect("an id").to_owned()
    }

    /// The whole log of a sandbox or run, to its end.
    pub async fn log(&self, id: &str) -> Frames {
        self.follow(id, "from=0").await.collect().await
    }

    /// The token that this client sends.
    #[must_use]
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }
}
