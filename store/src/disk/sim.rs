//! A disk in memory that fails as it is told.
//!
//! The fault model, and why a store must survive each:
//! - *a sector is bad* ([`SimMedium::spoil`]): one record cannot be read, and the others can;
//! - *a call fails* ([`SimMedium::fail_call`], [`SimMedium::fail_all`]): disks report errors;
//! - *power is cut at a sync* ([`SimMedium::cut_power_at_sync`]): what was synced before is there
//!   afterwards, of what was not any part may be ([`SimMedium::after_power_cut`]), down to half a
//!   record;
//! - *a bit flips* in a record at rest ([`SimMedium::flip_bit`]): media rot, silently;
//! - *the disk is full*: the capacity given to [`SimDisk::open`];
//! - *the disk is slow*: a hook before each call ([`SimMedium::on_call`]), which may wait.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::num::NonZeroU64;
use std::ops::DerefMut;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::verify::{record_bytes, record_of, seal_record};
use super::{
    BatchId, BatchTooLarge, DiskScan, DiskTier, DiskUsage, META_BYTES_MAX, RecordId, RecordInfo,
};
use crate::{Clock, Error, Filling, Key, KvGeometry, RecordHeader, Result, Slot};

/// What a [`SimDisk`] asks of its medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SimDiskCall {
    /// Append to the log: records, removals, touches.
    Append,
    /// Append a small value of the caller's to it.
    Meta,
    /// Make everything appended so far durable.
    Sync,
    /// Read one record.
    Read,
    /// Give the bytes of removed records back.
    Trim,
}

/// The bytes under a [`SimDisk`]: a log of frames, of which a leading part is synced. It outlives
/// the tier, as a disk outlives a process. Clones are the same medium.
#[derive(Clone, Default)]
pub struct SimMedium(Arc<Mutex<Medium>>);

type Hook = Arc<dyn Fn(SimDiskCall) + Send + Sync>;

#[derive(Default)]
struct Medium {
    geometry: Option<KvGeometry>,
    in_use: bool,
    log: Vec<Frame>,
    synced: usize,
    calls: u64,
    syncs: u64,
    fail_at_call: Option<u64>,
    fail_all: bool,
    bad: BTreeSet<Key>,
    cut_at_sync: Option<u64>,
    dead: bool,
    hook: Option<Hook>,
    trace: String,
}

#[derive(Clone)]
enum Frame {
    Records(Vec<(u64, u64, Vec<u8>)>),
    Remove(Vec<RecordId>),
    Touch(Vec<RecordId>, u64),
    Meta(Key, Vec<u8>),
    /// Its write failed.
    Void,
}

