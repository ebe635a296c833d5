//! The server put together: model, store, scheduler.

use std::path::PathBuf;

use stemkv::{Cache, Config, DiskConfig, HostCodec, Namespace};
use stemkv_store::{Error, Result};

use crate::model::{Gguf, Model, Tokenizer};
use crate::scheduler::{BLOCK_TOKENS, Limits, Reuse, Scheduler};

/// How a server is set up.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// The GGUF file.
    pub model: PathBuf,
    /// The store; `None` computes everything.
    pub store: Option<StoreConfig>,
    /// Compute each layer as soon as its KV has been loaded, rather than when all has.
    pub overlap: bool,
    /// Bounds; `context_tokens` is cut to what the model was trained for.
    pub limits: Limits,
}

/// The store's part of a server's configuration.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Bytes of the host tier.
    pub host_bytes: u64,
    /// How saves put KV there.
    pub host_codec: HostCodec,
    /// The disk tier; without it nothing survives a restart.
    pub disk: Option<DiskConfig>,
}

/// A running server, without its HTTP.
pub struct Server {
    scheduler: Scheduler,
    /// The name it answers to.
    model_id: String,
}

impl Server {
    /// Loads the model, opens the store and starts the model thread.
    ///
    /// # Errors
    /// `Invalid` for a model or a setting that cannot be used; those of [`Cache::open`].
    pub fn start(mut config: ServerConfig) -> Result<Server> {
        let mut gguf = Gguf::open(&config.model)?;
        let context = gguf.config()?.context;
        let limits = &mut config.limits;
        limits.context_tokens = limits.context_tokens.min(context);
        let tokenizer = Tokenizer::from_gguf(&gguf)?;
        let model = Model::load(&mut gguf, limits.context_tokens)?;
        let reuse = match &config.store {
            None => None,
            Some(store) => Some(open_store(&config, store, &model)?),
        };
        let model_id = config.model.file_stem().map_or_else(
            || model.config().name.clone(),
            |stem| stem.to_string_lossy().into_owned(),
        );
        Ok(Server {
            scheduler: Scheduler::start(model, tokenizer, reuse, config.limits)?,
            model_id,
        })
    }

    /// The scheduler.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// The name of the model in requests and answers.
    pub fn model_id(&self) -> &str {
        &self.model_id
    }

    /// Ends what is under way, makes everything durable and releases the store.
    ///
    /// # Errors
    /// Those of [`Cache::close`].
    pub fn close(&self) -> Result<()> {
        self.scheduler.close();
        match self.scheduler.reuse() {
            Some(reuse) => reuse.cache.close_blocking(),
            None => Ok(()),
        }
    }
}

fn open_store(config: &ServerConfig, store: &StoreConfig, model: &Model) -> Result<Reuse> {
    let geometry = model.geometry(BLOCK_TOKENS)?;
    let mut settings = Config::in_memory(geometry.clone(), store.host_bytes);
    settings.host.codec = store.host_codec;
    if let Some(disk) = &store.disk {
        settings = settings.with_disk(disk.clone());
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update_mmap(&config.model).map_err(|error| {
        Error::unavailable("cannot read the model")
            .with("path", config.model.display())
            .caused_by(error)
    })?;
    // The tokenizer and the template are in the same file. What our arithmetic changes in the KV's
    // bits must change the name, too.
    let revision = hasher.finalize().to_hex().to_string();
    let mut namespace = Namespace::new(
        model.config().name.clone(),
        revision.clone(),
        revision,
        geometry,
    );
    namespace.kv_quantization = Some("bf16 of stemkv-serve kernels 1".to_owned());
    let cache = Cache::open(settings)?;
    let namespace = cache.namespace(&namespace)?;
    Ok(Reuse {
        cache,
        namespace,
        overlap: config.overlap,
    })
}
