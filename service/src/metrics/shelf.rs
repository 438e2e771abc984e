//! Where series are made and kept.

use prometheus::{
    Counter, Encoder as _, Gauge, GaugeVec, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder, core::Collector,
};

/// Makes series, and tells all that it made.
#[derive(Debug, Default)]
pub(super) struct Shelf(Registry);

impl Shelf {
    pub(super) fn counter(&self, name: &str, help: &str) -> anyhow::Result<IntCounter> {
        self.keep(IntCounter::new(name, help)?)
    }

    pub(super) fn seconds(&self, name: &str, help: &str) -> anyhow::Result<Counter> {
        self.keep(Counter::new(name, help)?)
    }

    pub(super) fn counters(&self, name: &str, help: &str, labels: &[&str]) -> anyhow::Result<IntCounterVec> {
        self.keep(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn gauge(&self, name: &str, help: &str) -> anyhow::Result<IntGauge> {
        self.keep(IntGauge::new(name, help)?)
    }

    pub(super) fn fraction(&self, name: &str, help: &str) -> anyhow::Result<Gauge> {
        self.keep(Gauge::new(name, help)?)
    }

    pub(super) fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> anyhow::Result<IntGaugeVec> {
        self.keep(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn fractions(&self, name: &str, help: &str, labels: &[&str]) -> anyhow::Result<GaugeVec> {
        self.keep(GaugeVec::new(Opts::new(name, help), labels)?)
    }

    pub(super) fn histograms(&self, name: &str, help: &str, labels: &[&str], buckets: &[f64]) -> anyhow::Result<HistogramVec> {
        self.keep(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels)?)
    }

    /// Every series, in the text format of Prometheus.
    pub(super) fn text(&self) -> anyhow::Result<Vec<u8>> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.0.gather(), &mut text)?;
        Ok(text)
    }

    pub(super) fn keep<C: Collector + Clone + 'static>(&self, series: C) -> anyhow::Result<C> {
        self.0.register(Box::new(series.clone()))?;
        Ok(series)
    }
}
