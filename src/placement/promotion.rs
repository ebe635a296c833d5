//! Which chunks move up into the device tier.

use crate::index::BlockState;

/// Leases that must have covered a chunk before it is worth a slot in the device tier, the present
/// one among them. Most blocks are used once more at most (three of four on Mooncake's conversation
/// trace are touched once): a first hit says little.
const HITS_MIN: u32 = 2;

/// Is a chunk that a device just loaded out of the host tier hot enough for its tier?
pub fn is_worth_promoting(block: &BlockState) -> bool {
    block.device.is_none() && block.host.is_some() && block.hits >= HITS_MIN
}

#[cfg(test)]
mod tests {
    use stemkv_store::{DeviceSlotId, Key, SlotId};

    use super::*;

    #[test]
    fn what_is_hit_again_moves_up_once() {
        let block = |hits, host, device| BlockState {
            key: Key([0; 32]),
            device,
            elsewhere: None,
            host,
            record: None,
            pending: false,
            hits,
        };
        let host = Some(SlotId(1));
        assert!(!is_worth_promoting(&block(1, host, None)));
        assert!(is_worth_promoting(&block(2, host, None)));
        assert!(!is_worth_promoting(&block(2, None, None)));
        assert!(!is_worth_promoting(&block(2, host, Some(DeviceSlotId(1)))));
    }
}
