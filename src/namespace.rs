//! What must be equal for KV to be reusable, and the 256 bits that stand for all of it.

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};
use stemkv_store::{Error, Key, KvGeometry, Result};

/// The version of a chunk's layout (layer-major slabs). Part of every namespace root.
pub const LAYOUT_VERSION: u32 = 1;

/// The version of the sequence hashes (`hash.rs`). Part of every namespace root.
pub const HASHING_VERSION: u32 = 1;

/// The part of the model's KV that a process holds, as content and not as a rank: two ranks that
/// hold equal bytes (MLA's latent plane under tensor parallelism) share one namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shard {
    /// Layers of the whole model, first to one past the last.
    pub layers: Range<u32>,
    /// KV heads of the whole model; `0..1` for a latent plane.
    pub kv_heads: Range<u32>,
}

/// A tenant's secret. It changes every hash of its namespaces, so that no other tenant can hit or
/// probe them (I9). It is never printed and never serialised.
#[derive(Clone, PartialEq, Eq, Deserialize)]
pub struct Salt(String);

impl Salt {
    /// Takes the secret. Any bytes will do; long and random is better.
    pub fn new(secret: impl Into<String>) -> Self {
        Salt(secret.into())
    }

    /// 64 bits that tell two salts apart without giving either away.
    fn fingerprint(&self) -> String {
        let hash = blake3::derive_key(
            "stemkv 2026 fingerprint of a tenant salt v1",
            self.0.as_bytes(),
        );
        Key(hash).to_hex()[..16].to_owned()
    }
}

impl fmt::Debug for Salt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Salt(secret)")
    }
}

/// Everything that must be equal for KV to be reusable.
///
/// Two prompts can share KV only where every field here is equal; [`Namespace::root`] stands for
/// all of them and keys every sequence hash.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespace {
    /// The model's name, e.g. `meta-llama/Llama-3.1-8B-Instruct`.
    pub model: String,
    /// Which weights exactly: a commit, or a hash of the files.
    pub revision: String,
    /// Which tokenizer and chat template exactly.
    pub tokenizer: String,
    /// The adapter (LoRA) that was active, with its revision.
    #[serde(default)]
    pub adapter: Option<String>,
    /// How the KV is quantised, with everything that changes its bytes (scheme, group size, scales).
    #[serde(default)]
    pub kv_quantization: Option<String>,
    /// How a chunk is laid out, the KV's element type and the block size included.
    pub geometry: KvGeometry,
    /// Which part of the model's KV this is.
    pub shard: Shard,
    /// How rotary positions are scaled, with its parameters (`yarn factor=4 original=32768`).
    #[serde(default)]
    pub rope_scaling: Option<String>,
    /// The tenant's secret, where tenants must not share.
    #[serde(default)]
    pub salt: Option<Salt>,
}

impl Namespace {
    /// The namespace of an unsharded model without adapter, quantisation, scaling or salt. Set the
    /// other fields where they apply.
    pub fn new(
        model: impl Into<String>,
        revision: impl Into<String>,
        tokenizer: impl Into<String>,
        geometry: KvGeometry,
    ) -> Self {
        let shard = Shard {
            layers: 0..geometry.layers,
            kv_heads: 0..geometry.planes.first().map_or(1, |plane| plane.heads),
        };
        Namespace {
            model: model.into(),
            revision: revision.into(),
            tokenizer: tokenizer.into(),
            adapter: None,
            kv_quantization: None,
            geometry,
            shard,
            rope_scaling: None,
            salt: None,
        }
    }

    /// Checks what can be checked without knowing the model.
    ///
    /// # Errors
    /// `Invalid`, naming the field and what is allowed.
    pub fn validate(&self) -> Result<()> {
        self.geometry.validate()?;
        let check = |ok: bool, message: &str| match ok {
            true => Ok(()),
            false => Err(Error::invalid(message)),
        };
        check(!self.model.is_empty(), "namespace.model must not be empty")?;
        let Shard { layers, kv_heads } = &self.shard;
        check(
            layers.end.checked_sub(layers.start) == Some(self.geometry.layers),
            "namespace.shard.layers must span geometry.layers layers",
        )?;
        check(
            kv_heads.start < kv_heads.end,
            "namespace.shard.kv_heads must span at least one head",
        )
    }

