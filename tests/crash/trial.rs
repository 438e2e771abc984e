//! One round after the other over one node: a load, a death, a recovery, and then everything is looked at.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use mayfly_tests::{random::Random, snapshot::Snapshot};

use super::{
    books::{self, History},
    checks,
    counts::Counts,
    load::{self, Crowd, Known, Load},
    node::{KeeperOf, Node, Victim},
};

/// Runs and sandboxes of the load that fit on the node at a time: fewer than the load wants.
const FIT: u64 = 6;
/// Sandboxes that write lines in each round.
const LINES: u64 = 2;
/// Accepted after the recovery, and where nobody dies.
const ACCEPTED_AFTER: usize = 4;
const ACCEPTED_UNBROKEN: usize = 40;
/// How often runs are tried again, where they are: more often than their keeper dies.
const RETRIES: u64 = 10;
/// How long a step may take to be reached, and the load to get on.
const STEP_DEADLINE: Duration = Duration::from_secs(60);
const LOAD_DEADLINE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(10);
/// After so many failures there is no use in going on.
const FAILURES_MAX: usize = 8;
/// Lines of the log that a failure shows.
const LAST_WORDS: usize = 60;

/// Who dies in a round, and when.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Death<'a> {
    Nobody,
    AtRandom(Victim),
    /// By itself, at this step, which is reached in the load.
    AtStep(Victim, &'a str),
    /// At random, and then its successor at this step of its start.
    AtStart(Victim, &'a str),
}

#[derive(Debug)]
pub(crate) struct Trial {
    name: String,
    node: Node,
    first: Snapshot,
    seed: u64,
    random: Random,
    rounds: u64,
    history: History,
    counts: Counts,
    failures: Vec<String>,
}

impl Death<'_> {
    fn victim(&self) -> Option<Victim> {
        match self {
            Self::Nobody => None,
            Self::AtRandom(victim) | Self::AtStep(victim, _) | Self::AtStart(victim, _) => Some(*victim),
        }
    }

    /// Whether it is at a step that is reached only where a run is tried again: its keeper has to die for that, too.
    fn needs_retries(&self) -> bool {
        matches!(self, Self::AtStep(_, "service.settle.returned"))
    }

    /// Whether the sandboxes died with their keeper.
    fn ends_keeper(&self) -> bool {
        self.victim() == Some(Victim::Keeper) || self.needs_retries()
    }

    /// How it stands in the table, for a trial of this name.
    fn how<'b>(&'b self, trial: &'b str) -> &'b str {
        match self {
            Self::Nobody | Self::AtRandom(_) => trial,
            Self::AtStep(_, step) | Self::AtStart(_, step) => step,
        }
    }

    /// Processes that die by it.
    const fn kills(&self) -> u64 {
        match self {
            Self::Nobody => 0,
            Self::AtRandom(_) | Self::AtStep(..) => 1,
            Self::AtStart(..) => 2,
        }
    }
}

impl Trial {
    /// Starts a node, has it do everything once, and looks at what it is like at rest.
    pub(crate) async fn start(name: &str, keeper_of: KeeperOf, seed: u64) -> Self {
        let node = Node::start(keeper_of, FIT).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let (random, history, counts) = (Random::new(seed), History::default(), Counts::default());
        let mut trial = Self {
            name: name.to_owned(),
            node,
            first: Snapshot::default(),
            seed,
            random,
            rounds: 0,
            history,
            counts,
            failures: Vec::new(),
        };
        let first = async {
            trial.live_through(Death::Nobody).await?;
            trial.node.first_snapshot().await
        };
        match first.await {
            Ok(first) => trial.first = first,
            Err(error) => panic!("{}", trial.failure(Death::Nobody, &error)),
        }
        trial
    }

    /// One round. What is found to be wrong is told at the end, with all that is needed to see the same again; the rounds go on from there.
    pub(crate) async fn round(&mut self, death: Death<'_>) {
        let Err(error) = self.live_through(death).await else { return };
        let failure = self.failure(death, &error);
        eprintln!("{failure}");
        self.failures.push(failure);
        assert!(self.failures.len() < FAILURES_MAX, "{}", self.failures.join("\n\n"));
        let again = async {
            self.node.recover()?;
            checks::settle(&self.node.place(), &self.node.database, &self.name, false).await?;
            checks::drop_layers(&self.node.place(), &self.node.database, &self.name).await?;
            self.node.clear().await?;
            self.node.first_snapshot().await
        };
        match again.await {
            Ok(first) => self.first = first,
            Err(error) => panic!("and then: {error:#}\n\n{}", self.failures.join("\n\n")),
        }
    }

    /// Hands in what was counted, and tells what was wrong.
    pub(crate) fn end(self) {
        self.counts.hand_in();
        assert!(self.failures.is_empty(), "{}", self.failures.join("\n\n"));
    }

    fn failure(&self, death: Death<'_>, error: &anyhow::Error) -> String {
        format!(
            "{}, round {}, {death:?}, MAYFLY_CRASH_SEED={}\n{error:#}\nservice and keeper said last:\n{}",
            self.name,
            self.rounds,
            self.seed,
            self.node.last_words(LAST_WORDS)
        )
    }

