//! Which piece of a NAR is asked of whom, and what came of each: pure, the clock is passed in.
//!
//! Knows sources by number and nothing of how they are asked. The invariants: no byte is given out of its turn, and no more
//! than `ahead` bytes are asked for beyond what was taken, so that no more than those are ever kept.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};

/// How long a piece takes to come, about: long beside the way there and back, short beside the whole.
const PIECE_TIME: Duration = Duration::from_millis(150);
/// No piece is shorter, in bytes, but the last; nor longer.
pub(super) const SHORTEST: u64 = 256 * 1024;
const LONGEST: u64 = 4 * 1024 * 1024;
/// What is asked of a source of which nothing is known.
const FIRST: u64 = 1024 * 1024;
/// A piece is asked of a second source if that will have the rest so many times sooner, and by so much.
const SOONER: f64 = 2.0;
const SOONER_BY: Duration = Duration::from_millis(50);
/// A source that was overtaken so often in a row is asked only for what nobody else can give.
const BEATEN: u32 = 3;
/// A source that alone sends so many bytes a second is on no slower a link than most hosts have: more than 1 Gbit/s carries. What
/// bounds it then is the work, of which pieces make more.
const FAST: f64 = 128.0 * 1024.0 * 1024.0;
/// Shorter chunks are copied and gathered until they are as long, in bytes: each may hold on to a far larger buffer, until its turn comes.
const COPIED: usize = 64 * 1024;
/// How much the latest piece counts in a source's rate.
const WEIGHT: f64 = 0.5;

/// The pieces of the rest of a NAR.
#[derive(Debug)]
pub(super) struct Pieces {
    end: u64,
    /// What comes before was taken.
    taken: u64,
    /// What comes from here on was never asked for.
    next: u64,
    /// How far beyond `taken` may be asked for, in bytes.
    ahead: u64,
    /// No more pieces are begun.
    is_frozen: bool,
    /// Pieces by their beginnings, until they are taken.
    open: BTreeMap<u64, Piece>,
    sources: Vec<Source>,
}

#[derive(Debug)]
struct Piece {
    end: u64,
    /// Everything before came.
    came: u64,
    ready: VecDeque<Bytes>,
    /// Short chunks behind those.
    tail: BytesMut,
    asked: Vec<Asked>,
}

/// A source that is asked for a piece from some place on.
#[derive(Debug)]
struct Asked {
    source: usize,
    from: u64,
    at: u64,
    since: Instant,
}

#[derive(Debug)]
struct Source {
    /// Bytes a second.
    rate: Option<f64>,
    beaten: u32,
    /// The beginning of the piece that it is asked for.
    asked: Option<u64>,
    is_gone: bool,
}

/// What a source is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Bytes that nobody was asked for before.
    New(Range<u64>),
    /// The rest of what another one failed to send, or sends too slowly.
    Again(Range<u64>),
}

/// What came of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Came {
    /// How many of its bytes are of use.
    pub(super) new: u64,
    /// Whether nothing more of this request is: all of the piece came, from whomever.
    pub(super) is_over: bool,
}

impl Pieces {
    /// Of the bytes in this range, with `ahead` bytes of memory for what comes before its turn.
    pub(super) fn new(range: Range<u64>, ahead: u64) -> Self {
        Self {
            end: range.end,
            taken: range.start,
            next: range.start,
            ahead: ahead.max(SHORTEST),
            is_frozen: false,
            open: BTreeMap::new(),
            sources: Vec::new(),
        }
    }

    /// Another source. Gives its number.
    pub(super) fn add_source(&mut self) -> usize {
        self.sources.push(Source { rate: None, beaten: 0, asked: None, is_gone: false });
        self.sources.len() - 1
    }

