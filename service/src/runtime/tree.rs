//! The service's side of [`sandbox_core::tree`]: files of a sandbox, asked of a process inside it.
//!
//! What comes from there is a stranger's word. Its lengths are bounded before anything is set aside for them, and it says no more than was asked for.

mod notices;

use std::{io, os::fd::OwnedFd, time::Duration};

use futures_util::{Stream, StreamExt as _};
use sandbox_core::{
    protocol::VERSION,
    tree::{self, Ask, Call, Change, Entry, Fault, Piece, Process, Reply},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::UnixStream,
};
use tokio_util::bytes::Bytes;

pub use notices::{Noticed, Notices};

/// How long the other side may say nothing. Its own deadline is shorter, so that this is for one that cannot keep it: a sandbox that stands still.
const PATIENCE: Duration = Duration::from_secs(90);

/// A conversation about the files of one sandbox.
#[derive(Debug)]
pub struct Tree(UnixStream);

/// Why a question has no answer.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// The sandbox's word.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// The other side went away, said nothing for too long or talked nonsense.
    #[error("the process that works on the sandbox's files went away: {0}")]
    Lost(#[from] io::Error),
}

/// Content of a file or an archive on its way out.
#[derive(Debug)]
pub struct Content {
    stream: UnixStream,
    /// How much of it there may still be.
    left: u64,
    is_over: bool,
}

impl Tree {
    /// A new conversation, and the end of it that is to be handed in.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Self(ours), theirs.into_std()?.into()))
    }

    /// Asks what is answered without content.
    pub async fn ask(&mut self, ask: Ask) -> Result<Reply, TreeError> {
        self.send(ask).await?;
        self.reply().await
    }

    /// Asks what is answered by an [`Entry`].
    pub async fn entry(&mut self, ask: Ask) -> Result<Entry, TreeError> {
        let reply = self.ask(ask).await?;
        if let Reply::Entry(entry) = reply { Ok(entry) } else { Err(unexpected(&reply)) }
    }

    /// Asks for content. The first answer, and what follows it: `length` says of the answer how much that can be, `None` that it is no such answer.
    pub async fn content(mut self, ask: Ask, length: impl FnOnce(&Reply) -> Option<u64>) -> Result<(Reply, Content), TreeError> {
        self.send(ask).await?;
        let reply = self.reply().await?;
        let left = length(&reply).ok_or_else(|| unexpected(&reply))?;
        Ok((reply, Content { stream: self.0, left, is_over: false }))
    }

    /// Sends content after a question. An answer that comes before its end is the answer; where `content` breaks off, nothing of it is left in the sandbox.
    pub async fn give<E>(mut self, ask: Ask, content: impl Stream<Item = Result<Bytes, E>> + Unpin) -> Result<Reply, GiveError<E>> {
        self.send(ask).await.map_err(GiveError::Tree)?;
        let (mut read, mut write) = self.0.split();
        let mut reading = std::pin::pin!(read_reply(&mut read));
        tokio::select! {
            // Refused half-way: what is left is nobody's to read.
            reply = &mut reading => return reply.map_err(GiveError::Tree),
            sent = send_content(&mut write, content) => match sent {
                Err(Unsent::Broken(error)) => return Err(GiveError::Content(error)),
                // Why nobody reads it any more, the answer says.
                Ok(()) | Err(Unsent::Refused) => {}
            },
        }
        within(PATIENCE, reading).await.map_err(GiveError::Tree)
    }

    /// What differs from the image, and whether there is more than `max`.
    pub async fn changes(&mut self, max: usize) -> Result<(Vec<Change>, bool), TreeError> {
        self.send(Ask::Changes).await?;
        let mut all = Vec::new();
        loop {
            let reply = self.reply().await?;
            let Reply::Changes { changes, is_more } = reply else { return Err(unexpected(&reply)) };
            if changes.is_empty() && is_more {
                return Err(nonsense("a page without an entry that is not the last").into());
            }
            all.extend(changes);
            if all.len() > max || !is_more {
                let is_cut = all.len() > max;
                all.truncate(max);
                return Ok((all, is_cut));
            }
        }
    }

    /// The payload's processes, as many as `max`.
    pub async fn processes(&mut self, max: usize) -> Result<Vec<Process>, TreeError> {
        self.send(Ask::Processes).await?;
        let mut all = Vec::new();
        loop {
            let reply = self.reply().await?;
            let Reply::Processes { processes, is_more } = reply else { return Err(unexpected(&reply)) };
            if processes.is_empty() && is_more {
                return Err(nonsense("a page without an entry that is not the last").into());
            }
            all.extend(processes);
            if all.len() >= max || !is_more {
                all.truncate(max);
                return Ok(all);
            }
        }
    }

    async fn send(&mut self, ask: Ask) -> Result<(), TreeError> {
        let frame = tree::frame(&Call { version: VERSION, ask })?;
        // Somebody who said no and closed has said so before.
        match self.0.write_all(&frame).await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => Ok(other?),
        }
    }

    async fn reply(&mut self) -> Result<Reply, TreeError> {
        within(PATIENCE, read_reply(&mut self.0)).await
    }
}

/// Why content that was given has no answer.
#[derive(Debug)]
pub enum GiveError<E> {
    Tree(TreeError),
    /// It broke off where it came from.
    Content(E),
}

enum Unsent<E> {
    Broken(E),
    Refused,
}

