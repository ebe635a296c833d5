//! Look-ahead: prefetches for an engine's waiting requests, in their order, within bounds.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::Result;
use crate::lease::Lease;
use crate::pipeline::prefetch::{Missing, Prefetch, PrefetchGoal, missing, prefetch};
use crate::pipeline::{Driven, Priority, Shared};

/// The bounds of a [`LookAhead`].
#[derive(Clone, Debug, PartialEq)]
pub struct LookAheadLimits {
    /// Bytes that are brought from disk into the host tier for waiting requests, at most.
    pub host_bytes: u64,
    /// Bytes that are brought into the device tier for waiting requests, at most.
    pub device_bytes: u64,
    /// What has not begun by then, from when its request came into the queue's reach, is given up.
    pub deadline: Option<Duration>,
}

/// The engine's queue of waiting requests, which the store works through ahead of the engine.
///
/// Requests nearest to their turn come first; as many are prefetched as the bounds allow, and more as
/// those in front leave. A request that is dispatched is loaded as any other: the load takes what has
/// arrived and joins what is under way. Dropped, it cancels what has not begun.
pub struct LookAhead {
    shared: Arc<Shared>,
    on: Arc<Driven>,
    limits: LookAheadLimits,
    entries: Mutex<Vec<Entry>>,
}

/// One waiting request.
struct Entry {
    lease: Lease,
    /// What was missing when it came.
    needed: Missing,
    /// `None` while it is out of reach.
    under_way: Option<UnderWay>,
}

struct UnderWay {
    prefetch: Prefetch,
    priority: Priority,
    /// What was and may be brought for it, of the bounds.
    granted: Missing,
}

/// How far a look-ahead is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LookAheadReport {
    /// Requests that wait.
    pub waiting: usize,
    /// Of those, requests within the bounds, whole or in part.
    pub in_reach: usize,
    /// Of those, requests whose prefetch has ended.
    pub finished: usize,
    /// Bytes that those in reach may bring from disk into the host tier.
    pub host_bytes: u64,
    /// Bytes that those in reach may bring into the device tier.
    pub device_bytes: u64,
}

impl LookAhead {
    pub(crate) fn new(shared: Arc<Shared>, on: Arc<Driven>, limits: LookAheadLimits) -> Self {
        LookAhead {
            shared,
            on,
            limits,
            entries: Mutex::default(),
        }
    }

    /// The engine's waiting requests by their leases, the next one first. Those that are not among them
    /// any more, dispatched or given up, leave the queue. Does not wait.
    ///
    /// # Errors
    /// `Invalid`, and nothing changes, where a lease is of another store; `Closed`.
    pub fn set(&self, waiting: &[Lease]) -> Result<()> {
        self.shared.check_open()?;
        let are_own = |lease: &Lease| self.shared.check_lease(&lease.pin);
        waiting.iter().try_for_each(are_own)?;
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let mut old = std::mem::take(&mut *entries);
        let mut left = Missing {
            in_ram_bytes: self.limits.host_bytes,
            on_device_bytes: self.limits.device_bytes,
        };
        for (position, lease) in waiting.iter().enumerate() {
            let known = old
                .iter()
                .position(|entry| Arc::ptr_eq(&entry.lease.pin, &lease.pin));
            let mut entry = match known {
                Some(at) => old.swap_remove(at),
                None => Entry {
                    lease: lease.clone(),
                    needed: missing(&self.shared, &self.on, &lease.pin),
                    under_way: None,
                },
            };
            let grant = Missing {
                in_ram_bytes: entry.needed.in_ram_bytes.min(left.in_ram_bytes),
                on_device_bytes: entry.needed.on_device_bytes.min(left.on_device_bytes),
            };
            left.in_ram_bytes -= grant.in_ram_bytes;
            left.on_device_bytes -= grant.on_device_bytes;
            self.reach(&mut entry, grant, priority_at(position))?;
            entries.push(entry);
        }
        Ok(())
    }

    /// Does for one request what it is granted, as urgently as its place asks.
    fn reach(&self, entry: &mut Entry, granted: Missing, priority: Priority) -> Result<()> {
        if granted == Missing::default() {
            entry.under_way = None;
            return Ok(());
        }
        if let Some(under_way) = &entry.under_way {
            let is_as_urgent = under_way.priority >= priority || under_way.prefetch.is_finished();
            if under_way.granted == granted && is_as_urgent {
                return Ok(());
            }
        }
        // What was brought for it counts.
        let (needed, still) = (
            entry.needed,
            missing(&self.shared, &self.on, &entry.lease.pin),
        );
        let rest = |needed: u64, still: u64, granted: u64| {
            granted.saturating_sub(needed.saturating_sub(still))
        };
        let goal = PrefetchGoal {
            priority,
            deadline: self.limits.deadline,
            budget_bytes: rest(
                needed.in_ram_bytes,
                still.in_ram_bytes,
                granted.in_ram_bytes,
            ),
            device_budget_bytes: rest(
                needed.on_device_bytes,
                still.on_device_bytes,
                granted.on_device_bytes,
            ),
        };
        let begun = UnderWay {
            prefetch: prefetch(
                &self.shared,
                &self.on,
                &entry.lease.pin,
                &entry.lease.path,
                goal,
            )?,
            priority,
            granted,
        };
        // The new one has joined what is under way before the old one lets it go.
        if let Some(old) = entry.under_way.replace(begun) {
            old.prefetch.replaced();
        }
        Ok(())
    }

    /// How far it is.
    pub fn report(&self) -> LookAheadReport {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let mut report = LookAheadReport {
            waiting: entries.len(),
            ..LookAheadReport::default()
        };
        for under_way in entries.iter().filter_map(|entry| entry.under_way.as_ref()) {
            report.in_reach += 1;
            report.finished += usize::from(under_way.prefetch.is_finished());
            report.host_bytes += under_way.granted.in_ram_bytes;
            report.device_bytes += under_way.granted.on_device_bytes;
        }
        report
    }
}

/// The nearer its turn, the sooner a request is read for.
fn priority_at(position: usize) -> Priority {
    let last = Priority::HIGH.0 - Priority::NORMAL.0 - 1;
    let behind = u8::try_from(position).unwrap_or(u8::MAX).min(last);
    Priority(Priority::HIGH.0 - behind)
}
