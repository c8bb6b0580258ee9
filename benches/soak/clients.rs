//! Who asks the local daemon: the real Nix, and clients that look at every byte.

use std::io::Read as _;
use std::time::{Duration, Instant};

use peernix::nix::NarHash;
use sha2::{Digest as _, Sha256};

use crate::nix::{self, Member, Store};
use crate::promises::Broken;
use crate::tally::Random;
use crate::{LEASE, Soak};

/// After which nobody waits for an answer, or for the end of one.
const TOO_LONG: Duration = Duration::from_secs(90);

/// How a client reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Manner {
    /// As fast as it can.
    Fast,
    /// A few MiB a second, and the large paths above all.
    Slow,
}

/// Copies closures into fresh stores, with signatures required, and verifies each.
pub(crate) fn copy(soak: &Soak, copier: usize, mut random: Random) {
    let home = soak.local.folder.join(format!("copier{copier}"));
    while soak.goes_on() {
        let shelf = if random.percent(20) { &soak.alone } else { &soak.shared };
        let Some(closure) = shelf.any(&mut random) else {
            soak.pause(100);
            continue;
        };
        // With it goes what Nix remembers of the cache.
        let _ = std::fs::remove_dir_all(&home);
        std::fs::create_dir_all(&home).expect("a folder");
        let target = Store::new(&home, "target");
        let was_kept = closure.is_steady && soak.shared.is_kept(&closure);
        let mut copy = nix::nix("nix", &home);
        copy.args(["copy", "--from", &soak.url, "--to"]).arg(target.root()).arg(&closure.top);
        copy.args(["--option", "require-sigs", "true", "--option", "trusted-public-keys", &soak.key]);
        let began = Instant::now();
        let copied = nix::run(&mut copy);
        if began.elapsed() > TOO_LONG {
            soak.tally.unanswered.one();
            soak.tally.note(format!("a copy took {:?}: {copied:?}", began.elapsed()));
        }
        let Err(error) = copied else {
            soak.tally.copied.one();
            if let Err(error) = target.verify() {
                soak.tally.wrong.one();
                soak.tally.note(format!("a copied store is wrong: {error}"));
            }
            continue;
        };
        let says = |words: &[&str]| words.iter().any(|word| error.contains(word));
        if says(&["hash mismatch", "lacks a valid signature", "bad archive"]) {
            soak.tally.wrong.one();
            soak.tally.note(format!("Nix got something wrong: {error}"));
        } else if says(&["HTTP error 5"]) {
            soak.tally.failed_5xx.one();
            soak.tally.note(format!("Nix got a 5xx: {error}"));
        } else if says(&[
            "is not valid",
            "does not exist in binary cache",
            "no substituter that can build it",
        ]) {
            soak.tally.gone.one();
            if was_kept && soak.shared.is_kept(&closure) {
                soak.tally.gone_though_kept.one();
                soak.tally.note(format!("gone, though a peer has it: {error}"));
            }
        } else {
            soak.tally.not_copied.one();
            soak.tally.note(format!("not copied: {error}"));
        }
    }
    let _ = std::fs::remove_dir_all(&home);
}

/// Asks for a narinfo and then for its NAR, by hand, again and again.
pub(crate) fn ask(soak: &Soak, manner: Manner, random: Random) {
    let config = ureq::Agent::config_builder().http_status_as_error(false).proxy(None);
    let agent = config.timeout_global(Some(TOO_LONG)).build().into();
    let mut asker = Asker { soak, agent, manner, random };
    while soak.goes_on() {
        if asker.ask_once().is_none() {
            soak.pause(20);
        }
        let pause = asker.random.below(60);
        soak.pause(pause);
    }
}

struct Asker<'a> {
    soak: &'a Soak,
    agent: ureq::Agent,
    manner: Manner,
    random: Random,
}

/// What was asked for and where it is.
struct Wanted {
    member: Member,
    url: String,
    /// When its narinfo was asked for and answered, if nobody but the local store has ever had it.
    promised: Option<(Instant, Instant)>,
}

