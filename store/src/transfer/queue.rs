use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

use super::Job;
use super::worker::{Road, Running, Worker};
use crate::{Clock, Device, Error, Result};

/// The bounds of a [`TransferQueue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueLimits {
    /// Jobs that are accepted and not done: of loads over the link, of saves over it, and of what stays
    /// within the device, each by itself. A save has one for each layer, and all wait for the engine.
    pub jobs: usize,
    /// How long a layer may take from its submission to its fence; for a blocking device, also
    /// how long a job may wait for its `after` fences.
    pub fence_timeout: Duration,
}

/// The queue in front of one device. Clones share it; dropping the last one closes it.
#[derive(Clone)]
pub struct TransferQueue(Arc<Owner>);

struct Owner {
    shared: Arc<Shared>,
    runner: Runner,
}

enum Runner {
    Threads {
        ids: Vec<ThreadId>,
        /// Taken by the first close; held while it joins, so that a second one waits too.
        handles: Mutex<Vec<JoinHandle<()>>>,
    },
    #[cfg(any(test, feature = "sim"))]
    Inline(Mutex<Worker>),
}

/// What submitters and the transfer threads share.
pub(super) struct Shared {
    pub(super) device: Arc<dyn Device>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) limits: QueueLimits,
    inbox: Mutex<Inbox>,
    /// By road.
    wake: [Condvar; Road::ALL.len()],
}

#[derive(Default)]
struct Inbox {
    /// By road.
    jobs: [VecDeque<Running>; Road::ALL.len()],
    /// Accepted and not done, by road: in the inbox or with a worker.
    accepted: [usize; Road::ALL.len()],
    closed: bool,
}

/// While fences are outstanding they are looked at this often, at first and at most.
const POLL_MIN: Duration = Duration::from_micros(50);
const POLL_MAX: Duration = Duration::from_millis(1);

impl TransferQueue {
    /// Starts the device's transfer threads.
    ///
    /// # Errors
    /// `Unavailable` where the system gives no thread.
    pub fn spawn(
        device: Arc<dyn Device>,
        clock: Arc<dyn Clock>,
        limits: QueueLimits,
    ) -> Result<TransferQueue> {
        let shared = Shared::new(device, clock, limits);
        let mut handles = Vec::new();
        for road in Road::ALL {
            let mut worker = Worker::new(Arc::clone(&shared), vec![road]);
            let spawned = thread::Builder::new()
                .name(road.thread_name().into())
                .spawn(move || worker.run());
            match spawned {
                Ok(handle) => handles.push(handle),
                Err(cause) => {
                    shared.close();
                    return Err(
                        Error::unavailable("cannot start a transfer thread").caused_by(cause)
                    );
                }
            }
        }
        let runner = Runner::Threads {
            ids: handles.iter().map(|handle| handle.thread().id()).collect(),
            handles: Mutex::new(handles),
        };
        Ok(TransferQueue(Arc::new(Owner { shared, runner })))
    }

    /// A queue without a thread, for simulations: jobs run in the thread that submits them, as far
    /// as their fences allow; [`TransferQueue::turn`] goes on with the rest.
    #[cfg(any(test, feature = "sim"))]
    pub fn inline(
        device: Arc<dyn Device>,
        clock: Arc<dyn Clock>,
        limits: QueueLimits,
    ) -> TransferQueue {
        let shared = Shared::new(device, clock, limits);
        let runner = Runner::Inline(Mutex::new(Worker::new(
            Arc::clone(&shared),
            Road::ALL.to_vec(),
        )));
        TransferQueue(Arc::new(Owner { shared, runner }))
    }

    /// Hands a job over.
    ///
    /// # Errors
    /// `Invalid` where the job does not fit together (see [`Transfer::new`](crate::Transfer::new)), names
    /// a layer that does not exist, or is to be encoded by a device that does not; `Busy` over the bound of
    /// its road; `Closed` after close. The job's events are not called then.
    pub fn submit(&self, job: Job) -> Result<()> {
        let encoded = job.encoded.clone();
        self.accept(job).inspect_err(|_| {
            // Jobs of later layers do not wait for this one.
            if let Some(encoded) = encoded {
                encoded.give_up();
            }
        })
    }

