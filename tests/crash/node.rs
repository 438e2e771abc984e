//! One node to be broken: a service, its keeper and its Postgres, of which each can be killed, and a supervisor that starts what does not
//! come back by itself.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use mayfly_tests::{
    Client, Service,
    database::Database,
    host, image,
    keeper::Keeper,
    service::{self, Place},
    snapshot::{Keepers, Snapshot, Stock},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::sync::watch;

use super::{load::import, payload::MEMORY_BYTES};

/// How long the parts may take to be there again, and to come to rest.
const RECOVERY_DEADLINE: Duration = Duration::from_secs(90);
const REST_DEADLINE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(10);

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Victim {
    Service,
    Keeper,
    Postmaster,
    /// A process of Postgres' that serves the service.
    Backend,
}

/// Who looks after the keeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KeeperOf {
    /// The service starts it, and ends when it is gone.
    Service,
    /// A supervisor starts it, and starts it again at once.
    Supervisor,
}

#[derive(Debug)]
pub(crate) struct Node {
    service: Service,
    /// `None`: the service's own.
    keeper: Option<Keeper>,
    pub(crate) database: Database,
    /// Of every keeper that this node has had.
    keepers: Keepers,
    places: watch::Sender<Place>,
    archive: Arc<Vec<u8>>,
    /// An image with the same layers and another configuration.
    other_archive: Arc<Vec<u8>>,
    /// Sandboxes that the keeper has ready when nothing happens.
    ready: usize,
}

impl fmt::Display for Victim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Service => "service",
            Self::Keeper => "keeper",
            Self::Postmaster => "postgres",
            Self::Backend => "postgres backend",
        })
    }
}

impl Node {
    /// Starts one that holds so many runs and sandboxes of the load at a time.
    pub(crate) fn start(keeper_of: KeeperOf, fit: u64) -> Result<Self> {
        let capacity = (fit * MEMORY_BYTES).to_string();
        let mut service = Service::start_with(&["--capacity-memory-bytes", &capacity, "--capacity-cpu-millis", "64000"])?;
        let mut keeper = None;
        if keeper_of == KeeperOf::Supervisor {
            // Once by itself, which makes its folders.
            service.stop()?;
            let data_dir = service.place().data_dir.clone();
            keeper = Some(Keeper::start(&data_dir, "", &service.log_path())?);
            service.add_arguments(&["--keeper-socket", &data_dir.join("keeper.sock").display().to_string()]);
            service.start_again()?;
        }
        let folder = service::folder()?;
        let archive = image::archive("busybox")?;
        let (layout, other) = (folder.path().join("layout"), folder.path().join("other.tar"));
        image::variant(&archive, &layout, &["--config.env", "OTHER=1"])?;
        image::run(std::process::Command::new("tar").arg("-C").arg(&layout).arg("-cf").arg(&other).arg("."))?;
        let database = Database::of(&service.place().data_dir)?;
        let places = watch::channel(service.place().clone()).0;
        let (archive, other_archive) = (Arc::new(std::fs::read(archive)?), Arc::new(std::fs::read(other)?));
        let mut node = Self { service, keeper, database, keepers: Keepers::default(), places, archive, other_archive, ready: 0 };
        node.meet_keeper();
        node.ready = node.count_ready()?;
        Ok(node)
    }

    /// How many sandboxes a keeper that was never asked for one has half ready, once it has made as many as it wants.
    fn count_ready(&self) -> Result<usize> {
        let deadline = Instant::now() + REST_DEADLINE;
        let (mut last, mut same) = (0, 0);
        while same < 50 || last == 0 {
            ensure!(Instant::now() < deadline, "the keeper does not come to rest");
            std::thread::sleep(LOOK);
            let now = Stock::of(self.service.place().keeper_pid())?.groups;
            same = if now == last { same + 1 } else { 0 };
            last = now;
        }
        Ok(last)
    }

    pub(crate) fn place(&self) -> Place {
        self.service.place().clone()
    }

    pub(crate) fn places(&self) -> watch::Receiver<Place> {
        self.places.subscribe()
    }

    pub(crate) fn other_archive(&self) -> Arc<Vec<u8>> {
        Arc::clone(&self.other_archive)
    }

