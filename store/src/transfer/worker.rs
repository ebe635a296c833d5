//! A transfer thread's work, one step at a time.

use std::any::Any;
use std::collections::VecDeque;
use std::mem;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::queue::Shared;
use super::{Job, JobEvent, Urgency};
use crate::{
    Checksum, Checksummer, Direction, Error, Fence, LayerId, Result, SlabEntry, SlabMove, SlabSums,
    Submitted, Transfer,
};

/// Jobs on different roads do not wait for each other: the link carries both directions at once, and
/// what stays within the device does not take it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Road {
    Local,
    LinkLoad,
    LinkSave,
}

impl Road {
    /// In the order of their numbers.
    pub(super) const ALL: [Road; 3] = [Road::Local, Road::LinkLoad, Road::LinkSave];

    pub(super) fn thread_name(self) -> &'static str {
        match self {
            Road::Local => "stemkv-local",
            Road::LinkLoad => "stemkv-load",
            Road::LinkSave => "stemkv-save",
        }
    }
}

/// A job that was accepted.
pub(super) struct Running {
    transfer: Transfer,
    urgency: Urgency,
    /// Not submitted yet.
    layers: Range<u32>,
    after: Vec<Fence>,
    begin_by: Option<Duration>,
    events: Box<dyn FnMut(JobEvent) + Send>,
    cancelled: Arc<AtomicBool>,
    accepted: Duration,
    begun: bool,
    /// Was [`JobEvent::Begun`] reported?
    announced: bool,
    failed: bool,
    /// Leading moves of which no slab is known to be wrong.
    good: usize,
    layer_bytes: u64,
    settled: bool,
    /// Submitted and not arrived, in order.
    flights: VecDeque<Flight>,
}

/// One layer that was submitted.
struct Flight {
    layer: LayerId,
    fence: Fence,
    /// Taken where the layer was reported at its submission.
    sums: SlabSums,
    submitted: Duration,
}

impl Running {
    /// Checks and plans `job`.
    pub(super) fn new(job: Job, accepted: Duration) -> Result<Self> {
        let transfer = match job.encoded {
            None => Transfer::new(job.direction, job.table, job.moves, job.from_token)?,
            Some(encoded) => Transfer::encoded_save(job.table, job.moves, encoded)?,
        };
        Ok(Running {
            good: transfer.moves().len(),
            layer_bytes: transfer.plan().bytes(),
            transfer,
            urgency: job.urgency,
            layers: job.layers,
            after: job.after,
            begin_by: job.begin_by,
            events: job.events,
            cancelled: job.cancelled,
            accepted,
            begun: false,
            announced: false,
            failed: false,
            settled: true,
            flights: VecDeque::new(),
        })
    }

    fn turn(&self) -> Turn {
        let is_local = self.transfer.device_arena().is_some();
        (self.urgency, self.transfer.direction(), is_local)
    }

    pub(super) fn road(&self) -> Road {
        match (self.transfer.device_arena(), self.transfer.direction()) {
            (Some(_), _) => Road::Local,
            (None, Direction::Load) => Road::LinkLoad,
            (None, Direction::Save) => Road::LinkSave,
        }
    }

    /// When its bytes would have moved, had it had the road to itself from the start: the job with the
    /// earliest goes first. So a small job goes before the rest of a large one, and a large one waits
    /// no longer for small ones than for as long as it takes itself: what comes later than that stays
    /// behind it.
    fn due(&self) -> Duration {
        let bytes = self.layer_bytes * self.layers.len() as u64;
        self.accepted + Duration::from_nanos(bytes / BYTES_PER_NS)
    }

    /// Submits no more of it.
    pub(super) fn stop(&mut self) {
        if let Some(encoded) = self.transfer.encoded().filter(|_| !self.layers.is_empty()) {
            encoded.give_up();
        }
        self.layers.start = self.layers.end;
    }

    /// May its next layer be submitted, of all layers of its save?
    fn has_its_turn(&self) -> bool {
        let encoded = self.transfer.encoded();
        encoded.is_none_or(|encoded| encoded.is_next(self.layers.start))
    }

    /// Will its next layer never have its turn?
    fn is_cut_off(&self) -> bool {
        let encoded = self.transfer.encoded().filter(|_| !self.layers.is_empty());
        encoded.is_some_and(|encoded| encoded.is_given_up())
    }

