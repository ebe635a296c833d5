//! Shown: opening a GPU never panics, and where there is none the error says so in one line.
#![cfg(feature = "cuda")]

use stemkv_store::device::CudaDevice;
use stemkv_store::{Device, ErrorKind};

#[test]
fn opening_a_gpu_that_is_not_there_is_unavailable_with_one_clear_line() {
    match CudaDevice::open(0) {
        Ok(device) => println!("there is a GPU: {}", device.info().name),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unavailable);
            assert!(!error.to_string().contains('\n'), "{error}");
            println!("{error}");
        }
    }
    let error = CudaDevice::open(u32::MAX)
        .err()
        .expect("no machine has so many");
    assert_eq!(error.kind(), ErrorKind::Unavailable);
}