    /// The end of what service and keeper said.
    pub(crate) fn last_words(&self, lines: usize) -> String {
        let log = self.service.log();
        // The load's image comes all the time.
        let all: Vec<&str> = log.lines().filter(|line| !line.contains("an image was imported")).collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Notes the keeper's number: its cgroups and ids bear it, also when the next one has another.
    fn meet_keeper(&mut self) {
        let keeper = self.service.place().try_keeper_pid();
        if let Some(number) = keeper.and_then(host::try_keeper_number) {
            self.keepers.meet(number);
        }
    }

    /// Has the victim kill itself at a step, once it has been reached so many times. At rest.
    pub(crate) fn arm(&mut self, victim: Victim, step: &str, times: u64) -> Result<()> {
        let points = format!("{step}={}*off->1*return", times - 1);
        let points = if times == 1 { format!("{step}=1*return") } else { points };
        match victim {
            Victim::Service => {
                self.service.kill();
                self.service.arm(&points);
                let started = self.service.start_again();
                self.service.arm("");
                started?;
            }
            Victim::Keeper => {
                let place = self.service.place().clone();
                let keeper = self.keeper.as_mut().context("the keeper is the service's own")?;
                keeper.stop()?;
                *keeper = Keeper::start(&place.data_dir, &points, &self.service.log_path())?;
                self.wait_until_serving()?;
            }
            Victim::Postmaster | Victim::Backend => bail!("Postgres has no steps of ours"),
        }
        self.places.send_replace(self.service.place().clone());
        self.meet_keeper();
        Ok(())
    }

    /// Kills the victim and has its successor kill itself at this step of its start, over what lives; false if that came to serve.
    pub(crate) fn die_at_start(&mut self, victim: Victim, step: &str) -> Result<bool> {
        let points = format!("{step}=1*return");
        match victim {
            Victim::Service => {
                self.service.kill();
                self.service.arm(&points);
                let started = self.service.start_again();
                self.service.arm("");
                Ok(started.is_err())
            }
            Victim::Keeper => {
                self.kill(victim)?;
                let data_dir = self.service.place().data_dir.clone();
                let keeper = self.keeper.as_mut().context("the keeper is the service's own")?;
                while keeper.is_running() {
                    std::thread::sleep(LOOK);
                }
                match Keeper::start(&data_dir, &points, &self.service.log_path()) {
                    Ok(started) => *keeper = started,
                    Err(_died) => return Ok(true),
                }
                Ok(false)
            }
            Victim::Postmaster | Victim::Backend => bail!("Postgres has no steps of ours"),
        }
    }

    pub(crate) fn kill(&mut self, victim: Victim) -> Result<()> {
        let kill = |pid: u32| kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).context("it runs");
        match victim {
            Victim::Service => self.service.kill(),
            Victim::Keeper => kill(self.service.place().keeper_pid())?,
            Victim::Postmaster => kill(self.database.postmaster()?)?,
            Victim::Backend => kill(self.database.backend()?)?,
        }
        Ok(())
    }

    /// Starts a keeper that was killed again, at once.
    pub(crate) fn revive_keeper(&mut self) -> Result<()> {
        let data_dir = self.service.place().data_dir.clone();
        let keeper = self.keeper.as_mut().context("the keeper is the service's own")?;
        while keeper.is_running() {
            std::thread::sleep(LOOK);
        }
        *keeper = Keeper::start(&data_dir, "", &self.service.log_path())?;
        self.meet_keeper();
        Ok(())
    }

    /// Has the keeper go on as the program that lies there now.
    pub(crate) fn upgrade_keeper(&self) -> Result<()> {
        let keeper = self.service.place().try_keeper_pid().context("no keeper runs")?;
        Ok(kill(Pid::from_raw(keeper.cast_signed()), Signal::SIGHUP)?)
    }

    pub(crate) fn is_dead(&mut self, victim: Victim) -> bool {
        match victim {
            Victim::Service => !self.service.is_running(),
            Victim::Keeper => self.keeper.as_mut().map_or_else(|| self.service.place().try_keeper_pid().is_none(), |k| !k.is_running()),
            Victim::Postmaster | Victim::Backend => !self.database.answers(),
        }
    }