fn lock<T>(mutex: &Mutex<T>) -> impl DerefMut<Target = T> + '_ {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SimMedium {
    /// Calls made so far, of all tiers on this medium.
    pub fn calls(&self) -> u64 {
        lock(&self.0).calls
    }

    /// Syncs made so far.
    pub fn syncs(&self) -> u64 {
        lock(&self.0).syncs
    }

    /// Lets the `n`-th call from now fail, counted from 1.
    pub fn fail_call(&self, n: u64) {
        let mut medium = lock(&self.0);
        medium.fail_at_call = Some(medium.calls + n);
    }

    /// Lets every call fail, or none any more, not the one of [`SimMedium::fail_call`] either.
    pub fn fail_all(&self, fail: bool) {
        let mut medium = lock(&self.0);
        medium.fail_all = fail;
        if !fail {
            medium.fail_at_call = None;
        }
    }

    /// Cuts the power when the `n`-th sync from now is asked for, counted from 1. That sync and
    /// every later call fail.
    pub fn cut_power_at_sync(&self, n: u64) {
        let mut medium = lock(&self.0);
        medium.cut_at_sync = Some(medium.syncs + n);
    }

    /// What a power cut at this moment leaves behind, as a medium of its own: all that was synced,
    /// and, as `seed` decides, each later frame whole, in part or not at all.
    pub fn after_power_cut(&self, seed: u64) -> SimMedium {
        let medium = lock(&self.0);
        let mut random = seed;
        let mut below = |bound: usize| {
            // splitmix64, as in the checksum's keys.
            random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut x = random;
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((x ^ (x >> 31)) % bound as u64) as usize
        };
        let mut log = medium.log[..medium.synced].to_vec();
        for frame in &medium.log[medium.synced..] {
            match (below(3), frame) {
                (0, _) => {}
                (1, Frame::Records(records)) => {
                    let mut records = records[..below(records.len() + 1)].to_vec();
                    if let Some((_, _, last)) = records.last_mut() {
                        last.truncate(below(last.len()));
                    }
                    log.push(Frame::Records(records));
                }
                _ => log.push(frame.clone()),
            }
        }
        SimMedium(Arc::new(Mutex::new(Medium {
            geometry: medium.geometry.clone(),
            synced: log.len(),
            log,
            ..Medium::default()
        })))
    }

    /// Flips one bit of the newest image stored under `key`; `false` where there is none that long.
    pub fn flip_bit(&self, key: &Key, bit: usize) -> bool {
        let mut medium = lock(&self.0);
        let images = medium.log.iter_mut().rev().flat_map(|frame| match frame {
            Frame::Records(records) => records.as_mut_slice(),
            _ => &mut [],
        });
        let at_key = RecordHeader::KEY_AT;
        for (_, _, image) in images {
            if image.get(at_key.clone()) == Some(&key.0[..]) && bit / 8 < image.len() {
                image[bit / 8] ^= 1 << (bit % 8);
                return true;
            }
        }
        false
    }

    /// The sectors of the record under `key` go bad, or are good again.
    pub fn spoil(&self, key: &Key, is_bad: bool) {
        let mut medium = lock(&self.0);
        match is_bad {
            true => medium.bad.insert(*key),
            false => medium.bad.remove(key),
        };
    }

    /// Runs `hook` before each call, on the calling thread, with no lock of the medium held: it may
    /// wait.
    pub fn on_call(&self, hook: impl Fn(SimDiskCall) + Send + Sync + 'static) {
        lock(&self.0).hook = Some(Arc::new(hook));
    }

    /// Every call so far, one a line. The same calls give the same trace.
    pub fn trace(&self) -> String {
        lock(&self.0).trace.clone()
    }

    fn call(&self, call: SimDiskCall, what: std::fmt::Arguments<'_>) -> Result<()> {
        let hook = lock(&self.0).hook.clone();
        if let Some(hook) = hook {
            hook(call);
        }
        let mut medium = lock(&self.0);
        medium.calls += 1;
        let number = medium.calls;
        if call == SimDiskCall::Sync {
            medium.syncs += 1;
            medium.dead |= medium.cut_at_sync == Some(medium.syncs);
        }
        let fails = medium.dead || medium.fail_all || medium.fail_at_call == Some(number);
        let outcome = if fails { "fails" } else { "ok" };
        let _ = writeln!(medium.trace, "{number} {call:?} {what}: {outcome}");
        match fails {
            false => Ok(()),
            true => Err(Error::unavailable("the simulated disk fails").with("call", number)),
        }
    }

    /// Appends a frame and syncs the log up to it. `Err` where either failed: then the frame is
    /// void, but for what a power cut may leave of it.
    fn append_synced(&self, frame: Frame, what: std::fmt::Arguments<'_>) -> Result<usize> {
        let at = self.append(frame, what)?;
        let synced = self.call(SimDiskCall::Sync, format_args!("{at}"));
        let mut medium = lock(&self.0);
        match &synced {
            Ok(()) => medium.synced = medium.synced.max(at + 1),
            Err(_) if medium.dead => {}
            Err(_) => medium.log[at] = Frame::Void,
        }
        synced.map(|()| at)
    }

    fn append(&self, frame: Frame, what: std::fmt::Arguments<'_>) -> Result<usize> {
        let call = match frame {
            Frame::Meta(..) => SimDiskCall::Meta,
            _ => SimDiskCall::Append,
        };
        self.call(call, what)?;
        let mut medium = lock(&self.0);
        medium.log.push(frame);
        Ok(medium.log.len() - 1)
    }
}

/// A [`DiskTier`] on a [`SimMedium`].
pub struct SimDisk {
    medium: SimMedium,
    geometry: KvGeometry,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// The head of the line moved on.
    turned: Condvar,
}

