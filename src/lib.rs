//! # peernix: the map for the next engineer
//!
//! A daemon on every Nix host of a LAN. The local Nix asks it as a substituter; it answers from the host's own store, or
//! from whichever peer has the path, verified, and serves its own store to the others. The README is for its users; this page is for whoever changes it.
//!
//! ## Invariants
//! 1. **Never worse than without it.** On loopback every failure is a fast 404: no 5xx, no hang, no broken narinfo.
//!    The daemon starts without Nix and without a store; what was configured wrongly ends it with one line.
//! 2. **A served narinfo keeps its promise.** The path is leased (a temporary garbage-collector root) before it is
//!    asked for validity, and stays leased for `store.lease` after the last request for it. While `nix-store` can't be
//!    asked, what is remembered is looked at once more and served without.
//! 3. **A body never ends early as if it were complete.** A NAR whose length is not NarSize is refused before its first
//!    byte; a file that is missing, short or changed cuts the connection.
//! 4. **Nothing unverified is passed on.** A peer's narinfo is a claim until a trusted key's signature or a content address
//!    proves it ([`trust::TrustedNarInfo`]); the last bytes of a relayed NAR leave after length and hash have proven right.
//! 5. **No loops.** A request that carries the peer header, or comes from neither loopback nor `http.relay_for`, is answered
//!    from local content alone ([`resolve::Scope`]); an announcement that answers another is not answered.
//! 6. **Wrong or slow peers cost themselves**: blamed, paused for longer and longer, never the client.
//! 7. **Everything is bounded**: memory, queues, sockets, waits. The bounds are options or named constants.
//! 8. **Nothing that arrives over the network can panic.** It is parsed once, at the door, into a type.
//!
//! ## Layers: imports point down only (`tests/tidy.rs` checks it)
//! | module | one idea | may import |
//! | --- | --- | --- |
//! | [`nix`] | formats, pure: hashes, narinfo, signatures, keys, URLs, NAR layout, the messages of `nix-store --serve` | nothing |
//! | [`metrics`] | every counter | nothing |
//! | [`store`] | the local store: names in the directory, `nix-store` processes, leases, NAR bytes from disk | nix, metrics |
//! | [`signing`] | our own keys and what they sign | nix |
//! | [`trust`] | whom this host believes, and what that proves | nix |
//! | [`peer`] | who is there and how good: registry, datagrams, mDNS, the way to one peer | nix, metrics |
//! | [`cache`] | what is remembered: who served a narinfo, what nobody has, what is being downloaded | nix, peer |
//! | [`resolve`] | the decision who answers: local, remembered, or which peer | nix, metrics, store, signing, trust, peer, cache |
//! | [`http`] | connections, limits, routes, errors to statuses | nix, metrics, resolve |
//! | [`config`] | the file with all options | the `Options` of each part |
//! | [`daemon`] | wiring, start, ordered shutdown | all above |
//! | [`cli`] | commands | all above |
//!
//! ## The way of a narinfo request
//! `http::listeners` accepts (within the host without the pacing that a system may have chosen: `http::congestion`), `http::server`
//! serves, `http::gate` lets in, `http::app` parses the URL ([`nix::cache_url`]). A path that was asked
//! for before is answered at once: `store::known` compares the path's stamp (device, inode, change time; one `lstat`)
//! and its lease's generation, and the narinfo was signed and printed the first time. Otherwise `store::names` has the
//! name for the hash part (after a start from `store::remembered_names`, or from `store::name_list`, which has what was read while the
//! rest of the directory is; later from `store::name_map`),
//! `store::leases` leases and asks (in one batch with whoever else waits; the processes behind it belong to `store::lease_office`), and
//! [`resolve`] adds our signatures behind the stored ones.
//!
//! ## The way of a NAR request
//! The URL has the hash part and NarHash, which is enough days later too. `store::tree` lays the tree out from metadata
//! ([`nix::layout`]), in parts on several threads (`store::tree_part`, `store::in_order`), so length and ranges are known before a byte is
//! sent; `store::nar_reader` reads the files by that layout, `store::nar_chunks` where the next chunk is asked for if few files in
//! memory make it, and several chunks at once where files are small, and `store::nar_stream` makes it a stream that holds the lease. A NAR of many small files is read once, into a
//! copy that all who ask follow (`store::nar_copies`, `store::nar_copy`), and that begins while the tree is laid out: what opens each file
//! anyway need not look at it first (`store::nar_head`; written in runs, which the kernel keeps in larger pieces).
//! Contents that are in memory and long enough are not read at all: their file is opened where the next chunk is asked for, if the
//! kernel has its name in memory, and the kernel sends them (`store::file_span`, `http::file_socket`).
//!
//! ## The way to a peer
//! `peer::discovery` starts what finds peers: datagrams (`peer::udp`, in the words of `peer::wire`, which peernix in Go speaks
//! too), multicast DNS, the configuration, and the file of those known before. This host is announced only from addresses that its
//! cache is listened on at (`peer::listening`), and its answers to peers say which run of it answers, since it may be known
//! by an address that the new run was not announced from. [`peer::Registry`] is the table, pure. What is
//! not in the local store goes to `resolve::lookup`: the remembered misses, then one flight a hash that asks all candidates
//! at once within one budget; the first good answer wins. `resolve::relay` gives the NAR: one
//! download (`resolve::download`) from the peer that the peer cache names, or from whoever has it now, goes on at another one
//! (`resolve::holders`) at the same offset where one fails, and is followed by all readers through a spool ([`cache::Spools`]).
//! `resolve::verified` hashes its bytes on their way, and gathers them in buffers that are used again. A NAR over 32 MiB comes in
//! pieces (`resolve::pieces`) from all who have it (`resolve::several`). A miss is remembered only if every peer that was asked said
//! so, and is worth nothing after a peer came or gained the path ([`cache::Misses`]).
//!
//! ## Who is not asked
//! `store::names` counts the paths that come; `resolve::share` tells what is held as a filter, and what came after a number
//! as a list (`peer::path_set`, `peer::path_filter`), at `api/v1/holdings`. `peer::follow` keeps one such question open at each peer that tells, and
//! `peer::sets` leaves out of a lookup whoever says that it does not have the path. A datagram names the first gain after a while at once,
//! so that what was built there is not denied here a moment later. A set is believed only while its peer answers for it; who tells nothing, or not any more, is asked. What is gone from a store stays in its set until the next
//! whole, and costs a question in vain.
//!
//! ## How NARs travel
//! `peer::link` measures what comes from a peer while it is waited for, plain and as zstd, and `peer::client` asks for zstd once the
//! plain rate is known, and tells it with the request. `http::compressors` decides: it knows how fast this machine packs, and
//! takes the level of zstd that brings most bytes a second over that link, or none. `http::packed` packs ahead of the socket,
//! `peer::arriving` unpacks (`peer::unpack`), and everything above sees the bytes of the NAR. Parts of NARs, short ones, and
//! everything by loopback travel as they are. Plain clients get zstd by its own URL (`nar/….nar.zst`), where
//! `http.compression` has their narinfos name it.
//!
//! ## Where we differ from what was planned
//! - The store counts into [`metrics`] itself, which lies beside the formats at the bottom, instead of handing numbers up.
//! - The watch on the store directory is read on every miss, under a lock, instead of by a task of its own: an event is in
//!   the kernel's queue before the change returns to whoever made it, so a path is found from its first moment on.
//! - The names in the store are written down when the daemon ends: reading 100,000 takes longer than `nix-store` to start, and the
//!   first answer needs one of them.
//! - A layout keeps metadata and writes the literal bytes on the way; kept whole they would take several times the memory.
//! - Peers are asked over pooled HTTP connections at once, without a datagram first: one round trip instead of two, and TCP makes
//!   up for what is lost. Only peernix in Go is asked by datagram first, since its HTTP side would ask the whole LAN.
//! - A gained path is told by a datagram of its own (`gained`), since a remembered miss must not outlive it. It goes out when
//!   the name comes and when its `.lock` goes, which is when Nix has registered it.
//! - Our own signature is put under a peer's path only if a trusted key has signed it: a content address does not prove
//!   NarSize, which a signature vouches for.
//! - One reader alone of a large NAR needs no file: what it has read is let go. A second one gives the download a file
//!   (`limits.spool`), or, too late for its beginning, begins another that has one. So no disk is written for the usual case.
//! - What a host holds is not packed: the filter is made of hashes, which nothing packs, and a difference is a few of them. It is
//!   not announced by a version either: a question that waits hears of every gain, however many datagrams are lost.
//! - The filter has 10 bits a fingerprint, 12 a path, not the crate's 8 and 10: with these every fifth miss among 50 peers asks one of
//!   them in vain, and among 200 every second (`peer::path_filter`).
//! - Files of spools have no names: a crash leaves none behind.
//! - NARs are downloaded ahead of Nix, which asks for one after the other in an order that follows from their references
//!   (`resolve::ahead`): while that is right, within half of `limits.relay_memory`.
//! - The first good answer to a lookup is passed on, and those that come right after it are remembered too: for the NAR, the less
//!   busy of two of them at random is asked (`resolve::choice`).
//! - A peer that sends more than a 1 Gbit/s link carries sends all of a NAR alone: several are slower then, by the work they make.
//! - What several peers sent together and proved wrong says nothing of any of them: each is asked alone, for whole NARs, until it has shown
//!   which one lies (`resolve::download`). Digests of pieces, which could show it at once, are nowhere signed.
//! - nix-compat, which was asked for, is an empty placeholder on the registry; nix-narinfo and nix-derivation stand
//!   behind [`nix`] instead.
#![warn(unreachable_pub, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

pub mod cache;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod http;
pub mod metrics;
pub mod nix;
pub mod peer;
pub mod resolve;
pub mod signing;
pub mod store;
pub mod trust;
