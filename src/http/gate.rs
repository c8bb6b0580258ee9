//! Who may come in: networks, connections in all and per address, requests a second.
//!
//! Loopback is the local Nix: its connections have a bound of their own and its requests none, because a refusal there
//! fails builds.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use dashmap::DashMap;
use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use hyper::header::HeaderMap;
use ipnet::IpNet;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::file_socket::FileQueue;
use super::{Limits, Options};
use crate::metrics::Refusal;
use crate::resolve::{PEER_HEADER, Scope};

/// Layouts that one class of clients may have in the making.
const LAYOUTS: usize = 8;
/// Listings and logs that one class of clients may have in memory, until they were sent.
const WHOLE: usize = 8;
/// How long a request waits for its place among these; then it is 404.
const PLACE_WAIT: Duration = Duration::from_secs(5);
/// Connections that are held open with those who get nothing but 403.
const STRANGERS: usize = 32;
/// Descriptors of one connection at most: its socket, the directory that it reads, two files that the kernel sends, and the next.
const DESCRIPTORS: usize = 5;
/// Descriptors that are kept for listeners, logs, nix-store, copies of NARs, laying out (nine each) and chunks that are being read.
const RESERVED_DESCRIPTORS: usize = 320;

/// Decides who may come in. One for all listeners.
#[derive(Debug)]
pub(super) struct Gate {
    allow: Vec<IpNet>,
    relay_for: Vec<IpNet>,
    per_address: usize,
    loopback: Class,
    others: Class,
    /// Addresses that `http.allow` does not have: they get their 403, and never the place of one that it has.
    strangers: Class,
    addresses: DashMap<IpAddr, usize>,
    rate: Option<DefaultKeyedRateLimiter<IpAddr>>,
    clock: DefaultClock,
}

/// Clients that share a bound.
#[derive(Debug)]
struct Class {
    connections: usize,
    open: AtomicUsize,
    layouts: Arc<Semaphore>,
    whole: Arc<Semaphore>,
}

impl Class {
    fn new(connections: usize) -> Self {
        let (layouts, whole) = (Arc::new(Semaphore::new(LAYOUTS)), Arc::new(Semaphore::new(WHOLE)));
        Self { connections, open: AtomicUsize::new(0), layouts, whole }
    }
}

/// A connection that came in; dropping it makes room for the next.
#[derive(Debug)]
pub(super) struct Admitted {
    gate: Arc<Gate>,
    /// An IPv4 address that came over an IPv6 socket shows as IPv4 here.
    pub(super) address: IpAddr,
    /// Whether `http.allow` has the address. If not, each request is told so.
    pub(super) is_allowed: bool,
    /// What the kernel sends to it.
    pub(super) files: FileQueue,
}

impl Gate {
    pub(super) fn new(options: &Options, limits: &Limits) -> Self {
        let quota = |rate: std::num::NonZeroU32| {
            Quota::per_second(rate)
                .allow_burst(rate.saturating_mul(std::num::NonZeroU32::MIN.saturating_add(1)))
        };
        let (loopback, others) = affordable(limits.connections);
        Self {
            allow: options.allow.clone(),
            relay_for: options.relay_for.clone(),
            per_address: limits.connections_per_address,
            loopback: Class::new(loopback),
            others: Class::new(others),
            strangers: Class::new(STRANGERS),
            addresses: DashMap::new(),
            rate: limits.rate().map(|rate| RateLimiter::keyed(quota(rate))),
            clock: DefaultClock::default(),
        }
    }

    /// Lets a connection in, or says which limit is reached.
    pub(super) fn admit(self: &Arc<Self>, address: IpAddr) -> Result<Admitted, Refusal> {
        let address = address.to_canonical();
        let is_allowed = self.allow.iter().any(|network| network.contains(&address));
        let class = self.class(address, is_allowed);
        if class.open.fetch_add(1, Ordering::Relaxed) >= class.connections {
            class.open.fetch_sub(1, Ordering::Relaxed);
            return Err(Refusal::Connections);
        }
        if !address.is_loopback() {
            let mut open = self.addresses.entry(address).or_insert(0);
            if *open >= self.per_address {
                class.open.fetch_sub(1, Ordering::Relaxed);
                return Err(Refusal::Address);
            }
            *open += 1;
        }
        Ok(Admitted { gate: Arc::clone(self), address, is_allowed, files: FileQueue::default() })
    }

    /// Forgets addresses that have not asked for a while.
    pub(super) fn tidy(&self) {
        if let Some(rate) = &self.rate {
            rate.retain_recent();
            rate.shrink_to_fit();
        }
    }

    fn class(&self, address: IpAddr, is_allowed: bool) -> &Class {
        match (address.is_loopback(), is_allowed) {
            (_, false) => &self.strangers,
            (true, true) => &self.loopback,
            (false, true) => &self.others,
        }
    }
}

/// As many connections as there are descriptors for: of the local Nix, and of all others.
fn affordable(wanted: usize) -> (usize, usize) {
    let descriptors = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let Some(descriptors) = descriptors.and_then(|limit| usize::try_from(limit).ok()) else {
        return (wanted, wanted);
    };
    let (loopback, others) = shares(wanted, descriptors);
    if others < wanted {
        tracing::warn!(
            local = loopback,
            others,
            wanted,
            descriptors,
            "fewer connections than limits.connections: the limit of open files is low (LimitNOFILE)"
        );
    }
    (loopback, others)
}

