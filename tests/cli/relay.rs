//! A stretch of network between a client and the service that can be cut.

use std::{
    io,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
};

/// Passes connections on for as long as this process lives.
#[derive(Debug)]
pub(crate) struct Relay {
    address: SocketAddr,
    /// Where it leads.
    target: Arc<Mutex<String>>,
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
        let (kept, leads_to) = (Arc::clone(&streams), Arc::clone(&target));
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let (client, to) = (client.unwrap(), leads_to.lock().unwrap().clone());
                // Nobody there: nobody here either.
                let Ok(service) = TcpStream::connect(to) else { continue };
                for (from, to) in [(&client, &service), (&service, &client)] {
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    std::thread::spawn(move || {
                        // However one way ends, the other has nothing to be passed on for.
                        io::copy(&mut from, &mut to).ok();
                        from.shutdown(Shutdown::Both).ok();
                        to.shutdown(Shutdown::Both).ok();
                    });
                }
                kept.lock().unwrap().extend([client, service]);
            }
        });
        Self { address, target, streams }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// New connections go there from now on.
    pub(crate) fn lead_to(&self, url: &str) {
        *self.target.lock().unwrap() = host(url);
    }

    /// Breaks every connection that there is.
    pub(crate) fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            // One that has ended needs no cut.
            stream.shutdown(Shutdown::Both).ok();
        }
    }
}

fn host(url: &str) -> String {
    url.trim_start_matches("http://").trim_end_matches('/').to_owned()
}
