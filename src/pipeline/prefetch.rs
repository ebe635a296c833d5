//! Prefetch: disk → host → device tier, ahead of a load.
//!
//! The stages submit on their own: reads are asked for at the start and come by themselves, by their
//! priority; what has arrived in the host tier goes up in jobs of a bounded size, two under way at a
//! time. A load of the same blocks joins reads and jobs that have begun, and takes what is there.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::Serialize;
use stemkv_store::Slot;
use tokio::sync::watch;

use crate::Result;
use crate::index::{BlockState, Pin};
use crate::pipeline::device::{self, Limits, Promoted, Promotion};
use crate::pipeline::reader::{self, Arrival, Ticket};
use crate::pipeline::{Driven, HashedPath, Priority, Shared, load};

/// Bytes of one job of the third stage, about; two are under way at most.
const JOB_BYTES: u64 = 64 << 20;
const JOBS: usize = 2;

/// How far and how urgently to prefetch.
#[derive(Clone, Debug, PartialEq)]
pub struct PrefetchGoal {
    /// What comes first where reads wait.
    pub priority: Priority,
    /// What has not begun by then is given up, on the way into either tier. 30 s by default.
    pub deadline: Option<Duration>,
    /// Bytes to read from disk at most.
    pub budget_bytes: u64,
    /// Bytes to bring into the device tier at most, from the host tier and as they arrive there. 0, the
    /// default, ends in the host tier.
    pub device_budget_bytes: u64,
}

impl Default for PrefetchGoal {
    fn default() -> Self {
        PrefetchGoal {
            priority: Priority::NORMAL,
            deadline: Some(load::DEADLINE),
            budget_bytes: u64::MAX,
            device_budget_bytes: 0,
        }
    }
}

/// What a prefetch brought.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PrefetchReport {
    /// Leading tokens of the lease that are in RAM now: in the host tier or the device tier.
    pub tokens: usize,
    /// Leading tokens of the lease that are in the device tier now.
    pub device_tokens: usize,
    /// Blocks that were read from disk for it.
    pub read_blocks: usize,
    /// Blocks that were brought into the device tier for it.
    pub promoted_blocks: usize,
    /// Blocks that did not come from disk: over the budget, late, no room, failed.
    pub missing_blocks: usize,
}

/// A prefetch under way. Dropping it cancels what has not begun; what arrived stays.
///
/// What was prefetched is kept for as long as the lease lives.
#[must_use = "a dropped prefetch is cancelled"]
pub struct Prefetch {
    /// Another one goes on with its jobs.
    is_replaced: bool,
    cancelled: Arc<AtomicBool>,
    cancel: watch::Sender<bool>,
    report: watch::Receiver<Option<PrefetchReport>>,
}

/// What a prefetch has to bring: by stage, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Missing {
    /// On disk alone.
    pub(crate) in_ram_bytes: u64,
    /// Not in the device tier.
    pub(crate) on_device_bytes: u64,
}

pub(crate) fn missing(shared: &Shared, on: &Driven, pin: &Pin) -> Missing {
    let states = pin.states_on(on.number, 0..pin.blocks());
    let count = |is: fn(&&BlockState) -> bool| states.iter().filter(is).count() as u64;
    Missing {
        // What another device alone holds comes down when it is loaded, not before.
        in_ram_bytes: count(|state| !state.is_in_ram() && state.record.is_some())
            * shared.config.image_bytes(),
        on_device_bytes: match on.tier {
            Some(_) => {
                count(|state| {
                    state.device.is_none() && (state.host.is_some() || state.record.is_some())
                }) * chunk_bytes(shared)
            }
            None => 0,
        },
    }
}

fn chunk_bytes(shared: &Shared) -> u64 {
    shared.config.geometry.payload_bytes() as u64
}

/// Where the chunk of one block is to come from.
enum Step {
    Host(Slot),
    Disk(Ticket),
}

