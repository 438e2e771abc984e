//! What is said on the socket of [`Request::Tree`](crate::protocol::Request::Tree), between whoever asks for files of a sandbox and a process inside it.
//!
//! A stream socket. The asker sends one [`Call`] after another, each as a frame: its length (u32, little-endian), then postcard. The other side answers each
//! with a frame that holds a [`Reply`]. Where content goes along, in either direction, it follows its frame in pieces: length (u32) and bytes, and at last a length of 0 —
//! or [`BROKEN`], behind which a frame with the reason comes. An asker who gives up closes the socket.
//!
//! The process that answers lives in the sandbox and under its fences, so the asker believes nothing it says: lengths are bounded here, names are bytes
//! in which anything may stand, and an archive is whatever somebody in there made of it.

use std::{
    fmt,
    io::{self, Read, Write},
};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, Error as _, SeqAccess, Visitor},
};

/// The largest frame, in bytes.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// The largest piece of content, in bytes.
pub const PIECE_BYTES_MAX: usize = 128 * 1024;
/// In the place of a piece's length: the content ends here, and is not whole.
pub const BROKEN: u32 = u32::MAX;

/// The longest path, in bytes (PATH_MAX of path_resolution(7) less its end), and the longest name in one.
pub const PATH_BYTES_MAX: usize = 4095;
pub const NAME_BYTES_MAX: usize = 255;
/// The most entries in one page of a listing.
pub const PAGE_ENTRIES_MAX: u32 = 1000;
/// How deep below its start a folder may lie that is packed, removed or compared.
pub const DEPTH_MAX: usize = 256;
/// The most processes and connections of this kind in one sandbox at a time, those that watch included.
pub const AT_ONCE_MAX: usize = 12;
/// The most folders of one [`Ask::Watch`].
pub const WATCHED_FOLDERS_MAX: usize = 4096;
/// The most of [`Notice`]s that wait for whoever reads them: what happens beyond is a [`GapCause::SlowReader`].
pub const NOTICES_MAX: usize = 4096;
/// The most of them in one [`Reply::Noticed`]: as many as wait, and gaps between them.
pub const NOTICES_AT_ONCE_MAX: usize = 2 * NOTICES_MAX + 1;

/// A question, with the version of the protocol that it is meant in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// [`VERSION`](crate::protocol::VERSION).
    pub version: u32,
    pub ask: Ask,
}

/// A path in a sandbox, from its root: its names. None of them is empty, `.` or `..`, or holds a slash or a zero byte.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<u8>", into = "Vec<u8>")]
pub struct TreePath(Vec<Vec<u8>>);

/// Why bytes are no [`TreePath`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathInvalid {
    #[error("a path has no part `..`: where it leads would be for links to decide")]
    Parent,
    #[error("a path has no zero byte")]
    Zero,
    #[error("a path is at most {PATH_BYTES_MAX} bytes long")]
    TooLong,
    #[error("a name in a path is at most {NAME_BYTES_MAX} bytes long")]
    NameTooLong,
}

impl TreePath {
    /// Takes a path with or without its leading slash, which is not counted: it is looked up from the root on. Empty names and `.` mean nothing.
    pub fn parse(path: &[u8]) -> Result<Self, PathInvalid> {
        let path = path.strip_prefix(b"/").unwrap_or(path);
        if path.len() > PATH_BYTES_MAX {
            return Err(PathInvalid::TooLong);
        }
        if path.contains(&0) {
            return Err(PathInvalid::Zero);
        }
        let mut names = Vec::new();
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".") {
            if name == b".." {
                return Err(PathInvalid::Parent);
            }
            if name.len() > NAME_BYTES_MAX {
                return Err(PathInvalid::NameTooLong);
            }
            names.push(name.to_vec());
        }
        Ok(Self(names))
    }

    /// The names from the root on; none for the root itself.
    pub fn names(&self) -> &[Vec<u8>] {
        &self.0
    }

    /// As a process writes it: with its slash.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut path = vec![b'/'];
        path.extend(self.0.join(&b'/'));
        path
    }
}

impl TryFrom<Vec<u8>> for TreePath {
    type Error = PathInvalid;
    fn try_from(path: Vec<u8>) -> Result<Self, PathInvalid> {
        Self::parse(&path)
    }
}