    /// Calls the job's events. One that panics stops its job, and nobody else's.
    fn emit(&mut self, event: JobEvent) {
        if contained(|| (self.events)(event)).is_none() {
            self.stop();
        }
    }

    /// Reports the beginning, once nothing stands before it any more.
    fn announce(&mut self) {
        if self.begun
            && !self.announced
            && matches!(guarded(|| all_reached(&self.after)), Ok(Ok(true)))
        {
            self.announced = true;
            self.emit(JobEvent::Begun);
        }
    }

    /// Reports the end. By then the job holds no slot and takes no room in the queue.
    fn end(self, shared: &Shared) {
        let road = self.road();
        let Running {
            transfer,
            after,
            mut events,
            settled,
            ..
        } = self;
        contained(|| drop((transfer, after)));
        shared.done(road);
        contained(|| events(JobEvent::Done { settled }));
        contained(|| drop(events));
    }

    /// Reports the job's first failure and submits no more of it.
    fn fail(&mut self, layer: LayerId, good_moves: usize, error: Error) {
        self.stop();
        if let Some(encoded) = self.transfer.encoded() {
            encoded.give_up();
        }
        if !mem::replace(&mut self.failed, true) {
            self.emit(JobEvent::Failed {
                layer,
                good_moves,
                error,
            });
        }
    }

    /// The device did not move the layer: because a slot does not say any more where its slabs are, where
    /// there is such a one.
    fn refused(&mut self, layer: LayerId, error: Error) {
        match first_damaged(&self.transfer) {
            Some(index) => self.fail(layer, index, damaged(layer, index, error)),
            None => self.fail(layer, 0, error),
        }
    }

    /// A load's move `good_moves` is wrong: it goes on for the sake of those before it, if there are any.
    fn spoiled(&mut self, layer: LayerId, good_moves: usize, error: Error) {
        if good_moves == 0 {
            self.fail(layer, 0, error);
        } else if good_moves < self.good && !self.failed {
            self.good = good_moves;
            self.emit(JobEvent::Failed {
                layer,
                good_moves,
                error,
            });
        }
    }

    /// A copy may still be running and will never be heard of: its slots must not be used again.
    fn leak(&mut self) {
        self.settled = false;
        self.flights.clear();
        mem::forget(self.transfer.clone());
    }
}

/// About the rate of a PCIe 5 link. It weighs the size of a job against the time it has waited: half or
/// twice as fast is as good.
const BYTES_PER_NS: u64 = 50;

/// Whose turn it is: an urgency, a direction, and whether it stays within the device.
type Turn = (Urgency, Direction, bool);

const TURNS: [Turn; 8] = [
    (Urgency::Demand, Direction::Load, true),
    (Urgency::Demand, Direction::Load, false),
    (Urgency::Demand, Direction::Save, true),
    (Urgency::Demand, Direction::Save, false),
    (Urgency::Later, Direction::Load, true),
    (Urgency::Later, Direction::Load, false),
    (Urgency::Later, Direction::Save, true),
    (Urgency::Later, Direction::Save, false),
];

