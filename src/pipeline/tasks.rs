//! The store's own tasks: where they run, and how a close waits for them.

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use tokio::runtime::{Builder, Handle};
use tokio::sync::{Notify, oneshot};

use crate::{Error, Result};

/// Spawns tasks on one runtime and counts them.
pub(crate) struct Tasks {
    runtime: Handle,
    /// Blocking calls run in the task itself: for simulations, which must not depend on threads.
    inline: Option<Box<Latency>>,
    count: Arc<Count>,
}

/// How long the next blocking call takes in a simulation.
pub(crate) type Latency = dyn Fn() -> Duration + Send + Sync;

#[derive(Default)]
struct Count {
    running: AtomicUsize,
    ended: Notify,
    /// The runtime's thread may end once no task runs.
    released: Notify,
}

/// Something under way that a close waits for; whatever ends it, it is counted down.
pub(crate) struct Running(Arc<Count>);

impl Drop for Running {
    fn drop(&mut self) {
        if self.0.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.ended.notify_waiters();
        }
    }
}

impl Tasks {
    /// A runtime of the store's own, on one thread. It ends after [`Tasks`] is dropped and the last
    /// task has ended: a task that still copies is never cut off.
    pub(crate) fn own_runtime() -> Result<Self> {
        let count = Arc::new(Count::default());
        let thread_count = count.clone();
        let (send, receive) = mpsc::channel();
        let failed = |error: std::io::Error| {
            Error::unavailable("cannot start the store's thread").caused_by(error)
        };
        std::thread::Builder::new()
            .name("stemkv".into())
            .spawn(move || {
                match Builder::new_current_thread()
                    .enable_time()
                    .thread_name("stemkv-io")
                    .build()
                {
                    Err(error) => drop(send.send(Err(error))),
                    Ok(runtime) => runtime.block_on(async {
                        let _ = send.send(Ok(Handle::current()));
                        thread_count.released.notified().await;
                        idle(&thread_count).await;
                    }),
                }
            })
            .map_err(failed)?;
        let runtime = receive
            .recv()
            .map_err(|_| Error::internal("the store's thread ended at once"))?
            .map_err(failed)?;
        Ok(Tasks {
            runtime,
            inline: None,
            count,
        })
    }

    /// Tasks and blocking calls on a given runtime.
    ///
    /// # Errors
    /// `Invalid` where its timer is not enabled.
    pub(crate) fn on(runtime: Handle) -> Result<Self> {
        let timer = {
            let _within = runtime.enter();
            // The runtime can only be asked by what panics where there is none.
            catch_unwind(|| drop(tokio::time::sleep(Duration::ZERO)))
        };
        timer.map_err(|_| {
            Error::invalid(
                "the runtime has no timer, which deadlines need: build it with enable_time",
            )
        })?;
        Ok(Tasks {
            runtime,
            inline: None,
            count: Arc::default(),
        })
    }

    /// Has the runtime ended? Nothing runs there any more then.
    pub(crate) async fn have_ended(&self) -> bool {
        let probe = self.runtime.spawn(async {});
        // What an ended one is given has ended at once. One that nobody drives is not waited for.
        probe.is_finished() && probe.await.is_err()
    }

    /// Tasks on a given runtime, blocking calls inside them: everything in one thread's order.
    #[cfg(feature = "sim")]
    pub(crate) fn inline_on(runtime: Handle, latency: Box<Latency>) -> Self {
        Tasks {
            runtime,
            inline: Some(latency),
            count: Arc::default(),
        }
    }

    /// Counts something under way that is no task.
    pub(crate) fn begin(&self) -> Running {
        self.count.running.fetch_add(1, Ordering::AcqRel);
        Running(self.count.clone())
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let running = self.begin();
        self.runtime.spawn(async move {
            let _running = running;
            task.await;
        });
    }

    /// Calls something short after a while, unless the runtime ends before. Nobody waits for that.
    pub(crate) fn after(&self, pause: Duration, call: impl FnOnce() + Send + 'static) {
        self.runtime.spawn(async move {
            tokio::time::sleep(pause).await;
            call();
        });
    }

