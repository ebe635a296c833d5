//! From logits to a token: greedy, or seeded sampling from the nucleus.

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; otherwise logits are divided by it.
    pub temperature: f32,
    /// The smallest set of tokens with at least this probability is sampled from; in (0, 1].
    pub top_p: f32,
    /// Same seed, same prompt, same tokens.
    pub seed: u64,
}

/// Chooses the tokens of one sequence.
pub struct Sampler {
    sampling: Sampling,
    state: u64,
}

impl Sampler {
    /// A sampler at its first token.
    pub fn new(sampling: Sampling) -> Sampler {
        Sampler {
            sampling,
            state: sampling.seed,
        }
    }

    /// The next token. Of equal logits, greedy takes the lowest id.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        let mut best = 0;
        for (id, &logit) in logits.iter().enumerate() {
            if logit > logits[best] {
                best = id;
            }
        }
        if self.sampling.temperature == 0.0 {
            return best as u32;
        }
        let weight = |&logit: &f32| ((logit - logits[best]) / self.sampling.temperature).exp();
        let mut candidates: Vec<(u32, f32)> = (0..).zip(logits.iter().map(weight)).collect();
        candidates.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let total: f32 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut nucleus = 0.0;
        let mut kept = 0;
        for (_, weight) in &candidates {
            nucleus += weight;
            kept += 1;
            if nucleus >= self.sampling.top_p * total {
                break;
            }
        }
        let mut at = self.unit() * nucleus;
        for &(id, weight) in &candidates[..kept] {
            at -= weight;
            if at < 0.0 {
                return id;
            }
        }
        candidates[kept - 1].0
    }

    /// Uniform in [0, 1): SplitMix64 (Steele, Lea, Flood 2014).
    fn unit(&mut self) -> f32 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 24) as f32
    }
}

#[cfg(test)]
mod tests {
    //! Shown on small hand-made logits, where the right answer is known.
    use super::*;

    const LOGITS: [f32; 4] = [0.0, 2.0, 2.0, 1.0];

    fn draws(sampling: Sampling) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling);
        (0..200).map(|_| sampler.choose(&LOGITS)).collect()
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        let sampling = Sampling {
            temperature: 0.0,
            top_p: 1.0,
            seed: 7,
        };
        assert_eq!(draws(sampling), [1; 200]);
    }

    #[test]
    fn a_seed_repeats_its_tokens_and_another_does_not() {
        let sampling = Sampling {
            temperature: 1.0,
            top_p: 1.0,
            seed: 7,
        };
        let first = draws(sampling);
        assert_eq!(first, draws(sampling));
        assert_ne!(
            first,
            draws(Sampling {
                seed: 8,
                ..sampling
            })
        );
        for token in 0..4 {
            assert!(first.contains(&token), "token {token} was never drawn");
        }
    }

    #[test]
    fn the_nucleus_leaves_unlikely_tokens_out() {
        let drawn = draws(Sampling {
            temperature: 1.0,
            top_p: 0.6,
            seed: 7,
        });
        assert!(drawn.iter().all(|token| [1, 2].contains(token)));
        assert!(drawn.contains(&1) && drawn.contains(&2));
    }
}
