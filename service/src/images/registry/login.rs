//! How a registry comes to know us: by name and password, or by a token that it has us fetch (distribution's `spec/auth`).

use std::sync::PoisonError;

use reqwest::{
    StatusCode, Url,
    header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE},
};
use serde::Deserialize;

use super::{
    Credentials, Session,
    patience::{Pace, Trouble, retry_after},
};

const TOKEN_BYTES_MAX: usize = 256 * 1024;

/// What a registry wants to hear.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String> },
}

/// One of the two names has it.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Session<'_> {
    /// What is sent to the registry, and to nobody else.
    pub(super) fn authorization(&self) -> Option<HeaderValue> {
        self.authorization.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Does what the registry asks for in its 401.
    pub(super) async fn log_in(&self, headers: &HeaderMap) -> Result<(), Trouble> {
        let credentials = self.credentials;
        let text = match (challenge(headers), credentials) {
            (Some(Challenge::Bearer { realm, service }), _) => format!("Bearer {}", self.token(&realm, service.as_deref()).await?),
            (Some(Challenge::Basic), Some(credentials)) => basic(credentials),
            (Some(Challenge::Basic), None) => return Err(Trouble::Denied("wants credentials".to_owned())),
            (None, _) => return Err(Trouble::Denied("answered 401, and not what it wants to hear".to_owned())),
        };
        let mut value = HeaderValue::try_from(text).map_err(|_| Trouble::lasting("gave us a token that fits no header".to_owned()))?;
        value.set_sensitive(true);
        *self.authorization.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
        Ok(())
    }

    async fn token(&self, realm: &str, service: Option<&str>) -> Result<String, Trouble> {
        let mut url: Url = realm.parse().map_err(|_| Trouble::lasting("names no URL to fetch a token from".to_owned()))?;
        self.registries.check_url(&url).map_err(Trouble::Refused)?;
        let scope = format!("repository:{}:{}", self.source.repository(), self.access);
        url.query_pairs_mut().extend_pairs(service.map(|service| ("service", service))).append_pair("scope", &scope);
        let mut request = self.registries.client.get(url);
        if let Some(Credentials { username, password }) = self.credentials {
            request = request.basic_auth(username, Some(password));
        }
        let mut response = self.send(request).await?;
        match response.status() {
            StatusCode::OK => {}
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                return Err(Trouble::Denied(format!("gives no token: answered {}", status.as_u16())));
            }
            status => return Err(Trouble::of_status(status, retry_after(response.headers()))),
        }
        let (mut bytes, mut pace) = (Vec::new(), Pace::new(self.registries.stall));
        while let Some(chunk) = self.chunk(&mut response, &mut pace).await? {
            bytes.extend_from_slice(&chunk);
            if bytes.len() > TOKEN_BYTES_MAX {
                return Err(Trouble::lasting(format!("sent a token of more than {TOKEN_BYTES_MAX} bytes")));
            }
        }
        let token: Option<Token> = serde_json::from_slice(&bytes).ok();
        token.and_then(|token| token.token.or(token.access_token)).ok_or_else(|| Trouble::lasting("gave us no token".to_owned()))
    }
}

fn basic(credentials: &Credentials) -> String {
    let Credentials { username, password } = credentials;
    let pair = format!("{username}:{password}");
    format!("Basic {}", base64::Engine::encode(&base64::prelude::BASE64_STANDARD, pair))
}

/// The best that we can answer: a token rather than the password itself.
fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let mut best = None;
    for value in headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()) {
        for challenge in http_auth::parse_challenges(value).ok().into_iter().flatten() {
            let parameter = |wanted: &str| {
                let found = challenge.params.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
                found.map(|(_, value)| value.to_unescaped())
            };
            if challenge.scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = parameter("realm")
            {
                return Some(Challenge::Bearer { realm, service: parameter("service") });
            }
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                best = Some(Challenge::Basic);
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(values: &[&'static str]) -> Option<Challenge> {
        challenge(&values.iter().map(|value| (WWW_AUTHENTICATE, HeaderValue::from_static(value))).collect())
    }

    #[test]
    fn a_token_goes_before_a_password() {
        let token = Challenge::Bearer { realm: "https://auth.example/token".to_owned(), service: Some("a, b".to_owned()) };
        let bearer = r#"Bearer realm="https://auth.example/token",service="a, b",scope="repository:x:pull""#;
        assert_eq!(wanted(&[r#"Basic realm="a""#, bearer]), Some(token));
        assert_eq!(wanted(&[r#"Basic realm="a""#]), Some(Challenge::Basic));
        assert_eq!(wanted(&["Digest realm=\"a\""]), None);
        assert_eq!(wanted(&[]), None);
    }

    #[test]
    fn no_debug_print_shows_a_password() {
        let credentials = Credentials { username: "me".to_owned(), password: "correct horse".to_owned() };
        assert!(!format!("{credentials:?}").contains("horse"));
        assert_eq!(basic(&credentials), "Basic bWU6Y29ycmVjdCBob3JzZQ==");
    }
}
