//! A page as a browser has it when its scripts have run.

use std::{process::Command, time::Duration};

use mayfly_tests::service;

const DEADLINE: Duration = Duration::from_secs(180);

/// What Debian's Chromium makes of this address, as HTML. The page has had time to look at its figures once more.
pub(crate) fn page(url: &str) -> String {
    let profile = service::folder().expect("a folder can be made");
    let mut chromium = Command::new("chromium");
    chromium
        .args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"])
        .args(["--disable-component-update", "--disable-sync", "--virtual-time-budget=8000", "--window-size=1400,2000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", profile.path().display()))
        .arg(url)
        .env("HOME", profile.path());
    let (status, said) = service::finish(&mut chromium, DEADLINE).expect("chromium is there: tools/setup.sh test installs it");
    assert!(status.success(), "{said}");
    said
}
