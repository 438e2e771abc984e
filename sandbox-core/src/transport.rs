//! Messages and descriptors over a unix seqpacket socket.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketAddrUnix, SocketFlags, SocketType, connect, recvmsg, sendmsg, socket_with,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::protocol::{DESCRIPTORS_MAX, MESSAGE_BYTES_MAX};

/// One end of a connection. Reading and writing never block: they fail with [`io::ErrorKind::WouldBlock`].
#[derive(Debug)]
pub struct Socket(OwnedFd);

/// One datagram and what came with it.
#[derive(Debug)]
pub struct Datagram<T> {
    pub message: T,
    pub descriptors: Vec<OwnedFd>,
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Socket {
    /// `socket` must be a connected, non-blocking seqpacket socket.
    fn from(socket: OwnedFd) -> Self {
        Self(socket)
    }
}

impl Socket {
    /// Connects to the socket file at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        enlarge(&socket)?;
        connect(&socket, &SocketAddrUnix::new(path)?)?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self(socket))
    }

    /// Two connected ends. The first one does not block; the second one, for a process of ours that waits for orders, does.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        Ok((Self(ours), theirs))
    }

    /// Sends one message. All of it goes or none.
    pub fn send(&self, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        send(self.as_fd(), message, descriptors)
    }

    /// Takes the next message; `None` when the other end is closed. Descriptors come close-on-exec.
    pub fn recv<T: DeserializeOwned>(&self) -> io::Result<Option<Datagram<T>>> {
        recv(self.as_fd())
    }
}

/// [`Socket::send`] on a socket that someone else owns.
pub fn send(socket: BorrowedFd<'_>, message: &impl Serialize, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    if bytes.len() > MESSAGE_BYTES_MAX || descriptors.len() > DESCRIPTORS_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the message is too large for one datagram"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("the descriptors do not fit beside the message"));
    }
    rustix::io::retry_on_intr(|| sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// [`Socket::recv`] on a socket that someone else owns.
pub fn recv<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> io::Result<Option<Datagram<T>>> {
    thread_local! {
        static BUFFER: std::cell::RefCell<Vec<u8>> = std::cell::RefCell::new(vec![0; MESSAGE_BYTES_MAX]);
    }
    BUFFER.with_borrow_mut(|buffer| {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            rustix::io::retry_on_intr(|| recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC))?;
        let descriptors: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| if let RecvAncillaryMessage::ScmRights(descriptors) = message { Some(descriptors) } else { None })
            .flatten()
            .collect();
        if received.bytes == 0 {
            return Ok(None);
        }
        if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the message was cut"));
        }
        let message = postcard::from_bytes(&buffer[..received.bytes]).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(Some(Datagram { message, descriptors }))
    })
}

/// Asks for the largest buffers that an unprivileged process gets; the kernel doubles the number (socket(7)).
pub(crate) fn enlarge(socket: &OwnedFd) -> io::Result<()> {
    rustix::net::sockopt::set_socket_send_buffer_size(socket, MESSAGE_BYTES_MAX)?;
    rustix::net::sockopt::set_socket_recv_buffer_size(socket, MESSAGE_BYTES_MAX)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        io::{Read, Write},
    };

    use super::*;

    #[test]
    fn a_message_arrives_whole_with_its_descriptors() {
        let (ours, theirs) = Socket::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        ours.send(&("hello".to_owned(), 7_u32), &[writer.as_fd()]).unwrap();
        drop(writer);

        let datagram: Datagram<(String, u32)> = recv(theirs.as_fd()).unwrap().unwrap();
        assert_eq!(datagram.message, ("hello".to_owned(), 7));
        let mut sent: File = datagram.descriptors.into_iter().next().unwrap().into();
        sent.write_all(b"through").unwrap();
        drop(sent);
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn a_closed_other_end_is_none_and_an_empty_socket_would_block() {
        let (ours, theirs) = Socket::pair().unwrap();
        assert_eq!(ours.recv::<u32>().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(theirs);
        assert!(ours.recv::<u32>().unwrap().is_none());
    }

    #[test]
    fn a_message_over_the_bound_is_refused_before_it_is_sent() {
        let (ours, _theirs) = Socket::pair().unwrap();
        let error = ours.send(&vec![0_u8; MESSAGE_BYTES_MAX + 1], &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}