async fn send_content<E>(
    to: &mut (impl AsyncWrite + Unpin),
    mut content: impl Stream<Item = Result<Bytes, E>> + Unpin,
) -> Result<(), Unsent<E>> {
    while let Some(bytes) = content.next().await {
        for piece in bytes.map_err(Unsent::Broken)?.chunks(tree::PIECE_BYTES_MAX) {
            let length = u32::try_from(piece.len()).map_err(|_| Unsent::Refused)?;
            taken(to, &length.to_le_bytes()).await?;
            taken(to, piece).await?;
        }
    }
    taken(to, &0_u32.to_le_bytes()).await
}

/// Sends bytes to somebody who may stand still.
async fn taken<E>(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), Unsent<E>> {
    let sent = tokio::time::timeout(PATIENCE, to.write_all(bytes)).await;
    if matches!(sent, Ok(Ok(()))) { Ok(()) } else { Err(Unsent::Refused) }
}

impl Content {
    /// The next piece; `None` at the end. An end that was not announced is an error, and so is more than was said.
    pub async fn next(&mut self) -> Option<Result<Vec<u8>, TreeError>> {
        if self.is_over {
            return None;
        }
        let next = within(PATIENCE, self.read()).await;
        self.is_over = !matches!(next, Ok(Some(_)));
        next.transpose()
    }

    async fn read(&mut self) -> Result<Option<Vec<u8>>, TreeError> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length).await?;
        match tree::piece(length)? {
            Piece::End => Ok(None),
            Piece::Broken => Err(read_reply(&mut self.stream).await.map_or_else(|error| error, |other| unexpected(&other))),
            Piece::Bytes(length) => {
                self.left = self.left.checked_sub(length as u64).ok_or_else(|| nonsense("more content than was said"))?;
                let mut bytes = vec![0; length];
                self.stream.read_exact(&mut bytes).await?;
                Ok(Some(bytes))
            }
        }
    }
}

/// Not to be given up half-way and begun again: it would go on behind what was read.
async fn read_reply(from: &mut (impl AsyncRead + Unpin)) -> Result<Reply, TreeError> {
    let mut length = [0; 4];
    from.read_exact(&mut length).await?;
    let mut bytes = vec![0; tree::frame_bytes(length)?];
    from.read_exact(&mut bytes).await?;
    let reply = tree::parse::<Reply>(&bytes)?;
    if let Reply::Failed(fault) = reply { Err(fault.into()) } else { Ok(reply) }
}

async fn within<T>(patience: Duration, answer: impl Future<Output = Result<T, TreeError>>) -> Result<T, TreeError> {
    match tokio::time::timeout(patience, answer).await {
        Ok(answer) => answer,
        Err(_late) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
    }
}

fn unexpected(reply: &Reply) -> TreeError {
    tracing::debug!(?reply, "a sandbox gave an answer that fits no question");
    nonsense("an answer that fits no question").into()
}

fn nonsense(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use sandbox_core::tree::{EntryKind, FaultKind, Link, TreePath};

    use super::*;

    fn stat() -> Ask {
        Ask::Stat { path: TreePath::default(), link: Link::Itself }
    }

    /// A conversation with somebody who says `said` whatever is asked, and closes.
    async fn hostile(said: &[u8]) -> Tree {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(said).await.unwrap();
        tokio::spawn(async move { tokio::io::copy(&mut theirs, &mut tokio::io::sink()).await });
        Tree(ours)
    }

    #[tokio::test]
    async fn lengths_are_believed_up_to_their_bounds() {
        let error = hostile(&[0xff; 64]).await.ask(stat()).await.unwrap_err();

        assert!(matches!(error, TreeError::Lost(error) if error.kind() == io::ErrorKind::InvalidData));
    }

    #[tokio::test]
    async fn an_answer_to_another_question_is_none() {
        let said = tree::frame(&Reply::Archive).unwrap();

        assert!(matches!(hostile(&said).await.entry(stat()).await, Err(TreeError::Lost(_))));
    }

    #[tokio::test]
    async fn no_more_content_is_taken_than_was_said() {
        let mut said = tree::frame(&Reply::Archive).unwrap();
        said.extend(4_u32.to_le_bytes());
        said.extend(b"four");
        said.extend(1_u32.to_le_bytes());
        said.extend(b"!");
        let tree = hostile(&said).await;

        let (_, mut content) = tree.content(stat(), |_| Some(4)).await.unwrap();

        assert_eq!(content.next().await.unwrap().unwrap(), b"four");
        assert!(content.next().await.unwrap().is_err());
        assert!(content.next().await.is_none());
    }

    #[tokio::test]
    async fn a_refusal_ends_what_would_be_sent_for_ever() {
        let fault = Fault { kind: FaultKind::Full, message: "full".into() };
        let said = tree::frame(&Reply::Failed(fault.clone())).unwrap();
        // Nobody reads what comes.
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(&said).await.unwrap();

        let endless = futures_util::stream::repeat_with(|| Ok::<_, Infallible>(Bytes::from_static(&[7; 1000])));
        let refused = Tree(ours).give(stat(), endless).await;

        assert!(matches!(refused, Err(GiveError::Tree(TreeError::Fault(told))) if told == fault));
    }

    #[tokio::test]
    async fn an_answer_that_is_one_is_taken() {
        let entry = Entry {
            name: b"a".to_vec(),
            kind: EntryKind::File,
            size: 1,
            mode: 0o644,
            uid: 0,
            gid: 0,
            modified_ns: 1,
            inode: 1,
            target: None,
        };
        let said = tree::frame(&Reply::Entry(entry.clone())).unwrap();

        assert_eq!(hostile(&said).await.entry(stat()).await.unwrap(), entry);
    }
}
