//! peernix as its users have it: the real program, real sockets, the real Nix (`nix-bin`), as root.
//!
//! One program for all of these tests, since linking costs more than running. What they need is installed by
//! `tests/run.sh`; what is missing is a failure, never a skip.

mod clients;
mod collection;
mod command_line;
mod disk_full;
mod downloads;
mod holdings;
mod lan;
mod limits;
mod nar;
mod narinfo;
mod nix_store_process;
mod packed;
mod peers;
mod several;
mod shutdown;
mod signatures;
mod support;
