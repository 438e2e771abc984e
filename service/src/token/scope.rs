//! What a token allows.

use std::{fmt, str::FromStr};

/// One thing that a caller may be allowed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Scope {
    Runs = 1,
    SandboxesRead = 1 << 1,
    SandboxesWrite = 1 << 2,
    ImagesRead = 1 << 3,
    ImagesWrite = 1 << 4,
    Volumes = 1 << 5,
    MetricsRead = 1 << 6,
    /// Everything, and what concerns all tenants.
    Admin = 1 << 7,
    Webhooks = 1 << 8,
}

/// A word that is no scope of ours.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no scope: there are runs, sandboxes:read, sandboxes:write, images:read, images:write, volumes, webhooks, metrics:read and admin"
)]
pub struct UnknownScope(String);

/// A set of scopes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scopes(u16);

impl Scope {
    const ALL: [Self; 9] = [
        Self::Runs,
        Self::SandboxesRead,
        Self::SandboxesWrite,
        Self::ImagesRead,
        Self::ImagesWrite,
        Self::Volumes,
        Self::Webhooks,
        Self::MetricsRead,
        Self::Admin,
    ];

    /// As it stands in tokens and errors.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Runs => "runs",
            Self::SandboxesRead => "sandboxes:read",
            Self::SandboxesWrite => "sandboxes:write",
            Self::ImagesRead => "images:read",
            Self::ImagesWrite => "images:write",
            Self::Volumes => "volumes",
            Self::Webhooks => "webhooks",
            Self::MetricsRead => "metrics:read",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Scope {
    type Err = UnknownScope;
    fn from_str(word: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|scope| scope.as_str() == word).ok_or_else(|| UnknownScope(word.to_owned()))
    }
}

impl Scopes {
    /// The scopes among these words. A token may name those of other services too; they mean nothing here.
    pub fn known_in<'a>(words: impl IntoIterator<Item = &'a str>) -> Self {
        words.into_iter().filter_map(|word| word.parse().ok()).collect()
    }

    /// Whether a caller with these may do that: it is in the set, or `admin` is, which implies all.
    pub const fn allow(self, scope: Scope) -> bool {
        self.0 & (scope as u16 | Scope::Admin as u16) != 0
    }
}

impl FromIterator<Scope> for Scopes {
    fn from_iter<T: IntoIterator<Item = Scope>>(scopes: T) -> Self {
        Self(scopes.into_iter().fold(0, |set, scope| set | scope as u16))
    }
}

impl FromStr for Scopes {
    type Err = UnknownScope;
    /// Words with blanks between them. Fails at the first that is no scope.
    fn from_str(words: &str) -> Result<Self, Self::Err> {
        words.split_whitespace().map(str::parse).collect()
    }
}

impl fmt::Display for Scopes {
    /// As it stands in a token: words with one blank between them.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held: Vec<_> = Scope::ALL.into_iter().filter(|scope| self.0 & *scope as u16 != 0).map(Scope::as_str).collect();
        f.write_str(&held.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_allows_itself_and_nothing_else() {
        let scopes: Scopes = "images:read".parse().unwrap();
        assert!(scopes.allow(Scope::ImagesRead));
        assert!(!scopes.allow(Scope::ImagesWrite));
        assert!(!scopes.allow(Scope::Admin));
    }

    #[test]
    fn admin_allows_everything() {
        let scopes: Scopes = "admin".parse().unwrap();
        assert!(Scope::ALL.into_iter().all(|scope| scopes.allow(scope)));
    }

    #[test]
    fn no_scope_allows_nothing() {
        assert!(!Scope::ALL.into_iter().any(|scope| Scopes::default().allow(scope)));
    }

    #[test]
    fn scopes_of_other_services_are_passed_over_in_tokens_and_refused_on_the_command_line() {
        assert_eq!(Scopes::known_in(["openid", "runs"]), "runs".parse().unwrap());
        assert_eq!("openid runs".parse::<Scopes>(), Err(UnknownScope("openid".into())));
    }

    #[test]
    fn a_set_is_written_as_it_is_read() {
        let text = "runs sandboxes:write volumes admin";
        assert_eq!(text.parse::<Scopes>().unwrap().to_string(), text);
    }
}