    /// The 256 bits that stand for every field, the versions of layout and hashing included.
    pub fn root(&self) -> Key {
        let mut hasher = blake3::Hasher::new_derive_key("stemkv 2026 namespace root v1");
        // Every field is its name and its value, each behind its length, an absent one has no
        // value part at all: no two different namespaces have the same bytes.
        let mut bytes = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        let mut field = |name: &str, value: Option<&[u8]>| {
            bytes(name.as_bytes());
            match value {
                Some(value) => {
                    bytes(&[1]);
                    bytes(value);
                }
                None => bytes(&[0]),
            }
        };
        let range = |range: &Range<u32>| {
            let mut bytes = [0; 8];
            bytes[..4].copy_from_slice(&range.start.to_le_bytes());
            bytes[4..].copy_from_slice(&range.end.to_le_bytes());
            bytes
        };
        let text = |value: &Option<String>| value.as_ref().map(|value| value.as_bytes().to_vec());
        field("layout", Some(&LAYOUT_VERSION.to_le_bytes()));
        field("hashing", Some(&HASHING_VERSION.to_le_bytes()));
        field("model", Some(self.model.as_bytes()));
        field("revision", Some(self.revision.as_bytes()));
        field("tokenizer", Some(self.tokenizer.as_bytes()));
        field("adapter", text(&self.adapter).as_deref());
        field("kv_quantization", text(&self.kv_quantization).as_deref());
        let geometry = &self.geometry;
        field("layers", Some(&geometry.layers.to_le_bytes()));
        field("block_tokens", Some(&geometry.block_tokens.to_le_bytes()));
        field("dtype", Some(&(geometry.dtype as u32).to_le_bytes()));
        for plane in &geometry.planes {
            field("plane.heads", Some(&plane.heads.to_le_bytes()));
            field("plane.head_bytes", Some(&plane.head_bytes.to_le_bytes()));
        }
        field("shard.layers", Some(&range(&self.shard.layers)));
        field("shard.kv_heads", Some(&range(&self.shard.kv_heads)));
        field("rope_scaling", text(&self.rope_scaling).as_deref());
        field("salt", self.salt.as_ref().map(|salt| salt.0.as_bytes()));
        Key(*hasher.finalize().as_bytes())
    }

    /// Every field but the salt, of which only a fingerprint is told: for manifests and for people.
    pub fn describe(&self) -> NamespaceDescription {
        NamespaceDescription {
            root: self.root().to_hex(),
            layout_version: LAYOUT_VERSION,
            hashing_version: HASHING_VERSION,
            model: self.model.clone(),
            revision: self.revision.clone(),
            tokenizer: self.tokenizer.clone(),
            adapter: self.adapter.clone(),
            kv_quantization: self.kv_quantization.clone(),
            geometry: self.geometry.clone(),
            shard: self.shard.clone(),
            rope_scaling: self.rope_scaling.clone(),
            salt_fingerprint: self.salt.as_ref().map(Salt::fingerprint),
        }
    }

    /// What differs, one line a field: `revision: "a" here, "b" there`. A salt is only said to
    /// differ. Empty exactly where the roots are equal.
    pub fn difference(&self, other: &Namespace) -> Vec<String> {
        self.describe().difference(&other.describe())
    }
}