pub(crate) fn prefetch(
    shared: &Arc<Shared>,
    on: &Arc<Driven>,
    pin: &Arc<Pin>,
    path: &HashedPath,
    goal: PrefetchGoal,
) -> Result<Prefetch> {
    shared.check_open()?;
    shared.check_lease(pin)?;
    let states = pin.states_on(on.number, 0..pin.blocks());
    let on_disk: Vec<_> = states
        .iter()
        .enumerate()
        .filter(|(_, state)| !state.is_in_ram())
        .filter_map(|(i, state)| state.record.map(|record| (i, record)))
        .collect();
    let affordable = blocks_of(goal.budget_bytes, shared.config.image_bytes());
    let wanted = &on_disk[..on_disk.len().min(affordable)];
    let tickets = match &shared.disk {
        Some(disk) => {
            let priority = goal.priority.min(Priority::HIGH);
            reader::request(shared, disk, pin, path, wanted, priority)
        }
        None => Vec::new(),
    };
    let rises = on.tier.is_some() && goal.device_budget_bytes > 0;
    let mut steps: Vec<(usize, Step)> = wanted
        .iter()
        .zip(tickets)
        .map(|(&(position, _), ticket)| (position, Step::Disk(ticket)))
        .collect();
    if rises {
        steps.extend(states.iter().enumerate().filter_map(|(position, state)| {
            let slot = state.host.filter(|_| state.device.is_none());
            let slot = slot.and_then(|id| shared.slot(id, &state.key))?;
            Some((position, Step::Host(slot)))
        }));
        steps.sort_by_key(|(position, _)| *position);
    }
    let cancel = watch::Sender::new(false);
    let cancelled: Arc<AtomicBool> = Arc::default();
    let (send, report) = watch::channel(None);
    let mut climb = Climb {
        shared: shared.clone(),
        on: on.clone(),
        pin: pin.clone(),
        limits: Limits {
            begin_by: goal
                .deadline
                .and_then(|deadline| shared.clock.now().checked_add(deadline)),
            cancelled: cancelled.clone(),
        },
        affordable: match rises {
            true => blocks_of(goal.device_budget_bytes, chunk_bytes(shared)),
            false => 0,
        },
        rising: Vec::new(),
        jobs: VecDeque::new(),
        read_blocks: 0,
        promoted_blocks: 0,
    };
    let (asked, given_up) = (on_disk.len(), cancel.subscribe());
    shared.tasks.spawn(async move {
        climb.run(steps, goal.deadline, given_up).await;
        let report = climb.report(asked);
        // Whoever waits for the report finds nothing pinned for it.
        drop(climb);
        send.send_replace(Some(report));
    });
    Ok(Prefetch {
        is_replaced: false,
        cancelled,
        cancel,
        report,
    })
}

fn blocks_of(bytes: u64, block_bytes: u64) -> usize {
    usize::try_from(bytes / block_bytes).unwrap_or(usize::MAX)
}

/// The task of one prefetch: waits for reads in order and sends what has arrived up.
struct Climb {
    shared: Arc<Shared>,
    on: Arc<Driven>,
    pin: Arc<Pin>,
    limits: Limits,
    /// Blocks that may still go into the device tier.
    affordable: usize,
    /// Arrived in the host tier, not yet sent up.
    rising: Vec<(usize, Slot)>,
    jobs: VecDeque<Vec<Arc<Promotion>>>,
    read_blocks: usize,
    promoted_blocks: usize,
}

impl Climb {
    /// Ends with the last step, a block that is missing for good, the deadline or the cancellation.
    async fn run(
        &mut self,
        steps: Vec<(usize, Step)>,
        deadline: Option<Duration>,
        mut cancelled: watch::Receiver<bool>,
    ) {
        let give_up = async {
            let cancelled = cancelled.wait_for(|cancelled| *cancelled);
            match deadline {
                // An error means that the handle is gone, which cancels too.
                Some(deadline) => drop(tokio::time::timeout(deadline, cancelled).await),
                None => drop(cancelled.await),
            }
        };
        tokio::pin!(give_up);
        tokio::select! {
            biased;
            () = self.steps(steps) => {}
            () = &mut give_up => {}
        }
    }

