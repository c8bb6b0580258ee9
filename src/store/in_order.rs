//! Work on several threads, with its results in order, and never more than a few of them at once. Blocking.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Builder;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

const MOST_THREADS: usize = 4;
/// Items that are under way or done, and not taken. Until there are so many, no thread is begun: that would not pay.
const AT_ONCE: usize = 12;

/// Does each item, and takes the results in the order of the items. Items are asked for here, and results are taken here; work is done
/// here too, whenever there is nothing else to do. If the system refuses a thread, the others do it all.
pub(super) fn in_order<T: Send, R: Send, E>(
    mut items: impl Iterator<Item = Result<T, E>>,
    work: impl Fn(T) -> R + Sync,
    mut take: impl FnMut(R) -> Result<(), E>,
) -> Result<(), E> {
    let (put, waiting) = unbounded();
    let mut results = VecDeque::with_capacity(AT_ONCE);
    let ended = AtomicBool::new(false);
    let do_one = |(item, result): (T, Sender<R>)| {
        if !ended.load(Ordering::Relaxed) {
            // Nobody waits for it after an error.
            let _ = result.send(work(item));
        }
    };
    std::thread::scope(|scope| {
        let mut threads = 1;
        let mut go = || {
            loop {
                while results.len() < AT_ONCE
                    && let Some(item) = items.next()
                {
                    let (result, to_take) = bounded(1);
                    let _ = put.send((item?, result));
                    results.push_back(to_take);
                }
                if results.len() == AT_ONCE && threads == 1 {
                    // Where there is one processor, a second thread waits for the disk at the same time.
                    let most = std::thread::available_parallelism().map_or(2, usize::from);
                    while threads < most.clamp(2, MOST_THREADS) {
                        let (waiting, do_one) = (waiting.clone(), &do_one);
                        let _ = Builder::new().spawn_scoped(scope, move || waiting.iter().for_each(do_one));
                        threads += 1;
                    }
                }
                // None of a thread that panicked: so does the scope then.
                let Some(next) = results.pop_front() else { return Ok(()) };
                let Some(result) = result_of(&next, &waiting, do_one) else { return Ok(()) };
                take(result)?;
            }
        };
        let done = go();
        // The threads end, before they have done what still waits.
        ended.store(true, Ordering::Relaxed);
        drop(put);
        done
    })
}

/// The result that comes next. Until it is there, other items that wait are done here.
fn result_of<R, J>(next: &Receiver<R>, waiting: &Receiver<J>, do_one: impl Fn(J)) -> Option<R> {
    loop {
        if let Ok(result) = next.try_recv() {
            return Some(result);
        }
        match waiting.try_recv() {
            Ok(job) => do_one(job),
            Err(_) => return next.recv().ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn every_item_is_done_once_and_taken_in_its_order() {
        for count in [0, 1, AT_ONCE - 1, AT_ONCE, 1000] {
            let (open, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let items = (0..count).map(|item| {
                most.fetch_max(open.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
                Ok::<_, ()>(item)
            });
            let mut taken = Vec::new();
            let take = |result| {
                open.fetch_sub(1, Ordering::Relaxed);
                taken.push(result);
                Ok(())
            };
            in_order(items, |item| item * 2, take).unwrap();
            assert_eq!(taken, (0..count).map(|item| item * 2).collect::<Vec<_>>());
            assert!(most.into_inner() <= AT_ONCE);
        }
    }

    #[test]
    fn an_item_that_fails_or_a_result_that_is_refused_ends_it() {
        let items = |bad: usize| (0..100).map(move |item| if item == bad { Err("item") } else { Ok(item) });
        let take = |result: usize| if result == 77 { Err("result") } else { Ok(()) };
        let failed = |bad| in_order(items(bad), |item| item, take);
        assert!(matches!(failed(30), Err("item")));
        assert!(matches!(failed(100), Err("result")));
    }

    #[test]
    #[should_panic = "scoped thread panicked"]
    fn a_thread_that_panics_is_not_waited_for() {
        let here = std::thread::current().id();
        let work = |item| {
            if std::thread::current().id() == here {
                std::thread::sleep(std::time::Duration::from_millis(1));
            } else {
                panic!("as is tried here");
            }
            item
        };
        in_order((0..10_000).map(Ok::<_, ()>), work, |_| Ok(())).unwrap();
    }
}
