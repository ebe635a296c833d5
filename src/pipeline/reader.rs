//! Disk → host: single flight, by priority, a bounded number of reads at once.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use stemkv_store::{RecordId, RecordInfo, Slot};
use tokio::sync::Notify;
use tracing::Instrument as _;

use crate::index::{Pin, Pool};
use crate::pipeline::{DiskSide, HashedPath, Priority, Shared, coding, removing};
use crate::stats::{Counter, Stage};
use crate::{Error, ErrorKind};

/// Bytes that one read call takes at most: consecutive records are one long read on disk.
const RUN_BYTES: u64 = 32 << 20;

/// How long a read call may take before who waits for it is told that nothing comes.
const READ_LIMIT: Duration = Duration::from_secs(30);

/// Reads in the order of priority, then of asking.
#[derive(Default)]
pub(crate) struct Reader(Mutex<State>);

#[derive(Default)]
struct State {
    flights: HashMap<RecordId, Queued>,
    queue: BTreeMap<Turn, Wanted>,
    next: u64,
    draining: usize,
    /// Read calls that have passed the limit and have not returned: until they do, the disk is not asked for more.
    overdue: usize,
    /// Records that the medium failed to give, and how often the disk had worked before.
    struck: HashMap<RecordId, u64>,
}

/// Records that are known to have been struck once.
const STRUCK_MAX: usize = 1024;

/// A flight's place in the queue: priority (highest first), then arrival.
type Turn = (Reverse<Priority>, u64);

struct Queued {
    flight: Arc<Flight>,
    /// `None` once the read has begun.
    turn: Option<Turn>,
}

/// A flight that is to be made, and the block that it is for.
struct Wanted {
    flight: Arc<Flight>,
    pin: Arc<Pin>,
    position: usize,
}

/// One record on its way into the host tier.
struct Flight {
    info: RecordInfo,
    /// Raised under the reader's lock only.
    interested: AtomicUsize,
    outcome: Mutex<Outcome>,
    /// Wakes those who wait in the order in which they came; a watch would wake them in any.
    arrived: Notify,
}

enum Outcome {
    Flying,
    Ended(Arrival),
    /// It ended, and nobody asks any more: its slot is not held for longer than that.
    LetGo,
}

impl Flight {
    fn outcome(&self) -> MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_ended(&self) -> bool {
        !matches!(*self.outcome(), Outcome::Flying)
    }

    /// Gives the slot up where the flight has ended and nobody is interested. A flight that has ended is out
    /// of the reader's map, so nobody joins it later; but somebody may have between the last ticket's going
    /// and this, so it is asked here.
    fn let_go(&self) {
        let mut outcome = self.outcome();
        if let Outcome::Ended(_) = *outcome
            && self.interested.load(Ordering::Acquire) == 0
        {
            let ended = std::mem::replace(&mut *outcome, Outcome::LetGo);
            drop(outcome);
            drop(ended);
        }
    }
}

/// How a flight ended.
#[derive(Clone)]
pub(crate) enum Arrival {
    /// The chunk is in the host tier.
    Ready(Slot),
    /// It is not, and why: `Corrupt` or `Unavailable`, or `Busy` where there was no room.
    Missing(ErrorKind),
}

/// Interest in a flight. Dropped by everyone, a flight that has not begun is given up.
pub(crate) struct Ticket(Arc<Flight>);

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.0.interested.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.let_go();
        }
    }
}

impl Ticket {
    /// How it ended, if it has.
    pub(crate) fn arrived(&self) -> Option<Arrival> {
        match &*self.0.outcome() {
            Outcome::Ended(arrival) => Some(arrival.clone()),
            Outcome::Flying | Outcome::LetGo => None,
        }
    }

    /// Waits for its end.
    pub(crate) async fn arrival(&self) -> Arrival {
        loop {
            // Made before the look: a notification between the two is not missed.
            let notified = self.0.arrived.notified();
            if let Some(arrival) = self.arrived() {
                return arrival;
            }
            notified.await;
        }
    }
}

