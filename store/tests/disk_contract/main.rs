//! The contract of `DiskTier`, sentence by sentence, over every implementation.
//!
//! Each function of `writing`, `reading` and `opening` shows one promise of the trait's documentation; the macro below runs
//! all of them on all tiers. "Reopening" closes nothing that it need not: the tier is dropped and
//! the same folder or medium opened again.

#![cfg(feature = "sim")]
#![allow(clippy::unwrap_used, reason = "tests")]

mod opening;
mod reading;
#[path = "../support/mod.rs"]
mod support;
mod writing;

use std::collections::{HashMap, HashSet};
use std::num::NonZeroU64;
use std::sync::{Arc, Barrier};

use opening::*;
use reading::*;
use stemkv_store::{
    CodecId, DiskTier, ErrorKind, Key, META_BYTES_MAX, RecordId, RecordInfo, Result,
};
use support::*;
use writing::*;

/// A place where tiers of one kind can be opened again and again.
trait Home: Sync {
    fn open(&self, capacity_bytes: u64) -> Result<Arc<dyn DiskTier>>;

    /// Flips a bit of the image stored under `key`.
    fn flip_bit(&self, key: &Key, bit: usize);
}

const ROOMY: u64 = 64 << 20;

macro_rules! suite {
    ($home:expr; $($promise:ident)*) => {
        $(#[test]
        fn $promise() {
            crate::$promise(&$home);
        })*
    };
}

macro_rules! on_every_tier {
    ($($promise:ident)*) => {
        mod sim {
            suite!(super::SimHome::default(); $($promise)*);
        }
        #[cfg(feature = "rocksdb")]
        mod rocks {
            suite!(super::RocksHome::default(); $($promise)*);

            // Whatever the system refuses, down to RocksDB's own reads.
            mod threads {
                use stemkv_store::disk::ReadWay;
                suite!(super::super::RocksHome::reading(ReadWay::Threads); $($promise)*);
            }
            mod buffered {
                use stemkv_store::disk::ReadWay;
                suite!(super::super::RocksHome::reading(ReadWay::Buffered); $($promise)*);
            }
            mod get {
                use stemkv_store::disk::ReadWay;
                suite!(super::super::RocksHome::reading(ReadWay::Get); $($promise)*);
            }
        }
    };
}

on_every_tier! {
    a_written_record_is_visible_on_return_and_after_reopening
    an_empty_batch_and_an_empty_read_are_fine
    ids_ascend_in_the_order_of_writing
    a_scan_reports_every_record_also_where_a_parent_was_written_again
    every_read_is_answered_once_under_its_own_number
    encoded_records_come_back_as_they_were_written_whatever_their_length
    records_are_handed_over_while_the_rest_is_still_filling
    a_panic_in_the_answer_frees_every_slot
    a_batch_over_the_capacity_is_refused_whole_and_fits_after_removal
    removed_records_are_gone_also_after_reopening_and_unknown_ids_are_ignored
    ids_stay_the_same_and_readable_when_cleaning_moves_the_bytes
    a_touch_is_reported_by_scans_and_found_by_the_next_opening
    metas_are_kept_replaced_removed_and_bounded
    after_close_every_call_answers_closed
    a_batch_can_be_begun_behind_one_under_way_and_becomes_durable_after_it
    a_second_writer_is_refused_while_the_first_is_open
    a_flipped_bit_in_any_region_of_a_record_is_corrupt_and_the_rest_stays
    a_record_is_not_served_under_another_identity
    ten_threads_leave_exactly_what_was_written_and_not_removed
}

#[derive(Default)]
struct SimHome(stemkv_store::SimMedium);

impl Home for SimHome {
    fn open(&self, capacity_bytes: u64) -> Result<Arc<dyn DiskTier>> {
        let tier = stemkv_store::SimDisk::open(&self.0, &geometry(), capacity_bytes, sim_clock())?;
        Ok(Arc::new(tier))
    }

    fn flip_bit(&self, key: &Key, bit: usize) {
        assert!(self.0.flip_bit(key, bit), "the record is stored");
    }
}

#[cfg(feature = "rocksdb")]
struct RocksHome {
    dir: tempfile::TempDir,
    /// `None`: the best that there is.
    way: Option<stemkv_store::disk::ReadWay>,
}

#[cfg(feature = "rocksdb")]
impl Default for RocksHome {
    fn default() -> Self {
        RocksHome {
            dir: tempfile::tempdir().unwrap(),
            way: None,
        }
    }
}

#[cfg(feature = "rocksdb")]
impl RocksHome {
    fn reading(way: stemkv_store::disk::ReadWay) -> Self {
        RocksHome {
            way: Some(way),
            ..Self::default()
        }
    }
}

#[cfg(feature = "rocksdb")]
impl Home for RocksHome {
    fn open(&self, capacity_bytes: u64) -> Result<Arc<dyn DiskTier>> {
        use stemkv_store::disk::{ReadSizes, RocksDisk};
        let tier = RocksDisk::open(self.dir.path(), &geometry(), capacity_bytes, sim_clock())?;
        Ok(Arc::new(match self.way {
            None => tier,
            Some(way) => {
                let tier = tier.with_read_way(way, ReadSizes::default());
                assert_eq!(tier.read_way(), way);
                tier
            }
        }))
    }

    fn flip_bit(&self, key: &Key, bit: usize) {
        flip_record_bit(self.dir.path(), key, bit);
    }
}
