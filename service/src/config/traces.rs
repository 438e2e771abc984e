//! Where traces go, and how many.

use anyhow::{Context as _, ensure};
use reqwest::Url;

use super::{Options, given, within};

/// A collector of traces that speaks OTLP over HTTP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TraceSettings {
    /// Where spans are posted to.
    pub endpoint: Url,
    /// Of a hundred requests without a trace of their own so many begin one.
    pub percent: u32,
}

/// `None` where there is no collector.
pub(super) fn settle(nearer: &Options, file: &Options) -> anyhow::Result<Option<TraceSettings>> {
    let percent = within("trace-percent", nearer.trace_percent.or(file.trace_percent).unwrap_or(100), 0, 100)?;
    let Some(text) = given(nearer.otlp_endpoint.clone()).or_else(|| given(file.otlp_endpoint.clone())) else { return Ok(None) };
    // It may hold what is secret, which no error shows.
    let base: Url = text.parse().context("otlp-endpoint: no URL, as in http://127.0.0.1:4318")?;
    ensure!(matches!(base.scheme(), "http" | "https"), "otlp-endpoint: {} is neither http nor https", base.scheme());
    ensure!(
        base.username().is_empty() && base.password().is_none(),
        "otlp-endpoint: it holds a user or a password, which would not be sent; give OTEL_EXPORTER_OTLP_HEADERS the header that the collector wants"
    );
    let mut endpoint = base.clone();
    // As the specification of OTLP exporters has it for an endpoint of all signals.
    endpoint.set_path(&format!("{}/v1/traces", base.path().trim_end_matches('/')));
    Ok(Some(TraceSettings { endpoint, percent }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn to(endpoint: &str) -> anyhow::Result<Option<TraceSettings>> {
        settle(&Options { otlp_endpoint: Some(endpoint.to_owned()), ..Options::default() }, &Options::default())
    }

    #[test]
    fn spans_go_to_the_path_of_traces() {
        let path = |endpoint: &str| to(endpoint).unwrap().unwrap().endpoint.to_string();
        assert_eq!(path("http://127.0.0.1:4318"), "http://127.0.0.1:4318/v1/traces");
        assert_eq!(path("https://collector.example/otlp/"), "https://collector.example/otlp/v1/traces");
    }

    #[test]
    fn without_a_collector_there_are_no_traces() {
        assert_eq!(to("").unwrap(), None);
        assert!(to("ftp://collector").unwrap_err().to_string().contains("otlp-endpoint"));
    }

    #[test]
    fn a_password_in_the_address_is_refused_and_not_shown() {
        let refused = format!("{:#}", to("https://me:hidden@collector.example").unwrap_err());
        assert!(refused.contains("OTEL_EXPORTER_OTLP_HEADERS") && !refused.contains("hidden"), "{refused}");
    }
}
