//! Shown: what each command says of a small store whose contents are known, sound, damaged in one
//! place each, or broken; that none but `compact --yes` changes a byte; and the exit codes. How: the
//! command line is run in this process, and compared with `tests/snapshots/` or piece by piece.

mod support;

use std::fs;
use std::io::{self, Write};

use stemkv::Stats;
use stemkv_cli::{Exit, run};
use stemkv_store::{DiskTier as _, RecordHeader};
use support::engine::namespace;
use support::{Home, adapted, first, fork, keys, snapshot, under_adapter};

fn ids(tokens: &[u32]) -> String {
    tokens
        .iter()
        .map(u32::to_string)
        .collect::<Vec<_>>()
        .join(",")
}

#[tokio::test]
async fn inspect_shows_namespaces_bytes_shape_and_heat() {
    let home = Home::new().await;
    let ran = home.run("inspect", &[]);
    assert_eq!((ran.exit, ran.err.as_str()), (Exit::Fine, ""));
    snapshot("inspect", &ran.out);

    let json = home.run("inspect", &["--json"]).json();
    assert_eq!(json["records"], 10);
    assert_eq!(json["namespaces"][0]["root"], namespace().root().to_hex());
    assert_eq!(json["namespaces"][1]["description"]["adapter"], "lora-7");
}

#[tokio::test]
async fn inspect_shows_one_prefix_and_one_record() {
    let home = Home::new().await;
    let key = keys(&namespace(), &fork())[4].to_hex();
    let path = home.run("inspect", &["--prefix", &key[..8]]);
    assert_eq!(path.exit, Exit::Fine);
    snapshot("inspect-prefix", &path.out);
    let record = home.run("inspect", &["--record", &key]);
    assert_eq!(record.exit, Exit::Fine);
    snapshot("inspect-record", &record.out);
    assert_eq!(
        home.run("inspect", &["--record", &key, "--json"]).json()["key"],
        key
    );

    let nothing = home.run("inspect", &["--record", "00000000"]);
    assert_eq!((nothing.exit, nothing.out.as_str()), (Exit::Problems, ""));
    assert_eq!(home.run("inspect", &["--record", "xyz"]).exit, Exit::Usage);
}

#[tokio::test]
async fn why_tells_what_ended_a_match() {
    let home = Home::new().await;
    let whole = home.run(
        "why",
        &["--tokens", &ids(&first()), "--namespace", "test-model"],
    );
    assert_eq!(whole.exit, Exit::Usage, "two namespaces have that model");
    let root = namespace().root().to_hex();

    let whole = home.run("why", &["--tokens", &ids(&first())]);
    assert_eq!(whole.exit, Exit::Fine);
    whole.contains("6 of 6 blocks, 24 tokens");

    let mut other = first();
    other[21] = 7;
    other.extend([1, 2]);
    let missing = home.run(
        "why",
        &["--tokens", &ids(&other), "--namespace", &root[..10]],
    );
    assert_eq!(missing.exit, Exit::Problems);
    snapshot("why-missing", &missing.out);

    let short = home.run("why", &["--tokens", "1,2"]);
    assert_eq!(short.exit, Exit::Problems);
    short.contains("the prompt has no full block");

    let hashes: Vec<String> = keys(&namespace(), &fork())
        .iter()
        .map(|key| key.to_hex())
        .collect();
    let hashes = home.run("why", &["--hashes", &hashes.join(","), "--json"]);
    assert_eq!(hashes.exit, Exit::Fine);
    assert_eq!(hashes.json()["matched_tokens"], 20);
}

