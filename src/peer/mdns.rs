//! Finding each other by multicast DNS (DNS-SD): `_peernix._tcp.local.`, with what an announcement says in TXT.

use std::net::SocketAddr;

use mdns_sd::{IfKind, IfPredicate, ServiceDaemon, ServiceEvent, ServiceInfo};

use super::Peers;
use super::record::Source;
use super::wire::{Announce, Message};

const SERVICE: &str = "_peernix._tcp.local.";

/// A service that is registered if others can reach it, and looks for others.
pub(super) struct Mdns {
    daemon: ServiceDaemon,
    fullname: Option<String>,
}

impl Mdns {
    /// Registers this host and begins to look for others.
    pub(super) fn start(peers: &Peers) -> Result<(Self, mdns_sd::Receiver<ServiceEvent>), mdns_sd::Error> {
        let daemon = ServiceDaemon::new()?;
        let service = peers.0.listening.is_reachable().then(|| service(peers)).transpose()?;
        let fullname = service.as_ref().map(|service| service.get_fullname().to_owned());
        if let Some(service) = service {
            daemon.register(service)?;
        }
        let events = daemon.browse(SERVICE)?;
        Ok((Self { daemon, fullname }, events))
    }

    /// Says goodbye and ends the daemon's thread.
    pub(super) async fn stop(self) {
        // What fails here is told to others by their own expiry.
        if let Some(Ok(done)) = self.fullname.map(|fullname| self.daemon.unregister(&fullname)) {
            let _ = done.recv_async().await;
        }
        if let Ok(done) = self.daemon.shutdown() {
            let _ = done.recv_async().await;
        }
    }
}

/// What this host is registered as, at those of its addresses that are listened on.
fn service(peers: &Peers) -> Result<ServiceInfo, mdns_sd::Error> {
    let announce = peers.own_announce();
    let id = announce.id.as_deref().unwrap_or_default();
    let features = announce.features.join(",");
    let properties = [
        ("version", announce.peernix_version.as_str()),
        ("platform", &announce.platform),
        ("features", &features),
        ("pubkey", &announce.public_key),
        ("id", id),
    ];
    let host = format!("peernix-{id}.local.");
    let service =
        ServiceInfo::new(SERVICE, &format!("peernix-{id}"), &host, "", announce.port, &properties[..])?;
    let mut service = service.enable_addr_auto();
    let (peers, port) = (peers.clone(), announce.port);
    let is_ours = IfPredicate::new(move |interface| peers.0.listening.port_at(interface.ip()) == Some(port));
    service.set_interfaces(vec![IfKind::Predicate(is_ours)]);
    Ok(service)
}

/// Tells the registry whom multicast DNS finds. Ends with the daemon.
pub(super) async fn follow(peers: Peers, events: mdns_sd::Receiver<ServiceEvent>) {
    while let Ok(event) = events.recv_async().await {
        let ServiceEvent::ServiceResolved(service) = event else { continue };
        let text =
            |key: &str| service.txt_properties.get_property_val_str(key).unwrap_or_default().to_owned();
        let announce = Announce {
            peernix_version: text("version"),
            platform: text("platform"),
            features: text("features").split(',').map(str::to_owned).collect(),
            public_key: text("pubkey"),
            port: service.port,
            id: Some(text("id")).filter(|id| !id.is_empty()),
            ..Announce::default()
        };
        // Through the same door as a datagram: what a stranger wrote is cut to its bounds there.
        let cut = Message::parse(&Message::Announce(announce).to_datagram());
        let Some(Message::Announce(announce)) =
            cut.filter(|message| matches!(message, Message::Announce(a) if a.id.is_some()))
        else {
            continue;
        };
        // An IPv4 address before the others: it needs no scope.
        let mut addresses: Vec<SocketAddr> = service
            .addresses
            .iter()
            .map(|address| match address {
                mdns_sd::ScopedIp::V6(v6) => {
                    SocketAddr::V6(std::net::SocketAddrV6::new(*v6.addr(), 0, 0, v6.scope_id().index))
                }
                other => SocketAddr::new(other.to_ip_addr(), 0),
            })
            .collect();
        addresses.sort_by_key(|address| (address.is_ipv6(), address.ip()));
        if let Some(address) = addresses.first() {
            peers.announced(announce, *address, Source::Mdns);
        }
    }
}