    /// What this source is to send now. `None`: nothing for now.
    pub(super) fn ask(&mut self, source: usize, now: Instant) -> Option<Ask> {
        let asking = self.sources.get(source)?;
        if asking.is_gone || asking.asked.is_some() {
            return None;
        }
        let is_trusted = asking.beaten < BEATEN || self.all_are_slow();
        let (start, ask) = match (self.orphan(), self.fresh(source)) {
            (Some(start), _) if is_trusted => (start, self.rest_of(start)?),
            (None, Some(range)) if is_trusted => {
                self.next = range.end;
                self.open.insert(range.start, Piece::new(&range));
                (range.start, Ask::New(range))
            }
            _ => {
                let start = self.slow(source, now)?;
                (start, self.rest_of(start)?)
            }
        };
        let (Ask::New(range) | Ask::Again(range)) = &ask;
        let asked = Asked { source, from: range.start, at: range.start, since: now };
        self.open.get_mut(&start)?.asked.push(asked);
        self.sources.get_mut(source)?.asked = Some(start);
        Some(ask)
    }

    /// The next bytes of what the source was asked for came.
    pub(super) fn came(&mut self, source: usize, mut bytes: Bytes, now: Instant) -> Came {
        let over = Came { new: 0, is_over: true };
        let Some(asking) = self.sources.get_mut(source) else { return over };
        // Another one was sooner, if nothing is asked of it any more.
        let Some(start) = asking.asked else { return over };
        let Some(piece) = self.open.get_mut(&start) else { return over };
        let Some(asked) = piece.asked.iter_mut().find(|asked| asked.source == source) else { return over };
        let known = piece.came.saturating_sub(asked.at);
        asked.at = (asked.at + bytes.len() as u64).min(piece.end);
        let (from, at, since) = (asked.from, asked.at, asked.since);
        let mut new = 0;
        if at > piece.came {
            bytes = bytes.split_off(usize::try_from(known).unwrap_or(usize::MAX).min(bytes.len()));
            bytes.truncate(usize::try_from(at - piece.came).unwrap_or(usize::MAX));
            new = bytes.len() as u64;
            piece.came = at;
            piece.put(bytes);
        }
        if piece.came < piece.end {
            return Came { new, is_over: false };
        }
        let took = now.saturating_duration_since(since).as_secs_f64().max(1e-6);
        let measured = (at - from) as f64 / took;
        let rate = asking.rate.map_or(measured, |before| before * (1.0 - WEIGHT) + measured * WEIGHT);
        (asking.rate, asking.beaten, asking.asked) = (Some(rate), 0, None);
        for beaten in piece.asked.drain(..).filter(|asked| asked.source != source) {
            if let Some(other) = self.sources.get_mut(beaten.source) {
                other.asked = None;
                other.beaten += 1;
                let took = now.saturating_duration_since(beaten.since).as_secs_f64().max(1e-6);
                other.rate = Some((beaten.at - beaten.from) as f64 / took);
            }
        }
        Came { new, is_over: true }
    }

    /// The source sends no more: what it was asked for is to be asked of others.
    pub(super) fn gone(&mut self, source: usize) {
        let Some(gone) = self.sources.get_mut(source) else { return };
        gone.is_gone = true;
        if let Some(piece) = gone.asked.take().and_then(|start| self.open.get_mut(&start)) {
            piece.asked.retain(|asked| asked.source != source);
        }
    }

    /// The next bytes in their order, if they came.
    pub(super) fn take(&mut self) -> Option<Bytes> {
        let mut first = self.open.first_entry()?;
        let bytes = first.get_mut().ready.pop_front()?;
        self.taken += bytes.len() as u64;
        if self.taken >= first.get().end {
            first.remove();
        }
        Some(bytes)
    }

    /// Whether [`Pieces::take`] gives something.
    pub(super) fn has_bytes(&self) -> bool {
        self.open.first_key_value().is_some_and(|(_, first)| !first.ready.is_empty())
    }

    /// No more pieces are begun: only what was is brought to its end.
    pub(super) fn freeze(&mut self) {
        self.is_frozen = true;
    }