impl From<TreePath> for Vec<u8> {
    fn from(path: TreePath) -> Self {
        path.to_bytes()
    }
}

impl fmt::Display for TreePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.to_bytes()))
    }
}

/// What can be asked. Paths are resolved inside the sandbox, as its own root user; what `/proc/self/fd` and its like lead to is not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ask {
    /// The content of a regular file. Links are followed. Answered by [`Reply::Content`], then its bytes.
    Read { path: TreePath, span: Span },
    /// A new content for a file; the content follows. It is written aside and given its name when it is whole, in one step: nobody sees half of it. What had the name
    /// before, a link too, is replaced, unless it is a folder. Answered by [`Reply::Entry`].
    Write { path: TreePath, mode: Option<u32>, owner: Option<Owner>, existing: Existing },
    /// Answered by [`Reply::Entry`].
    Stat { path: TreePath, link: Link },
    /// The entries of a folder in the order of their names as bytes, from behind `after`. Answered by [`Reply::Page`].
    List { path: TreePath, after: Option<Vec<u8>>, max: u32 },
    /// Answered by [`Reply::Entry`]. With `has_parents`, missing ones are made and one that is there already is fine, as `mkdir -p` does.
    MakeFolder { path: TreePath, has_parents: bool, mode: Option<u32>, owner: Option<Owner> },
    /// A file, a link, an empty folder; with `is_recursive` a folder with all that is in it. Answered by [`Reply::Done`].
    Remove { path: TreePath, is_recursive: bool },
    /// Another name for a file or folder, in one step. Answered by [`Reply::Entry`].
    Rename { from: TreePath, to: TreePath, existing: Existing },
    /// A file or a folder with all that is in it, as tar, below its own name. Devices and sockets are left out, and so is what lies in `/proc`. Answered by [`Reply::Archive`],
    /// then its bytes: as far as `bytes_max`, where it breaks.
    Pack { path: TreePath, bytes_max: u64 },
    /// Puts what a tar holds into a folder; the archive follows. Nothing in it leads out of that folder, devices are left out. Entries appear as they come. Answered by
    /// [`Reply::Unpacked`].
    Unpack { path: TreePath, bytes_max: u64, entries_max: u64 },
    /// What differs from the image. Answered by any number of [`Reply::Changes`].
    Changes,
    /// Answered by any number of [`Reply::Processes`].
    Processes,
    /// What changes in a folder, or of a file, from now on; links are followed to the folder. With `is_recursive` also what changes in the folders below it, as they come and go. Answered
    /// by [`Reply::Watching`] when nothing that happens afterwards is missed, then by any number of [`Reply::Noticed`], and [`Reply::WatchOver`] when there is nothing to watch any more.
    /// Nothing else is answered on this socket afterwards: who has seen enough closes it.
    Watch { path: TreePath, is_recursive: bool },
    /// The whole tree as a layer of an image (image-spec, `layer.md`): what [`Ask::Pack`] of the root says, and also that files have several names, and their extended attributes in `user.`
    /// whose name and value have neither a line feed nor, in the name, `=`. Of what is mounted the folder alone. Refused where something cannot be told: a name that begins with `.wh.`, which
    /// means a deletion there; a file that cannot be read. Answered as [`Ask::Pack`] is; it breaks also behind `entries_max`.
    Layer { bytes_max: u64, entries_max: u64 },
}

/// A part of a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Span {
    /// From this byte on, and so many at the most.
    From { offset: u64, length: u64 },
    /// So many at the end.
    Last { length: u64 },
}

impl Span {
    /// The whole of it.
    pub const ALL: Self = Self::From { offset: 0, length: u64::MAX };

    /// Where it begins and how much of it there is in a file of `size` bytes.
    #[must_use]
    pub const fn within(self, size: u64) -> (u64, u64) {
        match self {
            Self::From { offset, length } => {
                let left = size.saturating_sub(offset);
                (offset, if length < left { length } else { left })
            }
            Self::Last { length } => {
                let offset = size.saturating_sub(length);
                (offset, size - offset)
            }
        }
    }
}

/// Whom a new file belongs to, by the sandbox's own ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub uid: u32,
    pub gid: u32,
}

/// What becomes of something that has the name already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Existing {
    Replace,
    /// It stays, and the answer is [`FaultKind::Exists`].
    Keep,
}

