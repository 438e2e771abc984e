//! The service behind the binary `mayfly`: HTTP, Postgres, scheduling; everything privileged is asked of the keeper.

pub mod api;
pub mod cli;
pub mod clock;
pub mod config;
pub mod doctor;
pub mod engine;
pub mod images;
pub mod logs;
pub mod metrics;
pub mod outbound;
pub mod outbox;
pub mod postgres;
pub mod runtime;
pub mod sandbox;
pub mod serve;
pub mod store;
mod telemetry;
pub mod token;
pub mod webhooks;