#[tokio::test]
async fn why_names_the_field_that_differs_from_the_namespace_that_has_the_tokens() {
    let home = Home::new().await;
    let root = namespace().root().to_hex();
    let ran = home.run(
        "why",
        &["--tokens", &ids(&under_adapter()), "--namespace", &root],
    );
    assert_eq!(ran.exit, Exit::Problems);
    snapshot("why-other-namespace", &ran.out);

    // A namespace that the store has never seen, with a salt, from a file.
    let file = home.path().with_extension("toml");
    fs::write(
        &file,
        r#"
        model = "test-model"
        revision = "2"
        tokenizer = "bytes"
        adapter = "lora-7"
        salt = "of a tenant"
        geometry = { layers = 3, planes = [{ heads = 2, head_bytes = 16 }, { heads = 2, head_bytes = 16 }], block_tokens = 4, dtype = "bf16" }
        shard = { layers = { start = 0, end = 3 }, kv_heads = { start = 0, end = 2 } }
        "#,
    )
    .expect("written");
    let given = format!("@{}", file.display());
    let ran = home.run(
        "why",
        &[
            "--tokens",
            &ids(&under_adapter()),
            "--namespace",
            &given,
            "--json",
        ],
    );
    fs::remove_file(&file).expect("there");
    let json = ran.json();
    assert_eq!(json["reason"]["reason"], "other_namespace");
    assert_eq!(
        json["other_namespaces"][0]["difference"],
        serde_json::json!([
            r#"revision: "2" here, "1" there"#,
            "salt: set here, none there"
        ])
    );
    assert_eq!(
        json["other_namespaces"][0]["namespace"],
        adapted().root().to_hex()
    );
    assert!(!ran.out.contains("of a tenant"));
}

#[tokio::test]
async fn why_tells_a_damaged_block_from_a_lost_one() {
    let home = Home::new().await;
    let blocks = keys(&namespace(), &first());
    home.damage(&blocks[4]);
    let corrupt = home
        .run("why", &["--tokens", &ids(&first()), "--json"])
        .json();
    assert_eq!(corrupt["reason"]["reason"], "corrupt");
    assert_eq!(corrupt["reason"]["key"], blocks[4].to_hex());
    assert_eq!(corrupt["matched_blocks"], 4);

    home.remove(&blocks[3]);
    let lost = home.run("why", &["--tokens", &ids(&first())]);
    assert_eq!(lost.exit, Exit::Problems);
    lost.contains("is not there, but 2 blocks are behind it");
}

#[tokio::test]
async fn why_takes_text_with_the_engines_tokenizer() {
    let home = Home::new().await;
    let words: Vec<String> = first()
        .iter()
        .map(|id| format!("\"w{id}\": {id}"))
        .collect();
    let tokenizer = format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {{"type": "WhitespaceSplit"}}, "post_processor": null, "decoder": null,
        "model": {{"type": "WordLevel", "vocab": {{"?": 0, {}}}, "unk_token": "?"}}}}"#,
        words.join(", ")
    );
    let file = home.path().with_extension("json");
    fs::write(&file, tokenizer).expect("written");
    let text: Vec<String> = first().iter().map(|id| format!("w{id}")).collect();
    let path = file.to_str().expect("letters");
    let ran = home.run("why", &["--text", &text.join(" "), "--tokenizer", path]);
    fs::remove_file(&file).expect("there");
    assert_eq!(ran.exit, Exit::Fine, "{ran:?}");
    ran.contains("6 of 6 blocks, 24 tokens");
    assert_eq!(home.run("why", &["--text", "w1"]).exit, Exit::Usage);
}

#[tokio::test]
async fn verify_lists_what_does_not_verify() {
    let home = Home::new().await;
    let sound = home.run("verify", &[]);
    assert_eq!(sound.exit, Exit::Fine);
    snapshot("verify", &sound.out);

    let key = keys(&namespace(), &first())[4];
    home.damage(&key);
    let ran = home.run("verify", &[]);
    assert_eq!(ran.exit, Exit::Problems);
    snapshot("verify-corrupt", &ran.out.replace(&key.to_hex(), "KEY"));
    assert_eq!(
        home.run("verify", &["--json"]).json()["corrupt"][0]["key"],
        key.to_hex()
    );

    // The header can still be shown, and where it is.
    let record = home.run("inspect", &["--record", &key.to_hex()]);
    assert_eq!(record.exit, Exit::Problems);
    record.contains("DAMAGED     corrupt: ");
    record.contains(".sst at byte ");
    record.contains("4 tokens, codec raw, layers 0..3");
}

