//! Descriptors across an execve of the same process: they stay open under their numbers, and the numbers stand in a description of what they belong to.
//!
//! A field that holds some has `#[serde(with = "crate::handover")]`. [`describe`] writes, [`take_over`] reads. [`try_out`] reads like it in another
//! process, which has none of the descriptors: each is an empty file there.

use std::{
    cell::{Cell, RefCell},
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};

use crate::{sys, transport::Socket};

/// Something that is made of descriptors alone.
pub(crate) trait Descriptors: Sized {
    type Numbers: Serialize + DeserializeOwned;
    fn numbers(&self) -> Self::Numbers;
    fn of(numbers: Self::Numbers) -> io::Result<Self>;
}

thread_local! {
    /// The numbers in the description that is being written.
    static WRITTEN: RefCell<Vec<RawFd>> = const { RefCell::new(Vec::new()) };
    static IS_TRIAL: Cell<bool> = const { Cell::new(false) };
}

/// The description of `state`, and the numbers that must stay open for it.
pub(crate) fn describe(state: &impl Serialize) -> io::Result<(Vec<u8>, Vec<RawFd>)> {
    WRITTEN.take();
    let text = serde_json::to_vec(state).map_err(io::Error::other)?;
    Ok((text, WRITTEN.take()))
}

/// What [`describe`] described. Once in a process: it becomes the owner of the descriptors.
pub(crate) fn take_over<T: DeserializeOwned>(description: &[u8]) -> io::Result<T> {
    IS_TRIAL.set(false);
    serde_json::from_slice(description).map_err(io::Error::other)
}

/// The same, but for the descriptors: to see whether it can be read.
pub(crate) fn try_out<T: DeserializeOwned>(description: &[u8]) -> io::Result<T> {
    IS_TRIAL.set(true);
    serde_json::from_slice(description).map_err(io::Error::other)
}

pub(crate) fn serialize<T: Descriptors, S: Serializer>(descriptors: &T, to: S) -> Result<S::Ok, S::Error> {
    descriptors.numbers().serialize(to)
}

pub(crate) fn deserialize<'de, T: Descriptors, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
    let numbers = T::Numbers::deserialize(from)?;
    T::of(numbers).map_err(serde::de::Error::custom)
}

fn number(descriptor: BorrowedFd<'_>) -> RawFd {
    let number = descriptor.as_raw_fd();
    WRITTEN.with_borrow_mut(|written| written.push(number));
    number
}

impl Descriptors for OwnedFd {
    type Numbers = RawFd;
    fn numbers(&self) -> RawFd {
        number(self.as_fd())
    }
    fn of(number: RawFd) -> io::Result<Self> {
        if IS_TRIAL.get() {
            return File::open("/dev/null").map(Self::from);
        }
        let named = |e: io::Error| io::Error::new(e.kind(), format!("descriptor {number}: {e}"));
        sys::inherited(number).map_err(named)
    }
}

impl Descriptors for File {
    type Numbers = RawFd;
    fn numbers(&self) -> RawFd {
        number(self.as_fd())
    }
    fn of(number: RawFd) -> io::Result<Self> {
        OwnedFd::of(number).map(Self::from)
    }
}

impl Descriptors for Socket {
    type Numbers = RawFd;
    fn numbers(&self) -> RawFd {
        number(self.as_fd())
    }
    fn of(number: RawFd) -> io::Result<Self> {
        OwnedFd::of(number).map(Self::from)
    }
}

impl<T: Descriptors> Descriptors for Option<T> {
    type Numbers = Option<T::Numbers>;
    fn numbers(&self) -> Self::Numbers {
        self.as_ref().map(T::numbers)
    }
    fn of(numbers: Self::Numbers) -> io::Result<Self> {
        numbers.map(T::of).transpose()
    }
}

impl<T: Descriptors> Descriptors for Vec<T> {
    type Numbers = Vec<T::Numbers>;
    fn numbers(&self) -> Self::Numbers {
        self.iter().map(T::numbers).collect()
    }
    fn of(numbers: Self::Numbers) -> io::Result<Self> {
        numbers.into_iter().map(T::of).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Held {
        #[serde(with = "crate::handover")]
        pipe: Option<OwnedFd>,
        #[serde(with = "crate::handover")]
        none: Option<OwnedFd>,
        #[serde(with = "crate::handover")]
        many: Vec<OwnedFd>,
    }

    #[test]
    fn every_descriptor_is_named_and_a_trial_takes_none() {
        let open = || File::open("/proc/self/stat").unwrap().into();
        let held = Held { pipe: Some(open()), none: None, many: vec![open(), open()] };
        let (description, numbers) = describe(&held).unwrap();
        let expected = held.pipe.iter().chain(&held.many).map(AsRawFd::as_raw_fd).collect::<Vec<_>>();
        assert_eq!(numbers, expected);

        let tried: Held = try_out(&description).unwrap();
        let of_trial = tried.pipe.iter().chain(&tried.many).map(AsRawFd::as_raw_fd).collect::<Vec<_>>();
        assert!(tried.none.is_none() && of_trial.len() == 3 && of_trial.iter().all(|number| !expected.contains(number)));
    }
}
