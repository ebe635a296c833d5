//! Prefetch: disk → host, ahead of a load.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;

use crate::Result;
use crate::index::Pin;
use crate::pipeline::reader::{self, Arrival, Ticket};
use crate::pipeline::{HashedPath, Priority, Shared};

/// How far and how urgently to prefetch.
#[derive(Clone, Debug, PartialEq)]
pub struct PrefetchGoal {
    /// What comes first where reads wait.
    pub priority: Priority,
    /// What has not begun by then is given up.
    pub deadline: Option<Duration>,
    /// Bytes to read at most.
    pub budget_bytes: u64,
}

impl Default for PrefetchGoal {
    fn default() -> Self {
        PrefetchGoal {
            priority: Priority::NORMAL,
            deadline: None,
            budget_bytes: u64::MAX,
        }
    }
}

/// What a prefetch brought.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PrefetchReport {
    /// Leading tokens of the lease that are in the host tier now.
    pub tokens: usize,
    /// Blocks that were read from disk for it.
    pub read_blocks: usize,
    /// Blocks that did not come: over the budget, late, no room, failed.
    pub missing_blocks: usize,
}

/// A prefetch under way. Dropping it cancels what has not begun; what arrived stays.
///
/// What was prefetched is kept for as long as the lease lives.
#[must_use = "a dropped prefetch is cancelled"]
pub struct Prefetch {
    cancel: watch::Sender<bool>,
    report: watch::Receiver<Option<PrefetchReport>>,
}

pub(crate) fn prefetch(
    shared: &Arc<Shared>,
    pin: &Arc<Pin>,
    path: &HashedPath,
    goal: PrefetchGoal,
) -> Result<Prefetch> {
    shared.check_open()?;
    let blocks = pin.blocks();
    let states = pin.states(0..blocks);
    let missing = |(i, state): (usize, &crate::index::BlockState)| match state.is_in_ram() {
        true => None,
        false => state.record.map(|record| (i, record)),
    };
    let on_disk: Vec<_> = states.iter().enumerate().filter_map(missing).collect();
    let affordable =
        usize::try_from(goal.budget_bytes / shared.config.image_bytes()).unwrap_or(usize::MAX);
    let wanted = &on_disk[..on_disk.len().min(affordable)];
    let tickets = match &shared.disk {
        Some(disk) => reader::request(
            shared,
            disk,
            pin,
            path,
            wanted,
            goal.priority.min(Priority::HIGH),
        ),
        None => Vec::new(),
    };
    let cancel = watch::Sender::new(false);
    let (send, report) = watch::channel(None);
    let (task_shared, cancelled, pin) = (shared.clone(), cancel.subscribe(), pin.clone());
    let asked = on_disk.len();
    shared.tasks.spawn(async move {
        let read_blocks = wait(tickets, goal.deadline, cancelled).await;
        let on_host = pin
            .states(0..blocks)
            .iter()
            .take_while(|state| state.is_in_ram())
            .count();
        // Whoever waits for the report finds nothing pinned for it.
        drop(pin);
        let tokens = on_host * task_shared.config.geometry.block_tokens as usize;
        send.send_replace(Some(PrefetchReport {
            tokens,
            read_blocks,
            missing_blocks: asked - read_blocks,
        }));
    });
    Ok(Prefetch { cancel, report })
}

/// Waits for tickets until one is missing for good, the deadline or the cancellation; how many
/// arrived?
async fn wait(
    tickets: Vec<Ticket>,
    deadline: Option<Duration>,
    mut cancelled: watch::Receiver<bool>,
) -> usize {
    let give_up = async {
        let cancelled = cancelled.wait_for(|cancelled| *cancelled);
        match deadline {
            // An error means that the handle is gone, which cancels too.
            Some(deadline) => drop(tokio::time::timeout(deadline, cancelled).await),
            None => drop(cancelled.await),
        }
    };
    tokio::pin!(give_up);
    let mut arrived = 0;
    for ticket in &tickets {
        let arrival = tokio::select! {
            biased;
            arrival = ticket.arrival() => arrival,
            () = &mut give_up => break,
        };
        match arrival {
            Arrival::Ready(_) => arrived += 1,
            // Blocks behind a gap are of no use; their tickets go with this one.
            Arrival::Missing(_) => break,
        }
    }
    arrived
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

    /// Has it ended?
    pub fn is_finished(&self) -> bool {
        self.report.borrow().is_some()
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.cancel.send_replace(true);
    }
}
