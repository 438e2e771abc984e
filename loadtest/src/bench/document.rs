//! `docs/performance.md`: what was measured, around a part that people write and no measurement touches.

use std::{fmt::Write as _, fs, path::Path};

use anyhow::{Context as _, Result};

use super::{
    PROGRAMS,
    promise::{Promise, Promises},
    rounds::Row,
};

const BEGIN: &str = "<!-- by hand: from here to the other mark, `make bench` changes nothing -->";
const END: &str = "<!-- by hand: the end -->";

/// The page.
#[derive(Debug)]
pub(super) struct Document {
    about: String,
    at_once: u32,
    /// What stands between the marks, without them.
    by_hand: String,
    rows: Vec<Row>,
    promises: Promises,
}

impl Document {
    /// Reads the part that stays. Fails where a page has none: nobody's words are to be lost.
    pub(super) fn new(about: &str, page: Option<&Path>, at_once: u32) -> Result<Self> {
        let by_hand = match page {
            Some(page) => by_hand(&fs::read_to_string(page).with_context(|| page.display().to_string())?)?,
            None => String::new(),
        };
        Ok(Self { about: about.to_owned(), at_once, by_hand, rows: Vec::new(), promises: Promises::default() })
    }

    pub(super) fn add(&mut self, rows: Vec<Row>, promises: Promises) {
        self.rows = rows;
        self.promises = promises;
    }

    pub(super) fn is_met(&self) -> bool {
        self.promises.all.iter().all(|promise| promise.is_met)
    }

    /// For a terminal.
    pub(super) fn text(&self) -> String {
        let mut text = format!("\n{}\n\n", self.about);
        // Writing to a string cannot fail.
        for Promise { what, wanted, measured, is_met, .. } in &self.promises.all {
            writeln!(text, "{:6} {what:64} {wanted:>14} {measured:>14}", if *is_met { "met" } else { "MISSED" }).ok();
        }
        let [program, contender, p50, p90, p99, ratio, rate, rate_ratio] = self.heads();
        writeln!(text, "\n{program:14} {contender:28} {p50:>8} {p90:>8} {p99:>8} {ratio:>7} {rate:>16} {rate_ratio:>7}").ok();
        for [program, contender, p50, p90, p99, ratio, rate, rate_ratio] in self.cells() {
            writeln!(text, "{program:14} {contender:28} {p50:>8} {p90:>8} {p99:>8} {ratio:>7} {rate:>16} {rate_ratio:>7}").ok();
        }
        text
    }

    /// The page anew.
    pub(super) fn markdown(&self) -> String {
        let mut text = format!(
            "# Performance\n\nWritten by `make bench`: {}.\n\n## Targets\n\n\
             Measured from outside, by HTTP, with everything that a caller gets: token, durable rows in Postgres (`fsync` on), limits, output, usage. The service, its Postgres and the measuring program share the\n\
             machine. Ratios count; figures in milliseconds are those of this machine.\n\n\
             | target | wanted | measured | | how |\n|---|---:|---:|---|---|\n",
            self.about
        );
        for Promise { what, wanted, measured, is_met, how } in &self.promises.all {
            writeln!(text, "| {what} | {wanted} | {measured} | {} | {how} |", if *is_met { "met" } else { "**missed**" }).ok();
        }
        text.push_str("\nWhat an idle sandbox takes, in MiB, part by part:\n\n| part | MiB |\n|---|---:|\n");
        for (part, mib) in &self.promises.memory {
            writeln!(text, "| {part} | {mib} |").ok();
        }
        text.push_str(
            "\n## Beside other runtimes\n\n\
             Each program is run to its end on the same root folder, with the same limits for memory, processes and CPU, no network and no capabilities: ours by `POST /v1/runs`; Docker by create, start, wait and output\n\
             through its API on its unix socket, its removal not counted; the others as a plain process, `… run` and its end, without any record of it. Bubblewrap has no limits, and is a floor rather than an equal. The\n\
             contenders take turns in rounds. Ratios are to mayfly: above 1 is slower in time, and below 1 is fewer in runs per second.\n\n",
        );
        writeln!(text, "| {} |\n|---|---|---:|---:|---:|---:|---:|---:|", self.heads().join(" | ")).ok();
        for cells in self.cells() {
            writeln!(text, "| {} |", cells.join(" | ")).ok();
        }
        let versions =
            self.rows.iter().filter(|row| row.program == PROGRAMS[0].name).map(|row| format!("{} {}", row.contender, row.version));
        write!(text, "\nVersions: {}.\n\n{BEGIN}\n{}{END}\n", versions.collect::<Vec<_>>().join("; "), self.by_hand).ok();
        text
    }

    fn heads(&self) -> [String; 8] {
        let rate = format!("runs/s, {} at once", self.at_once);
        ["program", "runtime", "p50 ms", "p90 ms", "p99 ms", "ratio", &rate, "ratio"].map(ToOwned::to_owned)
    }

    fn cells(&self) -> impl Iterator<Item = [String; 8]> {
        self.rows.iter().map(|row| {
            // The first of a program is ours.
            let base = self.rows.iter().find(|first| first.program == row.program).unwrap_or(row);
            let rate = if row.many.rate() < 100.0 { format!("{:.1}", row.many.rate()) } else { format!("{:.0}", row.many.rate()) };
            [
                row.program.to_owned(),
                row.contender.to_owned(),
                format!("{:.2}", row.one.latency_ms(0.5)),
                format!("{:.2}", row.one.latency_ms(0.9)),
                format!("{:.2}", row.one.latency_ms(0.99)),
                format!("{:.2}", row.one.latency_ms(0.5) / base.one.latency_ms(0.5)),
                rate,
                format!("{:.2}", row.many.rate() / base.many.rate()),
            ]
        })
    }
}

fn by_hand(page: &str) -> Result<String> {
    let (_, rest) = page.split_once(BEGIN).context("the page has no part by hand: its first mark is missing")?;
    let (part, _) = rest.split_once(END).context("the page's part by hand does not end: its second mark is missing")?;
    Ok(part.strip_prefix('\n').unwrap_or(part).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_is_written_anew_keeps_what_was_written_by_hand() {
        let words = "\n## Why\n\nBecause.\n\n";
        let document = Document { by_hand: words.to_owned(), ..Document::new("a machine", None, 8).unwrap() };

        assert_eq!(by_hand(&document.markdown()).unwrap(), words);
    }

    #[test]
    fn a_page_without_marks_is_not_written_over() {
        assert!(by_hand("# Performance\n").is_err());
        assert!(by_hand(&format!("{BEGIN}\nwords")).is_err());
    }
}
