//! What is not in RAM when a load begins: waited for, and submitted in prompt order.

use std::sync::Arc;

use crate::ErrorKind;
use crate::pipeline::reader::Arrival;

use super::run::{Chunk, Place, Run, Source, Submitted};

/// Says what is coming when the gathering ends, also where its runtime ends first.
pub(super) struct Gathering {
    run: Arc<Run>,
    /// One past the last block that was handed to the transfer queue or that the engine computed.
    reached: usize,
    cut: Option<ErrorKind>,
}

impl Gathering {
    pub(super) fn new(run: Arc<Run>, reached: usize) -> Self {
        Gathering {
            run,
            reached,
            cut: Some(ErrorKind::Unavailable),
        }
    }

    /// Hands over what has arrived; `false` where not all of it was accepted: then the load ends here.
    fn submit(&mut self, ready: &mut Vec<Chunk>) -> bool {
        let Some(end) = ready.last().map(|chunk| chunk.position + 1) else {
            return true;
        };
        let submitted = self.run.submit(std::mem::take(ready));
        if submitted != Submitted::Nothing {
            self.reached = end;
        }
        submitted == Submitted::All
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        self.run.settle_target(self.reached, self.cut);
    }
}

/// How the wait for one block ended.
enum Waited {
    Arrived(Place),
    Missing(ErrorKind),
    Computed,
}

impl From<Arrival> for Waited {
    fn from(arrival: Arrival) -> Self {
        match arrival {
            Arrival::Ready(slot) => Waited::Arrived(Place::Host(slot)),
            Arrival::Missing(kind) => Waited::Missing(kind),
        }
    }
}

/// Waits block by block in prompt order, and submits what has arrived whenever the next one has not.
pub(super) async fn gather(mut gathering: Gathering, sources: Vec<(usize, Source)>) {
    let run = gathering.run.clone();
    let (mut cancel, mut watermark) = (run.cancel.subscribe(), run.watermark.subscribe());
    let give_up = async {
        match run.options.deadline {
            Some(deadline) => {
                tokio::select! {
                    _ = cancel.wait_for(|cancelled| *cancelled) => {}
                    () = tokio::time::sleep(deadline) => {}
                }
            }
            None => drop(cancel.wait_for(|cancelled| *cancelled).await),
        }
    };
    tokio::pin!(give_up);
    let (mut ready, mut cut) = (Vec::new(), None);
    for (position, source) in sources {
        let from = source.tier();
        let waited = match source {
            _ if run.is_computed(position) => Waited::Computed,
            Source::Device(slot) => Waited::Arrived(Place::Device(slot)),
            Source::Host(slot) => Waited::Arrived(Place::Host(slot)),
            Source::Missing => Waited::Missing(ErrorKind::Unavailable),
            Source::Lowering(lowering) => {
                if lowering.landed().is_none() && !gathering.submit(&mut ready) {
                    cut = Some(ErrorKind::Busy);
                    break;
                }
                tokio::select! {
                    biased;
                    lowered = lowering.wait() => match lowered {
                        Some(slot) => Waited::Arrived(Place::Host(slot)),
                        None => Waited::Missing(ErrorKind::Unavailable),
                    },
                    _ = watermark.wait_for(|computed| *computed > position) => Waited::Computed,
                    () = &mut give_up => Waited::Missing(ErrorKind::Busy),
                }
            }
            Source::Disk(ticket) => match ticket.arrived() {
                Some(arrival) => arrival.into(),
                None => {
                    if !gathering.submit(&mut ready) {
                        cut = Some(ErrorKind::Busy);
                        break;
                    }
                    tokio::select! {
                        biased;
                        arrival = ticket.arrival() => arrival.into(),
                        _ = watermark.wait_for(|computed| *computed > position) => Waited::Computed,
                        () = &mut give_up => Waited::Missing(ErrorKind::Busy),
                    }
                }
            },
        };
        match waited {
            Waited::Arrived(at) => ready.push(Chunk { position, from, at }),
            Waited::Missing(kind) => {
                cut = Some(kind);
                break;
            }
            Waited::Computed => {
                if !gathering.submit(&mut ready) {
                    cut = Some(ErrorKind::Busy);
                    break;
                }
                gathering.reached = position + 1;
            }
        }
    }
    if !gathering.submit(&mut ready) {
        cut = Some(ErrorKind::Busy);
    }
    gathering.cut = cut;
}
