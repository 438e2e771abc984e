//! The contenders take turns, so that whatever else the machine does meets all of them.

use std::sync::Arc;

use anyhow::Result;

use super::{
    Arguments,
    contender::{Contender, Program},
    well,
};
use crate::{
    drive::{self, Until},
    shape::bar,
    tally::Tally,
};

/// What was measured of one contender and one program.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) program: &'static str,
    pub(super) contender: &'static str,
    pub(super) version: String,
    /// One at a time.
    pub(super) one: Tally,
    /// Several at a time.
    pub(super) many: Tally,
}

/// Runs before the clock starts: caches fill, connections open.
const WARM_UP: u64 = 3;
/// Of each contender in each round, at the least.
const RUNS_MIN: u32 = 2;

pub(super) async fn measure(program: &Program, contenders: Vec<Arc<Contender>>, arguments: &Arguments) -> Result<Vec<Row>> {
    let Arguments { runs, rounds, at_once, .. } = *arguments;
    let mut rows = Vec::new();
    for contender in &contenders {
        let name = contender.name();
        let first = drive::closed(contender, 1, Until::Count(WARM_UP), &bar(name, WARM_UP)?).await?;
        let begun = well(name, first)?.begun;
        let (one, many) = (Tally::new(begun)?, Tally::new(begun)?);
        rows.push(Row { program: program.name, contender: name, version: contender.version(), one, many });
    }
    for round in 0..rounds {
        for places in [1, at_once] {
            for turn in 0..contenders.len() {
                // Nobody is always the one behind the same other.
                let next = (turn + usize::try_from(round)?) % contenders.len();
                let contender = &contenders[next];
                let row = &mut rows[next];
                // Several at a time share out as many rounds of places, at the least.
                let count = (runs / rounds / program.one_in / contender.one_in()).max(RUNS_MIN * places);
                let title = format!("{}: {}", program.name, contender.name());
                let tally = drive::closed(contender, places, Until::Count(count.into()), &bar(&title, count.into())?).await?;
                let tally = well(&title, tally)?;
                if places == 1 { row.one.absorb(tally)? } else { row.many.absorb(tally)? }
            }
        }
    }
    Ok(rows)
}
