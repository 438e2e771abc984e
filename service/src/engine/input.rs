//! What a sandbox is given at its start, as descriptors that the keeper takes.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::fs::FileExt as _},
    sync::Arc,
};

use rustix::fs::{MemfdFlags, SealFlags};
use sandbox_core::files;

use crate::{
    sandbox::{Content, File},
    store::Input,
};

/// Files and standard input in the form in which they travel.
pub(super) fn encode(files: &[File], stdin: Option<Content>) -> Input {
    let mut bytes = Vec::with_capacity(files.iter().map(|file| file.content.0.len() + file.path.len() + 16).sum());
    for file in files {
        files::write(&mut bytes, &file.path, file.mode, &file.content.0).expect("writing to memory does not fail");
    }
    Input { files: (!files.is_empty()).then_some(bytes), stdin: stdin.map(|content| content.0) }
}

/// The descriptors of a launch, in the order that the protocol asks for: standard input, then files.
pub(super) async fn descriptors(input: Arc<Input>) -> io::Result<Vec<OwnedFd>> {
    /// Copying more than this is left to a thread that may take its time.
    const SMALL_BYTES: usize = 256 * 1024;
    let bytes = [&input.stdin, &input.files].into_iter().flatten().map(Vec::len).sum::<usize>();
    let seal_all = move || {
        let parts = [("stdin", &input.stdin), ("files", &input.files)];
        parts.into_iter().filter_map(|(name, bytes)| bytes.as_ref().map(|bytes| sealed(name, bytes))).collect()
    };
    if bytes <= SMALL_BYTES {
        return seal_all();
    }
    tokio::task::spawn_blocking(seal_all).await.map_err(io::Error::other)?
}

/// Memory that nobody changes any more, to be read from its beginning.
fn sealed(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let memory = fs::File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    // At an offset: the position is shared with whoever gets the descriptor, and must stay at the beginning.
    memory.write_all_at(bytes, 0)?;
    rustix::fs::fcntl_add_seals(&memory, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(memory.into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[tokio::test]
    async fn standard_input_comes_first_and_is_read_from_its_beginning() {
        let file = File { path: "a".into(), mode: 0o644, content: Content(b"content".to_vec()) };
        let input = encode(&[file], Some(Content(b"hello".to_vec())));
        let mut sealed = descriptors(Arc::new(input)).await.unwrap().into_iter().map(fs::File::from);

        let mut stdin = String::new();
        sealed.next().unwrap().read_to_string(&mut stdin).unwrap();
        assert_eq!(stdin, "hello");
        let entry = files::read_entry(&mut sealed.next().unwrap()).unwrap().unwrap();
        assert_eq!((entry.path.as_str(), entry.content_bytes), ("a", 7));
    }

    #[tokio::test]
    async fn nobody_can_change_what_was_sealed() {
        let input = Input { files: None, stdin: Some(b"hello".to_vec()) };
        let mut stdin = fs::File::from(descriptors(Arc::new(input)).await.unwrap().remove(0));
        assert!(stdin.write_all(b"other").is_err());
        assert!(stdin.set_len(0).is_err());
    }

    #[tokio::test]
    async fn nothing_given_is_no_descriptor() {
        assert!(descriptors(Arc::new(encode(&[], None))).await.unwrap().is_empty());
    }
}
