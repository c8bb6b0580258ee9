//! The task that owns the `nix-store` processes: which one takes questions, which only hold leases, and when each ends.
//!
//! Leases live as long as their process. So one process takes questions for half of `store.lease`, and is then kept
//! for a whole `store.lease`, or longer while a NAR from one of its paths is in flight. Questions never wait for a
//! successor to start, and rotation never waits for questions.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, timeout};

use super::child::{Child, ChildError};
use super::lease_holder::{Holder, LostLeases};
use super::leases::{Generation, Lease, LeaseMark, Leases, Question, StoreState};
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
/// Processes that only hold their leases; one more, and the oldest ends before its time.
const MAX_RETIRED: usize = 16;
/// How long a process that only holds its leases may take to show that it lives.
const CHECK_TIME: Duration = Duration::from_millis(200);

/// Starts the task, and gives the way to ask it. It ends, and its processes with it, when the last handle is dropped.
pub(super) fn open(options: Options, store_dir: StoreDir, metrics: StoreMetrics) -> (Leases, JoinHandle<()>) {
    let (questions, receiver) = mpsc::channel(QUEUE);
    let current = Arc::new(AtomicU64::new(0));
    let (state_sender, state) = watch::channel(StoreState::Starting);
    let leases = Leases::new(questions, Arc::clone(&current), state, options.answer_time);
    let office = Office {
        options,
        store_dir,
        metrics,
        current_id: current,
        state: state_sender,
        current: None,
        retired: VecDeque::new(),
        lost_leases: LostLeases::default(),
        successor: None,
        started: 0,
        back_off: Duration::ZERO,
        not_before: Instant::now(),
        has_lost_one: false,
    };
    (leases, tokio::spawn(office.run(receiver)))
}

/// The task that owns the processes.
struct Office {
    options: Options,
    store_dir: StoreDir,
    metrics: StoreMetrics,
    current_id: Arc<AtomicU64>,
    state: watch::Sender<StoreState>,
    /// Takes questions.
    current: Option<Holder>,
    /// Only hold their leases.
    retired: VecDeque<Holder>,
    lost_leases: LostLeases,
    /// A process that is being started to take over; questions go on meanwhile.
    successor: Option<JoinHandle<Result<Child, ChildError>>>,
    /// How many processes were started, which numbers the generations.
    started: u64,
    back_off: Duration,
    not_before: Instant,
    /// A process died: whatever ended it may have ended the leases of others.
    has_lost_one: bool,
}

enum Event {
    Questions(Vec<Question>),
    Tick,
    Died(ChildError),
    Successor(Result<Box<Child>, ChildError>),
    /// Nothing else is to be done than to take lost leases again.
    Idle,
    Closed,
}

