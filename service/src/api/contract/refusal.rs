//! What an operation may refuse, code by code. Named in `responses(…)` of an operation what not every one of its kind refuses; `contract/finish.rs` names
//! the others, and `contract/answers.rs` lays them together, status by status.
//!
//! What is told of each comes from the error itself: its status, its code, its headers and its examples.

use std::collections::BTreeMap;

use sandbox_core::tree::{Fault, FaultKind};
use serde_json::json;
use utoipa::{
    IntoResponses,
    openapi::{Ref, RefOr, Response},
};

use super::super::error::ApiError;
use crate::{
    sandbox::{Exceeded, Invalid, QuotaScope, State, WAIT_MS},
    token::{Scope, TokenError},
};

/// One code with one status.
#[derive(Debug)]
pub(super) struct Refusal {
    /// Under which operations name it.
    pub(super) name: &'static str,
    /// What it means, for callers.
    pub(super) said: &'static str,
    /// As it comes.
    pub(super) errors: Vec<ApiError>,
}

/// What these are called among the answers of an operation, until `contract/answers.rs` puts answers in their place.
fn named(names: &[&str]) -> BTreeMap<String, RefOr<Response>> {
    names.iter().map(|name| ((*name).to_owned(), RefOr::Ref(Ref::from_response_name(*name)))).collect()
}

