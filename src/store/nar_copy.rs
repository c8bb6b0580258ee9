//! One copy of a NAR: the file, who makes it, and those who follow.
//!
//! Knows nothing of other copies. Its bytes are counted from before the file is made until the last who has it open lets it go.

use std::future::poll_fn;
use std::io::IoSliceMut;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use rustix::io::{Errno, ReadWriteFlags};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};

use super::buffers::BufferPool;
use super::copy_file::{CopyFile, Leave, NoFile};
use super::file_span::FileSpan;
use super::nar_chunks::NarChunks;
use super::nar_head::Head;
use super::nar_read_error::NarReadError;

/// Who follows a copy that has not grown for so long reads the tree: the disk that the copy is written to may stand still.
const STALLED: Duration = Duration::from_secs(2);
/// A copy that nobody has read for so long is not made to its end.
const LEFT_ALONE: Duration = Duration::from_secs(5);

/// One copy, whole or in the making.
#[derive(Debug)]
pub(super) struct NarCopy {
    len: u64,
    /// Closed by a maker that is through, or failed.
    progress: watch::Receiver<Progress>,
    readers: AtomicUsize,
}

/// How far it is. Without a file where none is yet, or not any more.
#[derive(Clone, Debug, Default)]
struct Progress {
    file: Option<Arc<CopyFile>>,
    /// So many bytes from the beginning are there.
    ready: u64,
}

/// Makes the file of a copy, or says why there is none. May block.
pub(super) type MakeFile = Box<dyn FnOnce() -> Result<CopyFile, NoFile> + Send>;

/// With what the making of a copy begins.
pub(super) enum Start {
    Head(Head),
    Nothing(MakeFile, Leave),
}

impl Start {
    /// So many bytes are there.
    pub(super) fn len(&self) -> u64 {
        match self {
            Self::Head(head) => head.len,
            Self::Nothing(..) => 0,
        }
    }
}

/// The copy has no more than was given out: its maker failed, or it can't be read.
#[derive(Debug)]
pub(super) struct Gone;

impl NarCopy {
    /// A copy of `len` bytes that is to be made, and who makes it.
    pub(super) fn new(len: u64, start: Start) -> (Arc<Self>, Maker) {
        let (begun, make, leave) = match start {
            Start::Head(Head { file, len, leave }) => {
                (Progress { file: Some(file), ready: len }, None, leave)
            }
            Start::Nothing(make, leave) => (Progress::default(), Some(make), leave),
        };
        let (sender, progress) = watch::channel(begun);
        let copy = Arc::new(Self { len, progress, readers: AtomicUsize::new(0) });
        (Arc::clone(&copy), Maker { copy, progress: sender, make, _leave: leave, patience: LEFT_ALONE })
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// Whether it can be read from there on now.
    pub(super) fn reaches(&self, from: u64) -> bool {
        self.progress.borrow().ready >= from
    }

    pub(super) fn has_failed(&self) -> bool {
        // In this order: a maker says that all is there before it leaves.
        !self.is_in_the_making() && !self.reaches(self.len)
    }

    /// Whether nobody would miss it.
    pub(super) fn is_at_rest(&self) -> bool {
        self.readers.load(Ordering::Acquire) == 0 && !self.is_in_the_making()
    }

    fn is_in_the_making(&self) -> bool {
        self.progress.has_changed().is_ok()
    }
}

/// How the making of a copy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Made {
    Whole,
    /// Nobody read it.
    LeftAlone,
    /// With one of its length, copies would take too much of the disk. A shorter one may do.
    TooLong,
    /// Its path can't be read. That says nothing of other copies.
    Unreadable,
    /// It can't be written.
    Failed,
}

/// Makes one copy. When it is dropped before the end, whatever is there goes, and those who follow read on from the tree.
pub(super) struct Maker {
    copy: Arc<NarCopy>,
    progress: watch::Sender<Progress>,
    /// As long as there is no file.
    make: Option<MakeFile>,
    _leave: Leave,
    /// How long it goes on for nobody.
    patience: Duration,
}