#[tokio::test]
async fn compact_changes_nothing_without_yes_and_drops_what_does_not_verify_with_it() {
    let home = Home::new().await;
    let blocks = keys(&namespace(), &first());
    home.damage(&blocks[3]);
    let before = home.bytes();
    let dry = home.run("compact", &[]);
    assert_eq!(dry.exit, Exit::Fine);
    dry.contains("would drop  1 record that did not verify, 2 out of reach");
    dry.contains("nothing: give --yes to do it");
    assert!(before == home.bytes(), "a dry run changed the store");

    let done = home.run("compact", &["--yes", "--json"]).json();
    assert_eq!(done["corrupt"][0]["key"], blocks[3].to_hex());
    assert_eq!(
        (&done["unreachable"], &done["evicted"]),
        (&2.into(), &0.into())
    );
    assert_eq!(home.records().len(), 7);
    assert_eq!(home.run("verify", &[]).exit, Exit::Fine);
    let left = home
        .run("why", &["--tokens", &ids(&first()), "--json"])
        .json();
    assert_eq!(left["matched_blocks"], 3);
}

#[tokio::test]
async fn compact_evicts_the_coldest_leaves_first_to_give_back_what_was_asked_for() {
    let home = Home::new().await;
    // Each record has its own page and one of header: the fork's two blocks are the coldest.
    let dry = home.run("compact", &["--free", "1 GiB", "--json"]).json();
    assert_eq!(dry["evicted"], 10);

    let done = home
        .run("compact", &["--free", "12 KiB", "--yes", "--json"])
        .json();
    let evicted = done["evicted"].as_u64().expect("a number") as usize;
    let used = |when: &str| done[when].as_u64().expect("bytes");
    let (before, after) = (used("used_bytes_before"), used("used_bytes_after"));
    assert!(before >= after + (12 << 10) && evicted <= 2, "{done}");
    let left: Vec<_> = home.records().iter().map(|record| record.key).collect();
    assert_eq!(left.len(), 10 - evicted);
    let mut coldest_first = keys(&namespace(), &fork())[3..].to_vec();
    coldest_first.reverse();
    for (i, key) in coldest_first.iter().enumerate() {
        assert_eq!(
            left.contains(key),
            i >= evicted,
            "block {key}, {evicted} evicted"
        );
    }
    assert_eq!(home.run("verify", &[]).exit, Exit::Fine);

    // More than there is: all goes, and what is missing is said.
    let all = home.run("compact", &["--free", "1 GiB", "--yes"]);
    assert_eq!(all.exit, Exit::Problems);
    all.contains("less than asked: no more records to evict");
    assert!(home.records().is_empty());
}

/// A payload file that cannot be taken in, and two records that cannot be reached.
async fn with_an_unread_file() -> Home {
    let home = Home::new().await;
    let blocks = keys(&namespace(), &first());
    home.remove(&blocks[3]);
    let unread = home.path().join("unread");
    fs::create_dir(&unread).expect("made");
    // Another file with its places: it is refused until that one is gone.
    fs::copy(&home.payload_files()[0], unread.join("db-7-000009.sst")).expect("copied");
    home
}