#[derive(Default)]
struct State {
    closed: bool,
    capacity_bytes: u64,
    next_id: u64,
    /// In the order of a scan.
    records: BTreeMap<(u32, RecordId), Place>,
    depths: BTreeMap<RecordId, u32>,
    metas: BTreeMap<Key, Vec<u8>>,
    /// Of removed records whose bytes are still on the medium.
    dead: Vec<(usize, usize)>,
    dead_bytes: u64,
    live_bytes: u64,
    written_bytes: u64,
    dropped: u64,
    /// Batches that have begun, and those of them that have ended: they are written in turn.
    given: u64,
    head: u64,
    failed: BTreeSet<u64>,
    reserved_bytes: u64,
}

struct Place {
    info: RecordInfo,
    frame: usize,
    index: usize,
}

impl State {
    fn free_bytes(&self) -> u64 {
        self.capacity_bytes
            .saturating_sub(self.live_bytes + self.dead_bytes + self.reserved_bytes)
    }

    fn insert(
        &mut self,
        geometry: &KvGeometry,
        at: (usize, usize),
        id: u64,
        saved_ms: u64,
        image: &[u8],
    ) {
        self.next_id = self.next_id.max(id + 1);
        let header = RecordHeader::decode(image, geometry)
            .ok()
            .filter(|header| record_bytes(header) == image.len());
        let (Some(header), Some(id)) = (header, NonZeroU64::new(id).map(RecordId)) else {
            self.dropped += 1;
            return;
        };
        let info = RecordInfo {
            id,
            namespace: header.namespace,
            parent: header.parent,
            key: header.key,
            depth: header.depth,
            bytes: image.len() as u32,
            last_use_ms: saved_ms,
        };
        self.live_bytes += image.len() as u64;
        self.depths.insert(id, info.depth);
        self.records.insert(
            (info.depth, id),
            Place {
                info,
                frame: at.0,
                index: at.1,
            },
        );
    }

    fn remove(&mut self, ids: &[RecordId]) {
        for id in ids {
            let place = self
                .depths
                .remove(id)
                .and_then(|depth| self.records.remove(&(depth, *id)));
            if let Some(place) = place {
                self.live_bytes -= u64::from(place.info.bytes);
                self.dead_bytes += u64::from(place.info.bytes);
                self.dead.push((place.frame, place.index));
            }
        }
    }

    fn touch(&mut self, ids: &[RecordId], last_use_ms: u64) {
        for id in ids {
            let place = self
                .depths
                .get(id)
                .and_then(|&depth| self.records.get_mut(&(depth, *id)));
            if let Some(place) = place {
                place.info.last_use_ms = last_use_ms;
            }
        }
    }

    fn put_meta(&mut self, key: Key, value: &[u8]) {
        match value.is_empty() {
            true => self.metas.remove(&key),
            false => self.metas.insert(key, value.to_vec()),
        };
    }
}

/// A batch's place in line, until it is dropped.
struct Turn<'a> {
    disk: &'a SimDisk,
    number: u64,
    batch_bytes: u64,
    is_written: bool,
}

impl<'a> Turn<'a> {
    /// Until all that began before have ended.
    fn wait(&self) -> MutexGuard<'a, State> {
        let state = self.disk.state.lock();
        let state = state.unwrap_or_else(PoisonError::into_inner);
        let is_later = |state: &mut State| state.head != self.number;
        let state = self.disk.turned.wait_while(state, is_later);
        state.unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.wait();
        state.head += 1;
        state.reserved_bytes -= self.batch_bytes;
        if !self.is_written {
            state.failed.insert(self.number);
        }
        drop(state);
        self.disk.turned.notify_all();
    }
}