/// A [`Namespace`] as it may be stored and shown: without the salt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamespaceDescription {
    /// The namespace root, 64 hexadecimal digits.
    pub root: String,
    /// [`LAYOUT_VERSION`] when it was made.
    pub layout_version: u32,
    /// [`HASHING_VERSION`] when it was made.
    pub hashing_version: u32,
    /// As [`Namespace::model`].
    pub model: String,
    /// As [`Namespace::revision`].
    pub revision: String,
    /// As [`Namespace::tokenizer`].
    pub tokenizer: String,
    /// As [`Namespace::adapter`].
    pub adapter: Option<String>,
    /// As [`Namespace::kv_quantization`].
    pub kv_quantization: Option<String>,
    /// As [`Namespace::geometry`].
    pub geometry: KvGeometry,
    /// As [`Namespace::shard`].
    pub shard: Shard,
    /// As [`Namespace::rope_scaling`].
    pub rope_scaling: Option<String>,
    /// 16 hexadecimal digits that tell salts apart; `None` without a salt.
    pub salt_fingerprint: Option<String>,
}

impl NamespaceDescription {
    /// What differs, one line a field, as [`Namespace::difference`].
    pub fn difference(&self, other: &NamespaceDescription) -> Vec<String> {
        let mut lines = Vec::new();
        let mut field = |name: &str, here: &dyn fmt::Debug, there: &dyn fmt::Debug| {
            let (here, there) = (format!("{here:?}"), format!("{there:?}"));
            if here != there {
                lines.push(format!("{name}: {here} here, {there} there"));
            }
        };
        // An absent optional reads `none`, a present one like any text.
        struct Optional<'a>(&'a Option<String>);
        impl fmt::Debug for Optional<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.0 {
                    Some(value) => value.fmt(f),
                    None => f.write_str("none"),
                }
            }
        }
        field(
            "layout_version",
            &self.layout_version,
            &other.layout_version,
        );
        field(
            "hashing_version",
            &self.hashing_version,
            &other.hashing_version,
        );
        field("model", &self.model, &other.model);
        field("revision", &self.revision, &other.revision);
        field("tokenizer", &self.tokenizer, &other.tokenizer);
        field(
            "adapter",
            &Optional(&self.adapter),
            &Optional(&other.adapter),
        );
        field(
            "kv_quantization",
            &Optional(&self.kv_quantization),
            &Optional(&other.kv_quantization),
        );
        field("shard.layers", &self.shard.layers, &other.shard.layers);
        field(
            "shard.kv_heads",
            &self.shard.kv_heads,
            &other.shard.kv_heads,
        );
        field(
            "rope_scaling",
            &Optional(&self.rope_scaling),
            &Optional(&other.rope_scaling),
        );
        lines.extend(
            self.geometry
                .difference(&other.geometry)
                .into_iter()
                .map(|line| format!("geometry.{line}")),
        );
        match (&self.salt_fingerprint, &other.salt_fingerprint) {
            (Some(_), None) => lines.push("salt: set here, none there".to_owned()),
            (None, Some(_)) => lines.push("salt: none here, set there".to_owned()),
            (here, there) if here != there => lines.push("salt: differs".to_owned()),
            _ => {}
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    //! Shown: the root depends on every field, a difference names exactly the fields that differ,
    //! and a salt never leaves. How: each field is changed alone, then random namespaces compared.

    use proptest::prelude::*;
    use stemkv_store::Dtype;

    use super::*;

    fn base() -> Namespace {
        let geometry = KvGeometry::gqa(4, 2, 32, Dtype::Bf16, 8).expect("valid");
        Namespace::new("model", "r1", "t1", geometry)
    }

    type Change = (&'static str, fn(&mut Namespace));

    /// Every way to change one field, with the name that the difference must give it.
    fn changes() -> [Change; 15] {
        [
            ("model", |n| n.model.push('x')),
            ("revision", |n| n.revision.push('x')),
            ("tokenizer", |n| n.tokenizer.push('x')),
            ("adapter", |n| n.adapter = Some(String::new())),
            ("kv_quantization", |n| n.kv_quantization = Some("q8".into())),
            ("geometry.layers", |n| n.geometry.layers += 1),
            ("geometry.block_tokens", |n| n.geometry.block_tokens += 1),
            ("geometry.dtype", |n| n.geometry.dtype = Dtype::F16),
            ("geometry.planes", |n| n.geometry.planes[0].heads += 1),
            ("geometry.planes", |n| n.geometry.planes[1].head_bytes += 2),
            ("geometry.planes", |n| n.geometry.planes.truncate(1)),
            ("shard.layers", |n| n.shard.layers = 4..8),
            ("shard.kv_heads", |n| n.shard.kv_heads = 2..4),
            ("rope_scaling", |n| n.rope_scaling = Some("yarn 4".into())),
            ("salt", |n| n.salt = Some(Salt::new("secret-of-a"))),
        ]
    }

    #[test]
    fn every_field_changes_the_root_and_is_named_alone() {
        let mut roots = vec![base().root()];
        for (name, change) in changes() {
            let mut other = base();
            change(&mut other);
            let lines = base().difference(&other);
            assert_eq!(lines.len(), 1, "{name}: {lines:?}");
            assert!(lines[0].starts_with(&format!("{name}: ")), "{lines:?}");
            assert!(!roots.contains(&other.root()), "{name}");
            roots.push(other.root());
        }
        assert!(base().difference(&base()).is_empty());
    }

    #[test]
    fn the_root_of_a_fixed_namespace_never_changes() {
        assert_eq!(base().root().to_hex(), ROOT);
    }
    const ROOT: &str = "211c668751ca2860ab6b95c0da903912bf749b19dc73ae22f559203a7a54524f";

    #[test]
    fn a_salt_is_neither_printed_nor_described() {
        let mut namespace = base();
        namespace.salt = Some(Salt::new("secret-of-a"));
        let described = serde_json::to_string(&namespace.describe()).expect("plain data");
        for text in [format!("{namespace:?}"), described.clone()] {
            assert!(!text.contains("secret-of-a"), "{text}");
        }
        let read: NamespaceDescription = serde_json::from_str(&described).expect("its own text");
        assert_eq!(read, namespace.describe());
        let mut other = namespace.clone();
        other.salt = Some(Salt::new("secret-of-b"));
        assert_eq!(namespace.difference(&other), ["salt: differs"]);
        assert_eq!(base().difference(&other), ["salt: none here, set there"]);
    }

    #[test]
    fn an_unknown_or_wrong_field_is_refused_by_name() {
        let mut toml = toml::Table::try_from(base().describe()).expect("plain data");
        for added in ["root", "layout_version", "hashing_version"] {
            toml.remove(added);
        }
        let read = Namespace::deserialize(toml.clone()).expect("complete");
        assert_eq!(read, base());
        toml.insert("modle".to_owned(), "x".into());
        let error = Namespace::deserialize(toml).expect_err("unknown field");
        assert!(error.to_string().contains("modle"), "{error}");
        let mut namespace = base();
        namespace.shard.layers = 0..3;
        let error = namespace.validate().expect_err("three layers of four");
        assert!(error.to_string().contains("shard.layers"), "{error}");
        assert!(base().validate().is_ok());
    }

    proptest! {
        #[test]
        fn roots_are_equal_exactly_where_nothing_differs(
            here in proptest::collection::vec("[ab]{0,2}", 6),
            there in proptest::collection::vec("[ab]{0,2}", 6),
        ) {
            let make = |parts: &[String]| {
                let mut namespace = base();
                let optional = |text: &String| (!text.is_empty()).then(|| text[1..].to_owned());
                namespace.model = parts[0].clone();
                namespace.revision = parts[1].clone();
                namespace.tokenizer = parts[2].clone();
                namespace.adapter = optional(&parts[3]);
                namespace.rope_scaling = optional(&parts[4]);
                namespace.salt = optional(&parts[5]).map(Salt::new);
                namespace
            };
            let (here, there) = (make(&here), make(&there));
            prop_assert_eq!(here == there, here.root() == there.root());
            prop_assert_eq!(here == there, here.difference(&there).is_empty());
        }
    }
}
