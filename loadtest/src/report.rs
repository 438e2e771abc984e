//! What was measured, as a table for the terminal and as Markdown for the documents.

use std::fmt::Write;

use crate::measure::Figures;

/// All figures of one go.
#[derive(Debug)]
pub(crate) struct Report {
    about: String,
    at_once: u32,
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    program: &'static str,
    contender: &'static str,
    figures: Figures,
}

impl Report {
    pub(crate) fn new(about: &str, at_once: u32) -> Self {
        Self { about: about.to_owned(), at_once, rows: Vec::new() }
    }

    /// Adds a row. The first of a program is what the others are compared with.
    pub(crate) fn add(&mut self, program: &'static str, contender: &'static str, figures: Figures) {
        self.rows.push(Row { program, contender, figures });
    }

    /// Columns for a terminal.
    pub(crate) fn table(&self) -> String {
        let [program, contender, p50, p90, p99, ratio, rate, rate_ratio] = self.heads();
        let mut text =
            format!("\n{}\n{program:14} {contender:24} {p50:>8} {p90:>8} {p99:>8} {ratio:>7} {rate:>16} {rate_ratio:>7}\n", self.about);
        for cells in self.cells() {
            let [program, contender, p50, p90, p99, ratio, rate, rate_ratio] = cells;
            // Writing to a string cannot fail.
            writeln!(text, "{program:14} {contender:24} {p50:>8} {p90:>8} {p99:>8} {ratio:>7} {rate:>16} {rate_ratio:>7}").ok();
        }
        text
    }

    /// A page for `docs/`.
    pub(crate) fn markdown(&self) -> String {
        let mut text = format!(
            "# Performance\n\nWritten by `make bench`. {}.\n\n\
             Each program is run from outside to its end: by `POST /v1/runs` with everything that a caller gets (token, durable rows in\n\
             Postgres, limits, output, usage), and by other runtimes as a plain process on the same root folder with the same limits for\n\
             memory, processes and CPU. Bubblewrap has no such limits. The service, its Postgres and the measuring program share the\n\
             machine. Ratios are to mayfly: above 1 is slower in time, and below 1 is fewer in runs per second.\n\n",
            self.about
        );
        writeln!(text, "| {} |\n|---|---|---:|---:|---:|---:|---:|---:|", self.heads().join(" | ")).ok();
        for cells in self.cells() {
            writeln!(text, "| {} |", cells.join(" | ")).ok();
        }
        text
    }

    fn heads(&self) -> [String; 8] {
        let rate = format!("runs/s, {} at once", self.at_once);
        ["program", "runtime", "p50 ms", "p90 ms", "p99 ms", "ratio", &rate, "ratio"].map(ToOwned::to_owned)
    }

    fn cells(&self) -> impl Iterator<Item = [String; 8]> {
        self.rows.iter().map(|Row { program, contender, figures: f }| {
            let base = self.rows.iter().find(|row| row.program == *program).map_or(f, |row| &row.figures);
            [
                (*program).to_owned(),
                (*contender).to_owned(),
                format!("{:.2}", f.p50_ms),
                format!("{:.2}", f.p90_ms),
                format!("{:.2}", f.p99_ms),
                format!("{:.2}", f.p50_ms / base.p50_ms),
                format!("{:.0}", f.rate),
                format!("{:.2}", f.rate / base.rate),
            ]
        })
    }
}