impl SimDisk {
    /// Opens a medium, one tier at a time.
    ///
    /// # Errors
    /// `Busy` where it is open already; `Invalid`, with the difference, where it was made with
    /// another geometry.
    pub fn open(
        medium: &SimMedium,
        geometry: &KvGeometry,
        capacity_bytes: u64,
        clock: Arc<dyn Clock>,
    ) -> Result<SimDisk> {
        let mut bytes = lock(&medium.0);
        if bytes.in_use {
            return Err(Error::busy(
                "the simulated disk is open already: close it there first",
            ));
        }
        if let Some(other) = bytes.geometry.as_ref().filter(|&other| other != geometry) {
            let difference = geometry.difference(other).join("; ");
            return Err(
                Error::invalid("the store has another geometry").with("difference", difference)
            );
        }
        bytes.geometry = Some(geometry.clone());
        bytes.in_use = true;
        let mut state = State {
            capacity_bytes,
            next_id: 1,
            ..State::default()
        };
        for (at, frame) in bytes.log.iter().enumerate() {
            match frame {
                Frame::Records(records) => {
                    for (index, (id, saved_ms, image)) in records.iter().enumerate() {
                        state.insert(geometry, (at, index), *id, *saved_ms, image);
                    }
                }
                Frame::Remove(ids) => state.remove(ids),
                Frame::Touch(ids, last_use_ms) => state.touch(ids, *last_use_ms),
                Frame::Meta(key, value) => state.put_meta(*key, value),
                Frame::Void => {}
            }
        }
        drop(bytes);
        Ok(SimDisk {
            medium: medium.clone(),
            geometry: geometry.clone(),
            clock,
            state: Mutex::new(state),
            turned: Condvar::new(),
        })
    }

    fn open_state(&self) -> Result<impl DerefMut<Target = State> + '_> {
        let state = lock(&self.state);
        match state.closed {
            true => Err(Error::closed()),
            false => Ok(state),
        }
    }

    fn read_one(&self, info: &RecordInfo, mut filling: Filling) -> Result<Slot> {
        self.open_state()?;
        self.medium
            .call(SimDiskCall::Read, format_args!("{}", info.id.0))?;
        let (frame, index) = match self.open_state()?.records.get(&(info.depth, info.id)) {
            Some(place) => (place.frame, place.index),
            None => return Err(Error::unavailable("the record is gone").with("record", info.id.0)),
        };
        let medium = lock(&self.medium.0);
        if medium.bad.contains(&info.key) {
            let cause = std::io::Error::from_raw_os_error(libc::EIO);
            return Err(Error::unavailable("the simulated disk has a bad sector").caused_by(cause));
        }
        let image = match &medium.log[frame] {
            Frame::Records(records) => &records[index].2,
            _ => return Err(Error::internal("a record's frame holds no records")),
        };
        if image.len() != info.bytes as usize {
            return Err(Error::unavailable("the record is gone").with("record", info.id.0));
        }
        let target = filling.image_mut()?.get_mut(..image.len());
        let target =
            target.ok_or_else(|| Error::invalid("the slot is too short for the record"))?;
        target.copy_from_slice(image);
        drop(medium);
        seal_record(info, filling)
    }
}

impl DiskTier for SimDisk {
    fn write_after(
        &self,
        batch: &[Slot],
        after: Option<BatchId>,
        begun: &mut dyn FnMut(BatchId),
    ) -> Result<Result<Vec<RecordId>, BatchTooLarge>> {
        let images: Vec<&[u8]> = batch
            .iter()
            .map(|slot| record_of(slot).map(|(_, image)| image))
            .collect::<Result<_>>()?;
        let batch_bytes: u64 = images.iter().map(|image| image.len() as u64).sum();
        let (first, mut turn) = {
            let mut state = self.open_state()?;
            if batch_bytes > state.free_bytes() {
                let missing_bytes = batch_bytes - state.free_bytes();
                return Ok(Err(BatchTooLarge { missing_bytes }));
            }
            let (first, number) = (state.next_id, state.given);
            state.next_id += batch.len() as u64;
            state.given += 1;
            state.reserved_bytes += batch_bytes;
            let turn = Turn {
                disk: self,
                number,
                batch_bytes,
                is_written: false,
            };
            (first, turn)
        };
        begun(BatchId(turn.number));
        let follows_failure = {
            let state = turn.wait();
            after.is_some_and(|after| state.failed.contains(&after.0))
        };
        if follows_failure {
            return Err(Error::unavailable(
                "the batch that this one was to follow was not written",
            ));
        }
        let saved_ms = self.clock.unix_ms();
        let records = images.iter().zip(first..);
        let records = records
            .map(|(image, id)| (id, saved_ms, image.to_vec()))
            .collect();
        let what = format_args!("records {first}.. × {}", batch.len());
        let frame = self.medium.append_synced(Frame::Records(records), what)?;
        let mut state = self.open_state()?;
        for ((index, image), id) in images.iter().enumerate().zip(first..) {
            state.insert(&self.geometry, (frame, index), id, saved_ms, image);
        }
        state.written_bytes += batch_bytes;
        drop(state);
        turn.is_written = true;
        let ids = first..first + batch.len() as u64;
        Ok(Ok(ids.filter_map(NonZeroU64::new).map(RecordId).collect()))
    }