#[tokio::test]
async fn compact_keeps_what_may_be_read_tomorrow_and_says_what_it_gives_up_for_room() {
    let home = with_an_unread_file().await;
    let dry = home.run("compact", &[]);
    assert_eq!(dry.exit, Exit::Problems);
    dry.contains("unread      1 file of ");
    dry.contains("that could not be read: kept, with 2 records out of reach without");
    let done = home.run("compact", &["--yes", "--json"]).json();
    assert_eq!(done["unread_files"], 1);
    assert_eq!(done["unread_given_up"], false);
    assert_eq!(
        (&done["unreachable_kept"], &done["unreachable"]),
        (&2.into(), &0.into())
    );
    assert_eq!(home.disk().usage().unread_files, 1);
    assert_eq!(home.records().len(), 9);

    // The other records stay where the file's bytes are enough.
    let dry = home.run("compact", &["--free", "100 KiB"]);
    dry.contains("that could not be read: would be given up");
    assert_eq!(home.disk().usage().unread_files, 1);
    let done = home
        .run("compact", &["--free", "4 KiB", "--yes", "--json"])
        .json();
    assert_eq!(done["unread_given_up"], true);
    assert_eq!(
        (&done["unreachable_kept"], &done["unreachable"]),
        (&0.into(), &2.into())
    );
    assert_eq!(done["evicted"], 0, "{done}");
    assert_eq!(home.disk().usage().unread_files, 0);
    assert_eq!(home.records().len(), 7);
}

#[tokio::test]
async fn stats_shows_what_the_process_kept() {
    let home = Home::new().await;
    let ran = home.run("stats", &[]);
    assert_eq!(ran.exit, Exit::Fine);
    snapshot("stats", &ran.out);
    let json = home.run("stats", &["--json"]).json();
    assert_eq!(json["process"]["index"]["disk_blocks"], 10);
}

#[tokio::test]
async fn warm_lists_the_last_used_prefixes_up_to_the_bytes() {
    let home = Home::new().await;
    let before = home.bytes();
    let ran = home.run("warm", &["--bytes", "56 KiB"]);
    assert_eq!((ran.exit, ran.err.as_str()), (Exit::Fine, ""));
    snapshot("warm", &ran.out);
    let json = home.run("warm", &["--bytes", "1 GiB", "--json"]).json();
    assert_eq!(
        (&json["blocks"], &json["is_cut"]),
        (&10.into(), &false.into())
    );
    let last = keys(&namespace(), &first())[5].to_hex();
    assert_eq!(json["prefixes"][1]["key"], last);
    assert!(before == home.bytes(), "looking changed the store");
}

#[tokio::test]
async fn a_store_that_does_not_open_is_shown_from_its_payload_files_and_left_as_it_is() {
    let home = Home::new().await;
    let files = home.payload_files();
    let cut = fs::metadata(&files[0]).expect("there").len() - 100;
    let file = fs::File::options()
        .write(true)
        .open(&files[0])
        .expect("there");
    file.set_len(cut).expect("cut short");
    let before = home.bytes();
    let shown = home.run("inspect", &["--json"]);
    assert_eq!(shown.exit, Exit::Problems);
    let json = shown.json();
    assert_eq!(json["access"]["how"], "salvaged");
    assert_eq!(json["records"], 10);
    assert_eq!(home.run("verify", &["--json"]).json()["sound"], 10);
    let whole = home
        .run("why", &["--tokens", &ids(&first()), "--json"])
        .json();
    assert_eq!(whole["matched_blocks"], 6);
    // Payload files say nothing of last uses.
    let unknown = home.run("inspect", &[]);
    unknown.contains("unknown          10  80.0 KiB  ####");
    unknown.contains("before that       0       0 B\n");
    let warm = home.run("warm", &["--bytes", "1 GiB"]);
    warm.contains("   unknown  (not described)");
    assert!(!warm.out.contains(" ago"), "{}", warm.out);
    let dry = home.run("compact", &[]);
    dry.contains("would       rebuild the store from its payload files first");
    assert!(before == home.bytes(), "looking changed the store");

    // Compacting rebuilds it: the file that was cut short is lost, the others come back.
    let done = home.run("compact", &["--yes", "--json"]).json();
    assert_eq!(done["access"]["how"], "rebuilt");
    assert_eq!(home.run("verify", &[]).exit, Exit::Fine);
    assert!(!home.records().is_empty());
}

