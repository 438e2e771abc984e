//! Images that were pulled go where room is short, the one first that was of no use for the longest: they can be pulled again. What lost its name goes with what needed it last.

use std::{collections::HashSet, time::Duration};

use serde_json::json;
use time::OffsetDateTime;
use tokio::time::Instant;

use super::Images;
use crate::{sandbox::ImageId, store::Act};

/// Between two looks at the disk, and after one at which it was short and nothing could go.
const LOOK: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// Between two looks at what lost its name.
const LEFTOVER: Duration = Duration::from_secs(30);
/// What is deleted is room only a moment later.
const SETTLE: Duration = Duration::from_secs(2);
/// Between two looks for what nothing needs any more here, however it came to that: another node may have given it up, which deletes only what is there.
const SWEEP: Duration = Duration::from_secs(3600);
/// What goes before it is looked again which are of use by now.
const AT_ONCE: u32 = 10;

/// When images go that were pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Collecting {
    /// Where so much of the disk is used; 100: never.
    pub high_water_percent: u64,
    /// Those of which nothing was made for so long.
    pub idle: Duration,
}

/// What became of a look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Enough,
    /// There is no room, and nothing that could go.
    Nothing,
}

impl Images {
    /// Sees to it, to what lost its name, and to what is left of pulls, for as long as the service lives. What fails is logged.
    pub async fn collect(&self) {
        let (mut looked_at, mut swept_at) = (Instant::now(), Instant::now());
        loop {
            if swept_at.elapsed() >= SWEEP {
                if let Err(error) = self.try_to_sweep().await {
                    tracing::warn!(error = format!("{error:#}"), "looking for what is left of images failed; it is tried again");
                }
                swept_at = Instant::now();
            }
            if looked_at.elapsed() >= LEFTOVER {
                self.unlink_leftover().await;
                looked_at = Instant::now();
            }
            if let Err(error) = self.parts.sweep(self.clock.now()) {
                tracing::warn!(%error, "what is left of pulls could not be looked through; it is tried again");
            }
            let pause = match self.try_to_collect().await {
                Ok(Found::Enough) => LOOK,
                Ok(Found::Nothing) => LOOK_AGAIN,
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "room could not be made by giving up images; it is tried again");
                    LOOK_AGAIN
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    async fn try_to_collect(&self) -> anyhow::Result<Found> {
        if self.is_full()? {
            // What nothing needs goes before what somebody may.
            self.try_to_sweep().await?;
        }
        while self.is_full()? {
            let before = self.clock.now() - self.collecting.idle;
            let idle = self.idle_here(before).await?;
            if idle.is_empty() {
                return Ok(Found::Nothing);
            }
            for root in idle {
                if !self.is_full()? {
                    break;
                }
                let act = Act { actor: None, at: self.clock.now(), data: json!({ "reason": "unused" }) };
                let gone = self.store.give_up_root(&root, before, &act).await?;
                for reference in &gone {
                    tracing::info!(image.reference = reference, image.root = %root, "an unused image was given up for room");
                    self.metrics.image_collected();
                }
                if !gone.is_empty() {
                    self.unlink(root, HashSet::new()).await;
                }
                tokio::time::sleep(SETTLE).await;
            }
        }
        Ok(Found::Enough)
    }

    /// Some that this node has, the one first that was of no use for the longest. To look for them is a look at every sandbox that is remembered.
    async fn idle_here(&self, before: OffsetDateTime) -> anyhow::Result<Vec<ImageId>> {
        Ok(self.store.idle_roots(&self.keeper.images().await?, before, AT_ONCE).await?)
    }

    fn is_full(&self) -> anyhow::Result<bool> {
        let disk = rustix::fs::statvfs(&self.uploads)?;
        let used = disk.f_blocks.saturating_sub(disk.f_bfree);
        Ok(self.collecting.high_water_percent < 100 && is_over(used, disk.f_bavail, self.collecting.high_water_percent))
    }
}

/// As df(1) reckons: what is kept for root is nobody's.
fn is_over(used: u64, available: u64, percent: u64) -> bool {
    u128::from(used) * 100 >= u128::from(percent) * (u128::from(used) + u128::from(available))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_full_from_its_mark_on() {
        assert!(is_over(85, 15, 85) && !is_over(84, 16, 85));
        assert!(is_over(0, 100, 0) && is_over(1, 0, 99));
    }
}
