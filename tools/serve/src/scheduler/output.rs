//! From tokens to the text that a client may see.

use crate::model::{Decoder, Tokenizer};

/// Decodes an answer and cuts it at the first stop string. Text that may turn out to be the
/// beginning of one is held back.
pub(super) struct Output {
    decoder: Decoder,
    stops: Vec<String>,
    held: String,
}

impl Output {
    pub(super) fn new(stops: Vec<String>) -> Output {
        Output {
            decoder: Decoder::default(),
            stops,
            held: String::new(),
        }
    }

    /// The text that this token sets free, and whether the answer ends here.
    pub(super) fn push(&mut self, tokenizer: &Tokenizer, token: u32) -> (String, bool) {
        self.held += &self.decoder.push(tokenizer, token);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop));
        if let Some(at) = found.min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let begun = self.stops.iter().map(|stop| overlap(&self.held, stop));
        let rest = self.held.len() - begun.max().unwrap_or(0);
        let held = self.held.split_off(rest);
        (std::mem::replace(&mut self.held, held), false)
    }

    /// What was held back, at the end of an answer that no stop string ended.
    pub(super) fn finish(&mut self) -> String {
        self.held += &self.decoder.finish();
        std::mem::take(&mut self.held)
    }
}

/// Length of the longest proper beginning of `stop` that `text` ends with.
fn overlap(text: &str, stop: &str) -> usize {
    let begins = stop.char_indices().map(|(at, _)| at).rev();
    begins
        .into_iter()
        .find(|&at| text.ends_with(&stop[..at]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::overlap;

    #[test]
    fn what_may_become_a_stop_string_is_found() {
        assert_eq!(overlap("one\nUs", "\nUser:"), 3);
        assert_eq!(overlap("aab", "abab"), 2);
        assert_eq!(overlap("xé", "éé"), 2);
        assert_eq!(overlap("done", "\n"), 0);
    }
}
