//! From which registries images may be pulled, and when they go again.

use std::path::Path;

use anyhow::Context as _;

use super::{Options, hours, seconds, within};
use crate::images::{Collecting, RegistrySettings};

pub(super) fn settle(nearer: &Options, file: &Options, data_dir: &Path) -> anyhow::Result<RegistrySettings> {
    let hosts = nearer.registry_hosts.as_ref().or(file.registry_hosts.as_ref()).into_iter().flatten();
    let allowed = nearer.registry_allow.as_ref().or(file.registry_allow.as_ref()).into_iter().flatten();
    let host = |text: &String| text.parse().map_err(|error: String| anyhow::anyhow!("registry-hosts: {error}"));
    let mirrors = nearer.registry_mirror.as_ref().or(file.registry_mirror.as_ref()).into_iter().flatten();
    let mirror = |text: &String| text.parse().map_err(|error: String| anyhow::anyhow!("registry-mirror: {error}"));
    let network = |text: &String| text.parse().with_context(|| format!("registry-allow: {text:?} is no network, as in 10.1.0.0/16"));
    Ok(RegistrySettings {
        hosts: hosts.filter(|text| !text.is_empty()).map(host).collect::<anyhow::Result<_>>()?,
        mirrors: mirrors.filter(|text| !text.is_empty()).map(mirror).collect::<anyhow::Result<_>>()?,
        allowed: allowed.filter(|text| !text.is_empty()).map(network).collect::<anyhow::Result<_>>()?,
        ca_file: nearer.registry_ca_file.clone().or_else(|| file.registry_ca_file.clone()),
        key_file: nearer
            .registry_key_file
            .clone()
            .or_else(|| file.registry_key_file.clone())
            .unwrap_or_else(|| data_dir.join("registry-key")),
        stall: seconds(within("registry-stall-s", nearer.registry_stall_s.or(file.registry_stall_s).unwrap_or(30), 1, 600)?),
    })
}

pub(super) fn collecting(nearer: &Options, file: &Options) -> anyhow::Result<Collecting> {
    let high_water = nearer.image_gc_high_water.or(file.image_gc_high_water).unwrap_or(85);
    let idle_hours = nearer.image_gc_idle_hours.or(file.image_gc_idle_hours).unwrap_or(24);
    Ok(Collecting {
        high_water_percent: within("image-gc-high-water", high_water, 0, 100)?.into(),
        idle: hours(within("image-gc-idle-hours", idle_hours, 0, 8760)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(options: &Options) -> anyhow::Result<RegistrySettings> {
        settle(options, &Options::default(), Path::new("/data"))
    }

    #[test]
    fn hosts_and_networks_are_read_or_named() {
        let hosts = |text: &str| settled(&Options { registry_hosts: Some(vec![text.to_owned()]), ..Options::default() });
        assert_eq!(hosts("*.example:5000").unwrap().hosts.len(), 1);
        assert!(hosts("").unwrap().hosts.is_empty());
        assert_eq!(hosts("").unwrap().key_file, Path::new("/data/registry-key"));
        assert!(hosts("https://a.example").unwrap_err().to_string().contains("registry-hosts"));
        let mirror = Options { registry_mirror: Some(vec!["registry.example".to_owned()]), ..Options::default() };
        assert!(settled(&mirror).unwrap_err().to_string().contains("registry-mirror"));
        let allow = Options { registry_allow: Some(vec!["10.1.0.0/33".to_owned()]), ..Options::default() };
        assert!(settled(&allow).unwrap_err().to_string().contains("10.1.0.0/33"));
    }
}