    async fn live_through(&mut self, death: Death<'_>) -> Result<()> {
        self.rounds += 1;
        let label = format!("{}-{}", self.name, self.rounds);
        let known = self.load_and_die(death, &label).await?;

        let victim = death.victim();
        let place = self.node.place();
        let rows = checks::settle(&place, &self.node.database, &format!("{label}-"), true).await.context("coming to rest")?;
        let mut found = checks::requests(&place, &known, &rows, death.ends_keeper(), victim.is_none()).await;
        let lines = checks::lines(&place, &known, &rows, death.ends_keeper()).await.context("reading the logs of what lives")?;
        found.wrong.extend(lines.wrong);
        let rows = checks::settle(&place, &self.node.database, &format!("{label}-"), false).await.context("deleting what lives")?;
        found.wrong.extend(books::contradictions(&self.node.database)?);
        found.wrong.extend(self.history.learn(&books::rows(&self.node.database, &self.name)?));

        checks::drop_layers(&place, &self.node.database, &format!("{label}-")).await?;
        self.node.clear().await.context("removing the images")?;
        let is_measured = !matches!(death, Death::Nobody);
        if is_measured {
            found.wrong.extend(self.node.compare(&self.first).await?);
        }
        ensure!(found.wrong.is_empty(), "{}", found.wrong.join("\n"));

        let line = self.counts.line(&victim.map_or_else(|| "nobody".to_owned(), |victim| victim.to_string()), death.how(&self.name));
        line.kills += death.kills();
        line.accepted += known.iter().filter(|known| known.id.is_some()).count() as u64;
        line.log_bytes += found.log_bytes + lines.log_bytes;
        line.snapshots += u64::from(is_measured);
        for row in &rows {
            *line.reasons.entry(row.reason.clone().unwrap_or_default()).or_default() += 1;
        }
        for _deleted in known.iter().filter(|known| known.deletion == Some(true)) {
            *line.reasons.entry("deleted".to_owned()).or_default() += 1;
        }
        Ok(())
    }

    /// The load, the death under it, the recovery, and a little more load. Returns what the clients know.
    async fn load_and_die(&mut self, death: Death<'_>, label: &str) -> Result<Vec<Known>> {
        if let Death::AtStep(victim, step) = death {
            let times = match step {
                // The second is that of the image that comes and goes: nobody makes up for it.
                _ if step.starts_with("service.import.") || step.starts_with("keeper.unpack.") => 2,
                _ if is_rare(step) || death.needs_retries() => 1,
                _ => 1 + self.random.below(6),
            };
            self.node.arm(victim, step, times)?;
        }
        self.node.import().await;
        let mut known = Vec::new();
        for number in 0..LINES {
            known.push(load::start_lines(&self.node.place(), format!("{label}-lines-{number}"), number).await);
        }
        let retry = if death.needs_retries() { RETRIES } else { 0 };
        let crowd = if matches!(death, Death::AtStep(_, step) if step.starts_with("service.start.")) { Crowd::Few } else { Crowd::Many };
        let load = Load::start(label, self.random.next(), &self.node.places(), self.node.other_archive(), retry, crowd);
        match death {
            Death::Nobody => {}
            Death::AtRandom(victim) => {
                self.random_moment().await;
                self.node.kill(victim)?;
            }
            Death::AtStep(victim, step) => {
                if step.starts_with("keeper.upgrade.") {
                    self.random_moment().await;
                    self.node.upgrade_keeper()?;
                }
                let deadline = Instant::now() + STEP_DEADLINE;
                while !self.node.is_dead(victim) {
                    ensure!(Instant::now() < deadline, "{step} is not reached within {} s", STEP_DEADLINE.as_secs());
                    if death.needs_retries() {
                        // Until it meets a run.
                        self.random_moment().await;
                        self.node.kill(Victim::Keeper)?;
                        self.node.revive_keeper()?;
                    }
                    tokio::time::sleep(LOOK).await;
                }
            }
            Death::AtStart(victim, step) => {
                self.random_moment().await;
                ensure!(self.node.die_at_start(victim, step)?, "{step} is not reached at the start");
            }
        }
        self.node.recover().context("recovering")?;
        // Who died in the import has not got the image yet.
        if !self.node.import().await {
            ensure!(self.node.import().await, "the image cannot be imported after the recovery");
        }
        let more = if matches!(death, Death::Nobody) { ACCEPTED_UNBROKEN } else { ACCEPTED_AFTER };
        let wanted = load.accepted() + more;
        let deadline = Instant::now() + LOAD_DEADLINE;
        while load.accepted() < wanted {
            ensure!(Instant::now() < deadline, "{} s after the recovery only {} were accepted", LOAD_DEADLINE.as_secs(), load.accepted());
            tokio::time::sleep(LOOK).await;
        }
        known.extend(load.finish().await);
        Ok(known)
    }

    async fn random_moment(&mut self) {
        tokio::time::sleep(Duration::from_micros(self.random.below(1_200_000))).await;
    }
}

/// Steps that the load reaches once in a while only.
fn is_rare(step: &str) -> bool {
    const RARE: [&str; 13] = [
        "service.image.",
        "service.delete.",
        "service.pause.",
        "service.start.",
        "service.stop.",
        "service.layer.",
        "service.update.",
        "service.settle.removed",
        "keeper.upgrade.",
        "keeper.control.",
        "keeper.exec.",
        "keeper.launch.disk_begun",
        "keeper.remove.disk",
    ];
    RARE.iter().any(|rare| step.starts_with(rare))
}
