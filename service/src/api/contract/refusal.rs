//! What an operation may refuse beyond what every one may. Named in `responses(…)` of an operation; the texts are in `frame.yaml`.

use std::collections::BTreeMap;

use utoipa::{
    IntoResponses,
    openapi::{Ref, RefOr, Response},
};

macro_rules! refusals {
    ($($(#[doc = $doc:literal])+ $name:ident = $status:literal;)+) => {$(
        $(#[doc = $doc])+
        #[derive(Debug)]
        pub(in crate::api) enum $name {}

        impl IntoResponses for $name {
            fn responses() -> BTreeMap<String, RefOr<Response>> {
                BTreeMap::from([($status.to_owned(), RefOr::Ref(Ref::from_response_name(stringify!($name))))])
            }
        }
    )+};
}

refusals! {
    /// There is no such thing, or it is another tenant's.
    NotFound = "404";
    /// There is no such sandbox, or no such file in it.
    FileNotFound = "404";
    /// Not as things are. A POST may always answer so.
    Conflict = "409";
    /// Beyond what there is of the file.
    RangeNotSatisfiable = "416";
    /// The sandbox's layer is full.
    DiskFull = "507";
    /// The body is larger than allowed: only where it is not the body of the request that is too large.
    PayloadTooLarge = "413";
    /// There is no image of that name, or no volume.
    ImageNotFound = "404";
    /// There is no volume of that name.
    VolumeNotFound = "404";
    /// More than the tenant or the principal may have.
    QuotaExceeded = "429";
    /// Not now: only where no token is asked for, since all others may answer so.
    Unavailable = "503";
}