    /// Whether everything that was asked for was taken, and no more will be asked for.
    pub(super) fn is_over(&self) -> bool {
        self.open.is_empty() && (self.is_frozen || self.next == self.end)
    }

    /// The fastest source that is left, and whether it is so fast that others would only be in its way.
    pub(super) fn fastest(&self) -> Option<(usize, bool)> {
        let left = self.sources.iter().enumerate().filter(|(_, source)| !source.is_gone);
        let rate = |source: &Source| source.rate.unwrap_or_default();
        let fastest = left.max_by(|(_, one), (_, other)| rate(one).total_cmp(&rate(other)))?;
        Some((fastest.0, rate(fastest.1) >= FAST))
    }

    /// Whether anything came.
    pub(super) fn has_begun(&self) -> bool {
        self.open.first_key_value().is_none_or(|(start, piece)| piece.came > *start)
    }

    /// How many sources are left.
    pub(super) fn left(&self) -> usize {
        self.sources.iter().filter(|source| !source.is_gone).count()
    }

    fn all_are_slow(&self) -> bool {
        self.sources.iter().all(|source| source.is_gone || source.beaten >= BEATEN)
    }

    /// The first piece that came in part, and that nobody is asked for.
    fn orphan(&self) -> Option<u64> {
        let is_orphan = |piece: &Piece| piece.came < piece.end && piece.asked.is_empty();
        self.open.iter().find(|(_, piece)| is_orphan(piece)).map(|(start, _)| *start)
    }

    /// A new piece for this source, as far as there is memory for it.
    fn fresh(&self, source: usize) -> Option<Range<u64>> {
        let left = self.end - self.next;
        if self.is_frozen || left == 0 {
            return None;
        }
        let rate = self.sources.get(source)?.rate;
        let wanted = rate.map_or(FIRST, |rate| (rate * PIECE_TIME.as_secs_f64()) as u64);
        // Each has one, and there is one for each that has sent its before the slowest has.
        let share = self.ahead / (2 * self.left().max(1) as u64);
        let len = wanted.clamp(SHORTEST, LONGEST).min(share.max(SHORTEST)).min(left);
        let room = self.ahead.saturating_sub(self.next - self.taken);
        // Not a crumb for each crumb that was taken.
        (room >= len).then(|| self.next..self.next + len)
    }

    /// The first piece that this source would send far sooner than the one that is asked for it.
    fn slow(&self, source: usize, now: Instant) -> Option<u64> {
        let rate = self.sources.get(source)?.rate.filter(|rate| *rate > 0.0)?;
        let is_slow = |piece: &Piece| {
            let [asked] = &piece.asked[..] else { return false };
            let left = (piece.end - piece.came) as f64;
            let took = now.saturating_duration_since(asked.since).as_secs_f64();
            let sent = (asked.at - asked.from) as f64;
            let known =
                self.sources.get(asked.source).and_then(|source| source.rate).filter(|rate| *rate > 0.0);
            let takes = match known {
                // Nothing came yet: as long again as it let wait, or as it took before.
                _ if sent > 0.0 => left * took / sent,
                Some(known) => (left / known).max(took),
                None => took,
            };
            takes > SOONER * left / rate + SOONER_BY.as_secs_f64()
        };
        let incomplete = self.open.iter().filter(|(_, piece)| piece.came < piece.end);
        incomplete.filter(|(_, piece)| is_slow(piece)).map(|(start, _)| *start).next()
    }

    fn rest_of(&self, start: u64) -> Option<Ask> {
        self.open.get(&start).map(|piece| Ask::Again(piece.came..piece.end))
    }
}

impl Piece {
    fn new(range: &Range<u64>) -> Self {
        Self {
            end: range.end,
            came: range.start,
            ready: VecDeque::new(),
            tail: BytesMut::new(),
            asked: Vec::new(),
        }
    }

