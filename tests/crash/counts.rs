//! How much was done: the table that a run of the crash tests leaves.

use std::{collections::BTreeMap, fmt::Write as _, fs::File, io::Write as _};

/// One line of the table.
#[derive(Debug, Default, Clone)]
pub(crate) struct Line {
    pub(crate) kills: u64,
    pub(crate) accepted: u64,
    pub(crate) reasons: BTreeMap<String, u64>,
    pub(crate) log_bytes: u64,
    pub(crate) snapshots: u64,
}

/// Lines by victim and by how it was killed.
#[derive(Debug, Default)]
pub(crate) struct Counts(BTreeMap<(String, String), Line>);

impl Counts {
    pub(crate) fn line(&mut self, victim: &str, how: &str) -> &mut Line {
        self.0.entry((victim.to_owned(), how.to_owned())).or_default()
    }

    /// Appends its lines to the file that `MAYFLY_CRASH_TABLE` names, if it names one, for the table over all tests.
    pub(crate) fn hand_in(&self) {
        #[expect(clippy::disallowed_methods, reason = "this is how `make test-crash` says where the table is gathered")]
        let Ok(path) = std::env::var("MAYFLY_CRASH_TABLE") else { return };
        let mut text = String::new();
        for ((victim, how), line) in &self.0 {
            let Line { kills, accepted, reasons, log_bytes, snapshots } = line;
            let reasons: Vec<String> = reasons.iter().map(|(reason, count)| format!("{reason}:{count}")).collect();
            let reasons = if reasons.is_empty() { "-".to_owned() } else { reasons.join(",") };
            writeln!(text, "{victim}\t{how}\t{kills}\t{accepted}\t{log_bytes}\t{snapshots}\t{reasons}").expect("a String takes everything");
        }
        let appended = File::options().create(true).append(true).open(&path).and_then(|mut file| file.write_all(text.as_bytes()));
        appended.unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}