    fn read(&self, reads: Vec<(RecordInfo, Filling)>, answer: &mut dyn FnMut(usize, Result<Slot>)) {
        for (i, (info, filling)) in reads.into_iter().enumerate() {
            answer(i, self.read_one(&info, filling));
        }
    }

    fn image_bytes(&self, info: &RecordInfo) -> Option<u32> {
        let state = lock(&self.state);
        let place = state.records.get(&(info.depth, info.id));
        place.map(|place| place.info.bytes)
    }

    fn remove(&self, ids: &[RecordId]) -> Result<()> {
        self.open_state()?.remove(ids);
        let what = format_args!("remove {:?}", ids.iter().map(|id| id.0).collect::<Vec<_>>());
        self.medium
            .append_synced(Frame::Remove(ids.to_vec()), what)
            .map(drop)
    }

    fn reclaim(&self, bytes: u64) -> Result<u64> {
        self.open_state()?;
        self.medium
            .call(SimDiskCall::Trim, format_args!("{bytes}"))?;
        let mut state = self.open_state()?;
        let dead = std::mem::take(&mut state.dead);
        state.dead_bytes = 0;
        let mut medium = lock(&self.medium.0);
        for (frame, index) in dead {
            if let Frame::Records(records) = &mut medium.log[frame] {
                records[index].2 = Vec::new();
            }
        }
        Ok(state.free_bytes())
    }

    fn touch(&self, ids: &[RecordId], last_use_ms: u64) -> Result<()> {
        self.open_state()?.touch(ids, last_use_ms);
        let what = format_args!("touch {:?}", ids.iter().map(|id| id.0).collect::<Vec<_>>());
        self.medium
            .append(Frame::Touch(ids.to_vec(), last_use_ms), what)
            .map(drop)
    }

    fn scan(&self, visit: &mut dyn FnMut(RecordInfo)) -> Result<DiskScan> {
        let state = self.open_state()?;
        state
            .records
            .values()
            .for_each(|place| visit(place.info.clone()));
        Ok(DiskScan {
            records: state.records.len() as u64,
            dropped: state.dropped,
        })
    }

    fn put_meta(&self, key: &Key, value: &[u8]) -> Result<()> {
        if value.len() > META_BYTES_MAX {
            return Err(
                Error::invalid("a meta value is longer than 64 KiB").with("bytes", value.len())
            );
        }
        self.open_state()?;
        let frame = Frame::Meta(*key, value.to_vec());
        self.medium
            .append_synced(frame, format_args!("meta {key} × {}", value.len()))?;
        self.open_state()?.put_meta(*key, value);
        Ok(())
    }

    fn scan_meta(&self, visit: &mut dyn FnMut(Key, &[u8])) -> Result<()> {
        let state = self.open_state()?;
        state
            .metas
            .iter()
            .for_each(|(key, value)| visit(*key, value));
        Ok(())
    }

    fn usage(&self) -> DiskUsage {
        let state = lock(&self.state);
        DiskUsage {
            capacity_bytes: state.capacity_bytes,
            used_bytes: state.live_bytes + state.dead_bytes + state.reserved_bytes,
            live_bytes: state.live_bytes,
            records: state.records.len() as u64,
            files: 1,
            written_bytes: state.written_bytes,
            rewritten_bytes: 0,
            unread_files: 0,
            unread_bytes: 0,
            read_depth: 0,
        }
    }

    fn close(&self) -> Result<()> {
        // A write that has begun is finished first.
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let is_busy = |state: &mut State| state.head != state.given;
        let state = self.turned.wait_while(state, is_busy);
        let mut state = state.unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut state.closed, true) {
            lock(&self.medium.0).in_use = false;
        }
        Ok(())
    }
}

impl Drop for SimDisk {
    fn drop(&mut self) {
        let _ = self.close();
    }
}
