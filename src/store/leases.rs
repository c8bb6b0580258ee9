//! Leases: the processes that hold temporary garbage-collector roots, and when one takes over from another.
//!
//! One task owns the processes. A question leases its path first and asks for validity after, so that a path which
//! was answered for stays. A root lives as long as its process, so processes rotate: one takes questions for half of
//! `store.lease`, and is then kept for a whole `store.lease`, or longer while a NAR from one of its paths is in flight.
//! The invariant: whoever was told of a path while a generation was current has it for `store.lease` from then on.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::child::{Child, ChildError};
use super::{Options, StoreError};
use crate::metrics::StoreMetrics;
use crate::nix::narinfo::PathInfo;
use crate::nix::{StoreDir, StorePath};

/// Questions that wait while others are asked; beyond it the asker waits for its place.
const QUEUE: usize = 4096;
/// The most paths that are asked about at once.
const BATCH: usize = 64;
const FIRST_BACK_OFF: Duration = Duration::from_millis(100);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(30);

/// A path is kept from garbage collection as long as this lives (and `store.lease` besides).
#[derive(Clone, Debug)]
pub struct Lease(#[expect(dead_code, reason = "held, not read")] Arc<Generation>);

/// One process's time in office.
#[derive(Debug)]
pub(super) struct Generation {
    id: u64,
}

/// Where a lease came from, without keeping it.
#[derive(Clone, Debug)]
pub(super) struct LeaseMark {
    id: u64,
    generation: std::sync::Weak<Generation>,
}

/// What is known of one leased path, or that it is not valid.
type Answer = Result<Option<(PathInfo, Lease, LeaseMark)>, StoreError>;

#[derive(Debug)]
struct Question {
    path: StorePath,
    reply: oneshot::Sender<Answer>,
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
    query_timeout: Duration,
}

impl Leases {
    /// Starts the task. It ends, and its processes with it, when the last handle is dropped.
    pub(super) fn start(
        options: Options,
        store_dir: StoreDir,
        metrics: StoreMetrics,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let (questions, receiver) = mpsc::channel(QUEUE);
        let current = Arc::new(AtomicU64::new(0));
        let (state_sender, state) = watch::channel(StoreState::Starting);
        let query_timeout = options.query_timeout;
        let office = Office {
            options,
            store_dir,
            metrics,
            current_id: Arc::clone(&current),
            state: state_sender,
            current: None,
            retired: Vec::new(),
            started: 0,
            back_off: Duration::ZERO,
            not_before: Instant::now(),
        };
        let task = tokio::spawn(office.run(receiver));
        (Self { questions, current, state, query_timeout }, task)
    }

    /// Leases a path and asks what is known of it.
    pub(super) async fn ask(&self, path: StorePath) -> Answer {
        let (reply, answer) = oneshot::channel();
        let asked = async {
            let gone = || StoreError::Closed;
            self.questions.send(Question { path, reply }).await.map_err(|_| gone())?;
            answer.await.map_err(|_| gone())?
        };
        // The process has its own deadline; this one is for the wait before it.
        match timeout(self.query_timeout * 2, asked).await {
            Ok(answer) => answer,
            Err(_) => Err(StoreError::Busy(self.query_timeout * 2)),
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

/// A process that takes questions.
struct Current {
    child: Child,
    generation: Arc<Generation>,
    since: Instant,
    leases: usize,
}

/// A process that only holds its leases.
struct Retired {
    child: Child,
    generation: Arc<Generation>,
    since: Instant,
    leases: usize,
}

/// The task that owns the processes.
struct Office {
    options: Options,
    store_dir: StoreDir,
    metrics: StoreMetrics,
    current_id: Arc<AtomicU64>,
    state: watch::Sender<StoreState>,
    current: Option<Current>,
    retired: Vec<Retired>,
    /// How many processes were started, which numbers the generations.
    started: u64,
    back_off: Duration,
    not_before: Instant,
}

enum Event {
    Questions(Vec<Question>),
    Tick,
    Died(ChildError),
    Closed,
}

impl Office {
    async fn run(mut self, mut questions: mpsc::Receiver<Question>) {
        // The first question shall not wait for the process to start.
        let _ = self.ensure_current().await;
        let period = (self.options.lease / 8).clamp(Duration::from_millis(100), Duration::from_secs(5));
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let event = {
                let died = async {
                    match &mut self.current {
                        Some(current) => current.child.ended().await.1,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    biased;
                    first = questions.recv() => match first {
                        Some(first) => Event::Questions(batch(first, &mut questions)),
                        None => Event::Closed,
                    },
                    error = died => Event::Died(error),
                    _ = ticks.tick() => Event::Tick,
                }
            };
            match event {
                Event::Questions(batch) => self.answer(batch).await,
                Event::Died(error) => {
                    self.lost(&error);
                    // The next question shall not wait for the process to start, nor be answered with a back-off.
                    let _ = self.ensure_current().await;
                }
                Event::Tick => self.rotate().await,
                Event::Closed => break,
            }
        }
        self.close().await;
    }

    async fn answer(&mut self, batch: Vec<Question>) {
        let mut paths: Vec<StorePath> = batch.iter().map(|question| question.path.clone()).collect();
        paths.sort_unstable();
        paths.dedup();
        self.metrics.queries.inc_by(paths.len() as u64);
        if self.current.as_ref().is_some_and(|current| current.leases >= self.options.leases) {
            self.replace().await;
        }
        match self.query(&paths).await {
            Ok((infos, lease, mark)) => {
                for question in batch {
                    let info = infos.get(&question.path).cloned();
                    // Whoever asked may have left; nothing is owed to them.
                    let _ = question.reply.send(Ok(info.map(|i| (i, lease.clone(), mark.clone()))));
                }
            }
            Err(error) => {
                self.metrics.lease_failures.inc_by(paths.len() as u64);
                for question in batch {
                    let _ = question.reply.send(Err(StoreError::Unavailable(Arc::clone(&error))));
                }
            }
        }
    }

    /// Asks; a process that died since the last question is replaced once.
    async fn query(
        &mut self,
        paths: &[StorePath],
    ) -> Result<(HashMap<StorePath, PathInfo>, Lease, LeaseMark), Arc<ChildError>> {
        let mut tries = 0;
        loop {
            tries += 1;
            let current = self.ensure_current().await?;
            match current.child.query(paths).await {
                Ok(infos) => {
                    current.leases += paths.len();
                    let generation = Arc::clone(&current.generation);
                    let mark = LeaseMark { id: generation.id, generation: Arc::downgrade(&generation) };
                    self.metrics.leases.inc_by(paths.len() as i64);
                    self.back_off = Duration::ZERO;
                    return Ok((infos, Lease(generation), mark));
                }
                Err(error) => {
                    let again = tries == 1 && matches!(error, ChildError::Ended(_));
                    let error = Arc::new(error);
                    self.lost(&error);
                    if !again {
                        return Err(error);
                    }
                }
            }
        }
    }

    async fn ensure_current(&mut self) -> Result<&mut Current, Arc<ChildError>> {
        if self.current.is_none() {
            let now = Instant::now();
            if now < self.not_before {
                return Err(Arc::new(ChildError::BackOff(self.not_before - now)));
            }
            match self.start_child().await {
                Ok(current) => self.take_office(current),
                Err(error) => {
                    let error = Arc::new(error);
                    self.unavailable(Arc::clone(&error));
                    return Err(error);
                }
            }
        }
        self.current.as_mut().ok_or_else(|| Arc::new(ChildError::Ended(String::new())))
    }

    async fn start_child(&mut self) -> Result<Current, ChildError> {
        let child = Child::start(&self.options, &self.store_dir).await?;
        self.started += 1;
        let generation = Arc::new(Generation { id: self.started });
        Ok(Current { child, generation, since: Instant::now(), leases: 0 })
    }

    fn take_office(&mut self, current: Current) {
        self.current_id.store(current.generation.id, Ordering::Release);
        self.current = Some(current);
        self.state.send_if_modified(|state| {
            let news = !matches!(state, StoreState::Serving);
            if news {
                tracing::info!("nix-store answers");
                *state = StoreState::Serving;
            }
            news
        });
    }

    /// Says once that `nix-store` can't be asked, and when it is tried again.
    fn unavailable(&mut self, error: Arc<ChildError>) {
        self.wait_longer();
        if !matches!(*self.state.borrow(), StoreState::Unavailable(_)) {
            tracing::warn!(%error, "the local store can't be asked; its paths are answered with 404 until it can");
        }
        self.state.send_replace(StoreState::Unavailable(error));
    }

    /// The current process died or is of no use any more: its leases are gone.
    fn lost(&mut self, error: &ChildError) {
        self.current_id.store(0, Ordering::Release);
        if let Some(current) = self.current.take() {
            self.metrics.leases.dec_by(current.leases as i64);
            self.metrics.lease_failures.inc_by(current.leases as u64);
            self.metrics.child_restarts.inc();
            tracing::warn!(%error, leases = current.leases, "nix-store died and is started again");
            // Dropping it kills what may be left of it.
        }
        self.wait_longer();
    }

    /// The first try after a success comes at once, the others later and later.
    fn wait_longer(&mut self) {
        self.not_before = Instant::now() + self.back_off;
        self.back_off = (self.back_off * 2).clamp(FIRST_BACK_OFF, LONGEST_BACK_OFF);
    }

    /// Retires what was in office long enough, and ends what was retired long enough.
    async fn rotate(&mut self) {
        let now = Instant::now();
        let lease = self.options.lease;
        let due = |current: &Current| current.leases > 0 && now - current.since >= lease / 2;
        if self.current.as_ref().is_some_and(due) {
            self.replace().await;
        }
        let mut kept = Vec::new();
        for retired in self.retired.drain(..) {
            let in_flight = Arc::strong_count(&retired.generation) > 1;
            if in_flight || now.saturating_duration_since(retired.since) < lease {
                kept.push(retired);
            } else {
                self.metrics.leases.dec_by(retired.leases as i64);
                // Ends by itself; nothing waits for it.
                tokio::spawn(retired.child.end());
            }
        }
        self.retired = kept;
    }

    /// Puts a fresh process in office, if one can be had, and keeps the leases of the one before.
    async fn replace(&mut self) {
        match self.start_child().await {
            Ok(fresh) => {
                if let Some(Current { child, generation, leases, .. }) = self.current.take() {
                    let since = Instant::now();
                    self.retired.push(Retired { child, generation, since, leases });
                }
                self.take_office(fresh);
            }
            Err(error) => tracing::warn!(%error, "no fresh nix-store; the old one keeps its leases"),
        }
    }

    async fn close(&mut self) {
        self.current_id.store(0, Ordering::Release);
        let current = self.current.take().map(|current| current.child);
        let retired = self.retired.drain(..).map(|retired| retired.child);
        let children: Vec<_> = current.into_iter().chain(retired).map(Child::end).collect();
        futures_util::future::join_all(children).await;
    }
}

fn batch(first: Question, questions: &mut mpsc::Receiver<Question>) -> Vec<Question> {
    let mut batch = vec![first];
    while batch.len() < BATCH {
        match questions.try_recv() {
            Ok(question) => batch.push(question),
            Err(_) => break,
        }
    }
    batch
}