/// Submits layers, watches fences, reports.
pub(super) struct Worker {
    shared: Arc<Shared>,
    /// Whose jobs it does: one, or for simulations all.
    roads: Vec<Road>,
    blocking: bool,
    /// In the order of submission.
    jobs: Vec<Running>,
    closed: bool,
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, roads: Vec<Road>) -> Self {
        Worker {
            roads,
            blocking: shared.device.info().blocking,
            shared,
            jobs: Vec::new(),
            closed: false,
        }
    }

    /// Works until the queue is closed and every job is done. A panic, of the clock that the process gave or of
    /// ours, costs the jobs that are under way: who waits for them is told, and later ones go on.
    pub(super) fn run(&mut self) {
        while contained(|| self.work()).is_none() {
            self.abandon();
            if self.closed {
                return;
            }
            self.shared.wait(self.roads[0], false, 0);
        }
    }

    fn work(&mut self) {
        let mut idle = 0;
        loop {
            if self.step() {
                idle = 0;
            } else if self.closed && self.jobs.is_empty() {
                return;
            } else {
                self.shared.wait(self.roads[0], !self.jobs.is_empty(), idle);
                idle += 1;
            }
        }
    }

    /// Ends every job where it is. What of it may have been submitted is not known any more.
    fn abandon(&mut self) {
        for mut job in self.jobs.drain(..) {
            let layer = LayerId(job.layers.start);
            if job.begun {
                job.leak();
            }
            job.fail(layer, 0, Error::internal("a transfer thread panicked"));
            job.end(&self.shared);
        }
    }

    /// Does what can be done now without waiting, up to one layer. `false` where that is nothing.
    pub(super) fn step(&mut self) -> bool {
        let before = self.jobs.len();
        self.closed = self.shared.collect(&self.roads, &mut self.jobs);
        let mut progress = self.jobs.len() > before;
        let now = self.shared.clock.now();
        for job in &mut self.jobs {
            if job.cancelled.load(Ordering::Relaxed) || self.closed && !job.begun {
                job.stop();
            } else if job.is_cut_off() {
                let layer = LayerId(job.layers.start);
                let error = Error::unavailable("an earlier layer of the save did not come");
                job.fail(layer, 0, error);
                progress = true;
            } else if !job.begun && job.begin_by.is_some_and(|late| late <= now) {
                let layer = LayerId(job.layers.start);
                let error = Error::busy("a transfer did not begin in the time that it was given");
                job.fail(layer, 0, error);
                progress = true;
            }
        }
        progress |= self.settle();
        progress |= self.finish();
        progress | TURNS.into_iter().any(|turn| self.submit(turn))
    }

    /// Takes in what has arrived. Summing slabs on this thread is work: one layer at a time.
    fn settle(&mut self) -> bool {
        let mut progress = false;
        let now = self.shared.clock.now();
        for job in &mut self.jobs {
            job.announce();
            while let Some(flight) = job.flights.front() {
                match guarded(|| flight.fence.point().is_reached()) {
                    Ok(Ok(true)) => {
                        job.announce();
                        let flight = job.flights.pop_front().expect("it is the front");
                        progress = true;
                        let looked = job.transfer.direction() == Direction::Save
                            && job.transfer.device_arena().is_none()
                            && matches!(flight.sums, SlabSums::Unknown);
                        arrived(job, flight, now);
                        if looked {
                            return true;
                        }
                        continue;
                    }
                    Ok(Ok(false)) if now < flight.submitted + self.shared.limits.fence_timeout => {
                        break;
                    }
                    Ok(Ok(false)) => {
                        let error = Error::unavailable(
                            "a transfer's fence did not arrive in time: the device hangs",
                        )
                        .with("layer", flight.layer);
                        let layer = flight.layer;
                        job.leak();
                        job.fail(layer, 0, error);
                    }
                    Ok(Err(error)) => {
                        let flight = job.flights.pop_front().expect("it is the front");
                        job.refused(flight.layer, error);
                    }
                    Err(error) => {
                        let layer = flight.layer;
                        job.leak();
                        job.fail(layer, 0, error);
                    }
                }
                progress = true;
            }
        }
        progress
    }

    /// Ends the jobs of which nothing is left.
    fn finish(&mut self) -> bool {
        let ended = |job: &mut Running| job.layers.is_empty() && job.flights.is_empty();
        let done: Vec<Running> = self.jobs.extract_if(.., ended).collect();
        let progress = !done.is_empty();
        for job in done {
            job.end(&self.shared);
        }
        progress
    }

    /// Submits the next layers of the job of that kind that is due first of those that can go on.
    fn submit(&mut self, turn: Turn) -> bool {
        let now = self.shared.clock.now();
        let jobs = self.jobs.iter_mut();
        let mut jobs: Vec<&mut Running> = jobs
            .filter(|job| !job.layers.is_empty() && job.turn() == turn && job.has_its_turn())
            .collect();
        jobs.sort_by_key(|job| job.due());
        for job in jobs {
            let layer = LayerId(job.layers.start);
            // A blocking device would wait for them in `submit`, and hold everybody up.
            if self.blocking && !job.begun {
                match guarded(|| all_reached(&job.after)).and_then(|answer| answer) {
                    Ok(true) => {}
                    Ok(false) if now < job.accepted + self.shared.limits.fence_timeout => continue,
                    Ok(false) => {
                        let error =
                            Error::unavailable("a fence to wait for did not arrive in time");
                        job.fail(layer, 0, error);
                        return true;
                    }
                    Err(error) => {
                        job.fail(layer, 0, error);
                        return true;
                    }
                }
            }
            job.begun = true;
            job.announce();
            let device = &self.shared.device;
            let at_once = guarded(|| device.layers_at_once(&job.transfer, layer.0)).unwrap_or(1);
            let end = job.layers.end.min(layer.0.saturating_add(at_once.max(1)));
            job.layers.start = end;
            let layers = layer.0..end;
            match guarded(|| device.submit_layers(&job.transfer, layers.clone(), &job.after)) {
                Ok(Ok(submitted)) => {
                    if let Some(encoded) = job.transfer.encoded() {
                        encoded.submitted(end);
                    }
                    // It may have taken long: the fences' time begins here.
                    let now = self.shared.clock.now();
                    for (layer, submitted) in layers.zip(submitted) {
                        took(job, LayerId(layer), submitted, now);
                    }
                }
                Ok(Err(error)) => {
                    if job.transfer.is_unsettled() {
                        job.leak();
                    }
                    job.refused(layer, error);
                }
                Err(error) => {
                    job.leak();
                    job.fail(layer, 0, error);
                }
            }
            return true;
        }
        false
    }
}

