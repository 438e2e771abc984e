//! How far something is, for whoever looks: on stderr, and only where that is a terminal.

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

/// A bar of bytes; without knowing how many there will be, a count.
pub(super) fn bytes(total: Option<u64>, what: &str) -> ProgressBar {
    let (bar, template) = match total {
        Some(total) => {
            (ProgressBar::new(total), "{msg} [{bar:32}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left")
        }
        None => (ProgressBar::new_spinner(), "{spinner} {msg} {binary_bytes}, {binary_bytes_per_sec}"),
    };
    let style = ProgressStyle::with_template(template).expect("a template of ours").progress_chars("#> ");
    // However it ends, it leaves no line behind.
    bar.with_style(style).with_message(what.to_owned()).with_finish(ProgressFinish::AndClear)
}
