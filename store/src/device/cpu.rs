use super::*;

/// Copies with the CPU: for engines whose pages are in host memory.
#[derive(Debug, Default)]
pub struct CpuDevice(());