impl Reader {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The medium failed to give a record, the disk having worked so often before. Did it fail to before,
    /// and has the disk worked since?
    fn struck(&self, id: RecordId, works: u64) -> bool {
        let mut state = self.state();
        if state
            .struck
            .remove(&id)
            .is_some_and(|before| before < works)
        {
            return true;
        }
        if state.struck.len() >= STRUCK_MAX {
            state.struck.clear();
        }
        state.struck.insert(id, works);
        false
    }

    /// Is a read call under way that has passed its limit?
    pub(crate) fn is_overdue(&self) -> bool {
        self.state().overdue > 0
    }

    /// Chunks that come before one of `priority` that is asked for now: being read, or queued with
    /// that priority or a higher one.
    pub(crate) fn chunks_ahead(&self, priority: Priority) -> usize {
        let state = self.state();
        let last: Turn = (Reverse(priority), u64::MAX);
        let behind = state.queue.len() - state.queue.range(..=last).count();
        state.flights.len() - behind
    }
}

impl State {
    fn turn(&mut self, priority: Priority) -> Turn {
        self.next += 1;
        (Reverse(priority), self.next)
    }

    /// The next run of flights that somebody still wants; empty, and this drain counted off, when
    /// there is none.
    fn next_run(&mut self, length: usize) -> Vec<Wanted> {
        let mut run: Vec<Wanted> = Vec::new();
        while run.len() < length {
            let Some(entry) = self.queue.first_entry() else {
                break;
            };
            if run
                .first()
                .is_some_and(|first| !Arc::ptr_eq(&first.pin, &entry.get().pin))
            {
                break;
            }
            let wanted = entry.remove();
            let flight = &wanted.flight;
            if flight.interested.load(Ordering::Acquire) == 0 {
                self.flights.remove(&flight.info.id);
                continue;
            }
            if let Some(queued) = self.flights.get_mut(&flight.info.id) {
                queued.turn = None;
            }
            run.push(wanted);
        }
        if run.is_empty() {
            self.draining -= 1;
        }
        run
    }
}

/// Asks for the records of some blocks, in order: `(position, record)`. Those that are under way
/// already are joined, and moved up where the new priority is higher. While a read is overdue, no other is
/// begun: they are answered at once.
pub(crate) fn request(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    pin: &Arc<Pin>,
    path: &HashedPath,
    wanted: &[(usize, RecordId)],
    priority: Priority,
) -> Vec<Ticket> {
    let mut guard = disk.reader.state();
    let state = &mut *guard;
    let mut tickets = Vec::with_capacity(wanted.len());
    let (is_overdue, mut skipped) = (state.overdue > 0, 0);
    for &(position, record) in wanted {
        let known = state
            .flights
            .get(&record)
            .map(|queued| (queued.flight.clone(), queued.turn));
        let (flight, turn) = known.unwrap_or_else(|| {
            let header = path.header(&shared.config, position);
            let info = RecordInfo {
                id: record,
                namespace: header.namespace,
                parent: header.parent,
                key: header.key,
                depth: header.depth,
                bytes: shared.config.image_bytes() as u32,
                last_use_ms: 0,
            };
            let flight = Arc::new(Flight {
                info,
                interested: AtomicUsize::new(0),
                outcome: Mutex::new(match is_overdue {
                    true => Outcome::Ended(Arrival::Missing(ErrorKind::Unavailable)),
                    false => Outcome::Flying,
                }),
                arrived: Notify::new(),
            });
            if is_overdue {
                skipped += 1;
                return (flight, None);
            }
            let turn = state.turn(priority);
            let wanted = Wanted {
                flight: flight.clone(),
                pin: pin.clone(),
                position,
            };
            state.queue.insert(turn, wanted);
            state.flights.insert(
                record,
                Queued {
                    flight: flight.clone(),
                    turn: Some(turn),
                },
            );
            (flight, Some(turn))
        });
        if let Some(turn) = turn.filter(|(Reverse(queued), _)| *queued < priority)
            && let Some(wanted) = state.queue.remove(&turn)
        {
            let sooner = state.turn(priority);
            state.queue.insert(sooner, wanted);
            state.flights.insert(
                record,
                Queued {
                    flight: flight.clone(),
                    turn: Some(sooner),
                },
            );
        }
        flight.interested.fetch_add(1, Ordering::AcqRel);
        tickets.push(Ticket(flight));
    }
    let runs = state.queue.len().div_ceil(run_length(shared));
    let start = runs.min(disk.config.reads_in_flight.saturating_sub(state.draining));
    state.draining += start;
    drop(guard);
    shared.recorder.add(Counter::DiskSkipped, skipped);
    for _ in 0..start {
        let draining = Draining {
            shared: shared.clone(),
            reading: Vec::new(),
            is_overdue: false,
            ended: false,
        };
        shared.tasks.spawn(drain(draining));
    }
    tickets
}