/// The device took a layer. A load is reported now where its sums are known or never will be, and
/// where the device compares them on the way: the engine's stream waits for the fence, not the host.
fn took(job: &mut Running, layer: LayerId, submitted: Submitted, now: Duration) {
    let Submitted { fence, sums } = submitted;
    let sums = match (job.transfer.direction(), sums) {
        (Direction::Load, SlabSums::Known(sums)) => {
            report_load(job, layer, fence.clone(), Some(&sums));
            SlabSums::Unknown
        }
        (Direction::Load, sums @ (SlabSums::Unknown | SlabSums::Compared(_))) => {
            report_load(job, layer, fence.clone(), None);
            sums
        }
        (_, sums) => sums,
    };
    job.flights.push_back(Flight {
        layer,
        fence,
        sums,
        submitted: now,
    });
}

fn report_load(job: &mut Running, layer: LayerId, fence: Fence, sums: Option<&[Checksum]>) {
    let wrong = sums.and_then(|sums| first_wrong(&job.transfer, layer, sums));
    if let Some(index) = wrong {
        job.spoiled(layer, index, mismatch(layer, index));
    }
    if !job.failed {
        job.emit(JobEvent::Layer {
            layer,
            fence,
            slabs: Vec::new(),
        });
    }
}

/// The first move of a load whose slab is not what its slot says.
fn first_wrong(transfer: &Transfer, layer: LayerId, checksums: &[Checksum]) -> Option<usize> {
    let is_wrong = |(index, slab_move): (usize, &SlabMove)| {
        let expected = match slab_move {
            SlabMove::Load { slot, .. } => slot.slab(layer).map(|slab| slab.checksum),
            SlabMove::LoadDevice { slot, .. } => match slot.checksum(layer) {
                None => return false, // There is nothing to compare with.
                known => known,
            },
            SlabMove::Save { .. } | SlabMove::SaveDevice { .. } => return false,
        };
        expected.is_none() || expected.as_ref() != checksums.get(index)
    };
    transfer.moves().iter().enumerate().position(is_wrong)
}

/// The first move of a load whose slot's header does not verify.
fn first_damaged(transfer: &Transfer) -> Option<usize> {
    let is_damaged = |slab_move: &SlabMove| match slab_move {
        SlabMove::Load { slot, .. } => slot.header().is_err(),
        _ => false,
    };
    transfer.moves().iter().position(is_damaged)
}

fn damaged(layer: LayerId, index: usize, refused: Error) -> Error {
    Error::corrupt("a header in memory does not verify")
        .with("move", index)
        .with("layer", layer)
        .caused_by(refused)
}

fn mismatch(layer: LayerId, index: usize) -> Error {
    Error::corrupt("a slab in memory does not match its checksum")
        .with("move", index)
        .with("layer", layer)
}

