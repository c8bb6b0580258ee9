//! What is kept of a download: which bytes are in memory, which in the file, and who has read how far.
//!
//! Pure bookkeeping under the lock of [`super::spool`], which waits and writes. What a reader may still ask for is in one of the
//! two places: memory lets go only what is in the file, or what all have read.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::task::Waker;

use bytes::Bytes;
use thiserror::Error;

use super::budget::Reserved;

/// How much of a download is kept in memory beside its file, or for its readers if it has none, in bytes.
pub(super) const WINDOW: u64 = 4 * 1024 * 1024;
/// How much is read from a file at once, in bytes.
const PIECE: u64 = 256 * 1024;

/// Why a reader gets no more.
#[derive(Clone, Debug, Error)]
pub enum SpoolError {
    /// The download failed, or was given up.
    #[error("{0}")]
    Failed(Arc<str>),
    /// The file of the spool can't be read.
    #[error("the spool can't be read: {0}")]
    Read(Arc<std::io::Error>),
}

/// How far a download is.
#[derive(Clone, Debug)]
pub(super) enum Progress {
    /// More is to come.
    Receiving,
    /// All came, and was declared good.
    Complete,
    /// No more will come, and what came is not all.
    Failed(Arc<str>),
}

/// What is kept of a download.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// All of it, in memory.
    All,
    /// What some reader has not read yet: the writer waits for the slowest.
    Window,
    /// All of it, in a file, and the latest of it in memory too.
    File,
}

/// What came, who reads it from where, and how far it is.
#[derive(Debug)]
pub(super) struct State {
    pub(super) keep: Keep,
    pub(super) progress: Progress,
    /// The latest bytes, from `window_start` to `end`.
    pub(super) window: VecDeque<Bytes>,
    pub(super) window_start: u64,
    pub(super) end: u64,
    pub(super) file: Option<Arc<File>>,
    /// How much of the beginning the file has.
    pub(super) on_disk: u64,
    pub(super) readers: HashMap<u64, Reading>,
    pub(super) readers_ever: u64,
    pub(super) is_closing: bool,
    pub(super) writer: Option<Waker>,
    pub(super) closers: Vec<Waker>,
    /// Memory and disk that this takes, for as long as it takes them.
    pub(super) reserved: Vec<Reserved>,
    /// Memory that the window takes, until it is empty for good.
    pub(super) window_memory: Option<Reserved>,
}

#[derive(Debug)]
pub(super) struct Reading {
    pub(super) offset: u64,
    pub(super) waker: Option<Waker>,
}

/// What comes next: in memory, or to be read from the file.
#[derive(Debug)]
pub enum Piece {
    /// Here it is.
    Bytes(Bytes),
    /// So many bytes at this place of the file.
    File(Arc<File>, u64, usize),
}

impl Piece {
    /// The bytes. Blocks if they are in a file.
    pub fn read(self) -> Result<Bytes, SpoolError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            Self::File(file, offset, len) => {
                let mut buffer = vec![0; len];
                file.read_exact_at(&mut buffer, offset).map_err(|error| SpoolError::Read(Arc::new(error)))?;
                Ok(buffer.into())
            }
        }
    }
}

impl State {
    pub(super) fn new(keep: Keep, file: Option<File>, reserved: Vec<Reserved>) -> Self {
        Self {
            keep,
            progress: Progress::Receiving,
            window: VecDeque::new(),
            window_start: 0,
            end: 0,
            file: file.map(Arc::new),
            on_disk: 0,
            readers: HashMap::new(),
            readers_ever: 0,
            is_closing: false,
            writer: None,
            closers: Vec::new(),
            reserved,
            window_memory: None,
        }
    }

    pub(super) fn all_reserved(&self) -> impl Iterator<Item = &Reserved> {
        self.reserved.iter().chain(&self.window_memory)
    }

