//! Webhooks: what happened is sent to where a tenant wants it, signed, again and again until it is taken, and never to where only we can reach.

mod deliver;
mod secret;
mod send;

use std::{path::PathBuf, sync::Arc, time::Duration};

use deliver::Dispatcher;
use ipnet::IpNet;
pub use secret::SigningKey;
use send::Sender;
use tokio::sync::Notify;

use crate::{
    clock::Clock,
    metrics::Metrics,
    outbound::Targets,
    outbox::Outbox,
    store::{Store, Told},
};

/// What an operator decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Holds the key that all secrets are made of; all nodes have the same.
    pub key_file: PathBuf,
    /// Networks that are not public and may be sent to all the same.
    pub allowed: Vec<IpNet>,
    /// Whether targets may be plain HTTP.
    pub is_http_allowed: bool,
    /// Authorities that may vouch for targets beside the system's, in PEM.
    pub ca_file: Option<PathBuf>,
    /// Between the first attempt and the second. Each pause is twice the one before, up to six hours.
    pub first_retry: Duration,
    /// How long a delivery is tried.
    pub retry_for: Duration,
    /// How long every attempt must fail before a webhook is made inactive.
    pub disable_after: Duration,
}

/// Everything about webhooks that is not in the store.
#[derive(Debug)]
pub struct Webhooks {
    pub targets: Targets,
    pub key: SigningKey,
    pub settings: Settings,
    /// Wakes who delivers.
    due: Arc<Notify>,
    dispatcher: Dispatcher,
}

impl Webhooks {
    /// Begins to deliver; `body` makes of an event what is sent of it.
    pub fn start(
        settings: Settings,
        key: SigningKey,
        store: Store,
        outbox: &Arc<Outbox>,
        clock: Clock,
        metrics: Arc<Metrics>,
        body: fn(Told) -> String,
    ) -> anyhow::Result<Arc<Self>> {
        let targets = Targets::new(settings.allowed.clone(), settings.is_http_allowed);
        let sender = Sender::new(targets.clone(), settings.ca_file.as_deref())?;
        let due = Arc::new(Notify::new());
        let work = deliver::Work { store, sender, key: key.clone(), settings: settings.clone(), clock, metrics, body };
        let dispatcher = Dispatcher::start(work, outbox, Arc::clone(&due));
        Ok(Arc::new(Self { targets, key, settings, due, dispatcher }))
    }

    /// Something was made that is to be sent.
    pub fn note_delivery(&self) {
        self.due.notify_one();
    }

    /// Begins no more attempts, and returns when those under way are over or given back; after [`Outbox`]'s end has come.
    pub async fn close(&self) {
        self.dispatcher.ended().await;
    }
}