/// A layer's bytes are where they belong.
fn arrived(job: &mut Running, flight: Flight, now: Duration) {
    let direction = match job.transfer.direction() {
        Direction::Load => "load",
        Direction::Save => "save",
    };
    // What the process hangs on the facade must not end this thread.
    contained(|| {
        metrics::histogram!("stemkv_transfer_layer_seconds", "direction" => direction)
            .record(now.saturating_sub(flight.submitted).as_secs_f64());
        metrics::counter!("stemkv_transfer_bytes_total", "direction" => direction)
            .increment(job.layer_bytes);
    });
    if job.failed {
        return;
    }
    let Flight {
        layer, fence, sums, ..
    } = flight;
    let answer = match job.transfer.direction() {
        Direction::Load => load_arrived(layer, sums),
        Direction::Save => match save_arrived(&job.transfer, layer, sums) {
            Ok(slabs) => {
                job.emit(JobEvent::Layer {
                    layer,
                    fence,
                    slabs,
                });
                return;
            }
            Err(error) => Err((0, error)),
        },
    };
    match answer {
        Ok(None) => {}
        Ok(Some(sums)) => report_load(job, layer, fence, Some(&sums)),
        Err((good_moves, error)) => job.spoiled(layer, good_moves, error),
    }
}

/// What is still to be verified of a load's layer: nothing where it was reported when it was taken.
fn load_arrived(layer: LayerId, sums: SlabSums) -> Result<Option<Vec<Checksum>>, (usize, Error)> {
    match sums {
        SlabSums::Unknown => Ok(None),
        SlabSums::Known(sums) => Ok(Some(sums)),
        SlabSums::AfterFence(ask) => asked(ask).map(Some).map_err(|error| (0, error)),
        SlabSums::Compared(ask) => match asked(ask) {
            Ok(None) => Ok(None),
            Ok(Some(index)) => Err((index, mismatch(layer, index))),
            Err(error) => Err((0, error)),
        },
        SlabSums::Stored(_) => Err((0, Error::internal("a load stores nothing"))),
    }
}

/// Where a save's slabs are; nothing where the device tier's checksums are not known.
fn save_arrived(transfer: &Transfer, layer: LayerId, sums: SlabSums) -> Result<Vec<SlabEntry>> {
    let is_local = transfer.device_arena().is_some();
    let sums = match (sums, transfer.encoded()) {
        (SlabSums::Stored(ask), Some(_)) => {
            return checked_count(asked(ask)?, transfer);
        }
        (SlabSums::Stored(_), None) | (_, Some(_)) => {
            return Err(Error::internal(
                "a device says of encoded saves alone where slabs are stored",
            ));
        }
        (SlabSums::Unknown, _) if is_local => return Ok(Vec::new()),
        (SlabSums::Unknown, _) => sum_slabs(transfer, layer),
        (SlabSums::Known(sums), _) => sums,
        (SlabSums::AfterFence(ask), _) => asked(ask)?,
        (SlabSums::Compared(_), _) => {
            return Err(Error::internal("a device compares sums of a load alone"));
        }
    };
    let geometry = transfer.table().kv.geometry();
    let slabs = sums
        .into_iter()
        .map(|sum| SlabEntry::raw(geometry, layer, sum));
    checked_count(slabs.collect(), transfer)
}

fn checked_count(slabs: Vec<SlabEntry>, transfer: &Transfer) -> Result<Vec<SlabEntry>> {
    match slabs.len() == transfer.moves().len() {
        true => Ok(slabs),
        false => Err(Error::internal(
            "a device returned another number of checksums than moves",
        )),
    }
}

/// What a device answers behind its fence.
fn asked<T>(ask: Box<dyn FnOnce() -> Result<T> + Send>) -> Result<T> {
    guarded(ask).and_then(|answer| answer)
}

/// The checksums of a layer that a save has brought into its slots.
fn sum_slabs(transfer: &Transfer, layer: LayerId) -> Vec<Checksum> {
    let sum = |slab_move: &SlabMove| match slab_move {
        SlabMove::Save { slot, .. } => slot.write_slab(layer, |slab| Checksummer::of(slab)),
        _ => None,
    };
    // A slab that is not there was refused by the device; no sum matches it.
    let sums = transfer.moves().iter().map(sum);
    sums.map(Option::unwrap_or_default).collect()
}

fn all_reached(fences: &[Fence]) -> Result<bool> {
    for fence in fences {
        if !fence.point().is_reached()? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Turns a device's panic into an error.
fn guarded<T>(call: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call))
        .map_err(|panic| Error::internal("the device panicked").with("panic", panic_text(&*panic)))
}

/// Keeps a panic of the caller's code, or of its exporter, from ending the transfer thread.
fn contained<T>(call: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(call))
        .inspect_err(|panic| {
            tracing::error!(
                panic = panic_text(&**panic),
                "what belongs to a job panicked"
            );
        })
        .ok()
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no text")
}