impl Maker {
    /// Writes the chunks behind what is there, at the pace of the disk.
    pub(super) async fn run(mut self, chunks: NarChunks) -> Made {
        let Progress { mut file, mut ready } = self.progress.borrow().clone();
        if let Some(make) = self.make.take() {
            file = match spawn_blocking(make).await {
                Ok(Ok(file)) => Some(Arc::new(file)),
                Ok(Err(NoFile::TooLong)) => return Made::TooLong,
                Ok(Err(NoFile::Failed)) | Err(_) => None,
            };
        }
        let Some(file) = file else { return Made::Failed };
        let mut chunks = chunks.copied_to(Arc::clone(&file), ready);
        let mut last_read = Instant::now();
        while let Some(chunk) = poll_fn(|context| chunks.poll_next(context)).await {
            match chunk {
                Ok(chunk) => ready += chunk.len() as u64,
                Err(NarReadError::Copy(error)) => {
                    CopyFile::say_why_not(&error);
                    return Made::Failed;
                }
                // Whoever reads it from its tree says so where it matters.
                Err(error) => {
                    tracing::debug!(%error, "a NAR is not copied: its path can't be read");
                    return Made::Unreadable;
                }
            }
            self.progress.send_replace(Progress { file: Some(Arc::clone(&file)), ready });
            if self.copy.readers.load(Ordering::Acquire) > 0 {
                last_read = Instant::now();
            } else if last_read.elapsed() > self.patience {
                return Made::LeftAlone;
            }
        }
        Made::Whole
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        // A receiver would keep the file open, and its bytes on a disk that may be full.
        if !self.copy.reaches(self.copy.len) {
            self.progress.send_replace(Progress::default());
        }
    }
}

/// Somebody who reads a copy, and may be ahead of its maker.
#[derive(Debug)]
pub(super) struct CopyReader(Arc<NarCopy>);

impl CopyReader {
    pub(super) fn new(copy: &Arc<NarCopy>) -> Self {
        copy.readers.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(copy))
    }

    /// The beginning of a range, if it is there and need not be read here.
    pub(super) fn span(&self, range: &Range<u64>) -> Option<FileSpan> {
        let Progress { file, ready } = self.0.progress.borrow().clone();
        FileSpan::in_memory(&file?, range.start..range.end.min(ready))
    }

    /// The chunks of a range, each as soon as it is there.
    pub(super) fn chunks(
        &self,
        range: Range<u64>,
        pool: BufferPool,
    ) -> BoxStream<'static, Result<Bytes, Gone>> {
        let begun = (self.0.progress.clone(), range, pool);
        stream::try_unfold(begun, |(mut progress, range, pool)| async move {
            if range.is_empty() {
                return Ok(None);
            }
            let there = progress.wait_for(|progress| progress.ready > range.start);
            let there = timeout(STALLED, there).await.map_err(|_| Gone)?;
            let Progress { file, ready } = there.map_err(|_| Gone)?.clone();
            let file = file.ok_or(Gone)?;
            let chunk = read(&file, range.start..range.end.min(ready), &pool).await?;
            let range = range.start + chunk.len() as u64..range.end;
            Ok(Some((chunk, (progress, range, pool))))
        })
        .boxed()
    }
}

impl Drop for CopyReader {
    fn drop(&mut self) {
        self.0.readers.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Reads from the beginning of a range: here and now what is in memory, else by a blocking task.
async fn read(file: &Arc<CopyFile>, range: Range<u64>, pool: &BufferPool) -> Result<Bytes, Gone> {
    let place = pool.place();
    let mut buffer = pool.take_in(place.as_ref());
    let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX).min(buffer.len());
    let mut slices = [IoSliceMut::new(&mut buffer[..len])];
    match rustix::io::preadv2(&**file, &mut slices, range.start, ReadWriteFlags::NOWAIT) {
        Ok(read) if read > 0 => return Ok(pool.share(buffer, read, place)),
        Ok(_) => return Err(Gone),
        Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR) => {}
        Err(_) => return Err(Gone),
    }
    let (file, pool) = (Arc::clone(file), pool.clone());
    let read = spawn_blocking(move || {
        file.read_exact_at(&mut buffer[..len], range.start).map(|()| pool.share(buffer, len, place))
    });
    read.await.map_err(|_| Gone)?.map_err(|_| Gone)
}

