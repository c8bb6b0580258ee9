//! The interfaces of this host. Where announcements go: the broadcast address of every IPv4 interface, and all nodes on
//! every IPv6 link; and where they come from. And the names of interfaces, which stay when their numbers change.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};

use if_addrs::IfAddr;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice};

/// All nodes on the link (RFC 4291, section 2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The addresses that reach everybody on every link of this host, on this port. Loopback is no link.
pub(super) fn broadcast_addresses(port: u16) -> Vec<SocketAddr> {
    let mut addresses: Vec<SocketAddr> = Vec::new();
    // A system that does not tell its interfaces has none to announce on; the configured targets remain.
    for interface in if_addrs::get_if_addrs().unwrap_or_default() {
        if interface.is_loopback() || interface.is_p2p() {
            continue;
        }
        let address = match &interface.addr {
            IfAddr::V4(v4) => v4.broadcast.map(|address| SocketAddr::from((address, port))),
            IfAddr::V6(_) => {
                interface.index.map(|index| SocketAddr::V6(SocketAddrV6::new(ALL_NODES, port, 0, index)))
            }
        };
        if let Some(address) = address.filter(|address| !addresses.contains(address)) {
            addresses.push(address);
        }
    }
    addresses
}

/// The address of this host that a datagram to this destination comes from, as the kernel chooses it. `None`: there is no
/// way to there. Sends nothing.
pub(super) fn source_to(to: SocketAddr) -> Option<IpAddr> {
    let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.set_broadcast(true).ok()?;
    socket.connect(to).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// The name of the interface with this number.
pub(super) fn name_of(index: u32) -> Option<String> {
    netdevice::index_to_name(any_socket()?, index).ok()
}

/// The number of the interface with this name.
pub(super) fn index_of(name: &str) -> Option<u32> {
    netdevice::name_to_index(any_socket()?, name).ok()
}

/// The kernel tells of interfaces through any socket.
fn any_socket() -> Option<rustix::fd::OwnedFd> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()
}