    fn put(&mut self, bytes: Bytes) {
        if bytes.len() >= COPIED && self.tail.is_empty() {
            return self.ready.push_back(bytes);
        }
        self.tail.extend_from_slice(&bytes);
        if self.tail.len() >= COPIED || self.came == self.end {
            self.ready.push_back(self.tail.split().freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1024 * 1024;
    const STEP: Duration = Duration::from_millis(5);

    /// What the bytes of a range are.
    fn bytes(range: Range<u64>) -> Bytes {
        range.map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    /// A source as it is played: how fast, and from when on it is silent or gone.
    #[derive(Clone, Debug)]
    struct Played {
        bytes_a_step: u64,
        silent_after: usize,
        gone_after: usize,
        asked: Option<Range<u64>>,
        sent: u64,
    }

    fn played(bytes_a_second: u64) -> Played {
        let bytes_a_step = bytes_a_second * STEP.as_millis() as u64 / 1000;
        Played { bytes_a_step, silent_after: usize::MAX, gone_after: usize::MAX, asked: None, sent: 0 }
    }

    /// Plays until all of it was taken, `taken_a_step` bytes at most each step. Gives the time that it took; `None`: too long.
    fn play(
        size: u64,
        ahead: u64,
        sources: &mut [Played],
        taken_a_step: u64,
        limit: Duration,
    ) -> Option<Duration> {
        let began = Instant::now();
        let (mut pieces, mut now, mut step) = (Pieces::new(0..size, ahead), began, 0);
        for _ in sources.iter() {
            pieces.add_source();
        }
        let (mut position, mut kept) = (0, 0);
        while !pieces.is_over() {
            for (number, source) in sources.iter_mut().enumerate() {
                if step == source.gone_after {
                    pieces.gone(number);
                }
                if step >= source.gone_after {
                    continue;
                }
                if source.asked.is_none() {
                    source.asked = pieces.ask(number, now).map(|ask| match ask {
                        Ask::New(range) | Ask::Again(range) => range,
                    });
                }
                let Some(range) = source.asked.take().filter(|_| step < source.silent_after) else {
                    continue;
                };
                let to = range.end.min(range.start + source.bytes_a_step);
                let came = pieces.came(number, bytes(range.start..to), now);
                source.sent += came.new;
                kept += came.new;
                assert!(to < range.end || came.is_over);
                source.asked = (!came.is_over).then_some(to..range.end);
            }
            // What is short is gathered.
            assert!(kept <= ahead.max(SHORTEST), "{kept} bytes are kept");
            let mut taken = 0;
            while taken < taken_a_step && pieces.has_bytes() {
                let chunk = pieces.take().unwrap();
                let end = position + chunk.len() as u64;
                assert!(chunk == bytes(position..end), "other bytes at {position}");
                (position, taken, kept) = (end, taken + chunk.len() as u64, kept - chunk.len() as u64);
            }
            (now, step) = (now + STEP, step + 1);
            if now - began > limit {
                return None;
            }
        }
        assert_eq!(position, size);
        Some(now - began)
    }

    fn seconds(size: u64, sources: &mut [Played]) -> f64 {
        let limit = Duration::from_secs(600);
        play(size, 14 * MIB, sources, u64::MAX, limit).expect("it never ends").as_secs_f64()
    }

    #[test]
    fn two_take_half_as_long_as_one_and_a_slow_one_holds_up_nobody() {
        let size = 128 * MIB;
        let alone = seconds(size, &mut [played(12 * MIB)]);
        let mut two = [played(12 * MIB), played(12 * MIB)];
        assert!(seconds(size, &mut two) < 0.54 * alone);
        assert!(two.iter().all(|source| source.sent > size / 3));
        for slow in [6 * MIB, 2 * MIB, MIB / 2, 10_000] {
            let took = seconds(size, &mut [played(12 * MIB), played(slow)]);
            assert!(took < 1.03 * alone, "with one of {slow} bytes a second: {took} s, alone {alone} s");
        }
    }

    #[test]
    fn what_a_silent_one_was_asked_for_is_asked_of_another_at_the_end_too() {
        let mut silent = played(12 * MIB);
        silent.silent_after = 100;
        let took = seconds(64 * MIB, &mut [silent.clone(), played(12 * MIB)]);
        assert!(took < 7.0, "{took} s");
        // From the beginning on, and asked first.
        silent.silent_after = 0;
        let took = seconds(64 * MIB, &mut [silent.clone(), silent, played(12 * MIB)]);
        assert!(took < 7.0, "{took} s");
    }

    #[test]
    fn the_rest_of_what_failed_is_asked_for_and_nothing_new_of_what_is_frozen() {
        let (mut pieces, now) = (Pieces::new(100..100 + 8 * MIB, 8 * MIB), Instant::now());
        let (one, two) = (pieces.add_source(), pieces.add_source());
        let (first, second) = (100..100 + MIB, 100 + MIB..100 + 2 * MIB);
        assert_eq!(pieces.ask(one, now), Some(Ask::New(first.clone())));
        assert_eq!(pieces.ask(one, now), None, "it has something to do");
        assert_eq!(pieces.ask(two, now), Some(Ask::New(second.clone())));
        assert_eq!(pieces.came(one, bytes(100..300), now), Came { new: 200, is_over: false });
        assert!(pieces.came(two, bytes(second.clone()), now).is_over);
        assert!(!pieces.has_bytes(), "short chunks are gathered, and the others wait for their turn");
        pieces.gone(one);
        pieces.freeze();
        assert_eq!((pieces.ask(one, now), pieces.left()), (None, 1));
        assert_eq!(pieces.ask(two, now), Some(Ask::Again(300..first.end)));
        assert!(pieces.came(two, bytes(300..first.end), now).is_over);
        assert_eq!(pieces.ask(two, now), None);
        let all: Vec<u8> = std::iter::from_fn(|| pieces.take()).flatten().collect();
        assert!(all == bytes(first.start..second.end) && pieces.is_over());
        // Who was never asked, or is over, changes nothing.
        assert!(pieces.came(two, bytes(0..9), now).is_over && pieces.came(7, bytes(0..9), now).is_over);
        pieces.gone(7);
    }

    #[test]
    fn the_fastest_is_known_and_whether_it_needs_no_help() {
        let (mut pieces, now) = (Pieces::new(0..64 * MIB, 16 * MIB), Instant::now());
        let (one, two) = (pieces.add_source(), pieces.add_source());
        let mut sends = |source: usize, took: Duration| {
            let Some(Ask::New(range)) = pieces.ask(source, now) else { panic!("there is more") };
            pieces.came(source, bytes(range), now + took);
            pieces.fastest()
        };
        assert_eq!(sends(one, Duration::from_millis(50)), Some((one, false)));
        assert_eq!(sends(two, Duration::from_millis(20)), Some((two, false)));
        assert_eq!(sends(one, Duration::from_millis(2)), Some((one, true)));
        pieces.gone(one);
        assert_eq!(pieces.fastest(), Some((two, false)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn all_comes_in_order_within_its_memory_whoever_fails(
            size in 1..24 * MIB,
            ahead in SHORTEST..16 * MIB,
            taken_a_step in 30_000..1_000_000u64,
            good in 20_000..100_000u64,
            others in prop::collection::vec((0..100_000u64, 0..100usize, 0..100usize), 0..4),
            place in 0..4usize,
        ) {
            let mut sources: Vec<Played> = others.into_iter().map(|(bytes_a_step, silent_after, gone_after)| {
                // Who is silent for long is given up.
                let gone_after = gone_after.min(silent_after + 200);
                Played { bytes_a_step, silent_after, gone_after, asked: None, sent: 0 }
            }).collect();
            let good = Played { bytes_a_step: good, ..played(0) };
            sources.insert(place.min(sources.len()), good);
            let took = play(size, ahead, &mut sources, taken_a_step, Duration::from_secs(60));
            prop_assert!(took.is_some(), "it never ends");
        }
    }
}
