//! The device half of the contract suite, over the CPU device and the simulated one: see
//! `device_suite` for what is shown and how.

mod device_suite;

use std::sync::Arc;

use device_suite::*;
use stemkv_store::{CodecId, CpuDevice, Device};

fn on_host_memory(device: impl Device, check: fn(&Subject<'_>)) {
    check(&Subject {
        device: Arc::new(device),
        allocate: &|bytes| Arc::new(HostMemory::new(bytes)),
    });
}

macro_rules! suite {
    ($name:ident, $device:expr) => {
        mod $name {
            use super::*;

            /// So none of what follows is skipped for want of it.
            #[test]
            fn it_encodes_and_decodes() {
                let device: Arc<dyn Device> = Arc::new($device);
                for codec in [CodecId::Exp, CodecId::Planes] {
                    assert!(device.encodes(codec) && device.decodes(codec));
                }
            }

            #[test]
            fn a_move_writes_every_byte_of_its_tokens_and_no_other() {
                on_host_memory(
                    $device,
                    device_suite::moves::a_move_writes_every_byte_of_its_tokens_and_no_other,
                );
            }

            #[test]
            fn a_layer_that_is_not_there_is_invalid_and_moves_nothing() {
                on_host_memory(
                    $device,
                    device_suite::moves::a_layer_that_is_not_there_is_invalid_and_moves_nothing,
                );
            }

            #[test]
            fn handles_may_be_dropped_while_a_layer_is_under_way() {
                on_host_memory(
                    $device,
                    device_suite::moves::handles_may_be_dropped_while_a_layer_is_under_way,
                );
            }

            #[test]
            fn a_recorded_point_is_reached_and_orders_a_stream() {
                on_host_memory(
                    $device,
                    device_suite::moves::a_recorded_point_is_reached_and_orders_a_stream,
                );
            }

            #[test]
            fn chunks_move_between_the_tiers_and_pages() {
                on_host_memory(
                    $device,
                    device_suite::device_tier::chunks_move_between_the_tiers_and_pages,
                );
            }

            #[test]
            fn everything_of_a_device_transfer_may_be_leaked() {
                on_host_memory(
                    $device,
                    device_suite::device_tier::everything_of_a_device_transfer_may_be_leaked,
                );
            }

            #[test]
            fn encoded_slabs_load_as_they_were() {
                on_host_memory(
                    $device,
                    device_suite::encoded_loads::encoded_slabs_load_as_they_were,
                );
            }

            #[test]
            fn a_malformed_slab_fails_and_writes_nowhere_else() {
                on_host_memory(
                    $device,
                    device_suite::encoded_loads::a_malformed_slab_fails_and_writes_nowhere_else,
                );
            }

            #[test]
            fn raw_and_encoded_chunks_load_side_by_side() {
                on_host_memory(
                    $device,
                    device_suite::encoded_saves::raw_and_encoded_chunks_load_side_by_side,
                );
            }

            #[test]
            fn an_encoded_save_stores_what_a_raw_one_does() {
                on_host_memory(
                    $device,
                    device_suite::encoded_saves::an_encoded_save_stores_what_a_raw_one_does,
                );
            }

            #[test]
            fn an_encoded_chunk_that_does_not_fit_is_told() {
                on_host_memory(
                    $device,
                    device_suite::encoded_saves::an_encoded_chunk_that_does_not_fit_is_told,
                );
            }

            #[test]
            fn the_layers_of_an_encoded_save_come_in_order() {
                on_host_memory(
                    $device,
                    device_suite::encoded_saves::the_layers_of_an_encoded_save_come_in_order,
                );
            }

            #[test]
            fn encoded_chunks_rise_into_the_device_tier_and_sink_again() {
                on_host_memory(
                    $device,
                    device_suite::device_tier::encoded_chunks_rise_into_the_device_tier_and_sink_again,
                );
            }

            #[test]
            fn ten_threads_share_a_queue() {
                on_host_memory($device, device_suite::jobs::ten_threads_share_a_queue);
            }
        }
    };
}

suite!(cpu, CpuDevice::new());
#[cfg(feature = "sim")]
suite!(sim_that_sums, stemkv_store::SimDevice::sound());
#[cfg(feature = "sim")]
suite!(
    sim_that_does_not_sum,
    stemkv_store::SimDevice::new(false, |_| None)
);
