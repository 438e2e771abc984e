//! Runs one service for all tests: prints where it is, stops when its stdin closes, and proves that nothing stayed behind.

use std::{
    io::{Read, Write},
    time::Duration,
};

use anyhow::{Result, ensure};
use mayfly_tests::{
    image,
    service::{self, Service},
};

fn main() -> Result<()> {
    let mut service = Service::start_shared()?;
    service.import("busybox")?;
    service.import("python")?;
    let mut place = service.place().clone();
    let folder = service::folder()?;
    let layout = folder.path().join("busybox-user");
    image::variant(&image::archive("busybox")?, &layout, &["--config.user", "user"])?;
    service::import(&place, &layout, "busybox-user")?;
    place.busybox_root = folder.path().join("busybox-root");
    image::unpack_root(&layout, &place.busybox_root)?;
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{}", serde_json::to_string(&place)?)?;
    stdout.flush()?;

    std::io::stdin().read_to_end(&mut Vec::new())?;

    let footprint = place.footprint();
    let status = service.stop()?;
    ensure!(status.success(), "the service ended with {status}\n{}", service.log());
    let left = footprint.wait_until_gone(Duration::from_secs(30));
    ensure!(left.is_empty(), "left behind: {left:#?}");
    Ok(())
}
