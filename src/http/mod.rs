//! HTTP: connections, limits, routes, and errors to statuses.
//!
//! Knows what a binary cache looks like from outside and nothing of how a path is found. The invariants: on loopback
//! every failure is a fast 404, every wait has a bound, and a body that breaks cuts its connection.

mod activity;
mod answer;
mod api;
mod app;
mod cache;
mod compressors;
mod congestion;
mod counted_body;
mod file_socket;
mod gate;
mod listeners;
mod nar_body;
mod options;
mod packed;
mod packer;
mod range;
mod sent_nar;
mod server;

pub use listeners::{BindError, Listeners};
pub use options::{Compression, Limits, Options};
pub use server::Server;