    /// Starts what does not come back by itself, until all is there and works together.
    pub(crate) fn recover(&mut self) -> Result<()> {
        let deadline = Instant::now() + RECOVERY_DEADLINE;
        loop {
            let data_dir = self.service.place().data_dir.clone();
            if let Some(keeper) = &mut self.keeper
                && !keeper.is_running()
            {
                *keeper = Keeper::start(&data_dir, "", &self.service.log_path())?;
            }
            if self.service.is_running() {
                // Without a keeper of its own it ends, and its Postgres with it; Postgres it starts again.
                if self.service.place().try_keeper_pid().is_some() && self.database.answers() && self.is_serving() {
                    break;
                }
            } else {
                self.service.start_again()?;
                self.places.send_replace(self.service.place().clone());
            }
            ensure!(Instant::now() < deadline, "the node does not serve again within {} s", RECOVERY_DEADLINE.as_secs());
            std::thread::sleep(LOOK);
        }
        self.meet_keeper();
        Ok(())
    }

    fn wait_until_serving(&self) -> Result<()> {
        let deadline = Instant::now() + RECOVERY_DEADLINE;
        while !self.is_serving() {
            ensure!(Instant::now() < deadline, "the service does not serve within {} s", RECOVERY_DEADLINE.as_secs());
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Whether the service says that it is ready, by the plainest of requests.
    fn is_serving(&self) -> bool {
        use std::io::{Read, Write};
        let address = self.service.place().url.trim_start_matches("http://").to_owned();
        let asked = || -> std::io::Result<String> {
            let mut stream = std::net::TcpStream::connect(&address)?;
            stream.set_read_timeout(Some(Duration::from_secs(10)))?;
            write!(stream, "GET /readyz HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        asked().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
    }

    /// Makes the load's image known; false if the service was not there to take it.
    pub(crate) async fn import(&self) -> bool {
        import(&Client::admin(self.service.place()), "busybox", self.archive.to_vec()).await == Some(true)
    }

    /// Removes every image, and with them what the keeper has ready for them, once it holds nothing else.
    pub(crate) async fn clear(&mut self) -> Result<()> {
        let deadline = Instant::now() + REST_DEADLINE;
        loop {
            let stock = Stock::of(self.service.place().keeper_pid())?;
            // What does not go in time shows in the snapshot.
            if stock.groups.checked_sub(stock.inits) == Some(self.ready) || Instant::now() > deadline {
                break;
            }
            tokio::time::sleep(LOOK).await;
        }
        let client = Client::admin(self.service.place());
        let list = client.get("/v1/images").await.expect(200);
        for image in list["items"].as_array().context("items")? {
            client.delete(&format!("/v1/images/{}", image["reference"].as_str().context("a reference")?)).await.expect(204);
        }
        Ok(())
    }

    /// What there is at rest, to be compared with later.
    pub(crate) async fn first_snapshot(&mut self) -> Result<Snapshot> {
        let deadline = Instant::now() + REST_DEADLINE;
        let mut last = self.snapshot()?;
        let mut same = 0;
        while same < 20 {
            ensure!(Instant::now() < deadline, "this node does not come to rest: {:?}", self.snapshot()?.differences(&last));
            tokio::time::sleep(LOOK).await;
            let now = self.snapshot()?;
            same = if now.differences(&last).is_empty() && last.differences(&now).is_empty() { same + 1 } else { 0 };
            last = now;
        }
        Ok(last)
    }

    /// What is there that was not before, or the other way round, when all has had time to go.
    pub(crate) async fn compare(&mut self, before: &Snapshot) -> Result<Vec<String>> {
        let deadline = Instant::now() + REST_DEADLINE;
        loop {
            // A keeper that takes a number has it for good, but may have been met while it started.
            self.meet_keeper();
            let differences = self.snapshot()?.differences(before);
            if differences.is_empty() || Instant::now() > deadline {
                return Ok(differences);
            }
            tokio::time::sleep(LOOK * 5).await;
        }
    }

    fn snapshot(&self) -> Result<Snapshot> {
        Snapshot::take(self.service.place(), &self.database, &self.keepers)
    }
}