/// Which of the two is meant where a path ends at a symbolic link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Link {
    Itself,
    Followed,
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Entry(Entry),
    /// The file as it was when it was opened, and the part of it that follows.
    Content {
        entry: Entry,
        offset: u64,
        length: u64,
    },
    Page {
        entries: Vec<Entry>,
        is_more: bool,
    },
    Archive,
    Unpacked {
        entries: u64,
        bytes: u64,
    },
    Changes {
        changes: Vec<Change>,
        is_more: bool,
    },
    Processes {
        processes: Vec<Process>,
        is_more: bool,
    },
    Done,
    Failed(Fault),
    // What came later stands last: by their places older sides know those above.
    /// How many folders are watched, and whether it is a folder that was asked for.
    Watching {
        is_folder: bool,
        folders: u32,
    },
    /// [`NOTICES_AT_ONCE_MAX`] at the most.
    Noticed {
        #[serde(deserialize_with = "notices")]
        notices: Vec<Notice>,
    },
    WatchOver(WatchEnd),
}

/// Something that happened to what is watched. Paths begin there, without a slash: an empty one is what is watched itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Notice {
    Change {
        at_us: u64,
        kind: NoticeKind,
        path: Vec<u8>,
        /// Of what was moved: where it was.
        from: Option<Vec<u8>>,
        is_folder: bool,
    },
    /// Something happened here that is not told.
    Gap { at_us: u64, cause: GapCause },
}

/// So many and no more: a notice takes three bytes of a frame, but many times that of memory.
fn notices<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Notice>, D::Error> {
    struct Few;
    impl<'de> Visitor<'de> for Few {
        type Value = Vec<Notice>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {NOTICES_AT_ONCE_MAX} notices")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Self::Value, A::Error> {
            let mut all = Vec::new();
            while let Some(notice) = from.next_element()? {
                if all.len() == NOTICES_AT_ONCE_MAX {
                    return Err(A::Error::invalid_length(all.len() + 1, &self));
                }
                all.push(notice);
            }
            Ok(all)
        }
    }
    from.deserialize_seq(Few)
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NoticeKind {
    /// It has this name now, and had none that is watched.
    Created,
    /// Its content. Told once for any number of writes that came at about the same time.
    Modified,
    /// Mode, owner, times or extended attributes. Told as [`NoticeKind::Modified`] is.
    Attributes,
    /// It has no name any more that is watched.
    Removed,
    /// From one name that is watched to another.
    Moved,
}

/// Why something is not told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum GapCause {
    /// More happened at once than the kernel keeps (`IN_Q_OVERFLOW`, inotify(7)), or something in a folder in the midst of its move. What is watched was gone through anew.
    Overflow,
    /// Whoever reads does not keep up.
    SlowReader,
    /// There are folders, new ones, that are not watched: too many, too deep, or none that could be looked at.
    Unwatched,
}

/// Why there is nothing to watch any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WatchEnd {
    /// The folder was removed or has another name; of a file, the folder that it is in.
    Removed,
    Unmounted,
}

/// A file, folder or whatever else has a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Of the entry in its folder; empty for the root.
    pub name: Vec<u8>,
    pub kind: EntryKind,
    pub size: u64,
    /// Permission and set-id bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Nanoseconds since 1970.
    pub modified_ns: i64,
    pub inode: u64,
    /// Where a symbolic link leads, as it says.
    pub target: Option<Vec<u8>>,
}

/// What kind of file something is (inode(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryKind {
    File,
    Folder,
    Link,
    Fifo,
    Socket,
    Device,
}

/// A difference to the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// From the root, with its slash.
    pub path: Vec<u8>,
    pub kind: ChangeKind,
}

/// As `docker diff` tells them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChangeKind {
    Added,
    Changed,
    Deleted,
}

/// A process of the payload's, as the sandbox's own `/proc` has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    pub parent: u32,
    pub uid: u32,
    /// A letter of proc_pid_stat(5).
    pub state: u8,
    pub threads: u32,
    pub cpu_ms: u64,
    pub resident_bytes: u64,
    /// The arguments, each behind the other with a zero byte between; of a process without any its name in brackets. Cut after [`COMMAND_BYTES_MAX`].
    pub command: Vec<u8>,
}