    /// Hands a call to the runtime's threads for blocking ones. Where there is none and none can be had it
    /// is `Unavailable`, and the call is not made; so is the answer where the runtime ends before. A panic in
    /// the call is `Internal`.
    fn start_blocking<R: Send + 'static>(
        runtime: &Handle,
        call: impl FnOnce() -> R + Send + 'static,
    ) -> Result<impl Future<Output = Result<R>> + Send + 'static> {
        let (answer, answered) = oneshot::channel();
        // The runtime panics where the system refuses a thread, and keeps what it was handed for a later
        // one: so the call can be taken back.
        let call = Arc::new(Mutex::new(Some(call)));
        let take = |call: &Mutex<Option<_>>| {
            let mut call = call.lock().unwrap_or_else(PoisonError::into_inner);
            call.take()
        };
        let handed = call.clone();
        let handed_over = catch_unwind(AssertUnwindSafe(|| {
            runtime.spawn_blocking(move || {
                if let Some(call) = take(&handed) {
                    let _ = answer.send(call());
                }
            })
        }));
        match handed_over {
            Err(_) if take(&call).is_some() => Err(Error::unavailable(
                "no thread can be had for a blocking call",
            )),
            _ => Ok(async move {
                answered.await.map_err(|_| match take(&call) {
                    Some(_) => {
                        Error::unavailable("the runtime ended before a blocking call was made")
                    }
                    None => Error::internal("a blocking call panicked"),
                })
            }),
        }
    }

    /// Runs a call that blocks, away from the runtime's thread. A panic in it is `Internal`; where no thread
    /// can be had for it, or the runtime has ended, it is `Unavailable`.
    pub(crate) async fn blocking<R: Send + 'static>(
        &self,
        call: impl FnOnce() -> R + Send + 'static,
    ) -> Result<R> {
        let Some(latency) = &self.inline else {
            return Self::start_blocking(&self.runtime, call)?.await;
        };
        // Where others run while a thread would do this.
        match latency() {
            Duration::ZERO => tokio::task::yield_now().await,
            latency => tokio::time::sleep(latency).await,
        }
        catch_unwind(AssertUnwindSafe(call))
            .map_err(|_| Error::internal("a blocking call panicked"))
    }

    /// As [`Tasks::blocking`], waiting at most for `limit`: `None` where the call hangs, and is left to its
    /// thread.
    pub(crate) async fn blocking_within<R: Send + 'static>(
        &self,
        limit: Duration,
        call: impl FnOnce() -> R + Send + 'static,
    ) -> Result<Option<R>> {
        if self.inline.is_some() {
            return self.blocking(call).await.map(Some);
        }
        let answered = Self::start_blocking(&self.runtime, call)?;
        // The timer is the runtime's, so the wait runs there.
        let wait = self
            .runtime
            .spawn(async move { tokio::time::timeout(limit, answered).await });
        match wait.await {
            Ok(Ok(answer)) => answer.map(Some),
            Ok(Err(_)) => Ok(None),
            Err(_) => Err(Error::unavailable(
                "the runtime ended while a blocking call was waited for",
            )),
        }
    }

    /// Tries a call that blocks again and again, after a pause each, until it answers `true` or the runtime ends.
    /// Nobody waits for that.
    pub(crate) fn repeat(&self, pause: Duration, call: impl Fn() -> bool + Send + Sync + 'static) {
        let (call, runtime) = (Arc::new(call), self.runtime.clone());
        self.runtime.spawn(async move {
            loop {
                tokio::time::sleep(pause).await;
                let call = call.clone();
                if let Ok(answered) = Self::start_blocking(&runtime, move || call())
                    && let Ok(true) = answered.await
                {
                    return;
                }
            }
        });
    }

    /// Waits for something, at most for `limit`.
    pub(crate) async fn within<R: Send + 'static>(
        &self,
        limit: Duration,
        what: impl Future<Output = R> + Send + 'static,
    ) -> Option<R> {
        // The timer is the runtime's, so the wait runs there.
        let wait = self
            .runtime
            .spawn(async move { tokio::time::timeout(limit, what).await.ok() });
        wait.await.ok().flatten()
    }

    /// Waits until no task runs, at most for `limit`; is none left?
    pub(crate) async fn idle(&self, limit: Duration) -> bool {
        let count = self.count.clone();
        // The timer is the runtime's, so the wait runs there; uncounted, or it would wait for itself.
        let wait = self
            .runtime
            .spawn(async move { tokio::time::timeout(limit, idle(&count)).await.is_ok() });
        let is_idle = || self.count.running.load(Ordering::Acquire) == 0;
        wait.await.unwrap_or_else(|_| is_idle())
    }
}

impl Drop for Tasks {
    fn drop(&mut self) {
        self.count.released.notify_one();
    }
}

async fn idle(count: &Count) {
    loop {
        let ended = count.ended.notified();
        if count.running.load(Ordering::Acquire) == 0 {
            return;
        }
        ended.await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_hangs_is_waited_for_as_long_as_is_said_and_goes_on() {
        let tasks = Tasks::own_runtime().expect("a thread");
        let (release, released) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let brief = Duration::from_millis(10);
        let hangs = tasks.blocking_within(brief, move || {
            let _ = released.recv();
            tell.send(7)
        });
        assert!(pollster::block_on(hangs).expect("no panic").is_none());
        drop(release);
        assert_eq!(told.recv(), Ok(7));
        let long = Duration::from_secs(60);
        let answered = pollster::block_on(tasks.blocking_within(long, || 8));
        assert_eq!(answered.expect("no panic"), Some(8));
        let panics = pollster::block_on(tasks.blocking_within(long, || panic!("on purpose")));
        panics
            .map(|answer: Option<()>| answer)
            .expect_err("said so");
    }
}