#[cfg(test)]
mod tests {
    use prometheus_client::metrics::gauge::Gauge;

    use super::super::copy_file::Room;
    use super::super::nar_reader::NarReader;
    use super::super::tree::lay_out;
    use super::*;

    /// A copy of a tree, its gauge, and its making, which goes on for nobody.
    fn begun(tree: &std::path::Path) -> (Arc<NarCopy>, Gauge, impl Future<Output = Made> + Send + use<>) {
        begun_in(tree, CopyFile::make)
    }

    /// The same in the file that is made so.
    fn begun_in(
        tree: &std::path::Path,
        make: fn(&std::path::Path, Room) -> Result<CopyFile, NoFile>,
    ) -> (Arc<NarCopy>, Gauge, impl Future<Output = Made> + Send + use<>) {
        std::fs::create_dir(tree).unwrap();
        for file in 0..400 {
            std::fs::write(tree.join(format!("f{file}")), vec![b'x'; 5000]).unwrap();
        }
        let layout = Arc::new(lay_out(tree, None, || true).unwrap());
        let (len, taken) = (layout.len(), Gauge::default());
        let reader = NarReader::new(tree.to_owned(), layout, 0..len);
        let (room, folder) = (Room::of_a_test(len, &taken), tree.parent().unwrap().to_owned());
        let start = Start::Nothing(Box::new(move || make(&folder, room)), Leave::of_a_test());
        let (copy, mut maker) = NarCopy::new(len, start);
        maker.patience = Duration::ZERO;
        (copy, taken, maker.run(NarChunks::new(reader, BufferPool::default())))
    }

    async fn until_free(taken: &Gauge) {
        while taken.get() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn a_copy_that_nobody_reads_is_not_made_and_one_that_somebody_reads_is() {
        let folder = tempfile::tempdir().unwrap();
        for is_read in [false, true] {
            let (copy, taken, made) = begun(&folder.path().join(format!("{is_read}")));
            let reader = is_read.then(|| CopyReader::new(&copy));
            let expected = if is_read { Made::Whole } else { Made::LeftAlone };
            assert_eq!((made.await, copy.has_failed()), (expected, !is_read));
            drop((reader, copy));
            // Chunks that were being read ahead are still written.
            until_free(&taken).await;
        }
    }

    #[tokio::test]
    async fn a_copy_that_can_not_be_written_has_failed_and_who_follows_it_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let (copy, taken, made) = begun_in(&folder.path().join("tree"), |_, room| Ok(CopyFile::full(room)));
        let mut chunks = CopyReader::new(&copy).chunks(0..copy.len, BufferPool::default());
        let (made, read) = tokio::join!(made, chunks.next());
        assert!(matches!((made, read), (Made::Failed, Some(Err(Gone)))) && copy.has_failed());
        until_free(&taken).await;
    }

    #[tokio::test]
    async fn what_could_not_be_made_takes_no_room_and_its_readers_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        let (copy, taken, made) = begun(&tree);
        let reader = CopyReader::new(&copy);
        let mut chunks = reader.chunks(0..copy.len, BufferPool::default());
        // The last one of the NAR.
        std::fs::remove_file(tree.join("f99")).unwrap();
        let read = async {
            let mut read = 0;
            while let Some(Ok(chunk)) = chunks.next().await {
                read += chunk.len() as u64;
            }
            read
        };
        let (read, made) = tokio::join!(read, made);
        assert!(read < copy.len && made == Made::Unreadable && copy.has_failed());
        // Those who follow, and the table of all copies, hold no file.
        assert!(reader.span(&(0..copy.len)).is_none());
        until_free(&taken).await;
    }
}
