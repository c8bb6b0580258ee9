//! Leases: a path is kept from garbage collection, and then asked about.
//!
//! This is the way to ask; the processes behind it belong to [`super::lease_office`]. The invariant: a question leases
//! its path first and asks for validity after, and whoever was told of a path has it for `store.lease` from then on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use super::StoreError;
use super::child::ChildError;
use crate::nix::StorePath;
use crate::nix::narinfo::PathInfo;

/// A path is kept from garbage collection as long as this lives (and `store.lease` besides).
#[derive(Clone, Debug)]
pub struct Lease(#[expect(dead_code, reason = "held, not read")] pub(super) Arc<Generation>);

/// One process's time in office.
#[derive(Debug)]
pub(super) struct Generation {
    pub(super) id: u64,
}

/// Where a lease came from, without keeping it.
#[derive(Clone, Debug)]
pub(super) struct LeaseMark {
    id: u64,
    generation: std::sync::Weak<Generation>,
}

impl LeaseMark {
    pub(super) fn of(generation: &Arc<Generation>) -> Self {
        Self { id: generation.id, generation: Arc::downgrade(generation) }
    }
}

/// What is known of one leased path, or that it is not valid.
pub(super) type Answer = Result<Option<(PathInfo, Lease, LeaseMark)>, StoreError>;

/// A path to be leased and asked about.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) path: StorePath,
    pub(super) reply: oneshot::Sender<Answer>,
}

impl Question {
    /// This one and those that wait behind it.
    pub(super) fn with_others(self, questions: &mut mpsc::Receiver<Self>, at_most: usize) -> Vec<Self> {
        let mut batch = vec![self];
        while batch.len() < at_most {
            match questions.try_recv() {
                Ok(question) => batch.push(question),
                Err(_) => break,
            }
        }
        batch
    }
}

/// How it goes with `nix-store`.
#[derive(Clone, Debug)]
pub enum StoreState {
    /// The first process is being started.
    Starting,
    /// It answers.
    Serving,
    /// It can't be asked, and why.
    Unavailable(Arc<ChildError>),
}

/// The way to ask.
#[derive(Clone, Debug)]
pub(super) struct Leases {
    questions: mpsc::Sender<Question>,
    /// The generation that takes questions; 0 while there is none.
    current: Arc<AtomicU64>,
    state: watch::Receiver<StoreState>,
    answer_time: Duration,
}

impl Leases {
    /// The way to whoever takes the questions.
    pub(super) fn new(
        questions: mpsc::Sender<Question>,
        current: Arc<AtomicU64>,
        state: watch::Receiver<StoreState>,
        answer_time: Duration,
    ) -> Self {
        Self { questions, current, state, answer_time }
    }

    /// Leases a path and asks what is known of it.
    pub(super) async fn ask(&self, path: StorePath) -> Answer {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            let gone = || StoreError::Closed;
            self.questions.send(Question { path, reply }).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?
        };
        // The process may take longer, and then answers the next who ask; this one is sent on to other caches.
        match timeout(self.answer_time, asked).await {
            Ok(answer) => answer,
            Err(_) => Err(StoreError::Busy(self.answer_time)),
        }
    }

    /// Whether this lease still comes from the generation that takes questions.
    pub(super) fn is_current(&self, mark: &LeaseMark) -> bool {
        mark.id == self.current.load(Ordering::Acquire)
    }

    pub(super) fn state(&self) -> watch::Receiver<StoreState> {
        self.state.clone()
    }
}

impl LeaseMark {
    /// The lease itself, unless its process is gone.
    pub(super) fn lease(&self) -> Option<Lease> {
        self.generation.upgrade().map(Lease)
    }
}