/// What so many descriptors are for, half of them for the local Nix.
fn shares(wanted: usize, descriptors: usize) -> (usize, usize) {
    let affordable = descriptors.saturating_sub(RESERVED_DESCRIPTORS) / DESCRIPTORS;
    let loopback = affordable.div_ceil(2).clamp(1, wanted.max(1));
    (loopback, affordable.saturating_sub(loopback).clamp(1, wanted.max(1)))
}

impl Admitted {
    /// Waits for a place to walk through a tree. `None`: none became free in time. The local Nix has places of its own.
    pub(super) async fn place_to_lay_out(&self) -> Option<OwnedSemaphorePermit> {
        place(&self.class().layouts).await
    }

    /// The same to have a body in memory as a whole, for as long as a slow reader takes it.
    pub(super) async fn place_in_memory(&self) -> Option<OwnedSemaphorePermit> {
        place(&self.class().whole).await
    }

    fn class(&self) -> &Class {
        self.gate.class(self.address, self.is_allowed)
    }

    /// Who may be asked for this client. A request that a peer sent is answered from local content alone: so no lookup
    /// ever goes in circles.
    pub(super) fn scope(&self, headers: &HeaderMap) -> Scope {
        let is_ours =
            self.address.is_loopback() || self.gate.relay_for.iter().any(|net| net.contains(&self.address));
        if is_ours && !headers.contains_key(PEER_HEADER) { Scope::LocalThenPeers } else { Scope::LocalOnly }
    }

    /// Counts a request; too many of them get the seconds after which the next one is welcome.
    pub(super) fn count_request(&self) -> Result<(), u64> {
        let Some(rate) = self.gate.rate.as_ref().filter(|_| !self.address.is_loopback()) else {
            return Ok(());
        };
        rate.check_key(&self.address).map_err(|early| {
            let wait = early.wait_time_from(self.gate.clock.now());
            wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
        })
    }
}

async fn place(places: &Arc<Semaphore>) -> Option<OwnedSemaphorePermit> {
    timeout(PLACE_WAIT, Arc::clone(places).acquire_owned()).await.ok()?.ok()
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.class().open.fetch_sub(1, Ordering::Relaxed);
        if !self.address.is_loopback() {
            self.gate.addresses.remove_if_mut(&self.address, |_, open| {
                *open -= 1;
                *open == 0
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(limits: Limits) -> Arc<Gate> {
        Arc::new(Gate::new(&Options::default(), &limits))
    }

    #[test]
    fn each_address_and_all_together_have_a_bound_and_loopback_its_own() {
        let limits = Limits { connections: 3, connections_per_address: 2, ..Limits::default() };
        let gate = gate(limits);
        let [one, two, lo] = ["10.0.0.1", "10.0.0.2", "127.0.0.1"].map(|a| a.parse::<IpAddr>().unwrap());
        let mut open = vec![gate.admit(one).unwrap(), gate.admit(one).unwrap()];
        assert!(matches!(gate.admit(one), Err(Refusal::Address)));
        open.push(gate.admit(two).unwrap());
        assert!(matches!(gate.admit(two), Err(Refusal::Connections)));
        let local: Vec<_> = (0..3).map(|_| gate.admit(lo).unwrap()).collect();
        assert!(matches!(gate.admit(lo), Err(Refusal::Connections)));
        open.remove(0);
        assert!(gate.admit(two).is_ok());
        drop((open, local));
        assert!(gate.addresses.is_empty());
        assert_eq!(gate.others.open.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn all_connections_together_have_the_descriptors_that_are_left_and_each_side_one_at_least() {
        for (descriptors, expected) in
            [(0, (1, 1)), (1024, (70, 70)), (4096, (378, 377)), (8192, (787, 787)), (65_536, (1024, 1024))]
        {
            assert_eq!(shares(1024, descriptors), expected);
        }
    }

    #[test]
    fn networks_are_seen_through_mapped_addresses() {
        let gate = gate(Limits::default());
        for (address, allowed) in [
            ("::ffff:192.168.1.2", true),
            ("::ffff:8.8.8.8", false),
            ("100.127.0.1", true),
            ("100.128.0.1", false),
            ("fd00::1", true),
            ("fe80::1", true),
            ("2001:db8::1", false),
            ("172.32.0.1", false),
        ] {
            let admitted = gate.admit(address.parse().unwrap()).unwrap();
            assert_eq!(admitted.is_allowed, allowed, "{address}");
        }
    }

    #[test]
    fn too_many_requests_are_told_a_true_time_and_loopback_never_is() {
        let gate = gate(Limits { requests_per_second: 1, ..Limits::default() });
        let other = gate.admit("10.0.0.1".parse().unwrap()).unwrap();
        assert!(other.count_request().is_ok() && other.count_request().is_ok());
        assert_eq!(other.count_request(), Err(1));
        let local = gate.admit("::1".parse().unwrap()).unwrap();
        assert!((0..1000).all(|_| local.count_request().is_ok()));
    }
}
