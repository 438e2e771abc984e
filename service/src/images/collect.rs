//! Images that were pulled go where room is short, the one first that was of no use for the longest: they can be pulled again. What lost its name goes with what needed it last.

use std::{collections::HashSet, time::Duration};

use serde_json::json;
use tokio::time::Instant;

use super::Images;
use crate::store::{Act, IdleImage};

/// Between two looks at the disk, and after one at which it was short and nothing could go.
const LOOK: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// Between two looks at what lost its name.
const LEFTOVER: Duration = Duration::from_secs(30);
/// What is deleted is room only a moment later.
const SETTLE: Duration = Duration::from_secs(2);
/// Candidates of one look: those whose content is at other nodes are of no use to this one.
const CANDIDATES: u32 = 100;
/// What goes before it is looked again which are of use by now.
const AT_ONCE: usize = 10;

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
        let mut looked_at = Instant::now();
        loop {
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
        while self.is_full()? {
            let idle = self.idle_here().await?;
            if idle.is_empty() {
                return Ok(Found::Nothing);
            }
            for IdleImage { tenant, image } in idle {
                if !self.is_full()? {
                    break;
                }
                let act = Act { actor: None, at: self.clock.now(), data: json!({ "reason": "unused" }) };
                let removed = self.store.remove_image(tenant.as_ref(), &image.reference, Some(&image.digest), &act).await?;
                if removed.is_some() {
                    tracing::info!(image.reference = image.reference, image.digest = image.digest, "an unused image was given up for room");
                    self.metrics.image_collected();
                    self.unlink(image.root, HashSet::new()).await;
                }
                tokio::time::sleep(SETTLE).await;
            }
        }
        Ok(Found::Enough)
    }

    /// Some that this node has, the one first that was of no use for the longest. To look for them is a look at every sandbox that is remembered.
    async fn idle_here(&self) -> anyhow::Result<Vec<IdleImage>> {
        let before = self.clock.now() - self.collecting.idle;
        let here = self.keeper.images().await?;
        let idle = self.store.idle_images(before, CANDIDATES).await?;
        Ok(idle.into_iter().filter(|idle| here.contains(&idle.image.root)).take(AT_ONCE).collect())
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