    async fn steps(&mut self, steps: Vec<(usize, Step)>) {
        let job_blocks = blocks_of(JOB_BYTES, chunk_bytes(&self.shared)).max(1);
        for (position, step) in steps {
            let slot = match step {
                Step::Host(slot) => slot,
                Step::Disk(ticket) => {
                    let arrival = match ticket.arrived() {
                        Some(arrival) => arrival,
                        None => {
                            self.send_up().await;
                            ticket.arrival().await
                        }
                    };
                    match arrival {
                        Arrival::Ready(slot) => {
                            self.read_blocks += 1;
                            slot
                        }
                        // Blocks behind a gap are of no use; their tickets go with this one.
                        Arrival::Missing(_) => break,
                    }
                }
            };
            if self.affordable > 0 {
                self.affordable -= 1;
                self.rising.push((position, slot));
            }
            if self.rising.len() >= job_blocks {
                self.send_up().await;
            }
        }
        self.send_up().await;
        while !self.jobs.is_empty() {
            self.await_job().await;
        }
    }

    /// Sends up what has arrived, once no more than one other job is under way.
    async fn send_up(&mut self) {
        let Some(tier) = &self.on.tier else {
            return;
        };
        if self.rising.is_empty() {
            return;
        }
        let rising = std::mem::take(&mut self.rising);
        let limits = self.limits.clone();
        let job = device::promote(&self.shared, &self.on, tier, &self.pin, rising, limits);
        self.jobs.push_back(job);
        while self.jobs.len() > JOBS - 1 {
            self.await_job().await;
        }
    }

    async fn await_job(&mut self) {
        let Some(job) = self.jobs.front() else {
            return;
        };
        let (mut landed, all) = (0, job.len());
        for promotion in job {
            match promotion.landing.wait().await {
                Promoted::Ready => landed += 1,
                Promoted::Missing => {}
            }
        }
        self.jobs.pop_front();
        self.promoted_blocks += landed;
        if landed < all {
            // No room there, or no time: what comes behind would be of no use either.
            self.affordable = 0;
        }
    }

    fn report(&self, asked: usize) -> PrefetchReport {
        let states = self.pin.states_on(self.on.number, 0..self.pin.blocks());
        let block_tokens = self.shared.config.geometry.block_tokens as usize;
        let leading =
            |is: fn(&&BlockState) -> bool| states.iter().take_while(is).count() * block_tokens;
        PrefetchReport {
            tokens: leading(|state| state.is_in_ram()),
            device_tokens: leading(|state| state.device.is_some()),
            read_blocks: self.read_blocks,
            promoted_blocks: self.promoted_blocks,
            missing_blocks: asked - self.read_blocks,
        }
    }
}

impl Prefetch {
    /// Waits until the prefetch has ended.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the prefetch.
    pub async fn finish(self) -> PrefetchReport {
        let mut report = self.report.clone();
        report
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|report| report.clone())
            .unwrap_or_default()
    }

    /// [`Prefetch::finish`] for a thread.
    pub fn finish_blocking(self) -> PrefetchReport {
        pollster::block_on(self.finish())
    }

    /// Ends it where another prefetch of the same blocks has begun: what is under way goes on for that
    /// one.
    pub(crate) fn replaced(mut self) {
        self.is_replaced = true;
    }

    /// Has it ended?
    pub fn is_finished(&self) -> bool {
        self.report.borrow().is_some()
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        if !self.is_replaced {
            self.cancelled.store(true, Ordering::Release);
        }
        self.cancel.send_replace(true);
    }
}
