//! What a process in a sandbox tells of files that it watches.

use std::collections::VecDeque;

use sandbox_core::tree::{Ask, Notice, Reply, TreePath, WatchEnd};
use tokio::net::UnixStream;

use super::{Tree, TreeError, read_reply, unexpected};

/// A watch that stands, until this is dropped.
#[derive(Debug)]
pub struct Notices {
    stream: UnixStream,
    /// Whether it is a folder that is watched; else it is one name in a folder.
    pub is_folder: bool,
    pub folders: u32,
    ready: VecDeque<Notice>,
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum Noticed {
    Notice(Notice),
    /// Nothing will.
    Over(WatchEnd),
}

impl Tree {
    /// Watches a file or folder. What happens after this has returned is told.
    pub async fn watch(mut self, path: TreePath, is_recursive: bool) -> Result<Notices, TreeError> {
        let reply = self.ask(Ask::Watch { path, is_recursive }).await?;
        let Reply::Watching { is_folder, folders } = reply else { return Err(unexpected(&reply)) };
        Ok(Notices { stream: self.0, is_folder, folders, ready: VecDeque::new() })
    }
}

impl Notices {
    /// What happened next, however long nothing does: the sandbox may even stand still. What is not read is dropped in the sandbox, where a gap is told instead. Not to be given up
    /// half-way and called again.
    pub async fn next(&mut self) -> Result<Noticed, TreeError> {
        loop {
            if let Some(notice) = self.ready.pop_front() {
                return Ok(Noticed::Notice(notice));
            }
            match read_reply(&mut self.stream).await? {
                Reply::Noticed { notices } => self.ready = notices.into(),
                Reply::WatchOver(end) => return Ok(Noticed::Over(end)),
                reply @ (Reply::Entry(_)
                | Reply::Content { .. }
                | Reply::Page { .. }
                | Reply::Archive
                | Reply::Unpacked { .. }
                | Reply::Changes { .. }
                | Reply::Processes { .. }
                | Reply::Done
                | Reply::Failed(_)
                | Reply::Watching { .. }) => return Err(unexpected(&reply)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use sandbox_core::tree::{GapCause, NOTICES_AT_ONCE_MAX, frame};
    use tokio::io::AsyncWriteExt as _;

    use super::*;

    /// Somebody in a sandbox who says this, and closes.
    async fn watching(said: &[Reply]) -> Notices {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for reply in said {
            theirs.write_all(&frame(reply).unwrap()).await.unwrap();
        }
        tokio::spawn(async move { tokio::io::copy(&mut theirs, &mut tokio::io::sink()).await });
        Tree(ours).watch(TreePath::default(), true).await.unwrap()
    }

    #[tokio::test]
    async fn notices_come_one_by_one_and_then_the_end() {
        let gap = |at_us| Notice::Gap { at_us, cause: GapCause::Overflow };
        let stands = Reply::Watching { is_folder: true, folders: 7 };
        let said = [stands, Reply::Noticed { notices: vec![gap(1), gap(2)] }, Reply::WatchOver(WatchEnd::Removed)];

        let mut notices = watching(&said).await;

        assert_eq!((notices.is_folder, notices.folders), (true, 7));
        for expected in [Noticed::Notice(gap(1)), Noticed::Notice(gap(2)), Noticed::Over(WatchEnd::Removed)] {
            assert_eq!(notices.next().await.unwrap(), expected);
        }
    }

    #[tokio::test]
    async fn more_at_once_than_any_honest_side_tells_ends_it() {
        let at_once = |count| Reply::Noticed { notices: vec![Notice::Gap { at_us: 0, cause: GapCause::Unwatched }; count] };
        let stands = Reply::Watching { is_folder: true, folders: 1 };
        let mut notices = watching(&[stands, at_once(NOTICES_AT_ONCE_MAX), at_once(NOTICES_AT_ONCE_MAX + 1)]).await;

        for _ in 0..NOTICES_AT_ONCE_MAX {
            assert!(matches!(notices.next().await, Ok(Noticed::Notice(_))));
        }
        let end = notices.next().await;

        assert!(matches!(&end, Err(TreeError::Lost(error)) if error.kind() == io::ErrorKind::InvalidData), "{end:?}");
    }

    #[tokio::test]
    async fn an_answer_to_another_question_ends_it() {
        let mut notices = watching(&[Reply::Watching { is_folder: true, folders: 1 }, Reply::Archive]).await;

        assert!(matches!(notices.next().await, Err(TreeError::Lost(_))));
    }
}
