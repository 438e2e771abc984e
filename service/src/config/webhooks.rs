//! Where webhooks may lead, and how often they are tried.

use std::path::Path;

use anyhow::Context as _;

use super::{Options, hours, seconds, within};
use crate::webhooks::Settings;

pub(super) fn settle(nearer: &Options, file: &Options, data_dir: &Path) -> anyhow::Result<Settings> {
    let allowed = nearer.webhook_allow.as_ref().or(file.webhook_allow.as_ref()).into_iter().flatten();
    let bounded = |name, given: Option<u32>, usual, max| within(name, given.unwrap_or(usual), 1, max);
    Ok(Settings {
        key_file: nearer.webhook_key_file.clone().or_else(|| file.webhook_key_file.clone()).unwrap_or_else(|| data_dir.join("webhook-key")),
        allowed: allowed
            .filter(|text| !text.is_empty())
            .map(|text| text.parse().with_context(|| format!("webhook-allow: {text:?} is no network, as in 10.1.0.0/16")))
            .collect::<anyhow::Result<_>>()?,
        is_http_allowed: nearer.webhook_http.or(file.webhook_http).unwrap_or(false),
        ca_file: nearer.webhook_ca_file.clone().or_else(|| file.webhook_ca_file.clone()),
        first_retry: seconds(bounded("webhook-retry-s", nearer.webhook_retry_s.or(file.webhook_retry_s), 5, 3600)?),
        retry_for: hours(bounded("webhook-retry-hours", nearer.webhook_retry_hours.or(file.webhook_retry_hours), 72, 168)?),
        disable_after: hours(bounded("webhook-disable-hours", nearer.webhook_disable_hours.or(file.webhook_disable_hours), 120, 720)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allow(network: &str) -> anyhow::Result<Settings> {
        let options = Options { webhook_allow: Some(vec![network.to_owned()]), ..Options::default() };
        settle(&options, &Options::default(), Path::new("/data"))
    }

    #[test]
    fn networks_are_read_or_named() {
        assert_eq!(allow("10.1.0.0/16").unwrap().allowed.len(), 1);
        assert!(allow("10.1.0.0/33").unwrap_err().to_string().contains("10.1.0.0/33"));
        assert_eq!(allow("").unwrap().key_file, Path::new("/data/webhook-key"));
    }
}
