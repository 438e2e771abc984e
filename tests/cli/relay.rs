//! A stretch of network between a client and the service that can be cut.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

/// Passes connections on for as long as this process lives.
#[derive(Debug)]
pub(crate) struct Relay {
    address: SocketAddr,
    /// Where it leads.
    target: Arc<Mutex<String>>,
    /// The next answer is lost.
    is_losing: Arc<AtomicBool>,
    /// Both ends of each connection.
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

impl Relay {
    /// To what is at this URL (http://host:port).
    pub(crate) fn to(url: &str) -> Self {
        let target = Arc::new(Mutex::new(host(url)));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let streams = Arc::new(Mutex::new(Vec::new()));
        let is_losing = Arc::new(AtomicBool::new(false));
        let (kept, leads_to, loses) = (Arc::clone(&streams), Arc::clone(&target), Arc::clone(&is_losing));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (client, to) = (client.unwrap(), leads_to.lock().unwrap().clone());
                // Nobody there: nobody here either.
                let Ok(service) = TcpStream::connect(to) else { continue };
                for (from, to, loses) in [(&client, &service, None), (&service, &client, Some(&loses))] {
                    let (from, to, loses) = (from.try_clone().unwrap(), to.try_clone().unwrap(), loses.cloned());
                    std::thread::spawn(move || {
                        // However one way ends, the other has nothing to be passed on for.
                        pass_on(&from, &to, loses.as_deref()).ok();
                        from.shutdown(Shutdown::Both).ok();
                        to.shutdown(Shutdown::Both).ok();
                    });
                }
                kept.lock().unwrap().extend([client, service]);
            }
        });
        Self { address, target, is_losing, streams }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// New connections go there from now on.
    pub(crate) fn lead_to(&self, url: &str) {
        *self.target.lock().unwrap() = host(url);
    }

    /// The connection breaks over which the next answer comes, before any of it is passed on.
    pub(crate) fn lose_an_answer(&self) {
        self.is_losing.store(true, Ordering::SeqCst);
    }

    /// Breaks every connection that there is.
    pub(crate) fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            // One that has ended needs no cut.
            stream.shutdown(Shutdown::Both).ok();
        }
    }
}

/// Until one of them ends, or is to lose what comes next.
fn pass_on(mut from: &TcpStream, mut to: &TcpStream, loses: Option<&AtomicBool>) -> io::Result<()> {
    let mut piece = [0; 65_536];
    loop {
        let count = from.read(&mut piece)?;
        if count == 0 || loses.is_some_and(|loses| loses.swap(false, Ordering::SeqCst)) {
            return Ok(());
        }
        to.write_all(&piece[..count])?;
    }
}

fn host(url: &str) -> String {
    url.trim_start_matches("http://").trim_end_matches('/').to_owned()
}