impl Office {
    /// Runs until the last handle is dropped, and ends the processes then.
    async fn run(mut self, mut questions: mpsc::Receiver<Question>) {
        // The first question shall not wait for the process to start.
        let _ = self.ensure_current().await;
        let period = (self.options.lease / 8).clamp(Duration::from_millis(100), Duration::from_secs(5));
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            match self.next_event(&mut ticks, &mut questions).await {
                Event::Tick => {
                    self.rotate().await;
                    self.check().await;
                }
                Event::Successor(Ok(child)) => self.promote(*child),
                Event::Successor(Err(error)) => {
                    tracing::warn!(%error, "no fresh nix-store to take over; the old one goes on");
                    self.wait_longer();
                }
                Event::Died(error) => {
                    self.lost(Arc::new(error));
                    // The next question shall not wait for the process to start, nor be answered with a back-off.
                    let _ = self.ensure_current().await;
                }
                Event::Questions(batch) => self.answer(batch).await,
                Event::Idle => {}
                Event::Closed => break,
            }
            self.take_again().await;
        }
        self.close().await;
    }

    async fn next_event(&mut self, ticks: &mut Interval, questions: &mut mpsc::Receiver<Question>) -> Event {
        let has_to_take_again = self.current.is_some() && !self.lost_leases.is_empty();
        let Self { current, successor, .. } = self;
        let died = async {
            match current {
                Some(current) => current.child.ended().await.1,
                None => std::future::pending().await,
            }
        };
        let started = async {
            match successor {
                // It is never aborted; a panic in it is as good as a process that does not start.
                Some(task) => task.await.unwrap_or_else(|error| Err(ChildError::Ended(error.to_string()))),
                None => std::future::pending().await,
            }
        };
        // Questions come last: however many there are, leases have to end and processes to rotate.
        let event = tokio::select! {
            biased;
            _ = ticks.tick() => Event::Tick,
            child = started => Event::Successor(child.map(Box::new)),
            error = died => Event::Died(error),
            first = questions.recv() => match first {
                Some(first) => Event::Questions(first.with_others(questions, BATCH)),
                None => Event::Closed,
            },
            () = std::future::ready(()), if has_to_take_again => Event::Idle,
        };
        if matches!(event, Event::Successor(_)) {
            self.successor = None;
        }
        event
    }

    async fn answer(&mut self, mut batch: Vec<Question>) {
        // Whoever has left meanwhile needs no answer, and no lease.
        batch.retain(|question| !question.reply.is_closed());
        let mut paths: Vec<StorePath> = batch.iter().map(|question| question.path.clone()).collect();
        paths.sort_unstable();
        paths.dedup();
        if paths.is_empty() {
            return;
        }
        self.metrics.queries.inc_by(paths.len() as u64);
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
        let is_full = |current: &Holder| current.roots >= self.options.leases;
        if self.current.as_ref().is_some_and(is_full) && self.retired.len() < MAX_RETIRED / 2 {
            self.start_successor();
        }
    }

    /// Asks nothing in particular: a process that goes through nix-daemon lives on when that dies, and its leases do not.
    async fn check(&mut self) {
        if self.current.as_ref().is_some_and(|current| current.leases > 0) {
            let _noted_where_it_happens = self.query(&[]).await;
        }
        if std::mem::take(&mut self.has_lost_one) {
            let asked = std::mem::take(&mut self.retired).into_iter().map(|mut retired| async move {
                let answer = timeout(CHECK_TIME, retired.child.query(&[])).await;
                (retired, answer)
            });
            // All at once: questions wait for it.
            for (retired, answer) in join_all(asked).await {
                // One that hangs holds its leases. It is asked nothing else: its answer may be missed.
                match answer {
                    Ok(Err(ChildError::Ended(_))) => self.died_in_retirement(retired),
                    _ => self.retired.push_back(retired),
                }
            }
        }
    }

    /// Takes some of the lost leases again; what is not valid any more is forgotten. Only a batch: others wait to be asked.
    async fn take_again(&mut self) {
        if self.current.is_none() || self.lost_leases.is_empty() {
            return;
        }
        let batch = self.lost_leases.take(BATCH);
        // What goes wrong is noted where it happens.
        if self.query(&batch).await.is_err() {
            self.lost_leases.put_back(batch);
        } else if let Some(current) = &mut self.current {
            self.lost_leases.leave_to(current);
        }
    }

    fn died_in_retirement(&mut self, mut retired: Holder) {
        tracing::warn!(leases = retired.leases, "a nix-store that held leases died; they are taken again");
        self.lost_leases.add(&mut retired, self.options.leases);
        self.metrics.lease_failures.inc_by(retired.leases as u64);
        self.release(retired);
    }

    /// Asks; a process that died since the last question is replaced once.
    async fn query(
        &mut self,
        paths: &[StorePath],
    ) -> Result<(HashMap<StorePath, PathInfo>, Lease, LeaseMark), Arc<ChildError>> {
        let (mut tries, at_most) = (0, self.options.leases);
        loop {
            tries += 1;
            let current = self.ensure_current().await?;
            current.roots += paths.len();
            match current.child.query(paths).await {
                Ok(infos) => {
                    current.add(infos.keys(), at_most);
                    let generation = Arc::clone(&current.generation);
                    let mark = LeaseMark::of(&generation);
                    self.metrics.leases.inc_by(infos.len() as i64);
                    self.back_off = Duration::ZERO;
                    return Ok((infos, Lease(generation), mark));
                }
                Err(error) => {
                    let ended = matches!(error, ChildError::Ended(_));
                    let error = Arc::new(error);
                    if ended {
                        self.lost(Arc::clone(&error));
                    } else {
                        self.set_aside(Arc::clone(&error));
                    }
                    if !(ended && tries == 1) {
                        return Err(error);
                    }
                }
            }
        }
    }

    async fn ensure_current(&mut self) -> Result<&mut Holder, Arc<ChildError>> {
        if self.current.is_none() {
            let now = Instant::now();
            if now < self.not_before {
                return Err(Arc::new(ChildError::BackOff(self.not_before - now)));
            }
            match Child::start(&self.options, &self.store_dir).await {
                Ok(child) => self.promote(child),
                Err(error) => {
                    let error = Arc::new(error);
                    self.unavailable(Arc::clone(&error));
                    self.wait_longer();
                    return Err(error);
                }
            }
        }
        self.current.as_mut().ok_or_else(|| Arc::new(ChildError::Ended(String::new())))
    }

    /// Puts a fresh process in office and keeps the leases of the one before.
    fn promote(&mut self, child: Child) {
        self.retire();
        self.started += 1;
        let generation = Arc::new(Generation { id: self.started });
        self.current_id.store(generation.id, Ordering::Release);
        self.current = Some(Holder::new(child, generation));
        if !matches!(*self.state.borrow(), StoreState::Serving) {
            tracing::info!("nix-store answers");
            self.state.send_replace(StoreState::Serving);
        }
    }

    /// The current process asks no more, and keeps its leases.
    fn retire(&mut self) {
        self.current_id.store(0, Ordering::Release);
        if let Some(mut holder) = self.current.take() {
            holder.since = Instant::now();
            self.retired.push_back(holder);
        }
        while self.retired.len() > MAX_RETIRED {
            if let Some(oldest) = self.retired.pop_front() {
                self.metrics.lease_failures.inc_by(oldest.leases as u64);
                self.release(oldest);
            }
        }
    }

    /// The current process does not answer as it should. It may hold its leases all the same.
    fn set_aside(&mut self, error: Arc<ChildError>) {
        tracing::warn!(%error, "nix-store is replaced; its leases are kept");
        self.metrics.child_restarts.inc();
        self.retire();
        self.unavailable(error);
        self.wait_longer();
    }

    /// The current process died, and its leases with it: the next one takes them again.
    fn lost(&mut self, error: Arc<ChildError>) {
        self.has_lost_one = true;
        self.current_id.store(0, Ordering::Release);
        if let Some(mut current) = self.current.take() {
            self.lost_leases.add(&mut current, self.options.leases);
            self.metrics.leases.dec_by(current.leases as i64);
            self.metrics.lease_failures.inc_by(current.leases as u64);
            self.metrics.child_restarts.inc();
            tracing::warn!(%error, leases = current.leases, "nix-store died and is started again");
            // Dropping it kills what may be left of it.
        }
        self.state.send_replace(StoreState::Unavailable(error));
        self.wait_longer();
    }

    /// Says once that `nix-store` can't be asked.
    fn unavailable(&mut self, error: Arc<ChildError>) {
        if !matches!(*self.state.borrow(), StoreState::Unavailable(_)) {
            tracing::warn!(%error, "the local store can't be asked; its paths are answered with 404 until it can");
        }
        self.state.send_replace(StoreState::Unavailable(error));
    }

    /// The first try after a success comes at once, the others later and later.
    fn wait_longer(&mut self) {
        self.not_before = Instant::now() + self.back_off;
        self.back_off = (self.back_off * 2).clamp(FIRST_BACK_OFF, LONGEST_BACK_OFF);
    }

    /// Retires what was in office long enough, ends what was retired long enough, replaces what is missing.
    async fn rotate(&mut self) {
        let (now, lease) = (Instant::now(), self.options.lease);
        self.lost_leases.expire(now, lease);
        let due = |current: &Holder| current.roots > 0 && now - current.since >= lease / 2;
        if self.current.as_ref().is_some_and(due) {
            self.start_successor();
        }
        for mut retired in std::mem::take(&mut self.retired) {
            if retired.child.is_gone() {
                self.died_in_retirement(retired);
            } else if retired.is_in_use() || now.saturating_duration_since(retired.since) < lease {
                self.retired.push_back(retired);
            } else {
                self.release(retired);
            }
        }
        if self.current.is_none() && now >= self.not_before {
            let _ = self.ensure_current().await;
        }
    }

    fn release(&self, retired: Holder) {
        self.metrics.leases.dec_by(retired.leases as i64);
        // Ends by itself; nothing waits for it.
        tokio::spawn(retired.child.end());
    }

    fn start_successor(&mut self) {
        if self.successor.is_none() && Instant::now() >= self.not_before {
            let (options, store_dir) = (self.options.clone(), self.store_dir.clone());
            self.successor = Some(tokio::spawn(async move { Child::start(&options, &store_dir).await }));
        }
    }

    async fn close(&mut self) {
        self.current_id.store(0, Ordering::Release);
        if let Some(successor) = self.successor.take() {
            successor.abort();
        }
        let current = self.current.take().map(|current| current.child);
        let retired = self.retired.drain(..).map(|retired| retired.child);
        let children: Vec<_> = current.into_iter().chain(retired).map(Child::end).collect();
        join_all(children).await;
    }
}