    /// Whether a new reader would get all of it.
    pub(super) fn lets_in(&self) -> bool {
        let has_beginning = self.window_start == 0 || self.on_disk >= self.window_start;
        has_beginning && !self.is_closing && !matches!(self.progress, Progress::Failed(_))
    }

    /// Whether a file would be of use. One that could not be written is there already.
    pub(super) fn wants_file(&self) -> bool {
        let is_receiving = matches!(self.progress, Progress::Receiving);
        self.keep == Keep::Window && self.file.is_none() && self.window_start == 0 && is_receiving
    }

    /// Lets the contents go, if it is closing and nobody is left.
    pub(super) fn let_go(&mut self) {
        if self.is_closing && self.readers.is_empty() {
            self.window.clear();
            self.window_start = self.end;
            self.file = None;
            self.on_disk = 0;
            self.reserved.clear();
            self.window_memory = None;
            self.closers.drain(..).for_each(Waker::wake);
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        matches!(self.progress, Progress::Complete)
    }

    pub(super) fn window_len(&self) -> u64 {
        self.end - self.window_start
    }

    /// Whether the window may take more: as much as it has memory for, and then one piece.
    pub(super) fn has_room(&self) -> bool {
        let limit = self.window_memory.as_ref().map_or(WINDOW, Reserved::amount);
        self.window.is_empty() || self.window_len() < limit
    }

    /// Drops from memory what nobody needs there.
    pub(super) fn trim(&mut self) {
        let slowest = self.readers.values().map(|reading| reading.offset).min().unwrap_or(self.end);
        while let Some(first) = self.window.front() {
            let first_end = self.window_start + first.len() as u64;
            let is_needless = match self.keep {
                Keep::All => false,
                Keep::Window => first_end <= slowest.max(self.on_disk),
                Keep::File => first_end <= self.on_disk && (!self.has_room() || self.is_complete()),
            };
            if !is_needless {
                break;
            }
            self.window.pop_front();
            self.window_start = first_end;
        }
        if self.window.is_empty() && !matches!(self.progress, Progress::Receiving) {
            self.window_memory = None;
        }
    }

    /// What is not in the file yet. All that came before there was one is in the window still.
    pub(super) fn unwritten(&self) -> Vec<Bytes> {
        let mut start = self.window_start;
        let mut unwritten = Vec::new();
        for bytes in &self.window {
            if start >= self.on_disk {
                unwritten.push(bytes.clone());
            }
            start += bytes.len() as u64;
        }
        unwritten
    }

    /// No more will come, unless all came already.
    pub(super) fn give_up(&mut self) {
        if matches!(self.progress, Progress::Receiving) {
            self.progress = Progress::Failed("the download was given up".into());
            self.wake_readers();
            self.offer();
        }
    }

    /// Tells whoever waits for a place that this one may be had.
    pub(super) fn offer(&self) {
        if self.readers.is_empty() && !matches!(self.progress, Progress::Receiving) {
            self.all_reserved().for_each(Reserved::offer);
        }
    }

    pub(super) fn wake_readers(&mut self) {
        self.readers.values_mut().for_each(|reading| wake(&mut reading.waker));
    }

    /// The piece at an offset; nothing if that has not come yet.
    pub(super) fn piece(&self, offset: u64) -> Option<Piece> {
        if offset >= self.end {
            return None;
        }
        if offset < self.window_start {
            let file = Arc::clone(self.file.as_ref()?);
            let len = self.on_disk.checked_sub(offset).filter(|len| *len > 0)?.min(PIECE);
            return Some(Piece::File(file, offset, usize::try_from(len).unwrap_or(usize::MAX)));
        }
        let mut start = self.window_start;
        for bytes in &self.window {
            let end = start + bytes.len() as u64;
            if offset < end {
                let skip = usize::try_from(offset - start).unwrap_or(usize::MAX);
                return Some(Piece::Bytes(bytes.slice(skip..)));
            }
            start = end;
        }
        None
    }
}

pub(super) fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}