type Response = ureq::http::Response<ureq::Body>;

/// How a body ended.
enum Read {
    Whole,
    Cut,
    Left,
}

impl Asker<'_> {
    /// `None`: there was nothing to ask for, or it is not there.
    fn ask_once(&mut self) -> Option<()> {
        let wanted = self.narinfo()?;
        let is_fast = self.manner == Manner::Fast;
        // At times the lease ends before the NAR is asked for, which is nobody's fault.
        let pause = if self.random.percent(85) { self.random.below(200) } else { self.random.below(2000) };
        self.soak.pause(pause);
        if is_fast && self.random.percent(25) { self.in_ranges(&wanted) } else { self.whole(&wanted) }
    }

    fn narinfo(&mut self) -> Option<Wanted> {
        let tally = &self.soak.tally;
        let is_alone = self.manner == Manner::Fast && self.random.percent(40);
        let shelf = if is_alone { &self.soak.alone } else { &self.soak.shared };
        // The newest is the likeliest to be in the local store, and to be deleted under our eyes.
        let newest = self.random.percent(50);
        let closure = if newest { shelf.latest()? } else { shelf.any(&mut self.random)? };
        let largest = closure.members.iter().max_by_key(|member| member.nar_size)?;
        let any = &closure.members[self.random.below(closure.members.len() as u64) as usize];
        let takes_largest = self.manner == Manner::Slow && self.random.percent(80);
        let member = if takes_largest { largest.clone() } else { any.clone() };
        let began = Instant::now();
        let answer = self.get(&format!("{}.narinfo", member.hash_part), None)?;
        let answered = Instant::now();
        if answer.status() == 404 {
            tally.narinfos_missing.one();
            return None;
        }
        let text = self.text(answer)?;
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let (hash, size) = (field("NarHash"), field("NarSize").and_then(|size| size.parse().ok()));
        if hash != Some(&member.nar_hash) || size != Some(member.nar_size) {
            tally.wrong.one();
            tally.note(format!("a narinfo is not what Nix says ({member:?}): {text}"));
            return None;
        }
        tally.narinfos.one();
        let url = field("URL")?.to_owned();
        Some(Wanted { member, url, promised: is_alone.then_some((began, answered)) })
    }

    fn whole(&mut self, wanted: &Wanted) -> Option<()> {
        let answer = self.nar(wanted, None)?;
        if !self.has_right_length(&answer, wanted.member.nar_size) {
            return None;
        }
        self.read_whole(answer, &wanted.member)
    }

    fn read_whole(&mut self, answer: Response, member: &Member) -> Option<()> {
        let leaves_after = self.random.percent(8).then(|| self.random.below(member.nar_size));
        let (mut hasher, mut len) = (Sha256::new(), 0);
        match self.read(answer, &mut hasher, &mut len, leaves_after) {
            Read::Whole => self.compare(hasher, len, member),
            Read::Left | Read::Cut => None,
        }
    }

    /// Three ranges, one after the other; a relayed NAR comes whole instead, which is right too.
    fn in_ranges(&mut self, wanted: &Wanted) -> Option<()> {
        let size = wanted.member.nar_size;
        let (first, second) = (self.random.below(size), self.random.below(size));
        let bounds = [0, first.min(second), first.max(second), size];
        let (mut hasher, mut len) = (Sha256::new(), 0);
        for part in bounds.windows(2).filter(|part| part[0] < part[1]) {
            let range = format!("{}-{}", part[0], part[1] - 1);
            let answer = self.nar(wanted, Some(&range))?;
            if answer.status() == 200 {
                return self
                    .has_right_length(&answer, size)
                    .then(|| self.read_whole(answer, &wanted.member))?;
            }
            let place = answer.headers().get("content-range").and_then(|place| place.to_str().ok());
            if place != Some(&format!("bytes {range}/{size}")) {
                self.soak.tally.wrong.one();
                self.soak.tally.note(format!("bytes {range}/{size} were asked for, not {place:?}"));
                return None;
            }
            if !self.has_right_length(&answer, part[1] - part[0]) {
                return None;
            }
            let Read::Whole = self.read(answer, &mut hasher, &mut len, None) else { return None };
            self.soak.pause(self.random.below(50));
        }
        self.soak.tally.nars_by_ranges.one();
        self.compare(hasher, len, &wanted.member)
    }

    fn nar(&self, wanted: &Wanted, range: Option<&str>) -> Option<Response> {
        let answer = self.get(&wanted.url, range)?;
        if answer.status() != 404 {
            return Some(answer);
        }
        self.soak.tally.nars_missing.one();
        if let Some((asked, answered)) = wanted.promised.filter(|(asked, _)| asked.elapsed() < LEASE) {
            let hash_part = wanted.member.hash_part.clone();
            self.soak.promises.broken(Broken { hash_part, asked, answered, missing: Instant::now() });
        }
        None
    }

    /// An answer that is 200, 206 or 404.
    fn get(&self, path: &str, range: Option<&str>) -> Option<Response> {
        let tally = &self.soak.tally;
        let mut request = self.agent.get(format!("{}/{path}", self.soak.url));
        if let Some(range) = range {
            request = request.header("range", format!("bytes={range}"));
        }
        match request.call() {
            Ok(answer) if matches!(answer.status().as_u16(), 200 | 206 | 404) => Some(answer),
            Ok(answer) if answer.status().is_server_error() => {
                tally.failed_5xx.one();
                tally.note(format!("{} for {path}", answer.status()));
                None
            }
            Ok(answer) => {
                tally.unanswered.one();
                tally.note(format!("{} for {path}", answer.status()));
                None
            }
            Err(error) => {
                tally.unanswered.one();
                tally.note(format!("no answer for {path}: {error}"));
                None
            }
        }
    }

    fn text(&self, answer: Response) -> Option<String> {
        let text = answer.into_body().read_to_string();
        text.inspect_err(|error| {
            self.soak.tally.unanswered.one();
            self.soak.tally.note(format!("half a narinfo: {error}"));
        })
        .ok()
    }

    fn has_right_length(&self, answer: &Response, expected: u64) -> bool {
        let length = answer.headers().get("content-length").and_then(|length| length.to_str().ok());
        let is_right = length == Some(&expected.to_string());
        if !is_right {
            self.soak.tally.wrong.one();
            self.soak.tally.note(format!("{expected} bytes were to come, and {length:?} are announced"));
        }
        is_right
    }

    fn read(
        &mut self,
        answer: Response,
        hasher: &mut Sha256,
        len: &mut u64,
        leaves_after: Option<u64>,
    ) -> Read {
        let tally = &self.soak.tally;
        let (mut reader, mut buffer) = (answer.into_body().into_reader(), vec![0; 64 * 1024]);
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return Read::Whole,
                Ok(read) => {
                    hasher.update(&buffer[..read]);
                    *len += read as u64;
                }
                Err(error) => {
                    tally.cut.one();
                    if error.to_string().contains("timeout") {
                        tally.unanswered.one();
                        tally.note(format!("a NAR did not come to its end in {TOO_LONG:?}"));
                    }
                    return Read::Cut;
                }
            }
            if leaves_after.is_some_and(|bytes| *len > bytes) || !self.soak.goes_on() {
                tally.left.one();
                return Read::Left;
            }
            if self.manner == Manner::Slow {
                std::thread::sleep(Duration::from_millis(self.random.below(20)));
            }
        }
    }

    /// Of a body that came to its end.
    fn compare(&self, hasher: Sha256, len: u64, member: &Member) -> Option<()> {
        let hash = NarHash::from_digest(hasher.finalize().into()).to_string();
        if len != member.nar_size || hash != member.nar_hash {
            self.soak.tally.wrong.one();
            self.soak.tally.note(format!("{len} bytes of {hash} instead of {member:?}"));
            return None;
        }
        self.soak.tally.nars.one();
        Some(())
    }
}