#[tokio::test]
async fn what_is_no_store_of_ours_cannot_be_opened() {
    let home = Home::new().await;
    let manifest = home.path().join("stemkv.json");
    let text = fs::read_to_string(&manifest).expect("there");
    fs::write(
        &manifest,
        text.replace("\"format_version\": 0", "\"format_version\": 7"),
    )
    .expect("ours");
    let before = home.bytes();
    let commands = ["inspect", "verify", "stats", "compact"].map(|command| (command, &[][..]));
    for (command, options) in commands.into_iter().chain([("compact", &["--yes"][..])]) {
        let ran = home.run(command, options);
        assert_eq!((ran.exit, ran.out.as_str()), (Exit::CannotOpen, ""));
        assert!(
            ran.err.contains("store_version=7, our_version=0"),
            "{}",
            ran.err
        );
    }
    assert!(before == home.bytes());
    let nowhere = ["stemkv", "inspect", "/no/such/folder"].map(Into::into);
    let mut err = Vec::new();
    assert_eq!(run(nowhere, &mut io::sink(), &mut err), Exit::CannotOpen);
}

/// One digit of the manifest is another: it is as readable as before, and no record is of that geometry.
#[tokio::test]
async fn compact_refuses_a_manifest_that_the_records_contradict() {
    let home = Home::new().await;
    let manifest = home.path().join("stemkv.json");
    let right = fs::read_to_string(&manifest).expect("there");
    let wrong = right.replace("\"layers\": 3", "\"layers\": 4");
    assert_ne!(right, wrong);
    fs::write(&manifest, wrong).expect("ours");
    let before = home.bytes();
    let ran = home.run("compact", &["--yes"]);
    assert_eq!((ran.exit, ran.out.as_str()), (Exit::CannotOpen, ""));
    assert!(
        ran.err.contains("layers: 0..4 here, 0..3 there"),
        "{}",
        ran.err
    );
    let dry = home.run("compact", &["--json"]).json();
    assert_eq!(
        (&dry["corrupt"], &dry["unreachable"]),
        (&serde_json::json!([]), &0.into())
    );
    assert!(before == home.bytes());
    fs::write(&manifest, right).expect("ours");
    assert_eq!(home.records().len(), 10);
    assert_eq!(home.run("verify", &[]).exit, Exit::Fine);
}

#[tokio::test]
async fn compact_keeps_a_sound_record_that_is_not_what_the_store_says() {
    let home = Home::new().await;
    let blocks = keys(&namespace(), &first());
    // Its file has room to give back.
    home.remove(&blocks[5]);
    let changes: [fn(&mut RecordHeader); 2] = [
        |header| header.geometry ^= 1,
        |header| header.namespace = header.key,
    ];
    for change in changes {
        let right = home.change_header(&blocks[3], change);
        let verified = home.run("verify", &["--json"]).json();
        assert_eq!(verified["corrupt"], serde_json::json!([]));
        assert_eq!(verified["unreadable"][0]["key"], blocks[3].to_hex());
        let ran = home.run("compact", &["--yes", "--json"]);
        assert_eq!(ran.exit, Exit::Problems);
        let done = ran.json();
        assert_eq!(
            (&done["corrupt"], &done["unreachable"]),
            (&serde_json::json!([]), &0.into())
        );
        assert_eq!(done["unreadable"][0]["key"], blocks[3].to_hex());
        right.put_back();
        assert_eq!(home.run("verify", &["--json"]).json()["sound"], 9);
    }
    // And then its file is cleaned.
    assert_eq!(home.run("compact", &["--yes"]).exit, Exit::Fine);
    assert_eq!(home.run("verify", &["--json"]).json()["sound"], 9);
}

