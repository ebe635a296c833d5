use super::*;

/// What a [`SimDevice`] does wrong, and when.
#[derive(Clone, Debug, Default)]
pub struct SimDeviceFaults {}

/// A device that copies like the CPU and fails as it is told.
#[derive(Debug, Default)]
pub struct SimDevice(());