    fn accept(&self, job: Job) -> Result<()> {
        let shared = &self.0.shared;
        let layers = job.table.kv.geometry().layers;
        if job.layers.end > layers {
            return Err(Error::invalid("a job names a layer that does not exist")
                .with("layers", format_args!("{:?}", job.layers))
                .with("geometry_layers", layers));
        }
        if let Some(encoded) = &job.encoded
            && !shared.device.encodes(encoded.codec())
        {
            return Err(Error::invalid("the device does not encode")
                .with("codec", format_args!("{:?}", encoded.codec())));
        }
        let running = Running::new(job, shared.clock.now())?;
        let road = running.road();
        {
            let mut inbox = shared.lock();
            if inbox.closed {
                return Err(Error::closed());
            }
            if inbox.accepted[road as usize] >= shared.limits.jobs {
                return Err(Error::busy("too many transfers are under way")
                    .with("jobs", shared.limits.jobs));
            }
            inbox.accepted[road as usize] += 1;
            inbox.jobs[road as usize].push_back(running);
        }
        self.0.go_on(road);
        Ok(())
    }

    /// Goes on with jobs whose fences may have been reached meanwhile. Transfer threads do that
    /// by themselves; only an inline queue needs it.
    #[cfg(any(test, feature = "sim"))]
    pub fn turn(&self) {
        self.0.turn();
    }

    /// Begins a [`TransferQueue::close`] and does not wait for its end.
    pub fn refuse(&self) {
        self.0.shared.close();
    }

    /// Finishes the jobs that have begun, ends the others (`Done` alone), and returns when the
    /// transfer threads have ended. From within an event it does not wait. An inline queue finishes
    /// what its fences allow.
    pub fn close(&self) {
        self.0.close();
    }
}

impl Owner {
    fn go_on(&self, road: Road) {
        self.shared.wake[road as usize].notify_one();
        self.turn();
    }

    /// Without threads, does what can be done.
    fn turn(&self) {
        match &self.runner {
            Runner::Threads { .. } => {}
            #[cfg(any(test, feature = "sim"))]
            Runner::Inline(worker) => loop {
                // From within an event, or beside another thread: whoever has it goes on.
                let Ok(mut worker) = worker.try_lock() else {
                    return;
                };
                while worker.step() {}
                drop(worker);
                if self.shared.lock().jobs.iter().all(VecDeque::is_empty) {
                    return;
                }
            },
        }
    }

    fn close(&self) {
        self.shared.close();
        self.turn();
        match &self.runner {
            Runner::Threads { ids, handles } => {
                if ids.contains(&thread::current().id()) {
                    return;
                }
                let mut handles = handles.lock().unwrap_or_else(PoisonError::into_inner);
                for handle in handles.drain(..) {
                    if handle.join().is_err() {
                        tracing::error!("a transfer thread panicked");
                    }
                }
            }
            #[cfg(any(test, feature = "sim"))]
            Runner::Inline(_) => {}
        }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn new(device: Arc<dyn Device>, clock: Arc<dyn Clock>, limits: QueueLimits) -> Arc<Shared> {
        Arc::new(Shared {
            device,
            clock,
            limits,
            inbox: Mutex::default(),
            wake: Default::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        // Nothing under the lock panics half way through a change.
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.lock().closed = true;
        self.wake.iter().for_each(Condvar::notify_one);
    }

    /// Moves what was submitted for these roads to `jobs`. Returns whether the queue is closed.
    pub(super) fn collect(&self, roads: &[Road], jobs: &mut Vec<Running>) -> bool {
        let mut inbox = self.lock();
        for &road in roads {
            jobs.extend(inbox.jobs[road as usize].drain(..));
        }
        inbox.closed
    }

    /// Makes room for another job on this road.
    pub(super) fn done(&self, road: Road) {
        self.lock().accepted[road as usize] -= 1;
    }

    /// Waits for a job on this road or a close; where fences are outstanding, no longer than until the
    /// next look at them, `idle` looks after the last one that found something.
    pub(super) fn wait(&self, road: Road, outstanding: bool, idle: u32) {
        let inbox = self.lock();
        if !inbox.jobs[road as usize].is_empty() || inbox.closed && !outstanding {
            return;
        }
        let wake = &self.wake[road as usize];
        if outstanding {
            let poll = POLL_MIN.saturating_mul(1 << idle.min(10)).min(POLL_MAX);
            drop(wake.wait_timeout(inbox, poll));
        } else {
            drop(wake.wait(inbox));
        }
    }
}