fn run_length(shared: &Shared) -> usize {
    (RUN_BYTES / shared.config.image_bytes()).max(1) as usize
}

/// One of the tasks that read. Where its runtime ends first, nobody waits for ever.
struct Draining {
    shared: Arc<Shared>,
    /// Not held: a flight that has ended holds a slot.
    reading: Vec<Weak<Flight>>,
    /// Its call has passed the limit.
    is_overdue: bool,
    /// The queue was empty, and this task counted off.
    ended: bool,
}

/// A flight has ended. Who waits for it finds nothing pinned or held for it: its pin is given up
/// before, and its slot with the last ticket, however long this thread still has the flight.
///
/// Of one that was given up before, nobody hears any more.
fn end(disk: &DiskSide, flight: &Flight, arrival: Arrival) {
    {
        let mut state = disk.reader.state();
        let flying = state.flights.get(&flight.info.id);
        if flying.is_some_and(|queued| std::ptr::eq(&*queued.flight, flight)) {
            state.flights.remove(&flight.info.id);
        }
    }
    let mut outcome = flight.outcome();
    if !matches!(*outcome, Outcome::Flying) {
        // Its slot goes without the lock.
        drop(outcome);
        return drop(arrival);
    }
    *outcome = Outcome::Ended(arrival);
    drop(outcome);
    flight.let_go();
    flight.arrived.notify_waiters();
}

impl Drop for Draining {
    fn drop(&mut self) {
        let shared = self.shared.clone();
        let Some(disk) = shared.disk.as_ref().filter(|_| !self.ended) else {
            return;
        };
        {
            let mut state = disk.reader.state();
            state.draining -= 1;
            state.overdue -= usize::from(self.is_overdue);
        }
        self.give_up(disk);
    }
}

impl Draining {
    /// Its call has passed the limit, or returned after all.
    fn set_overdue(&mut self, disk: &DiskSide, is_overdue: bool) {
        self.is_overdue = is_overdue;
        let mut state = disk.reader.state();
        match is_overdue {
            true => state.overdue += 1,
            false => state.overdue -= 1,
        }
    }

    /// Nobody waits any more for what it reads, nor for what is queued.
    fn give_up(&mut self, disk: &DiskSide) {
        let queue = std::mem::take(&mut disk.reader.state().queue);
        for flight in self.reading.drain(..).filter_map(|weak| weak.upgrade()) {
            end(disk, &flight, Arrival::Missing(ErrorKind::Unavailable));
        }
        for (_, Wanted { flight, pin, .. }) in queue {
            // Outside the lock: pins take the index mutex.
            drop(pin);
            end(disk, &flight, Arrival::Missing(ErrorKind::Unavailable));
        }
    }
}