/// The most of a command line that is told, in bytes.
pub const COMMAND_BYTES_MAX: usize = 1024;

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    pub kind: FaultKind,
    pub message: String,
}

/// What a caller can do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FaultKind {
    /// The question makes no sense, or is of another version.
    Refused,
    NotFound,
    Exists,
    /// A folder where none can be, or none where one must be; a device, socket, fifo or part of `/proc`, which have no content to give; a folder that is not empty; something that lies
    /// on another file system.
    WrongKind,
    /// Read-only, or not the sandbox's.
    Denied,
    /// The layer, or what it may hold of files, is used up.
    Full,
    /// More than the question allows, or than this protocol does.
    TooLarge,
    /// Not now.
    Busy,
    Failed,
}

/// Writes one frame.
pub fn write_frame(to: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    to.write_all(&frame(message)?)
}

/// One frame, as it is sent.
pub fn frame(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = postcard::to_extend(message, vec![0; 4]).map_err(io::Error::other)?;
    let length = bytes.len() - 4;
    if length > FRAME_BYTES_MAX {
        return Err(invalid("a frame is too large"));
    }
    let length = u32::try_from(length).map_err(io::Error::other)?;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    Ok(bytes)
}

/// Reads one frame; `None` at the end of the stream.
pub fn read_frame<T: DeserializeOwned>(from: &mut impl Read) -> io::Result<Option<T>> {
    let mut length = [0; 4];
    if from.read(&mut length[..1])? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut length[1..])?;
    let mut bytes = vec![0; frame_bytes(length)?];
    from.read_exact(&mut bytes)?;
    parse(&bytes).map(Some)
}

/// The length of a frame by its first four bytes.
pub fn frame_bytes(length: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_le_bytes(length) as usize;
    if length > FRAME_BYTES_MAX { Err(invalid("a frame is too large")) } else { Ok(length) }
}

/// What a frame says.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    postcard::from_bytes(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// What stands in the place of a piece's length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    Bytes(usize),
    End,
    /// A frame with the reason follows.
    Broken,
}

/// What follows in a stream of content, by the four bytes before it.
pub fn piece(length: [u8; 4]) -> io::Result<Piece> {
    match u32::from_le_bytes(length) {
        0 => Ok(Piece::End),
        BROKEN => Ok(Piece::Broken),
        length if length as usize > PIECE_BYTES_MAX => Err(invalid("a piece of content is too large")),
        length => Ok(Piece::Bytes(length as usize)),
    }
}

/// Content on its way out: what is written goes in pieces. Nothing is buffered.
#[derive(Debug)]
pub struct ContentWriter<'a, W>(pub &'a mut W);

