//! The head of a NAR of many small files, written into the file of its copy while the tree is laid out.
//!
//! It may end anywhere: where a long file comes, where the disk is slow, or where the files turn out not to be small. Whoever
//! makes the copy goes on behind it. Nobody sees it before the length of the whole NAR has proven right.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::copy_file::{CopyFile, Leave};

/// Files are small where an entry has fewer bytes of the NAR than this on average; larger ones are read as fast from where they are.
const SMALL: u64 = 16 * 1024;
/// Nothing of a NAR is sent before it is laid out, so that may take no longer because the files are read.
const PATIENCE: Duration = Duration::from_millis(250);

/// Bytes are written in multiples of so many, at a multiple of as many: the kernel keeps them in larger pieces then, which are faster to write and to
/// send than those of parts as they come.
const RUN: u64 = 256 * 1024;

/// Whether so many bytes of a NAR are those of small files.
pub(super) fn are_small(bytes: u64, entries: u64) -> bool {
    bytes / entries.max(1) < SMALL
}

/// What makes the file, once it is known that the first files are small.
type MakeFile = Box<dyn FnOnce() -> Option<(CopyFile, Leave)> + Send>;

/// The bytes of a NAR from its beginning on, and leave to write what follows.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) file: Arc<CopyFile>,
    pub(super) len: u64,
    pub(super) leave: Leave,
}

/// A head that is being written.
pub(super) struct NarHead {
    /// As long as there is no file.
    make: Option<MakeFile>,
    written: Option<Head>,
    waiting: Waiting,
    entries: u64,
    /// NarSize: there is room for so many bytes.
    most: u64,
    until: Instant,
}

impl NarHead {
    /// A head of a NAR of `nar_size` bytes that has nothing yet, and no file.
    pub(super) fn new(nar_size: u64, make: MakeFile) -> Self {
        let until = Instant::now() + PATIENCE;
        Self {
            make: Some(make),
            written: None,
            waiting: Waiting::default(),
            entries: 0,
            most: nar_size,
            until,
        }
    }

    /// On a machine that is busy, too.
    #[cfg(test)]
    pub(super) fn patient(mut self) -> Self {
        self.until += Duration::from_secs(3600);
        self
    }

    /// When it ends, however far it is.
    pub(super) fn until(&self) -> Instant {
        self.until
    }

    /// Takes the bytes that come next, so many entries of the NAR, unless it ends before them. False: it wants no more.
    pub(super) fn put(&mut self, bytes: Vec<u8>, entries: usize) -> bool {
        self.entries += entries as u64;
        let before = self.written.as_ref().map_or(0, |head| head.len) + self.waiting.len;
        let len = before + bytes.len() as u64;
        if len > self.most || !are_small(len, self.entries) {
            return false;
        }
        if let Some((file, leave)) = self.make.take().and_then(|make| make()) {
            self.written = Some(Head { file: Arc::new(file), len: 0, leave });
        }
        let Some(head) = &mut self.written else { return false };
        self.waiting.put(bytes);
        // Whoever goes on says so, if it fails there as well.
        self.waiting.write(head, len - len % RUN).is_ok() && Instant::now() < self.until
    }

    /// A buffer that is not needed any more.
    pub(super) fn spare_buffer(&mut self) -> Option<Vec<u8>> {
        self.waiting.spare.pop()
    }

    /// What there is of it. `None`: nothing.
    pub(super) fn end(mut self) -> Option<Head> {
        let mut head = self.written?;
        let len = head.len + self.waiting.len;
        // What goes on behind it begins where a run does. Where writing fails, it has less.
        let _ = self.waiting.write(&mut head, if len == self.most { len } else { len - len % RUN });
        (head.len > 0).then_some(head)
    }
}

/// Bytes that are not written yet, and come next.
#[derive(Default)]
struct Waiting {
    parts: VecDeque<Vec<u8>>,
    /// So many bytes of the first part are written.
    written: usize,
    len: u64,
    spare: Vec<Vec<u8>>,
}

impl Waiting {
    fn put(&mut self, bytes: Vec<u8>) {
        self.len += bytes.len() as u64;
        self.parts.push_back(bytes);
    }

    /// Writes behind the head, until it is so long.
    fn write(&mut self, head: &mut Head, until: u64) -> io::Result<()> {
        while head.len < until {
            let mut slices = Vec::with_capacity(self.parts.len());
            let (mut left, mut from) = (until - head.len, self.written);
            for part in &self.parts {
                let len = usize::try_from(left).unwrap_or(usize::MAX).min(part.len() - from);
                slices.push(IoSlice::new(&part[from..from + len]));
                (left, from) = (left - len as u64, 0);
                if left == 0 {
                    break;
                }
            }
            let written = head.file.write_at(&slices, head.len)?;
            if written == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            head.len += written as u64;
            self.pass_over(written);
        }
        Ok(())
    }

    fn pass_over(&mut self, bytes: usize) {
        self.len -= bytes as u64;
        self.written += bytes;
        while let Some(first) = self.parts.front()
            && first.len() <= self.written
        {
            self.written -= first.len();
            self.spare.extend(self.parts.pop_front());
        }
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::gauge::Gauge;

    use super::super::copy_file::Room;
    use super::*;

    #[test]
    fn a_head_that_can_not_be_written_is_none() {
        let taken = Gauge::default();
        let room = Room::of_a_test(1_000_000, &taken);
        let make = Box::new(move || Some((CopyFile::full(room), Leave::of_a_test())));
        let mut head = NarHead::new(1_000_000, make).patient();
        // Less than a run waits, and what follows has to be written.
        assert!(head.put(vec![1; 200_000], 100));
        assert!(!head.put(vec![2; 200_000], 100));
        assert!(head.end().is_none());
        assert_eq!(taken.get(), 0);
    }

    #[test]
    fn a_head_of_less_than_the_nar_ends_where_a_run_does_and_one_of_it_all_has_it_all() {
        let folder = tempfile::tempdir().unwrap();
        for (most, len) in [(700_000, 700_000), (700_001, 2 * RUN)] {
            let (room, folder) = (Room::of_a_test(most, &Gauge::default()), folder.path().to_owned());
            let make = Box::new(move || Some((CopyFile::make(&folder, room).ok()?, Leave::of_a_test())));
            let mut head = NarHead::new(most, make).patient();
            let bytes: Vec<u8> = (0..700_000_u32).map(|at| (at / 251) as u8).collect();
            // Parts that are shorter than a run, longer, and of several.
            for part in [&bytes[..1000], &bytes[1000..300_000], &bytes[300_000..300_001], &bytes[300_001..]] {
                assert!(head.put(part.to_vec(), 500));
            }
            let head = head.end().unwrap();
            let mut written = vec![0; head.len as usize];
            head.file.read_exact_at(&mut written, 0).unwrap();
            assert!(head.len == len && written == bytes[..len as usize]);
        }
    }
}