async fn drain(mut draining: Draining) {
    let shared = draining.shared.clone();
    let Some(disk) = &shared.disk else { return };
    loop {
        let run = disk.reader.state().next_run(run_length(&shared));
        if run.is_empty() {
            draining.ended = true;
            return;
        }
        draining.reading = run
            .iter()
            .map(|wanted| Arc::downgrade(&wanted.flight))
            .collect();
        let span = tracing::debug_span!("disk_read", chunks = run.len());
        let task_shared = shared.clone();
        let read = shared.tasks.blocking(move || read(&task_shared, run));
        let mut read = pin!(read.instrument(span));
        let in_time = tokio::time::timeout(READ_LIMIT, read.as_mut()).await;
        let outcome = match in_time {
            Ok(outcome) => outcome,
            Err(_) => {
                tracing::error!("a disk read has not returned for {READ_LIMIT:?}");
                draining.set_overdue(disk, true);
                shared.recorder.add(Counter::DiskReadErrors, 1);
                disk.reads.failed(shared.clock.now());
                draining.give_up(disk);
                // What it reads into stays with the call until it returns.
                let outcome = read.await;
                draining.set_overdue(disk, false);
                outcome
            }
        };
        if let Err(error) = outcome {
            tracing::error!(%error, "a disk read was cut off");
        }
        for flight in draining.reading.drain(..).filter_map(|weak| weak.upgrade()) {
            // Answered, unless the call was cut off by a panic.
            if !flight.has_ended() {
                end(disk, &flight, Arrival::Missing(ErrorKind::Internal));
            }
        }
    }
}

/// Reads a run. Each of its flights ends as soon as its record is whole.
fn read(shared: &Arc<Shared>, run: Vec<Wanted>) {
    let Some(disk) = &shared.disk else { return };
    let end = |wanted: Wanted, arrival| {
        drop(wanted.pin);
        end(disk, &wanted.flight, arrival);
    };
    let begun = shared.clock.now();
    if shared.check_open().is_err() || disk.reads.is_paused(begun) {
        shared.recorder.add(Counter::DiskSkipped, run.len());
        for wanted in run {
            end(wanted, Arrival::Missing(ErrorKind::Unavailable));
        }
        return;
    }
    let infos: Vec<RecordInfo> = run
        .iter()
        .map(|wanted| {
            let info = &wanted.flight.info;
            RecordInfo {
                bytes: disk.tier.image_bytes(info).unwrap_or(info.bytes),
                ..info.clone()
            }
        })
        .collect();
    let images = infos.iter().map(|info| u64::from(info.bytes));
    let fillings = shared.allocate_images(images);
    shared
        .recorder
        .add(Counter::DeclinedPromotions, run.len() - fillings.len());
    let mut run: Vec<_> = run.into_iter().map(Some).collect();
    for wanted in run.drain(fillings.len()..).flatten() {
        end(wanted, Arrival::Missing(ErrorKind::Busy));
    }
    let reads: Vec<_> = infos.iter().cloned().zip(fillings).collect();
    if reads.is_empty() {
        return;
    }
    let (mut bytes, mut works) = (0, false);
    let mut failed = Vec::new();
    let under_way = UnderWay::begin(shared);
    disk.tier.read(reads, &mut |i, answer| {
        let Some(wanted) = run[i].take() else { return };
        works |= answer.is_ok();
        let arrival = match answer.and_then(|slot| coding::loadable(shared, slot)) {
            Ok(slot) => {
                bytes += u64::from(infos[i].bytes);
                // What a chunk is worth is the same however short its record is.
                let chunk_bytes = shared.config.image_bytes();
                shared.disk_meter.moved(shared.clock.now(), chunk_bytes);
                arrive(shared, &wanted, slot)
            }
            Err(error) if error.kind() == ErrorKind::Busy => {
                shared.recorder.add(Counter::DeclinedPromotions, 1);
                Arrival::Missing(ErrorKind::Busy)
            }
            // What becomes of it depends on whether others can be read.
            Err(error) => return failed.push((wanted, error)),
        };
        end(wanted, arrival);
    });
    drop(under_way);
    if bytes > 0 {
        let took = shared.clock.now().saturating_sub(begun);
        shared.recorder.time(Stage::DiskRead, took, bytes);
    }
    if works {
        disk.reads.worked();
    }
    let is_failing = |(wanted, error): &(Wanted, Error)| fail(shared, disk, wanted, error, works);
    let failing = failed.iter().filter(|failed| is_failing(failed)).count();
    if failing > 0 && !works {
        disk.reads.failed(shared.clock.now());
    }
    for (wanted, error) in failed {
        end(wanted, Arrival::Missing(error.kind()));
    }
}

