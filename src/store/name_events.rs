//! What the kernel tells of the names in the store directory.
//!
//! An event is in the queue before the change returns to whoever made it.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::name::store_path;
use crate::nix::StorePath;

/// What an event says of a name.
pub(super) enum Change {
    Appeared(StorePath),
    Disappeared(StorePath),
}

/// The events that waited.
#[derive(Default)]
pub(super) struct Events {
    pub(super) changes: Vec<Change>,
    /// Whether there were any, also such as say nothing of a path.
    pub(super) any: bool,
    /// Whether some were lost, or the directory itself went away.
    pub(super) lost: bool,
}

/// Wakes who waits for events.
#[expect(deprecated, reason = "an owned descriptor stays what it is; what is to be used instead is unsafe")]
pub(super) fn wakes(inotify: Arc<OwnedFd>) -> Option<AsyncFd<Arc<OwnedFd>>> {
    AsyncFd::with_interest(inotify, Interest::READABLE).ok()
}

/// Takes the events that wait.
pub(super) fn waiting_events(inotify: &OwnedFd) -> Events {
    let gone = ReadFlags::QUEUE_OVERFLOW
        | ReadFlags::IGNORED
        | ReadFlags::DELETE_SELF
        | ReadFlags::MOVE_SELF
        | ReadFlags::UNMOUNT;
    let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
    let mut reader = inotify::Reader::new(inotify, &mut buffer);
    let mut events = Events::default();
    loop {
        match reader.next() {
            Ok(event) => {
                events.any = true;
                events.lost |= event.events().intersects(gone);
                events.changes.extend(change(event.events(), event.file_name()));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => return events,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => {
                events.lost = true;
                return events;
            }
        }
    }
}

fn change(events: ReadFlags, name: Option<&CStr>) -> Option<Change> {
    let path = store_path(name?)?;
    if events.intersects(ReadFlags::CREATE | ReadFlags::MOVED_TO) {
        Some(Change::Appeared(path))
    } else if events.intersects(ReadFlags::DELETE | ReadFlags::MOVED_FROM) {
        Some(Change::Disappeared(path))
    } else {
        None
    }
}

/// Has the kernel tell from now on.
pub(super) fn watch_directory(directory: &Path) -> rustix::io::Result<OwnedFd> {
    let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
    let what = WatchFlags::CREATE
        | WatchFlags::MOVED_TO
        | WatchFlags::DELETE
        | WatchFlags::MOVED_FROM
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF
        | WatchFlags::ONLYDIR;
    inotify::add_watch(&inotify, directory, what)?;
    Ok(inotify)
}
