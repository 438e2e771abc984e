//! The terminal that a person sits at.

use std::{
    io::{self, IsTerminal as _},
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde_json::{Value, json};

/// Whether it passes on every key now. For [`super::output::note`]: which lines end how.
static IS_RAW: AtomicBool = AtomicBool::new(false);

/// A terminal that passes every key on as it is, until this is dropped.
#[derive(Debug)]
pub(super) struct Raw {
    before: Termios,
}

impl Raw {
    /// Of standard input (termios(3), «raw mode»).
    pub(super) fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Drain, &raw)?;
        IS_RAW.store(true, Ordering::Relaxed);
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // One that is gone needs nothing; one that is held up (Ctrl-S) is not waited for.
        tcsetattr(io::stdin(), OptionalActions::Now, &self.before).ok();
        IS_RAW.store(false, Ordering::Relaxed);
    }
}

pub(super) fn is_raw() -> bool {
    IS_RAW.load(Ordering::Relaxed)
}

/// Whether a person types there.
pub(super) fn is_typed_at() -> bool {
    io::stdin().is_terminal()
}

/// Rows and columns, as the API takes them; `None` if there is no terminal, or one without a size.
pub(super) fn size() -> Option<Value> {
    /// What the API takes.
    const MAX: u16 = 1000;
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())).ok()?;
    let is_sized = size.ws_row > 0 && size.ws_col > 0;
    is_sized.then(|| json!({ "rows": size.ws_row.min(MAX), "columns": size.ws_col.min(MAX) }))
}