/// The records name their geometry by a fingerprint alone: who opens the store must bring it.
#[tokio::test]
async fn a_store_whose_manifest_is_cut_short_is_sent_to_its_engine() {
    let home = Home::new().await;
    let manifest = home.path().join("stemkv.json");
    let text = fs::read_to_string(&manifest).expect("there");
    fs::write(&manifest, &text[..text.len() / 2]).expect("ours");
    let before = home.bytes();
    for options in [&[][..], &["--yes"]] {
        let ran = home.run("compact", options);
        assert_eq!((ran.exit, ran.out.as_str()), (Exit::CannotOpen, ""));
        assert!(ran.err.contains("open it with the engine"), "{}", ran.err);
    }
    assert!(before == home.bytes());
    // Which makes it again.
    assert_eq!(home.records().len(), 10);
    assert_eq!(home.run("compact", &["--yes"]).exit, Exit::Fine);
}

/// A pipe whose reader is gone.
struct Closed;

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_description_that_no_version_wrote_is_shown() {
    let home = Home::new().await;
    let mut description = namespace().describe();
    description.salt_fingerprint = Some("aéééééé·é".into());
    let text = serde_json::to_vec(&description).expect("JSON");
    let disk = home.disk();
    disk.put_meta(&namespace().root(), &text).expect("it works");
    disk.close().expect("it works");
    drop(disk);
    home.run("inspect", &[]).contains("salt aéééééé·");
}

#[tokio::test]
async fn what_another_version_wrote_beside_the_records_is_counted_and_not_taken_for_missing() {
    let home = Home::new().await;
    let disk = home.disk();
    for (key, value) in [
        (namespace().root(), &b"{\"model\": 7}"[..]),
        (Stats::META_KEY, b"{}"),
    ] {
        disk.put_meta(&key, value).expect("writable");
    }
    disk.close().expect("it works");
    drop(disk);
    let inspected = home.run("inspect", &[]);
    assert_eq!(inspected.exit, Exit::Fine);
    inspected.contains("left out    2 values (descriptions, statistics) of another version");
    inspected.contains("(not described)");
    let json = home.run("inspect", &["--json"]).json();
    assert_eq!(json["unreadable_values"], 2);
    let stats = home.run("stats", &[]);
    stats.contains("kept its statistics in another version's form");
}

#[tokio::test]
async fn a_closed_pipe_is_no_error() {
    let home = Home::new().await;
    for options in [&[][..], &["--json"]] {
        let path = home.path().to_str().expect("letters");
        let arguments = ["stemkv", "inspect", path].into_iter();
        let arguments = arguments.chain(options.iter().copied()).map(Into::into);
        let mut err = Vec::new();
        assert_eq!(run(arguments, &mut Closed, &mut err), Exit::Fine);
        assert_eq!(err, b"");
    }
}

#[test]
fn every_command_has_an_example_and_the_exit_codes_are_told() {
    let ask = |arguments: &[&str]| {
        let mut out = Vec::new();
        let arguments = std::iter::once(&"stemkv").chain(arguments).map(Into::into);
        let exit = run(arguments, &mut out, &mut io::sink());
        (exit, String::from_utf8(out).expect("text"))
    };
    let (exit, help) = ask(&["--help"]);
    assert_eq!(exit, Exit::Fine);
    assert!(help.contains("3  the store cannot be opened"), "{help}");
    for command in ["inspect", "why", "verify", "compact", "stats", "warm"] {
        let (exit, help) = ask(&[command, "--help"]);
        assert_eq!(exit, Exit::Fine);
        assert!(help.contains(&format!("\n  stemkv {command} /")), "{help}");
    }
    assert_eq!(ask(&["inspect"]).0, Exit::Usage);
    assert_eq!(ask(&["why", "/x"]).0, Exit::Usage);
    assert_eq!(ask(&["why", "/x", "--tokens", "a"]).0, Exit::Usage);
}
