//! What the tests share: a running service, a client that holds every answer against the contract, and a look at the host.

#[path = "harness/chart.rs"]
pub mod chart;
#[path = "harness/client.rs"]
pub mod client;
#[path = "harness/contract.rs"]
pub mod contract;
#[path = "harness/database.rs"]
pub mod database;
#[path = "harness/host.rs"]
pub mod host;
#[path = "harness/image.rs"]
pub mod image;
#[path = "harness/keeper.rs"]
pub mod keeper;
#[path = "harness/node_image.rs"]
pub mod node_image;
#[path = "harness/outcome.rs"]
pub mod outcome;
#[path = "harness/pod.rs"]
pub mod pod;
#[path = "harness/postgres.rs"]
pub mod postgres;
#[path = "harness/prometheus.rs"]
pub mod prometheus;
#[path = "harness/random.rs"]
pub mod random;
#[path = "harness/registry.rs"]
pub mod registry;
#[path = "harness/sdk.rs"]
pub mod sdk;
#[path = "harness/service.rs"]
pub mod service;
#[path = "harness/snapshot.rs"]
pub mod snapshot;
#[path = "harness/stream.rs"]
pub mod stream;
#[path = "harness/token.rs"]
pub mod token;

pub use client::{Answer, Client};
pub use service::Service;