macro_rules! refusals {
    ($($(#[doc = $doc:literal])+ $name:ident = [$($error:expr),+];)+) => {
        $(
            $(#[doc = $doc])+
            #[derive(Debug)]
            pub(in crate::api) enum $name {}

            impl IntoResponses for $name {
                fn responses() -> BTreeMap<String, RefOr<Response>> {
                    named(&[stringify!($name)])
                }
            }
        )+

        /// All of them, in the order in which an answer tells of those of its status.
        pub(super) fn all() -> Vec<Refusal> {
            vec![$(Refusal { name: stringify!($name), said: concat!($($doc),+), errors: vec![$($error),+] }),+]
        }
    };
}

macro_rules! groups {
    ($($(#[doc = $doc:literal])+ $name:ident = [$($one:ty),+];)+) => {$(
        $(#[doc = $doc])+
        #[derive(Debug)]
        pub(in crate::api) enum $name {}

        impl IntoResponses for $name {
            fn responses() -> BTreeMap<String, RefOr<Response>> {
                let mut all = BTreeMap::new();
                $(all.extend(<$one>::responses());)+
                all
            }
        }
    )+};
}

refusals! {
    /// No token, or none that is valid.
    Unauthenticated = [ApiError::Unauthenticated(None), ApiError::Unauthenticated(Some(TokenError::Unproven))];
    /// The token lacks a scope, which `detail` names.
    Forbidden = [ApiError::Forbidden(Scope::SandboxesWrite)];
    /// The tenant or the principal is suspended.
    Suspended = [ApiError::Suspended];
    /// Tenants must be registered here, and this one is not.
    UnknownTenant = [ApiError::UnknownTenant];
    /// The sandbox's own root may not touch that file.
    FileDenied = [file(FaultKind::Denied, "/proc/1/mem: Permission denied")];
    /// The registry does not give that to these credentials, or to nobody.
    RegistryDenied = [ApiError::RegistryDenied("the registry registry.example wants other credentials for team/app".to_owned())];
    /// There is no such thing, or it is another tenant's.
    NotFound = [ApiError::NotFound];
    /// There is no image of that name.
    ImageNotFound = [ApiError::ImageNotFound("python:4".to_owned())];
    /// There is no volume of that name.
    VolumeNotFound = [ApiError::VolumeNotFound("data".to_owned())];
    /// There is no pool of that name.
    PoolNotFound = [ApiError::PoolNotFound("notebooks".to_owned())];
    /// There is no such file or folder in the sandbox.
    FileNotFound = [file(FaultKind::NotFound, "/work/a: No such file or directory")];
    /// The body came too slowly.
    SlowBody = [ApiError::SlowBody];
    /// What is asked for is not possible as things are, as a name that is taken.
    Conflict = [ApiError::Conflict("the name is taken".to_owned())];
    /// The sandbox is in another state, which `state` tells.
    WrongState = [ApiError::WrongState(State::Paused)];
    /// What the sandbox wrote is not kept any more.
    LayerLost = [ApiError::LayerLost];
    /// There is a pool of that name.
    PoolExists = [ApiError::PoolExists("notebooks".to_owned())];
    /// A sandbox has the volume.
    VolumeInUse = [ApiError::VolumeInUse("the volume data stands in 0190b5a4-5f3e-7000-8000-3c2f5b1f9d10".to_owned())];
    /// The volume is on a node that is away, or on another one than the other volumes or the sandbox's layer.
    VolumeElsewhere = [ApiError::VolumeElsewhere("the volume data is on another node".to_owned())];
    /// There is a file of that name.
    FileExists = [file(FaultKind::Exists, "/work/a: File exists")];
    /// What is there is not a file for that, as a folder where a file is needed.
    FileUnfit = [file(FaultKind::WrongKind, "it is no regular file")];
    /// The `Idempotency-Key` was used for another request.
    KeyReused = [ApiError::KeyReused];
    /// A request with this `Idempotency-Key` is being worked on for longer than this one could wait, or its node is out of reach.
    KeyInUse = [ApiError::KeyInUse];
    /// It must not be done twice and may have been done, by an attempt that was cut off.
    OutcomeUnknown = [ApiError::OutcomeUnknown];
    /// The body is larger than allowed; of what is read, that it is more than is told at once.
    PayloadTooLarge = [ApiError::PayloadTooLarge("the body is larger than 16777216 bytes".to_owned())];
    /// The file has no such part.
    RangeNotSatisfiable = [ApiError::RangeNotSatisfiable(1234)];
    /// The request is malformed, has an unknown field, or a value out of range; `field` and `bound` say which.
    InvalidRequest = [
        ApiError::Invalid(Invalid::new("image", "missing field `image`")),
        ApiError::Invalid(WAIT_MS.check(WAIT_MS.max.saturating_add(1)).err().unwrap_or_else(|| Invalid::new("wait_ms", "out of range")))
    ];
    /// More often than the tenant or the principal may, by the quota `runs_per_minute`. `quota`, `scope`, `limit` and `used` tell which and how much.
    RateLimited = [exceeded("runs_per_minute", 60, Some(7))];
    /// More than the tenant or the principal may have. `quota`, `scope`, `limit` and `used` tell which and how much. What will never do with this quota is not `retryable`,
    /// and has none of the headers. Days are those of UTC.
    QuotaExceeded = [exceeded("runs_per_day", 10_000, Some(3600)), exceeded("largest_memory_bytes", 1 << 30, None)];
    /// Something went wrong on our side.
    Internal = [ApiError::Internal(anyhow::anyhow!("never told"))];
    /// The registry cannot be reached, or does not send what it promised.
    RegistryFailed = [ApiError::RegistryFailed("the registry registry.example cannot be reached".to_owned())];
    /// Not now, or never: `retryable` tells the two cases apart. False, and no `Retry-After`, for what is larger than the node; true while the node is busy: as many wait as may, the request was not
    /// to wait, or answers with output that nobody has read yet take all the memory that is set aside for them.
    NoCapacity = [
        ApiError::Busy("there is no room now, and as many wait as may".to_owned()),
        ApiError::NoCapacity("the node has 4000 cpu_millis in all".to_owned())
    ];
    /// The database is not available now.
    DatabaseUnavailable = [ApiError::DatabaseUnavailable];
    /// The keeper of the node that it is on is not available; or it is on another node, and this one reaches no others.
    KeeperUnavailable = [ApiError::KeeperUnavailable];
    /// What is asked for is on another node, of which no answer came: it is out of reach, or died meanwhile. What changes something may have been done, or not: with an `Idempotency-Key` it is not
    /// done twice.
    NodeUnavailable = [ApiError::NodeUnavailable];
    /// The request took too long.
    Timeout = [ApiError::Timeout];
    /// The sandbox's writable layer has no room or no inodes left.
    DiskFull = [file(FaultKind::Full, "/work/a: No space left on device")];
}

groups! {
    /// Of what needs a node.
    OnNode = [NoCapacity, KeeperUnavailable];
    /// Of what is done to a sandbox that lives.
    OfLife = [NotFound, WrongState, Conflict, OnNode];
    /// Of what makes a sandbox or a run.
    OfCreation = [NotFound, ImageNotFound, VolumeNotFound, VolumeElsewhere, RateLimited, QuotaExceeded, OnNode];
    /// Of what asks a registry.
    OfRegistries = [ImageNotFound, RegistryDenied, RegistryFailed, Conflict];
    /// Of whatever looks at the files in a sandbox.
    OfFiles = [OfLife, FileDenied, FileNotFound, FileUnfit, PayloadTooLarge];
    /// Of whatever changes the files in a sandbox.
    OfChange = [OfFiles, FileExists, DiskFull];
}

fn file(kind: FaultKind, message: &str) -> ApiError {
    ApiError::File(Fault { kind, message: message.to_owned() })
}

fn exceeded(quota: &str, limit: u64, retry_after_s: Option<u64>) -> ApiError {
    let used = if retry_after_s.is_some() { limit } else { limit.saturating_mul(2) };
    let exceeded = Exceeded { scope: QuotaScope::Tenant, quota: quota.to_owned(), limit: json!(limit), used: json!(used), retry_after_s };
    ApiError::QuotaExceeded(Box::new(exceeded))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_examples_of_a_refusal_have_one_status_and_one_code() {
        for refusal in all() {
            let told = |error: &ApiError| {
                let problem = serde_json::to_value(error.told(String::new())).unwrap();
                (problem["status"].clone(), problem["code"].clone())
            };
            let first = told(&refusal.errors[0]);
            assert!(refusal.errors.iter().all(|error| told(error) == first), "{refusal:?}");
        }
    }
}
