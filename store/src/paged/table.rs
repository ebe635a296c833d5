//! Which pages hold a prompt.

use std::ops::Range;
use std::sync::Arc;

use super::{PageId, PagedKv};
use crate::{Error, Result};

/// Which pages hold a prompt: token `t` lives in `pages[t / page_tokens]`, at `t % page_tokens`.
#[derive(Clone, Debug)]
pub struct PageTable {
    /// The memory that the ids name.
    pub kv: PagedKv,
    /// In prompt order, from the prompt's first token.
    pub pages: Arc<[PageId]>,
}

impl PageTable {
    /// Do the pages of prompt positions `tokens` exist?
    ///
    /// # Errors
    /// `Invalid`, naming the first page that the table lacks or that is out of range. Entries
    /// outside of `tokens` are not looked at.
    pub fn check(&self, tokens: Range<u64>) -> Result<()> {
        if tokens.is_empty() {
            return Ok(());
        }
        let page_tokens = u64::from(self.kv.page_tokens());
        let first = tokens.start / page_tokens;
        let end = tokens.end.div_ceil(page_tokens);
        if end > self.pages.len() as u64 {
            return Err(
                Error::invalid("the page table is too short for the tokens to be moved")
                    .with("pages", self.pages.len())
                    .with("tokens", format_args!("{tokens:?}"))
                    .with("page_tokens", page_tokens),
            );
        }
        for index in first as usize..end as usize {
            if self.pages[index].0 >= self.kv.pages() {
                return Err(
                    Error::invalid("the page table names a page that does not exist")
                        .with("index", index)
                        .with("page", self.pages[index].0)
                        .with("pages", self.kv.pages()),
                );
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, HostPages, KvGeometry};

    #[test]
    fn a_table_is_checked_only_where_tokens_move() {
        let geometry = KvGeometry::gqa(1, 1, 8, Dtype::Bf16, 4).expect("valid");
        let pages = HostPages::new(&geometry, 4, 3).expect("room");
        let table = PageTable {
            kv: pages.paged(),
            pages: [9, 0, 2, 3].map(PageId).into(),
        };
        assert!(table.check(4..12).is_ok());
        assert!(table.check(16..16).is_ok());
        for (tokens, index) in [(3..5, "index=0"), (11..13, "index=3"), (4..17, "pages=4")] {
            let error = table.check(tokens).expect_err(index);
            assert!(error.to_string().contains(index), "{error}");
        }
    }
}