/// A read call that the meter counts until it is dropped: also by a panic.
struct UnderWay<'a>(&'a Shared);

impl<'a> UnderWay<'a> {
    fn begin(shared: &'a Shared) -> Self {
        shared.disk_meter.begin(shared.clock.now());
        UnderWay(shared)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.disk_meter.end(self.0.clock.now(), 0);
    }
}

fn arrive(shared: &Shared, wanted: &Wanted, slot: Slot) -> Arrival {
    let id = slot.clone().into_id();
    match wanted.pin.set_host(wanted.position, id) {
        true => shared.recorder.add(Counter::PromotedBlocks, 1),
        // A save put the same chunk there in the meantime; ours serves who asked and goes.
        false => shared.arena.release(id),
    }
    Arrival::Ready(slot)
}

/// A record could not be read: it is dropped where the fault is its own. The answer says whether the disk
/// may be failing. `works`: others of the same call were read.
fn fail(
    shared: &Arc<Shared>,
    disk: &DiskSide,
    wanted: &Wanted,
    error: &Error,
    works: bool,
) -> bool {
    tracing::warn!(%error, key = %wanted.flight.info.key, "a record could not be read");
    // Somebody else met the record first and dropped it: the disk is sound.
    if !is_still_there(wanted) {
        return false;
    }
    let info = &wanted.flight.info;
    // Or the tier does not have it any more: cleaning found that it does not verify.
    let counter = if error.kind() == ErrorKind::Corrupt || disk.tier.image_bytes(info).is_none() {
        Counter::CorruptBlocks
    } else {
        shared.recorder.add(Counter::DiskReadErrors, 1);
        let is_bad =
            error.is_unreadable() && (works || disk.reader.struck(info.id, disk.reads.works()));
        if !is_bad {
            return true;
        }
        Counter::UnreadableBlocks
    };
    shared.recorder.add(counter, 1);
    let lost = wanted.pin.lost(wanted.position, Pool::Disk);
    if let Some(record) = lost.and_then(|lost| lost.record) {
        removing::remove(shared, vec![record]);
    }
    false
}

fn is_still_there(wanted: &Wanted) -> bool {
    let states = wanted.pin.states(wanted.position..wanted.position + 1);
    states[0].record == Some(wanted.flight.info.id)
}

#[cfg(all(test, feature = "sim"))]
mod tests {
    //! Shown: who joins a flight hears of its end, whatever others do meanwhile. How: each half of what
    //! another thread does at the worst moment.

    use std::num::NonZeroU64;

    use stemkv_store::Key;

    use super::*;

    #[test]
    fn who_joins_while_the_last_one_leaves_hears_of_the_end() {
        let key = Key([1; 32]);
        let flight = Arc::new(Flight {
            info: RecordInfo {
                id: RecordId(NonZeroU64::MIN),
                namespace: key,
                parent: key,
                key,
                depth: 0,
                bytes: 0,
                last_use_ms: 0,
            },
            interested: AtomicUsize::new(1),
            outcome: Mutex::new(Outcome::Flying),
            arrived: Notify::new(),
        });
        // The last one leaves, and comes no further for now.
        assert_eq!(flight.interested.fetch_sub(1, Ordering::AcqRel), 1);
        flight.interested.fetch_add(1, Ordering::AcqRel);
        let joined = Ticket(flight.clone());
        *flight.outcome() = Outcome::Ended(Arrival::Missing(ErrorKind::Busy));
        flight.arrived.notify_waiters();
        flight.let_go();
        assert!(joined.arrived().is_some());
        drop(joined);
        assert!(matches!(*flight.outcome(), Outcome::LetGo));
    }
}
