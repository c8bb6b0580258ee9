//! Who may come in: networks, connections in all and per address, requests a second.
//!
//! Loopback is the local Nix: its connections have a bound of their own and its requests none, because a refusal there
//! fails builds.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use dashmap::DashMap;
use governor::clock::{Clock as _, DefaultClock};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use ipnet::IpNet;

use super::{Limits, Options};
use crate::metrics::Refusal;

/// Decides who may come in. One for all listeners.
#[derive(Debug)]
pub(super) struct Gate {
    allow: Vec<IpNet>,
    connections: usize,
    per_address: usize,
    from_loopback: AtomicUsize,
    from_others: AtomicUsize,
    addresses: DashMap<IpAddr, usize>,
    rate: Option<DefaultKeyedRateLimiter<IpAddr>>,
    clock: DefaultClock,
}

/// A connection that came in; dropping it makes room for the next.
#[derive(Debug)]
pub(super) struct Admitted {
    gate: Arc<Gate>,
    /// An IPv4 address that came over an IPv6 socket shows as IPv4 here.
    pub(super) address: IpAddr,
    /// Whether `http.allow` has the address. If not, each request is told so.
    pub(super) is_allowed: bool,
}

impl Gate {
    pub(super) fn new(options: &Options, limits: &Limits) -> Self {
        let quota = |rate: std::num::NonZeroU32| {
            Quota::per_second(rate)
                .allow_burst(rate.saturating_mul(std::num::NonZeroU32::MIN.saturating_add(1)))
        };
        Self {
            allow: options.allow.clone(),
            connections: limits.connections,
            per_address: limits.connections_per_address,
            from_loopback: AtomicUsize::new(0),
            from_others: AtomicUsize::new(0),
            addresses: DashMap::new(),
            rate: limits.rate().map(|rate| RateLimiter::keyed(quota(rate))),
            clock: DefaultClock::default(),
        }
    }

    /// Lets a connection in, or says which limit is reached.
    pub(super) fn admit(self: &Arc<Self>, address: IpAddr) -> Result<Admitted, Refusal> {
        let address = address.to_canonical();
        let all = self.all(address);
        if all.fetch_add(1, Ordering::Relaxed) >= self.connections {
            all.fetch_sub(1, Ordering::Relaxed);
            return Err(Refusal::Connections);
        }
        if !address.is_loopback() {
            let mut open = self.addresses.entry(address).or_insert(0);
            if *open >= self.per_address {
                all.fetch_sub(1, Ordering::Relaxed);
                return Err(Refusal::Address);
            }
            *open += 1;
        }
        let is_allowed = self.allow.iter().any(|network| network.contains(&address));
        Ok(Admitted { gate: Arc::clone(self), address, is_allowed })
    }

    /// Forgets addresses that have not asked for a while.
    pub(super) fn tidy(&self) {
        if let Some(rate) = &self.rate {
            rate.retain_recent();
            rate.shrink_to_fit();
        }
    }

    fn all(&self, address: IpAddr) -> &AtomicUsize {
        if address.is_loopback() { &self.from_loopback } else { &self.from_others }
    }
}

impl Admitted {
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

impl Drop for Admitted {
    fn drop(&mut self) {
        self.gate.all(self.address).fetch_sub(1, Ordering::Relaxed);
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
        assert_eq!(gate.from_others.load(Ordering::Relaxed), 0);
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