impl<W: Write> Write for ContentWriter<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = &bytes[..bytes.len().min(PIECE_BYTES_MAX)];
        if !bytes.is_empty() {
            self.0.write_all(&u32::try_from(bytes.len()).map_err(io::Error::other)?.to_le_bytes())?;
            self.0.write_all(bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Content on its way in, to its end.
#[derive(Debug)]
pub struct ContentReader<'a, R> {
    from: &'a mut R,
    left: usize,
    is_ended: bool,
}

impl<'a, R: Read> ContentReader<'a, R> {
    pub fn new(from: &'a mut R) -> Self {
        Self { from, left: 0, is_ended: false }
    }
}

impl<R: Read> Read for ContentReader<'_, R> {
    /// An end that the other side did not announce is an error, and so is content that is not whole.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_ended || buffer.is_empty() {
            return Ok(0);
        }
        if self.left == 0 {
            let mut length = [0; 4];
            self.from.read_exact(&mut length)?;
            match piece(length)? {
                Piece::Bytes(length) => self.left = length,
                Piece::End => {
                    self.is_ended = true;
                    return Ok(0);
                }
                Piece::Broken => {
                    let fault: Option<Reply> = read_frame(self.from)?;
                    let message = if let Some(Reply::Failed(fault)) = fault { fault.message } else { "for no reason".to_owned() };
                    return Err(io::Error::other(message));
                }
            }
        }
        let wanted = buffer.len().min(self.left);
        let read = self.from.read(&mut buffer[..wanted])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= read;
        Ok(read)
    }
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_its_names() {
        let path = TreePath::parse(b"//a/./b\xff/").unwrap();
        assert_eq!(path.names(), [b"a".to_vec(), b"b\xff".to_vec()]);
        assert_eq!(path.to_bytes(), b"/a/b\xff");
        assert_eq!(TreePath::parse(b"").unwrap().to_bytes(), b"/");
    }

    #[test]
    fn what_could_lead_elsewhere_is_no_path() {
        assert_eq!(TreePath::parse(b"a/../b"), Err(PathInvalid::Parent));
        assert_eq!(TreePath::parse(b"a\0b"), Err(PathInvalid::Zero));
        assert_eq!(TreePath::parse(&[b'a'; NAME_BYTES_MAX + 1]), Err(PathInvalid::NameTooLong));
        assert_eq!(TreePath::parse(&b"a/".repeat(2048)), Err(PathInvalid::TooLong));
        assert!(TreePath::parse(&b"a/".repeat(2047)).is_ok());
        assert_eq!(TreePath::parse(b"...").unwrap().names(), [b"...".to_vec()]);
    }

    #[test]
    fn a_path_that_comes_by_the_socket_is_checked_again() {
        let hostile = postcard::to_stdvec(&b"/../x".to_vec()).unwrap();
        assert!(postcard::from_bytes::<TreePath>(&hostile).is_err());
        let longest = [&b"a/".repeat(PATH_BYTES_MAX / 2)[..], b"b"].concat();
        for path in [b"/a/b", &longest[..]] {
            let path = TreePath::parse(path).unwrap();
            let sent = postcard::to_stdvec(&path).unwrap();
            assert_eq!(postcard::from_bytes::<TreePath>(&sent).unwrap(), path);
        }
    }

    #[test]
    fn content_reads_back_as_it_was_written_and_ends_where_it_was_ended() {
        let content: Vec<u8> = (0..300_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        let mut stream = Vec::new();
        ContentWriter(&mut stream).write_all(&content).unwrap();
        stream.extend(0_u32.to_le_bytes());
        stream.extend(b"behind");
        let mut from = stream.as_slice();
        let mut read = Vec::new();
        ContentReader::new(&mut from).read_to_end(&mut read).unwrap();
        assert!(read == content);
        assert_eq!(from, b"behind");
    }

    #[test]
    fn content_that_breaks_off_is_an_error() {
        let mut stream = Vec::new();
        ContentWriter(&mut stream).write_all(b"half").unwrap();
        assert!(ContentReader::new(&mut stream.as_slice()).read_to_end(&mut Vec::new()).is_err());
        stream.extend(BROKEN.to_le_bytes());
        write_frame(&mut stream, &Reply::Failed(Fault { kind: FaultKind::TooLarge, message: "too large".into() })).unwrap();
        let error = ContentReader::new(&mut stream.as_slice()).read_to_end(&mut Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "too large");
    }

    #[test]
    fn lengths_are_believed_up_to_their_bounds() {
        let large = u32::try_from(FRAME_BYTES_MAX + 1).unwrap().to_le_bytes();
        assert!(read_frame::<Reply>(&mut large.as_slice()).is_err());
        assert!(piece(u32::try_from(PIECE_BYTES_MAX + 1).unwrap().to_le_bytes()).is_err());
        assert_eq!(read_frame::<Reply>(&mut [].as_slice()).unwrap(), None);
    }

    #[test]
    fn notices_are_believed_up_to_their_number() {
        let noticed = |count| Reply::Noticed { notices: vec![Notice::Gap { at_us: 0, cause: GapCause::Overflow }; count] };
        let read = |count| read_frame::<Reply>(&mut frame(&noticed(count)).unwrap().as_slice());
        assert_eq!(read(NOTICES_AT_ONCE_MAX).unwrap(), Some(noticed(NOTICES_AT_ONCE_MAX)));
        assert_eq!(read(NOTICES_AT_ONCE_MAX + 1).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn spans_end_with_the_file() {
        assert_eq!(Span::ALL.within(10), (0, 10));
        assert_eq!(Span::From { offset: 4, length: 3 }.within(10), (4, 3));
        assert_eq!(Span::From { offset: 12, length: 3 }.within(10), (12, 0));
        assert_eq!(Span::Last { length: 4 }.within(10), (6, 4));
        assert_eq!(Span::Last { length: 40 }.within(10), (0, 10));
    }
}
